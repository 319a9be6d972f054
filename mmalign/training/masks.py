"""Update masks: learn at some places only, where a map has an opinion or where the prompt acts."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmalign.learn.loss import pool
from mmalign.types import Policy, Transitions


def within(advantage: Float[Tensor, "*N _ _"], mask: Bool[Tensor, "*#N a b"]) -> Float[Tensor, "*N a b"]:
    """The advantage where the mask is, 0 elsewhere, over the mask's share of the cells: the mean over cells, which the
    loss takes, stays of one size. All cells masked in changes nothing. A 1x1 advantage takes the mask's grid."""
    share = mask.float().mean((-2, -1), keepdim=True)
    return torch.where(mask, advantage / share.clamp(min=1e-6), 0.0)


def top(values: Float[Tensor, "M a b"], share: float) -> Bool[Tensor, "M a b"]:
    """The `share` of each row's cells with the largest values, at least one."""
    cells = values[0].numel()
    chosen = values.flatten(1).topk(max(1, round(share * cells)), dim=1).indices
    return torch.zeros_like(values, dtype=torch.bool).flatten(1).scatter(1, chosen, True).view_as(values)


@torch.no_grad()
def attended(policy: Policy, cond, batch: Transitions, share: float, rows: int) -> Transitions:
    """The batch with credit kept at the `share` of cells where the prompt changes the velocity most, at each step
    (Video-KTR's attribution masks, for a flow: the length of conditional less unconditional velocity)."""
    parts = torch.arange(len(batch), device=batch.step.device).split(rows)
    effect = [policy.prompt_effect(batch.x[i], batch.t[i], cond, batch.index[i]) for i in parts]
    effect = torch.cat([e.to(batch.x) for e in effect])
    grid = batch.advantage.shape[1:] if batch.advantage[0].numel() > 1 else effect.shape[1:]
    advantage = batch.advantage.expand(-1, *grid)
    return Transitions(**vars(batch) | {"advantage": within(advantage, top(pool(effect, grid), share))})
