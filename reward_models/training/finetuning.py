"""Fine-tuning of a model with scores by preference pairs, in steps of a few pairs. After each epoch a checkpoint is
written, from which an interrupted training continues to the bit. Several members are trained one after another.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol, runtime_checkable

import torch
from annotated_types import Ge, Gt, Le, Lt
from jaxtyping import Float
from torch import Tensor, nn

from reward_models.limits import LAYERS
from reward_models.pairs import Pair
from reward_models.pictures import Stored
from reward_models.training import checkpoint, data
from reward_models.training.curves import Point, accuracy, best, stopped
from reward_models.training.data import Progress, Split
from reward_models.training.folder import Workplace
from reward_models.training.losses import LOSSES, summed

KEYS = 2**63  # seeds of a generator
MODEL, AVERAGE, CHOSEN, LOSS = "model", "average", "chosen", "loss"  # parts of a checkpoint
WIDTH = "log_width"  # of ties


@dataclass(frozen=True)
class Tuning:
    """The settings of all fine-tuning. `base`: the model that it begins with. `margin`: times the gap of a pair, the
    margin in its loss. `typed`: a component for each aspect of the pairs beside `score`, which is trained by pairs
    without an aspect, or by all where each has one. `members`: models, whose mean is the score; with `bootstrap` each
    is trained on a bootstrap of the prompts, else they differ by the order of the pairs, and what else is random.
    `average`: the share that the moving average of the weights keeps in a step; the average is what is kept; 0 for the
    weights themselves. `batch`: pairs in a step. `patience`: epochs without a lower held-out loss before it stops."""

    base: str = ""
    loss: Literal["bradley_terry", "rao_kupper", "davidson", "thurstone"] = "bradley_terry"
    margin: Annotated[float, Ge(0)] = 0.0
    typed: bool = False
    members: Annotated[int, Ge(1), Le(LAYERS)] = 1
    bootstrap: bool = False
    average: Annotated[float, Ge(0), Lt(1)] = 0.0
    learning_rate: Annotated[float, Gt(0)] = 1e-4
    weight_decay: Annotated[float, Ge(0)] = 0.01
    epochs: Annotated[int, Ge(1)] = 10
    batch: Annotated[int, Ge(1)] = 32
    patience: Annotated[int, Ge(1)] = 2


@runtime_checkable
class Network(Protocol):
    """A model that is trained. `parameters` are trained; `begin` sets the state before a member is trained on `pairs`;
    `tensors` are all that training changes, by name and not copied; `outputs` are the numbers of the loss for each
    picture with its text and each of K components; `bound` keeps parameters in their range after a step."""

    device: str
    parameters: list[nn.Parameter]

    def begin(self, pairs: Sequence[Pair], seed: int) -> None: ...

    def tensors(self) -> dict[str, Tensor]: ...

    def outputs(self, pictures: Sequence[Stored], texts: Sequence[str]) -> Float[Tensor, "M K O"]: ...

    def bound(self) -> None: ...


@dataclass(frozen=True)
class Weighed:
    """N pairs, and their weights for each of K components."""

    pairs: Sequence[Pair]
    weights: Float[Tensor, "K N"]

    def rows(self, rows: Sequence[int]) -> "Weighed":
        return Weighed([self.pairs[i] for i in rows], self.weights[:, rows])

    def in_order(self, size: int) -> Iterator["Weighed"]:
        """At most `size` of the pairs at a time."""
        numbers = range(len(self.pairs))
        return (self.rows(numbers[start : start + size]) for start in range(0, len(numbers), size))

    def shuffled(self, size: int, key: int) -> Iterator["Weighed"]:
        generator = torch.Generator().manual_seed(key)
        return self.rows(torch.randperm(len(self.pairs), generator=generator).tolist()).in_order(size)

    def repeated(self, times: Float[Tensor, "N"]) -> "Weighed":
        return self.rows([i for i, count in enumerate(times.int().tolist()) for _ in range(count)])


class Training:
    """The network, its optimiser, and of the member in training the weights with the least loss on the pairs to stop
    by. `names`: the components."""

    def __init__(self, method: Tuning, network: Network, names: Sequence[str], work: Workplace):
        self.method, self.network, self.names, self.work = method, network, names, work
        self.loss = LOSSES[method.loss]
        self.log_width = nn.Parameter(torch.zeros(len(names), device=network.device))
        self.parameters = [*network.parameters, self.log_width]
        self.chosen: dict[str, Tensor] = {}
        self.average: dict[str, Tensor] = {}

    def run(
        self, parts: Split, seed: int, progress: Progress, finished: Callable[[int, dict[str, Tensor]], None]
    ) -> list[Point]:
        """Train each member from the last checkpoint, if there is one. `finished` gets its number and weights, after an
        interruption perhaps again."""
        m = self.method
        train, stop = (_weighed(some, self.names) for some in (parts.train, parts.stop))
        prompts = data.cluster(train.pairs)
        points = self.resume()
        for member in range(points[-1].member if points else 0, m.members):
            of_member = [point for point in points if point.member == member]
            pairs = train.repeated(data.bootstrap(prompts, seed, member)) if m.bootstrap else train
            key = (seed * 1_000_003 + member) % KEYS
            if not of_member:
                self.begin(pairs.pairs, key)
            while len(of_member) < m.epochs and not stopped(of_member, m.patience):
                point = self.epoch(member, len(of_member) + 1, pairs, stop, key, progress)
                of_member.append(point)
                points.append(point)
                if best(of_member) is point:
                    self.chosen = {name: value.cpu().clone() for name, value in (self.average or self.state()).items()}
                self.save(points)
            finished(member, self.chosen)
        return points

    def begin(self, pairs: Sequence[Pair], key: int) -> None:
        """The state before a member's first step."""
        self.network.begin(pairs, key)
        self.log_width.data.zero_()
        self.optimizer = self.new_optimizer()
        self.average = self.state() if self.method.average else {}

    def new_optimizer(self) -> torch.optim.AdamW:
        decay = {True: [p for p in self.parameters if p.ndim > 1], False: [p for p in self.parameters if p.ndim <= 1]}
        groups = [
            {"params": some, "weight_decay": self.method.weight_decay * matrices} for matrices, some in decay.items()
        ]
        return torch.optim.AdamW([group for group in groups if group["params"]], lr=self.method.learning_rate)

    def epoch(self, member: int, number: int, pairs: Weighed, stop: Weighed, key: int, progress: Progress) -> Point:
        """One pass over the pairs, and its point."""
        m = self.method
        of = f" of member {member + 1} of {m.members}" if m.members > 1 else ""
        name = f"epoch {number} of at most {m.epochs}{of}"
        batches, steps = pairs.shuffled(m.batch, (key * 1_000_003 + number) % KEYS), -(-len(pairs.pairs) // m.batch)
        losses = [self.step(some) for some in progress(batches, 0, steps, name, "steps")]
        now = self.state()
        self.set(self.average or now)
        point = Point(member, number, sum(losses) / len(losses), *self.measured(stop))
        self.set(now)
        return point

    def state(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.network.tensors().items()}

    @torch.no_grad()
    def set(self, state: Mapping[str, Tensor]) -> None:
        for name, value in self.network.tensors().items():
            value.copy_(state[name])

    def outputs(self, pairs: Sequence[Pair]) -> tuple[Float[Tensor, "N K O"], Float[Tensor, "N K O"]]:
        """The numbers for the images a and b of each pair."""
        pictures = [picture for pair in pairs for picture in (pair.a, pair.b)]
        texts = [pair.prompt.text for pair in pairs for _ in range(2)]
        both = self.network.outputs(pictures, texts).unflatten(0, (-1, 2))
        return both[:, 0], both[:, 1]

    def total(self, some: Weighed, a: Float[Tensor, "N K O"], b: Float[Tensor, "N K O"]) -> Float[Tensor, ""]:
        """The sum of the components' mean losses."""
        preference, margin = data.preferences(some.pairs), data.margins(some.pairs, self.method.margin)
        return summed(self.loss, a, b, preference.to(a), margin.to(a), some.weights.to(a), self.log_width)

    def step(self, some: Weighed) -> float:
        self.optimizer.zero_grad()
        loss = self.total(some, *self.outputs(some.pairs))
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            self.network.bound()
            now = self.network.tensors() if self.average else {}
            for name, value in self.average.items():
                if value.is_floating_point():
                    value.lerp_(now[name], 1 - self.method.average)
        return loss.item()

    @torch.no_grad()
    def measured(self, held_out: Weighed) -> tuple[float, float | None]:
        """The loss, and the accuracy of the overall score."""
        parts = [self.outputs(some.pairs) for some in held_out.in_order(self.method.batch)]
        a, b = (torch.cat(side) for side in zip(*parts, strict=True))
        overall = held_out.weights[0] > 0
        preference = data.preferences(held_out.pairs)[overall]
        return self.total(held_out, a, b).item(), accuracy((a - b)[:, 0, 0].cpu()[overall], preference)

    def save(self, points: list[Point]) -> None:
        """Replace the checkpoint: weights, their average, the selected weights, moments, and the course so far."""
        parts = {MODEL: self.state(), AVERAGE: self.average, CHOSEN: self.chosen, LOSS: {WIDTH: self.log_width}}
        checkpoint.save(self.work, points, parts, self.optimizer)

    def resume(self) -> list[Point]:
        """The course of an interrupted training, whose state is restored. ValueError if it was of other data or
        settings."""
        state = checkpoint.resume(self.work)
        if state is None:
            return []
        self.set(state.part(MODEL))
        self.chosen = state.part(CHOSEN)
        self.average = {name: value.to(self.network.device) for name, value in state.part(AVERAGE).items()}
        self.log_width.data.copy_(state.part(LOSS)[WIDTH])
        self.optimizer = self.new_optimizer()
        state.restore(self.optimizer)
        return state.points


def _weighed(pairs: Sequence[Pair], names: Sequence[str]) -> Weighed:
    """The pairs that train a component."""
    weights = data.weights(pairs, names)
    return Weighed(pairs, weights).rows(weights.any(0).nonzero().flatten().tolist())
