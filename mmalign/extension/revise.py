"""Revision: where no image of a prompt is good, one more is drawn under the revised request of a critic (after
RGR-GRPO, arXiv 2511.12344).

It is judged against the prompt itself, and is learnt from as an image of the prompt: its importance weight is the ratio
of its steps' densities under the two texts. Left out: rubrics; the critic's request stands for the guidance they give.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Gt, Lt
from jaxtyping import Bool, Float
from torch import Tensor

from mmalign.credit.groups import Credit
from mmalign.extension.extension import Draws, Extension
from mmalign.learn.loss import Clipped
from mmalign.types import Judgement, Plan, Tree


@dataclass(frozen=True)
class Revise(Extension):
    """In each group whose best reward is below `good`, draw the best image again from its starting noise, under the
    request that a critic among the rewards gives for it, and keep it only if it is better than all. `off_clip` bounds
    the importance weight of its steps to [1 - off_clip, 1 + off_clip], in the clipped loss."""

    good: float = 1.0
    off_clip: Annotated[float, Gt(0), Lt(1)] = 0.2
    type = "revise"

    @property
    def off_loss(self) -> Clipped:
        return Clipped(self.off_clip)

    def __call__(self, tree: Tree, judged: Judgement, requests: Sequence[str]) -> Draws:
        rows, reward = [], judged.reward[:, -1].nan_to_num(-torch.inf)
        for number in tree.prompt.unique():
            group = (tree.prompt == number).nonzero()[:, 0]
            row = int(group[reward[group].argmax()])
            if -torch.inf < reward[row] < self.good and requests[row].strip():
                rows.append(row)
        return Draws(rows, [0] * len(rows), [requests[row] for row in rows])

    def accepted(
        self, reward: Float[Tensor, "n"], before: Float[Tensor, "n"], best: Float[Tensor, "n"]
    ) -> Bool[Tensor, "n"]:
        return reward > best

    def check(self, plan: Plan, seeds: int, credit: Credit) -> None:
        if getattr(credit, "baseline", None) == "state":
            raise ValueError(
                "extend: revise draws a trajectory whose states no other has, and credit: branch compares the children "
                "of one state; set baseline: prompt, or take credit: terminal or gain"
            )

    def most(self, plan: Plan, seeds: int) -> tuple[int, int]:
        return 1, 0
