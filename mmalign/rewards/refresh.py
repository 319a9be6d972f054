"""Refresh a fitted reward during a run: its settings, and which prompts it draws.

A fitted reward is right near the images that it was fitted to, and training leaves them (Gao et al., arXiv 2210.10760);
new pairs of the current images bring it back (Ziegler et al., arXiv 1909.08593). Left out: warm starts, so that a refit
depends on its pairs alone; a choice of pairs by doubt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt, Le, Lt

from mmalign.seeds import seed_of
from reward_models import Prompt, limits
from reward_models.meaning import meaning

LEAST = 3  # prompts that a reward model is fitted to: to train on, to stop by, to measure
REFITTED = ("score", "sigma", "spread")  # components that a fit may have without calibration and without aspects


@dataclass(frozen=True)
class Refresh:
    """Every `every` iterations the averaged adapter draws images of `prompts` training prompts from `seeds` seeds each,
    and the judge `by`, scorer.component, scores them. Images of a prompt with unequal scores are pairs. `scorer`, a
    scorer of type `fitted`, is fitted again to the pairs of all refreshes and those of `pairs`, a table or dataset,
    such as the one of its first fit. The share `held_out` of the prompts is never learnt from: the new model replaces
    the old one if it agrees with more of their pairs."""

    by: str
    scorer: str = "fitted"
    every: Annotated[int, Ge(1)] = 50
    prompts: Annotated[int, Ge(1), Le(10_000)] = 32
    seeds: Annotated[int, Ge(2), Le(64)] = 4
    held_out: Annotated[float, Gt(0), Lt(1)] = 0.25
    pairs: str | None = None

    def __post_init__(self):
        learnt, _ = self.counts
        if learnt < LEAST:
            raise ValueError(
                f"prompts: {self.prompts} with held_out: {self.held_out:g} leaves {max(0, learnt)} prompts to learn "
                f"from; at least {LEAST} are needed"
            )
        if self.prompts * self.seeds * (self.seeds - 1) // 2 > limits.PAIRS:
            raise ValueError(f"prompts: {self.prompts} of {self.seeds} seeds give more than {limits.PAIRS} pairs")

    @property
    def counts(self) -> tuple[int, int]:
        """The prompts of a refresh that are learnt from, and those that are held out."""
        apart = max(1, round(self.held_out * self.prompts))
        return self.prompts - apart, apart

    def due(self, done: int, iterations: int) -> bool:
        """Whether the reward is refreshed after `done` of the iterations."""
        return 0 < done < iterations and done % self.every == 0

    def times(self, iterations: int) -> int:
        """How often a run of so many iterations refreshes the reward."""
        return (iterations - 1) // self.every

    def groups(self, prompts: Sequence[Prompt], seed: int) -> tuple[list[Prompt], list[Prompt]]:
        """The training prompts that refreshes may learn from, and those that they hold out, the same during a run of
        this seed. Prompts of one meaning are in one group. ValueError where a group is smaller than a refresh needs."""
        ranked = sorted({meaning(p.text) for p in prompts}, key=lambda text: seed_of(seed, "refresh", text))
        apart = {*ranked[: max(1, round(self.held_out * len(ranked)))]}
        sides = [[p for p in prompts if (meaning(p.text) in apart) is held_out] for held_out in (False, True)]
        for side, count, use in zip(sides, self.counts, ("to learn from", "to hold out"), strict=True):
            if len(side) < count:
                raise ValueError(
                    f"refresh: prompts: {self.prompts} need {count} {use}, and {len(side)} of the {len(prompts)} "
                    "training prompts are; lower it"
                )
        return sides[0], sides[1]

    def drawn(self, prompts: Sequence[Prompt], seed: int, done: int) -> tuple[list[Prompt], list[Prompt]]:
        """The prompts of the refresh after `done` iterations: to learn from, and held out."""
        rng = np.random.default_rng(seed_of(seed, "refresh", done))
        sides = zip(self.groups(prompts, seed), self.counts, strict=True)
        learnt, apart = ([side[i] for i in rng.permutation(len(side))[:count].tolist()] for side, count in sides)
        return learnt, apart
