"""Terminal credit (Flow-GRPO, arXiv 2505.05470): a walk's reward, compared with its siblings', goes to all its
steps."""

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.credit.groups import GRPO, Units, as_grid, normalise
from mmalign.types import Judgement, Trajectories


def terminal(paths: Trajectories, judged: Judgement, units: Units = GRPO) -> Float[Tensor, "N T a b"]:
    """One advantage per image (or place), over all images of the same prompt, repeated for each step."""
    advantage = normalise(judged.reward[:, -1], paths.prompt, units)
    return as_grid(torch.stack([advantage] * paths.steps, 1))
