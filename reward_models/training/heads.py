"""Heads on fixed features of images with their prompts, trained on all pairs at once: a linear layer, or one hidden
layer. With `members`, several are trained on bootstraps of the prompts; their mean is the score, and their standard
deviation its spread.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le
from jaxtyping import Float
from torch import Tensor, nn

from reward_models.limits import LAYERS
from reward_models.pairs import Pair
from reward_models.training import data
from reward_models.training.curves import Point, accuracy, best, stopped
from reward_models.training.data import Progress, Split
from reward_models.training.folder import WEIGHTS
from reward_models.training.losses import LOSSES, summed
from reward_models.weights import fingerprint, linear_chain


@dataclass(frozen=True)
class Heads:
    """The settings of all heads. `base`: the model that gives the features. `hidden`: units of the hidden layer, 0 for
    a linear head. `margin`: times the gap of a pair, the margin in its loss. `typed`: a component for each aspect of
    the pairs beside `score`, which is trained by pairs without an aspect, or by all where each has one. `members`:
    heads. `optimizer`: both take all pairs at once; an epoch is `steps` steps. `learning_rate` is that of adamw.
    `patience`: epochs without a lower held-out loss before it stops. `batch`: images that are encoded at once."""

    base: str = ""
    hidden: Annotated[int, Ge(0), Le(2**14)] = 0
    loss: Literal["bradley_terry", "rao_kupper", "davidson", "thurstone"] = "bradley_terry"
    margin: Annotated[float, Ge(0)] = 0.0
    typed: bool = False
    members: Annotated[int, Ge(1), Le(LAYERS)] = 1
    optimizer: Literal["lbfgs", "adamw"] = "lbfgs"
    learning_rate: Annotated[float, Gt(0)] = 1e-2
    weight_decay: Annotated[float, Ge(0)] = 1e-2
    epochs: Annotated[int, Ge(1)] = 100
    steps: Annotated[int, Ge(1)] = 5
    patience: Annotated[int, Ge(1)] = 10
    batch: Annotated[int, Ge(1)] = 64


def trained(
    method: Heads, a: Float[Tensor, "N F"], b: Float[Tensor, "N F"], parts: Split, seed: int, progress: Progress
) -> tuple[dict[str, Tensor], dict[str, Any], list[Point]]:
    """The weights of heads for features, what a folder's config says of them, and the course of the training. `a`,
    `b`: the features of both images of `parts.train` and then of `parts.stop`."""
    names = data.components(parts.train, method.typed)
    prompts, count = data.cluster(parts.train), len(parts.train)
    weights: dict[str, Tensor] = {}
    points: list[Point] = []
    for member in range(method.members):
        times = data.bootstrap(prompts, seed, member) if method.members > 1 else torch.ones(count)
        training = Training(
            method,
            _examples(a[:count], b[:count], parts.train, names, times, method.margin),
            _examples(a[count:], b[count:], parts.stop, names, torch.ones(len(parts.stop)), method.margin),
            len(names),
            torch.Generator().manual_seed(seed * 1_000_003 + member),
        )
        points += training.run(member, progress)
        weights |= {f"{member}.{name}": value for name, value in training.weights().items()}
    config = {
        "components": names,
        "members": method.members,
        "hidden": method.hidden,
        "weights": fingerprint(weights),
        "loss": method.loss,
    }
    return weights, config, points


def _examples(
    a: Float[Tensor, "N F"],
    b: Float[Tensor, "N F"],
    pairs: Sequence[Pair],
    names: Sequence[str],
    times: Float[Tensor, "N"],
    margin: float,
) -> "Examples":
    preference, margins, weights = data.preferences(pairs), data.margins(pairs, margin), data.weights(pairs, names)
    return Examples(a, b, preference.to(a), margins.to(a), (times * weights).to(a))


@torch.no_grad()
def read(weights: Mapping[str, Tensor], config: Mapping[str, Any], features: int, outputs: int) -> nn.ModuleList:
    """One chain of layers for each member, from `features` to `outputs` numbers. ValueError for missing or other
    weights, types or shapes."""
    members, hidden = max(1, config["members"]), config["hidden"]
    shapes: dict[str, tuple[int, ...]] = {}
    for member in range(members):
        shapes |= shapes_of(f"{member}.", features, hidden, outputs)
    check(weights, shapes)
    return nn.ModuleList(chain_of(weights, f"{member}.") for member in range(members))


def shapes_of(prefix: str, features: int, hidden: int, outputs: int) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the weights of one head."""
    widths = [(hidden, features), (outputs, hidden)] if hidden else [(outputs, features)]
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, (high, wide) in enumerate(widths):
        shapes |= {f"{prefix}layers.{layer}.weight": (high, wide), f"{prefix}layers.{layer}.bias": (high,)}
    return shapes


def check(weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError unless the weights are float32, and exactly those of `shapes`."""
    for name, shape in shapes.items():
        if name not in weights or tuple(weights[name].shape) != shape or weights[name].dtype != torch.float32:
            have = f"{list(weights[name].shape)} {weights[name].dtype}" if name in weights else "missing"
            raise ValueError(f"{WEIGHTS}: {name} must be {list(shape)} torch.float32, is {have}")
    if others := sorted(weights.keys() - shapes.keys()):
        raise ValueError(f"{WEIGHTS}: {len(others)} unknown tensors, e.g. {others[0][:40]}")


@dataclass(frozen=True)
class Examples:
    """Features of both sides of `N` pairs, and for each of the K components the weight of each pair, 0 for none."""

    a: Float[Tensor, "N F"]
    b: Float[Tensor, "N F"]
    preference: Float[Tensor, "N"]
    margin: Float[Tensor, "N"]
    weights: Float[Tensor, "K N"]


def chain(features: int, hidden: int, outputs: int, generator: torch.Generator) -> nn.Sequential:
    """A new head: all weights are 0; with a hidden layer, whose tanh would then not move, they are small."""
    layers = [nn.Linear(features, hidden), nn.Tanh()] if hidden else []
    layers.append(nn.Linear(hidden or features, outputs))
    for layer in (layers[0], layers[-1]):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    if hidden:
        nn.init.normal_(layers[0].weight, std=features**-0.5, generator=generator)
        nn.init.normal_(layers[-1].weight, std=0.01, generator=generator)
    return nn.Sequential(*layers)


def named(head: nn.Sequential) -> dict[str, Tensor]:
    """The weights of a head under the names of `shapes_of`, not copied."""
    linear = [layer for layer in head if isinstance(layer, nn.Linear)]
    return {
        f"layers.{number}.{name}": parameter.data
        for number, layer in enumerate(linear)
        for name, parameter in layer.named_parameters()
    }


def chain_of(weights: Mapping[str, Tensor], prefix: str) -> nn.Sequential:
    """The head with the weights that begin with `prefix`."""
    return linear_chain(weights, f"{prefix}layers.", nn.Tanh)


class Training:
    """The training of one head, on standardised features."""

    def __init__(self, method: Heads, train: Examples, stop: Examples, components: int, generator: torch.Generator):
        self.method, self.loss, self.components = method, LOSSES[method.loss], components
        both = torch.cat([train.a, train.b])
        self.mean, spread = both.mean(0), both.std(0, correction=0)
        self.spread = torch.where(spread > 1e-6, spread, torch.ones_like(spread))
        self.train, self.stop = (self.standardised(examples) for examples in (train, stop))
        self.head = chain(both.shape[1], method.hidden, components * self.loss.outputs, generator).to(both.device)
        self.log_width = nn.Parameter(torch.zeros(components, device=both.device))
        self.parameters = [*self.head.parameters(), self.log_width]

    def standardised(self, examples: Examples) -> Examples:
        a, b = ((side - self.mean) / self.spread for side in (examples.a, examples.b))
        return replace(examples, a=a, b=b)

    def outputs(self, features: Float[Tensor, "N F"]) -> Float[Tensor, "N K O"]:
        return self.head(features).unflatten(1, (self.components, self.loss.outputs))

    def losses(self, examples: Examples) -> Float[Tensor, ""]:
        """The sum of the components' mean losses."""
        e = examples
        a, b = self.outputs(e.a), self.outputs(e.b)
        return summed(self.loss, a, b, e.preference, e.margin, e.weights, self.log_width)

    def penalty(self) -> Float[Tensor, ""]:
        matrices = [layer.weight for layer in self.head if isinstance(layer, nn.Linear)]
        return sum((weight.square().sum() for weight in matrices), self.mean.new_zeros(())) / 2

    def run(self, member: int, progress: Progress) -> list[Point]:
        """Train, and keep the weights with the least loss on the pairs to stop by."""
        m, lbfgs = self.method, self.method.optimizer == "lbfgs"
        if lbfgs:
            optimizer = torch.optim.LBFGS(self.parameters, max_iter=m.steps, line_search_fn="strong_wolfe")
        else:
            optimizer = torch.optim.AdamW(self.parameters, lr=m.learning_rate, weight_decay=m.weight_decay)

        def closure() -> Float[Tensor, ""]:
            optimizer.zero_grad()
            loss = self.losses(self.train) + (m.weight_decay * self.penalty() if lbfgs else 0)
            loss.backward()
            return loss

        points: list[Point] = []
        chosen = self.state()
        for epoch in progress(range(1, m.epochs + 1), 0, m.epochs, f"head {member + 1} of {m.members}", "epochs"):
            for _ in range(1 if lbfgs else m.steps):
                optimizer.step(closure)
            points.append(self.point(member, epoch))
            if best(points) is points[-1]:
                chosen = self.state()
            if stopped(points, m.patience):
                break
        for parameter, value in zip(self.parameters, chosen, strict=True):
            parameter.data.copy_(value)
        return points

    def state(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def point(self, member: int, epoch: int) -> Point:
        difference = (self.outputs(self.stop.a) - self.outputs(self.stop.b))[:, 0, 0]
        losses = float(self.losses(self.train)), float(self.losses(self.stop))
        return Point(member, epoch, *losses, accuracy(difference, self.stop.preference))

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """The layers for features that are not standardised, whose mean score over the training pairs is 0."""
        first, last = self.head[0], self.head[-1]
        centre = self.outputs(torch.cat([self.train.a, self.train.b]))[:, :, 0].mean(0)
        last.bias.view(self.components, self.loss.outputs)[:, 0] -= centre
        matrix = first.weight / self.spread
        values = {"layers.0.weight": matrix, "layers.0.bias": first.bias - matrix @ self.mean}
        if self.method.hidden:
            values |= {"layers.1.weight": last.weight, "layers.1.bias": last.bias}
        return {name: value.detach().cpu().contiguous() for name, value in values.items()}
