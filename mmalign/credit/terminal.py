"""Terminal credit (Flow-GRPO, arXiv 2505.05470): a walk's reward, compared with its siblings', goes to all its
steps."""

from jaxtyping import Float
from torch import Tensor

from mmalign.credit.groups import GRPO, Units, normalise
from mmalign.types import Judgement, Trajectories


def terminal(paths: Trajectories, judged: Judgement, units: Units = GRPO) -> Float[Tensor, "N T 1 1"]:
    """One advantage per image, over all images of the same prompt, repeated for each step."""
    advantage = normalise(judged.reward[:, -1], paths.prompt, units)
    return advantage[:, None, None, None].repeat(1, paths.steps, 1, 1)
