"""Which prompts an iteration draws.

A draw is called as `draw(ids, size, iteration, seed, rates) -> rows`, a function of its arguments alone, so that a
resumed run draws the same. `rates` holds the running mean of each prompt that was drawn before, by id; it stays empty
unless `learn` changes it. Add one: a frozen dataclass that derives from `Draw`, and its name in `DRAWS`.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import numpy as np
from annotated_types import Ge, Gt, Le, Lt, MinLen

from mmalign.errors import BadInput
from mmalign.seeds import seed_of
from reward_models import Prompt

Rates = Mapping[int, float]  # of prompts by id, in [0, 1]


class Draw:
    """Defaults. `learns`: whether it depends on the rewards of iterations before, which a checkpoint then holds.
    `weigh`: whether the advantages of a prompt are weighed by what it has learnt."""

    learns: ClassVar[bool] = False
    weigh: bool = False

    def order(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """The rows of the prompts by stage, in one stage. BadInput where they do not suit the draw."""
        return [[*range(len(prompts))]]

    def stage(self, iteration: int) -> tuple[int, int]:
        """The stage that an iteration belongs to, and the iterations before it."""
        return 0, 0

    def __call__(self, ids: Sequence[int], size: int, iteration: int, seed: int, rates: Rates) -> list[int]:
        """The rows of `size` different prompts of those with these `ids`; `size` is at most their number."""
        raise NotImplementedError

    def weight(self, id_: int, rates: Rates) -> float:
        """What the advantages of a prompt's images are multiplied by."""
        return 1.0

    def learn(self, rates: MutableMapping[int, float], reward: Mapping[int, float]) -> None:
        """Move the rates by the mean reward of each prompt of an iteration."""


@dataclass(frozen=True)
class Epochs(Draw):
    """Epochs of all prompts, each shuffled by its own seed and divided into batches. The remainder of an epoch is
    dropped, a different one each time."""

    type = "epochs"

    def __call__(self, ids: Sequence[int], size: int, iteration: int, seed: int, rates: Rates) -> list[int]:
        epoch, slot = divmod(iteration, len(ids) // size)
        order = np.random.default_rng(seed_of(seed, "prompts", epoch)).permutation(len(ids))
        return order[slot * size : (slot + 1) * size].tolist()


@dataclass(frozen=True)
class PassRate(Draw):
    """Prompts that are sometimes right more often than those that are always or never: with weight `p (1 - p) +
    floor`, without replacement.

    `p` is the running mean of the reward of a prompt's group, on a scale where `low` is 0 and `high` is 1: each
    iteration that draws the prompt moves it to `memory` x the mean before + (1 - memory) x the group's. It begins as
    1/2, where the weight is largest, so that new prompts are drawn often.

    `weigh`: the advantages of a prompt's images count `1 - p` times, by the mean before the iteration; those of a new
    prompt once (RewardMap's rewards by difficulty).
    """

    low: float = 0.0
    high: float = 1.0
    floor: Annotated[float, Gt(0), Le(1)] = 0.05
    memory: Annotated[float, Ge(0), Lt(1)] = 0.5
    weigh: bool = field(default=False, metadata={"later": True})
    type, learns = "pass_rate", True

    def __post_init__(self):
        if not self.low < self.high:
            raise ValueError(f"low: {self.low:g} must be below high: {self.high:g}")

    def __call__(self, ids: Sequence[int], size: int, iteration: int, seed: int, rates: Rates) -> list[int]:
        """By the Gumbel top-k trick (arXiv 1903.06059): the largest `log weight + Gumbel noise` are a draw without
        replacement, the first with probabilities proportional to the weights, and so on among those that remain."""
        p = np.array([rates.get(id_, 0.5) for id_ in ids])
        noise = np.random.default_rng(seed_of(seed, "draw", iteration)).gumbel(size=len(ids))
        return np.argsort(-(np.log(p * (1 - p) + self.floor) + noise), kind="stable")[:size].tolist()

    def weight(self, id_: int, rates: Rates) -> float:
        return 1 - rates[id_] if self.weigh and id_ in rates else 1.0

    def learn(self, rates: MutableMapping[int, float], reward: Mapping[int, float]) -> None:
        for id_, mean in reward.items():
            passed = min(1.0, max(0.0, (mean - self.low) / (self.high - self.low)))
            rates[id_] = self.memory * rates.get(id_, 0.5) + (1 - self.memory) * passed


@dataclass(frozen=True)
class Stages(Draw):
    """Prompts by difficulty: `every` iterations on those of the first of `tags`, as many on those of the first two, and
    so on; from then on on all. Within a stage they are drawn in epochs. A tag is the field `by` of a prompt's row,
    `tag` in GenEval's metadata; a prompt with another tag, or none, is refused."""

    tags: Annotated[tuple[str, ...], MinLen(1)] = ()
    every: Annotated[int, Ge(1)] = 25
    by: str = "tag"
    type = "stages"

    def __post_init__(self):
        if len({*self.tags}) < max(1, len(self.tags)):
            raise ValueError(
                f"tags: the tags of the prompts are needed, the easiest first, each once; got {[*self.tags]}"
            )

    def order(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        stages = [[] for _ in self.tags]
        for row, prompt in enumerate(prompts):
            tag = prompt.wants.get(self.by)
            if tag not in self.tags:
                raise BadInput(f"draw: stages: prompt {prompt.id} has {self.by} {tag!r}, which is not among the tags")
            stages[self.tags.index(tag)].append(row)
        return stages

    def stage(self, iteration: int) -> tuple[int, int]:
        stage = min(iteration // self.every, len(self.tags) - 1)
        return stage, stage * self.every

    def __call__(self, ids: Sequence[int], size: int, iteration: int, seed: int, rates: Rates) -> list[int]:
        return Epochs()(ids, size, iteration, seed, rates)


DRAWS = (Epochs, PassRate, Stages)
