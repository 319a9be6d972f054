"""A sum of credits, with weights that may move over the run (MatchTIR's two levels, Atom-Searcher's schedule).

Each part has its own groups, is normalised and clipped there, and is then weighted and added.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.credit.groups import GRPO, Credit, Units
from mmalign.credit.more.density import of_ends, of_states
from mmalign.types import Judgement, Plan, Tree
from reward_models.combine import Ramp


@dataclass(frozen=True)
class Mix(Credit):
    """`weights`: one for each of the `parts`, a number or a ramp over the run, which `at` turns into a number. Where
    some rewards are those of finished images alone, parts that read states measure the others, and parts that do not
    measure these. A part of weight 0 is left out and costs nothing."""

    parts: tuple[Any, ...]
    weights: tuple[float | Ramp, ...]
    type = "mix"

    def __post_init__(self):
        if not self.parts or len(self.parts) != len(self.weights):
            raise ValueError(f"a sum needs credits and a weight for each, got {len(self.parts)}, {len(self.weights)}")
        for what, of_part in (
            ("a value head", [part.observer for part in self.acting]),
            ("an adapter that learns rewards", [part.learner for part in self.acting]),
        ):
            if sum(each is not None for each in of_part) > 1:
                raise ValueError(f"two credits of the sum need {what} each, and a run has one; remove one of the two")

    @property
    def weighted(self) -> list[tuple[Any, float | Ramp]]:
        """The parts with their weights."""
        return [*zip(self.parts, self.weights, strict=True)]

    @property
    def acting(self) -> list[Any]:
        """The parts whose weight is not 0 throughout."""
        return [part for part, weight in self.weighted if weight != 0]

    @property
    def observer(self) -> Credit | None:
        return next((part.observer for part in self.acting if part.observer is not None), None)

    @property
    def dense(self) -> bool:
        return any(part.dense for part in self.acting)

    @property
    def normalises(self) -> bool:
        return any(part.normalises for part in self.acting)

    @property
    def drifts(self) -> bool:
        return any(part.drifts for part in self.acting)

    @property
    def learner(self) -> Credit | None:
        return next((part.learner for part in self.acting if part.learner is not None), None)

    @property
    def forwards(self) -> int:
        return int(self.drifts) + (0 if self.learner is None else self.learner.forwards)

    def at(self, progress: float) -> "Mix":
        parts = tuple(part.at(progress) for part in self.parts)
        weights = tuple(w.at(progress) if isinstance(w, Ramp) else w for w in self.weights)
        return Mix(parts, weights)

    def completions(self, plan: Plan) -> tuple[list[int], int | tuple[int, ...] | None]:
        """All states that a part wants, each in the most steps that one of them asks for."""
        longest: dict[int, int] = {}
        for part in self.acting:
            states, lengths = part.completions(plan)
            for k, n in zip(states, lengths if isinstance(lengths, tuple) else [lengths] * len(states), strict=True):
                remaining = plan.steps - k
                length = n or remaining
                longest[k] = max(longest.get(k, 1), length if isinstance(lengths, tuple) else min(length, remaining))
        states = sorted(longest)
        return states, tuple(longest[k] for k in states)

    def check(self, plan: Plan) -> None:
        for part in self.acting:
            part.check(plan)

    def thinner(self, plan: Plan | None, steps: int) -> Iterator["Mix"]:
        """All parts at once, each in its own order."""
        parts, rest = self.parts, [part.thinner(plan, steps) for part in self.parts]
        while any(thinner := [next(candidates, None) for candidates in rest]):
            parts = tuple(new or old for new, old in zip(thinner, parts, strict=True))
            yield replace(self, parts=parts)

    def __call__(self, tree: Tree, judged: Judgement, units: Units = GRPO) -> Float[Tensor, "N T a b"]:
        each = (w * part(tree, _of(part, judged), units) for part, w in self.weighted if w != 0)
        return sum(each, torch.zeros(*tree.std.shape, 1, 1))  # of one cell each, or of a map's

    def statistics(self, tree: Tree, judged: Judgement) -> dict[str, float]:
        rows = (part.statistics(tree, _of(part, judged)) for part in self.acting)
        return {name: value for row in rows for name, value in row.items()}


def _of(part: Credit, judged: Judgement) -> Judgement:
    return of_states(judged) if part.dense else of_ends(judged)
