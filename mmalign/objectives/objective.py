"""What an objective is: it turns a judged rollout into rows to train on and the loss of a row.

`Objective` lists what an objective may say of itself. `OnImages` is the base of those that learn from finished images:
they write `examples`, the rows of one prompt's images, and `replay`, the loss of rows under the current policy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Protocol, runtime_checkable

import torch
from annotated_types import Ge, Le
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmalign.learn.update import Replay
from mmalign.policy.protocol import Trainable
from mmalign.seeds import seed_of
from mmalign.types import Judgement, Marks, Plan, Rows, Trajectories

Draws = Annotated[int, Ge(1), Le(10_000)]  # times and noises of an image


@dataclass(frozen=True)
class TrainBatch:
    """Rows, the loss to replay them with, and which of them are worth a forward (None: all)."""

    rows: Rows
    replay: Replay
    needed: Bool[Tensor, "M"] | None = None


@dataclass(frozen=True)
class Finished(Rows):
    """`N` finished images, whoever made them: clean latents, the row of each one's prompt, its reward, and with a
    scorer that has a map the credit per position and the regions behind it."""

    x: Float[Tensor, "N C h w"]
    prompt: Int[Tensor, "N"]
    reward: Float[Tensor, "N"]
    places: Float[Tensor, "N a b"] | None = None
    marks: Marks | None = None


@runtime_checkable
class Run(Protocol):
    """What an objective reads of a run."""

    config: Any
    policy: Trainable
    ranks: Any
    fits: Any


@runtime_checkable
class Rollout(Protocol):
    """What it reads of a rollout on this rank: prompts with an `id`, their conditioning and their trajectories."""

    prompts: Sequence[Any]
    cond: Any
    paths: Trajectories


class Objective:
    """Defaults of what an objective says of itself.

    `uses`: the optional settings of a config that act with it, among credit, loss, advantage, mask, max_kl, region and
    records. `needs`: those of them that it cannot do without. `stochastic`: whether it trains on stochastic steps.
    `siblings`: the fewest images of a prompt. `width`: latents of one row in a forward; `reference`: whether the model
    without adapter is evaluated beside it.
    """

    uses: ClassVar[frozenset[str]] = frozenset()
    needs: ClassVar[frozenset[str]] = frozenset()
    stochastic: ClassVar[bool] = False
    siblings: ClassVar[int] = 1
    width: ClassVar[int] = 1
    reference: bool = False
    fewer: str | None = None  # where it replays fewer rows than `rows` says, for an estimate

    def rows(self, plan: Plan, seeds: int) -> int:
        """How many rows the images or steps of one prompt give, at most."""
        raise NotImplementedError


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

    def batch(
        self, run: Run, rollout: Rollout, judged: Judgement, advantage: Tensor | None, iteration: int
    ) -> TrainBatch:
        return self.of_images(run, rollout.prompts, rollout.cond, finished(rollout.paths, judged), iteration)

    def of_images(self, run: Run, prompts: Sequence[Any], cond: Any, images: Finished, iteration: int) -> TrainBatch:
        def rows(p: int) -> Rows:
            seed = seed_of(run.config.seed, name_of(self), iteration, prompts[p].id)
            generator = torch.Generator().manual_seed(seed)
            return self.examples(run.policy, images[images.prompt == p], generator)

        batch = joined([rows(p) for p in range(len(prompts))])
        return TrainBatch(batch, partial(self.replay, run.policy, cond))


def name_of(method: Any) -> str:
    """The name of a method in a config: its `type`, or its import path."""
    return getattr(method, "type", f"{type(method).__module__}:{type(method).__qualname__}")


def finished(paths: Trajectories, judged: Judgement) -> Finished:
    """The finished images of the trajectories that have a reward."""
    scored = (~judged.reward[:, -1].isnan()).nonzero()[:, 0]
    final, x = paths.tree.final[scored, -1], paths.finals
    columns = {"x": x[final], "prompt": paths.tree.prompt[scored], "reward": judged.reward[scored, -1]}
    if judged.regions is not None:
        marks = judged.marks[final.to(judged.regions.device)]
        columns["places"] = judged.regions[final.to(judged.regions.device)].to(x.device)
        columns["marks"] = Marks(*(column.to(x.device) for column in vars(marks).values()))
    return Finished(**columns)


def joined(parts: Sequence[Rows]) -> Rows:
    """The rows of records of one kind, one under the other."""
    return type(parts[0])(**{name: torch.cat([vars(part)[name] for part in parts]) for name in vars(parts[0])})
