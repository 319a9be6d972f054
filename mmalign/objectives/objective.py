"""What an objective is: it turns a judged rollout into rows to train on and the loss of a row.

`Objective` lists what an objective may say of itself. `OnImages` is the base of those that learn from finished images:
they write `examples`, the rows of one prompt's images, and `replay`, the loss of rows under the current policy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Protocol, runtime_checkable

import torch
from annotated_types import Ge, Le, Lt
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmalign.latents import Columns
from mmalign.learn.update import Replay
from mmalign.policy.protocol import Trainable
from mmalign.seeds import seed_of
from mmalign.types import Judgement, Marks, Plan, Rows, Trajectories

Draws = Annotated[int, Ge(1), Le(10_000)]  # times and noises of an image


@dataclass(frozen=True)
class TrainBatch:
    """Rows, the loss to replay them with, and which of them are worth a forward (None: all). `at_once`: they are parts
    of one graph, and take one backward pass."""

    rows: Rows
    replay: Replay
    needed: Bool[Tensor, "M"] | None = None
    at_once: bool = False


@dataclass(frozen=True)
class Lag:
    """How the policy that draws the images follows the one in training: after an iteration it keeps `most` of its
    weights, or `rate` for each iteration after the first `flat` while that is less. With `most` 0 it is the one in
    training."""

    most: Annotated[float, Ge(0), Lt(1)] = 0.0
    rate: Annotated[float, Ge(0), Le(1)] = 0.001
    flat: Annotated[int, Ge(0)] = 0

    def at(self, iteration: int) -> float:
        """The share that is kept after an iteration, numbered from 0."""
        return min(self.most, self.rate * max(0, iteration + 1 - self.flat))


AT_ONCE = Lag()


@dataclass(frozen=True)
class Finished(Rows):
    """`N` finished images, whoever made them: clean latents, the row of each one's prompt, its reward, and with a
    scorer that has a map the credit per position and the regions behind it; `advantage` over its siblings, where the
    objective uses one."""

    x: Float[Tensor, "N C h w"]
    prompt: Int[Tensor, "N"]
    reward: Float[Tensor, "N"]
    places: Float[Tensor, "N a b"] | None = None
    marks: Marks | None = None
    advantage: Float[Tensor, "N c d"] | None = None


@runtime_checkable
class Run(Protocol):
    """What an objective reads of a run."""

    config: Any
    policy: Trainable
    ranks: Any
    fits: Any
    rewards: Any


@runtime_checkable
class Rollout(Protocol):
    """What it reads of a rollout on this rank: prompts with an `id`, their conditioning, their trajectories, and the
    forwards that were kept for it, if any."""

    prompts: Sequence[Any]
    cond: Any
    paths: Trajectories
    forwards: Any


class Objective:
    """Defaults of what an objective says of itself.

    `uses`: the optional settings of a config that act with it, among credit, loss, advantage, mask, max_kl, region and
    records. `needs`: those of them that it cannot do without. `stochastic`: whether it trains on stochastic steps.
    `siblings`: the fewest images of a prompt. `lag`: how the policy that draws the images follows. `width`: latents of
    one row in a forward; `reference`: whether the model without adapter is evaluated beside it; `decoded`: images of a
    row that are decoded and scored in a graph. `even`: whether as many prompts give as many forwards, whatever their
    rewards. `guide`: a run, a checkpoint or a LoRA file, whose adapter it needs on the network by the name "guide".
    `summands`: the objectives that it consists of. `reuses`: whether its rows are steps of the rollout, whose
    velocities then may be the rollout's own.
    """

    uses: ClassVar[frozenset[str]] = frozenset()
    needs: ClassVar[frozenset[str]] = frozenset()
    stochastic: ClassVar[bool] = False
    siblings: ClassVar[int] = 1
    even: ClassVar[bool] = False
    reuses: ClassVar[bool] = False
    width: int = 1
    reference: bool = False
    decoded: int = 0
    guide: str | None = None
    lag: Lag = AT_ONCE
    fewer: str | None = None  # where it replays fewer rows than `rows` says, for an estimate

    @property
    def summands(self) -> tuple["Objective", ...]:
        return (self,)

    def rows(self, plan: Plan, seeds: int) -> int:
        """How many rows the images or steps of one prompt give, at most."""
        raise NotImplementedError

    def states(self, plan: Plan, seeds: int) -> int:
        """How many forwards the rows of one prompt share in a replay of them all, at most."""
        return self.rows(plan, seeds)

    def check(self, c: Any) -> None:
        """ValueError, in one line, where other settings of a config do not suit it."""

    def measures(self, c: Any) -> bool:
        """Whether the model without adapter is evaluated beside a replayed row."""
        return self.reference or ("max_kl" in self.uses and c.max_kl is not None)

    def reads(self, plan: Plan) -> Columns:
        """The latents of trajectories that it reads, beside the finished ones: here all."""
        return Columns.all(plan.steps)

    def replayed(self, measured: bool) -> int:
        """Forwards of a row in a replay; `measured`: the model without adapter is evaluated beside it."""
        return self.width * (2 if measured else 1)

    def prepared(self, updates: int) -> int:
        """Forwards of a row that are taken once, before the first of so many optimiser steps."""
        return 0

    def stored(self, updates: int) -> int:
        """Latents that a row holds during so many optimiser steps: here a state, the next one and its mean."""
        return 3


class OnImages(Objective):
    """An objective that learns from finished images. The random numbers of a prompt's rows depend on the prompt."""

    draws: int = 1  # rows of each image
    fewer = "replay_forwards, transitions: fewer where an image has no score"

    def examples(self, policy: Trainable, images: Finished, generator: torch.Generator) -> Rows:
        """Rows from one prompt's images; each has `index`, the prompt's row, and `step`, a number for statistics."""
        raise NotImplementedError

    def replay(self, policy: Trainable, cond: Any, rows: Any) -> tuple[Float[Tensor, "M"], dict[str, Tensor]]:
        """The loss of each row and its statistics, among them `loss`."""
        raise NotImplementedError

    def rows(self, plan: Plan, seeds: int) -> int:
        return seeds * plan.trained * self.draws

    def reads(self, plan: Plan) -> Columns:
        return Columns()

    def stored(self, updates: int) -> int:
        """The images of a row, and one noise for all of them."""
        return self.width + 1

    def batch(
        self, run: Run, rollout: Rollout, judged: Judgement, advantage: Tensor | None, iteration: int
    ) -> TrainBatch:
        return self.of_images(run, rollout.prompts, rollout.cond, finished(rollout.paths, judged, advantage), iteration)

    def of_images(self, run: Run, prompts: Sequence[Any], cond: Any, images: Finished, iteration: int) -> TrainBatch:
        def rows(p: int) -> Rows:
            seed = seed_of(run.config.seed, name_of(self), iteration, prompts[p].id)
            generator = torch.Generator().manual_seed(seed)
            return self.examples(run.policy, images[images.prompt == p], generator)

        return self.batch_of(run, cond, joined([rows(p) for p in range(len(prompts))]))

    def batch_of(self, run: Run, cond: Any, rows: Rows) -> TrainBatch:
        """The batch of these rows, in which velocities that do not change may be computed once."""
        return TrainBatch(rows, partial(self.replay, run.policy, cond))


def name_of(method: Any) -> str:
    """The name of a method in a config: its `type`, or its import path."""
    return getattr(method, "type", f"{type(method).__module__}:{type(method).__qualname__}")


def finished(paths: Trajectories, judged: Judgement, advantage: Float[Tensor, "N T a b"] | None = None) -> Finished:
    """The finished images of the trajectories that have a reward, with the advantage of their last step."""
    scored = (~judged.reward[:, -1].isnan()).nonzero()[:, 0]
    final = paths.tree.final[scored, -1]
    columns = {"x": paths.finals[final], "prompt": paths.tree.prompt[scored], "reward": judged.reward[scored, -1]}
    if advantage is not None:
        columns["advantage"] = advantage[scored, -1]
    if judged.regions is not None:
        columns |= {"places": judged.regions[final], "marks": judged.marks[final]}
    return Finished(**columns).to(paths.finals.device)


def joined(parts: Sequence[Rows]) -> Rows:
    """The rows of records of one kind, one under the other."""
    columns = {name: [vars(part)[name] for part in parts] for name in vars(parts[0])}
    return type(parts[0])(
        **{name: None if values[0] is None else torch.cat(values) for name, values in columns.items()}
    )
