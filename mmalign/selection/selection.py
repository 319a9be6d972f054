"""What a selection says of itself, and the rewards that advantages are then measured by."""

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmalign.types import Judgement, Tree, over


class Selection:
    """Defaults: `keep` is how many images of a prompt it leaves at most; `compare` whether advantages are measured
    against all images of the "group" or against the "selected" alone; `dense` whether it needs values of states, which
    a credit must have completed."""

    keep: int
    compare: Literal["group", "selected"] = "group"
    dense: ClassVar[bool] = False

    def choose(self, tree: Tree, judged: Judgement) -> Bool[Tensor, "N"]:
        """Whether each trajectory is learnt from."""
        return self(judged.reward[:, -1], tree.prompt)

    def __call__(self, reward: Float[Tensor, "N"], prompt: Int[Tensor, "N"]) -> Bool[Tensor, "N"]:
        """Whether each trajectory is learnt from; one without a reward (NaN) never is."""
        raise NotImplementedError


def compared(judged: Judgement, selection: Selection, selected: Bool[Tensor, "N"]) -> Judgement:
    """The rewards that advantages are measured by: all of them, or those of the selected alone."""
    if selection.compare == "group":
        return judged
    return replace(judged, reward=torch.where(over(selected, judged.reward), judged.reward, torch.nan))
