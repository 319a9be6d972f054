"""Regional credit: train where the image was right or wrong.

The transition of a stochastic step is an isotropic Gaussian, so its log-density is a sum over latent positions, and
each position may have its own advantage; the loss takes its ratio at the advantage's grid. The credit of a position is
what the same rule (terminal, branch, gain) makes of the map of rewards instead of the reward: a gain of the map is
credit by step and by position. After SRUM's local and global reward (arXiv 2510.12784), with the group as baseline.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.types import Judgement, Tree


def regional(
    tree: Tree, judged: Judgement, credit: Callable[[Tree, Judgement], Tensor], whole: float = 1.0, local: float = 0.0
) -> Float[Tensor, "N T a b"]:
    """`whole` times the advantage of the image, plus `local` times that of each position, both by `credit`; 1x1 without
    a map. Where a map has no opinion, the image alone counts. ValueError if `local` has no map to work on."""
    advantage = whole * credit(tree, judged)
    if not local:
        return advantage
    return advantage + local * credit(tree, replace(judged, reward=maps(tree, judged)))


def maps(tree: Tree, judged: Judgement) -> Float[Tensor, "N states a b"]:
    """The map of rewards at each completed state. A position without an opinion is NaN, unless the map of another state
    of the same trajectory has one: then it is 0, so that what appears or vanishes between two states is a gain."""
    if judged.regions is None:
        raise ValueError("regional credit needs a scorer with a map; this one has none")
    each = tree.at_states(judged.regions)
    scored = ~tree.at_states(judged.regions.isnan().all((1, 2)).float()).nan_to_num(1.0).bool()
    somewhere = (~each.isnan()).any(1, keepdim=True)
    neutral = each.isnan() & somewhere & scored[:, :, None, None]
    return torch.where(neutral, 0.0, each)
