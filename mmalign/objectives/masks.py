"""Update masks: train at some positions only, where a map has an opinion or where the prompt acts.

A mask may act on the advantages of trajectories (`advantage`), or on rows about to be replayed (`masked`). Add one: a
frozen dataclass that derives from `Mask`, and its name in `MASKS`.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Gt, Le
from jaxtyping import Bool, Float
from torch import Tensor

from mmalign.credit.region import maps
from mmalign.learn.loss import pool
from mmalign.policy.protocol import Attributing
from mmalign.types import Judgement, Transitions, Tree


class Mask:
    """Defaults: nothing is masked. `forwards`: network evaluations of a row; `region`: whether it needs a map."""

    forwards: ClassVar[int] = 0
    region: ClassVar[bool] = False

    def advantage(self, advantage: Float[Tensor, "N T a b"], tree: Tree, judged: Judgement) -> Tensor:
        return advantage

    def masked(self, policy: Any, cond: Any, batch: Transitions, rows: int) -> Transitions:
        """The batch with its advantages masked; `rows` bounds those of one forward."""
        return batch


@dataclass(frozen=True)
class Map(Mask):
    """Train where the region's map of the finished image has an opinion."""

    type, region = "map", True

    def advantage(self, advantage: Float[Tensor, "N T a b"], tree: Tree, judged: Judgement) -> Tensor:
        return within(advantage, ~maps(tree, judged)[:, -1, None].isnan())


@dataclass(frozen=True)
class Prompt(Mask):
    """Train at the `share` of positions where the prompt changes the velocity most, at each step (Video-KTR's
    attribution masks, for a flow: the length of conditional less unconditional velocity)."""

    share: Annotated[float, Gt(0), Le(1)] = 0.5
    type, forwards = "prompt", 2

    @torch.no_grad()
    def masked(self, policy: Attributing, cond: Any, batch: Transitions, rows: int) -> Transitions:
        parts = torch.arange(len(batch), device=batch.step.device).split(rows)
        effect = [policy.prompt_effect(batch.x[i], batch.t[i], cond, batch.index[i]) for i in parts]
        effect = torch.cat([e.to(batch.x) for e in effect])
        grid = batch.advantage.shape[1:] if batch.advantage[0].numel() > 1 else effect.shape[1:]
        advantage = within(batch.advantage.expand(-1, *grid), top(pool(effect, grid), self.share))
        return Transitions(**vars(batch) | {"advantage": advantage})


MASKS = (Map, Prompt)


def within(advantage: Float[Tensor, "*N _ _"], mask: Bool[Tensor, "*#N a b"]) -> Float[Tensor, "*N a b"]:
    """The advantage inside the mask, 0 elsewhere, over the mask's share of the cells, so that the mean over cells keeps
    its size in the loss. A full mask changes nothing. A 1x1 advantage takes the mask's grid."""
    share = mask.float().mean((-2, -1), keepdim=True)
    return torch.where(mask, advantage / share.clamp(min=1e-6), 0.0)


def top(values: Float[Tensor, "M a b"], share: float) -> Bool[Tensor, "M a b"]:
    """The `share` of each row's cells with the largest values, at least one."""
    cells = values[0].numel()
    chosen = values.flatten(1).topk(max(1, round(share * cells)), dim=1).indices
    return torch.zeros_like(values, dtype=torch.bool).flatten(1).scatter(1, chosen, True).view_as(values)
