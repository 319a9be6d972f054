"""`clip_head`: a linear head, or one hidden layer, on the features of a frozen CLIP model.

The features of image and prompt (`base.features`) are computed once and stay in memory. With `members`, several heads
are trained on bootstraps of the prompts; their mean is the score, and their standard deviation its spread.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le
from jaxtyping import Float
from torch import Tensor, nn

from reward_models.limits import LAYERS
from reward_models.pairs import Pair
from reward_models.training import base as bases, data
from reward_models.training.base import Encoded
from reward_models.training.curves import Point, accuracy, best, stopped
from reward_models.training.data import Progress, Split
from reward_models.training.folder import Model, Workplace
from reward_models.training.losses import LOSSES, weighted_mean
from reward_models.weights import fingerprint

OVERALL = "score"


@dataclass(frozen=True)
class ClipHead:
    """`base`: "" for the embedded CLIP, a folder in open_clip's layout, or a model of open_clip, then with the tag
    `pretrained`. `hidden`: units of the hidden layer, 0 for a linear head. `margin`: times the gap of a pair, the
    margin in its loss. `typed`: a component for each aspect of the pairs beside `score`, which is trained by pairs
    without an aspect, or by all where each has one. `members`: heads. `optimizer`: both take all pairs at once; an
    epoch is `steps` steps. `learning_rate` is that of adamw. `patience`: epochs without a lower held-out loss before it
    stops. `batch`: images that are encoded at once."""

    base: str = ""
    pretrained: str = ""
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

    type = "clip_head"

    def __call__(self, parts: Split, work: Workplace, device: str, seed: int, progress: Progress) -> Model:
        """The heads trained on `parts.train` and stopped by `parts.stop`."""
        base = bases.opened(self.base, self.pretrained, device, self.batch)
        encoded = bases.encode(base, [*parts.train, *parts.stop], progress)
        count = len(parts.train)
        train, stop = (_rows(encoded, slice(None, count)), _rows(encoded, slice(count, None)))
        aspects = [*dict.fromkeys(p.aspect for p in parts.train if p.aspect)] if self.typed else []
        if OVERALL in aspects or "spread" in aspects or "sigma" in aspects:
            raise ValueError("an aspect of the pairs is called score, spread or sigma, as another component is")
        weights, points = {}, []
        prompts = data.cluster(parts.train)
        for member in range(self.members):
            times = data.bootstrap(prompts, seed, member) if self.members > 1 else torch.ones(count)
            trained = Training(
                self,
                _examples(train, parts.train, aspects, times, self.margin),
                _examples(stop, parts.stop, aspects, torch.ones(len(parts.stop)), self.margin),
                1 + len(aspects),
                torch.Generator().manual_seed(seed * 1_000_003 + member),
            )
            points += trained.run(member, progress)
            weights |= {f"{member}.{name}": value for name, value in trained.weights().items()}
        return Model(
            weights,
            {
                "base": {"model": self.base, "pretrained": self.pretrained, "checkpoint": base.card.checkpoint},
                "licence": base.card.licence,
                "components": [OVERALL, *aspects],
                "members": self.members,
                "hidden": self.hidden,
                "weights": fingerprint(weights),
                "loss": self.loss,
            },
            points,
        )


@dataclass(frozen=True)
class Examples:
    """Features of both sides of `N` pairs, and for each of the K components the weight of each pair, 0 for none."""

    a: Float[Tensor, "N F"]
    b: Float[Tensor, "N F"]
    preference: Float[Tensor, "N"]
    margin: Float[Tensor, "N"]
    weights: Float[Tensor, "K N"]


def _rows(encoded: Encoded, rows: slice) -> Encoded:
    return replace(encoded, a=encoded.a[rows], b=encoded.b[rows], text=encoded.text[rows])


def _examples(
    encoded: Encoded, pairs: Sequence[Pair], aspects: Sequence[str], times: Float[Tensor, "N"], margin: float
) -> Examples:
    device = encoded.images.device
    weights = torch.stack(
        [times * data.overall(pairs), *(times * torch.tensor([p.aspect == name for p in pairs]) for name in aspects)]
    )
    return Examples(
        encoded.side(encoded.a),
        encoded.side(encoded.b),
        data.preferences(pairs).to(device),
        data.margins(pairs, margin).to(device),
        weights.to(device),
    )


def chain(features: int, hidden: int, outputs: int) -> nn.Sequential:
    """The head, with weights of 0 in the last layer."""
    layers = [nn.Linear(features, hidden), nn.Tanh()] if hidden else []
    layers.append(nn.Linear(hidden or features, outputs))
    nn.init.zeros_(layers[-1].weight)
    nn.init.zeros_(layers[-1].bias)
    return nn.Sequential(*layers)


class Training:
    """The training of one head, on standardised features."""

    def __init__(self, method: ClipHead, train: Examples, stop: Examples, components: int, generator: torch.Generator):
        self.method, self.loss, self.components = method, LOSSES[method.loss], components
        both = torch.cat([train.a, train.b])
        self.mean, spread = both.mean(0), both.std(0, correction=0)
        self.spread = torch.where(spread > 1e-6, spread, torch.ones_like(spread))
        self.train, self.stop = (self.standardised(examples) for examples in (train, stop))
        self.head = chain(both.shape[1], method.hidden, components * self.loss.outputs)
        if method.hidden:
            nn.init.normal_(self.head[0].weight, std=both.shape[1] ** -0.5, generator=generator)
            nn.init.normal_(self.head[2].weight, std=0.01, generator=generator)  # from 0, tanh would not move
            nn.init.zeros_(self.head[0].bias)
        self.head.to(both.device)
        self.log_width = nn.Parameter(torch.zeros(components, device=both.device))
        self.parameters = [*self.head.parameters(), self.log_width]

    def standardised(self, examples: Examples) -> Examples:
        a, b = ((side - self.mean) / self.spread for side in (examples.a, examples.b))
        return replace(examples, a=a, b=b)

    def outputs(self, features: Float[Tensor, "N F"]) -> Float[Tensor, "N K O"]:
        return self.head(features).unflatten(1, (self.components, self.loss.outputs))

    def losses(self, examples: Examples) -> Float[Tensor, ""]:
        """The sum of the components' mean losses."""
        a, b = self.outputs(examples.a), self.outputs(examples.b)
        total = examples.a.new_zeros(())
        for k, weights in enumerate(examples.weights):
            losses = self.loss(a[:, k], b[:, k], examples.preference, examples.margin, self.log_width[k])
            total = total + weighted_mean(losses, weights)
        return total

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
