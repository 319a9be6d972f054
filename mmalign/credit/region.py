"""Credit by place: learn where the image was right or wrong.

The transition of a stochastic step is an isotropic Gaussian, so its log-density is a sum over latent positions, and
each position may have an advantage of its own; the loss takes its ratio at the advantage's grid. The credit of a place
is what the same rule (terminal, branch, gain) makes of the map of rewards instead of the reward: a gain of the map is
credit by step and by place. After SRUM's local and global reward (arXiv 2510.12784), with the group as baseline.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.types import Judgement, Trajectories

Credit = Callable[[Trajectories, Judgement], Tensor]


def by_place(
    paths: Trajectories, judged: Judgement, credit: Credit, whole: float = 1.0, local: float = 0.0
) -> Float[Tensor, "N T a b"]:
    """`whole` times the advantage of the whole image, plus `local` times that of each place, both by `credit`; 1x1
    without a map. Where a map has no opinion, the whole alone counts. ValueError if `local` has no map to work on."""
    advantage = whole * credit(paths, judged)
    if not local:
        return advantage
    if judged.regions is None:
        raise ValueError("credit by place needs a scorer that says where; this one gives no map")
    return advantage + local * credit(paths, replace(judged, reward=maps(paths, judged)))


def maps(paths: Trajectories, judged: Judgement) -> Float[Tensor, "N states a b"]:
    """The map of rewards at each shown state; a place without an opinion is NaN there, unless the map of another state
    of the same walk has one: then it is 0 here, so that what appears or vanishes between two states is a gain."""
    found = paths.at_states(judged.regions)
    scored = ~paths.at_states(judged.regions.isnan().all((1, 2)).float()).nan_to_num(1.0).bool()
    somewhere = (~found.isnan()).any(1, keepdim=True)
    neutral = found.isnan() & somewhere & scored[:, :, None, None]
    return torch.where(neutral, 0.0, found)
