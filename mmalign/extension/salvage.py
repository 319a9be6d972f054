"""Salvage: cut a failing trajectory before the step that spoilt it and draw the rest again (after SCOPE, arXiv
2602.24110, and Search-R2).

Left out: a stronger model, or a judge, that writes the rest; it is drawn by the policy itself, on policy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge
from jaxtyping import Bool, Float
from torch import Tensor

from mmalign.credit.gain import gains
from mmalign.credit.groups import Credit, group_mean
from mmalign.credit.more.density import of_states
from mmalign.extension.extension import Draws, Extension
from mmalign.types import Judgement, Plan, Tree


@dataclass(frozen=True)
class Salvage(Extension):
    """The `per_group` worst images below the mean of their prompt whose value fell are cut, each before the first step
    that lowered the value of the state by more than `drop`. Drawn again from there, a trajectory joins its group if its
    reward has risen by more than `gain`."""

    drop: Annotated[float, Ge(0)] = 0.1
    per_group: Annotated[int, Ge(1)] = 2
    gain: Annotated[float, Ge(0)] = 0.0
    type = "salvage"

    def __call__(self, tree: Tree, judged: Judgement, requests: Sequence[str]) -> Draws:
        reward = judged.reward[:, -1]
        fell = (gains(tree, of_states(judged)) < -self.drop) & (tree.std > 0)
        failing = (reward < group_mean(reward, tree.prompt)) & fell.any(1)
        rows = []
        for number in tree.prompt.unique():
            worst = (failing & (tree.prompt == number)).nonzero()[:, 0]
            rows += worst[reward[worst].argsort(stable=True)][: self.per_group].tolist()
        return Draws(rows, [int(fell[row].int().argmax()) for row in rows])

    def accepted(
        self, reward: Float[Tensor, "n"], before: Float[Tensor, "n"], best: Float[Tensor, "n"]
    ) -> Bool[Tensor, "n"]:
        return reward > before + self.gain

    def most(self, plan: Plan, seeds: int) -> tuple[int, int]:
        return min(self.per_group, seeds * plan.trained - 1), min(plan.stochastic)

    def check(self, plan: Plan, seeds: int, credit: Credit) -> None:
        if not credit.completions(plan)[0]:
            raise ValueError("extend: salvage needs the values of states, which credit: gain has completed")
