"""From credit to advantages: their unit, the groups left out, the weight of regions, and the mask."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from jaxtyping import Bool, Float
from torch import Tensor

from mmalign.credit.groups import Scale, Units, group_mean
from mmalign.credit.region import regional
from mmalign.types import Judgement, Tree, over


@dataclass(frozen=True)
class Advantage:
    """`scale`, `floor` and `clip` as in `mmalign.credit.groups.Units`. `floor` may name a component that measures the
    noise of the reward, such as `voted.share_error`: a group's floor is its root mean square there.

    A group whose mean reward is at least `saturated` is left out, with advantage 0 (RationalRewards' filter). With a
    `region` scorer, `whole` weighs the advantage of the image and `regional` that of each position.
    """

    scale: Scale = "group"
    floor: Annotated[float, Ge(0)] | str = 0.0
    clip: Annotated[float, Gt(0)] = 5.0
    saturated: float | None = None
    whole: Annotated[float, Ge(0)] = 1.0
    regional: Annotated[float, Gt(0)] = 1.0

    def __post_init__(self):
        if self.floor and self.scale == "none":
            raise ValueError(f"floor: {self.floor} acts only where advantages are divided; remove it or change scale")

    def units(self, tree: Tree, judged: Judgement, dead: float) -> Units:
        """The units, with the spread up to which a group is dead."""
        floor = self.floor
        if isinstance(floor, str):
            floor = group_mean(judged.parts[floor] ** 2, tree.prompt).sqrt().nan_to_num(0.0)
        return Units(self.scale, floor, self.clip, dead)

    def __call__(
        self, tree: Tree, judged: Judgement, credit: Callable, mask: "object | None", dead: float
    ) -> Float[Tensor, "N T a b"]:
        """The advantages of trajectories by `credit`, 0 where the `mask` leaves positions out."""
        weights = (self.whole, self.regional) if judged.regions is not None else (1.0, 0.0)
        advantage = regional(tree, judged, partial(credit, units=self.units(tree, judged, dead)), *weights)
        if self.saturated is not None:
            advantage = advantage * ~over(self.full(tree, judged), advantage)
        return advantage if mask is None else mask.advantage(advantage, tree, judged)

    def full(self, tree: Tree, judged: Judgement) -> Bool[Tensor, "N"]:
        """Whether the mean reward of a trajectory's group has reached `saturated`."""
        reward = judged.reward[:, -1]
        if self.saturated is None:
            return torch.zeros(len(reward), dtype=torch.bool, device=reward.device)
        return group_mean(reward, tree.prompt) >= self.saturated
