"""Terminal credit (Flow-GRPO, arXiv 2505.05470): every step gets the advantage of the finished image."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.credit.groups import GRPO, Credit, Units, as_grid, normalise
from mmalign.types import Judgement, Tree


@dataclass(frozen=True)
class Terminal(Credit):
    """One advantage per image (or position), over all images of the same prompt, repeated for each step."""

    type = "terminal"

    def __call__(self, tree: Tree, judged: Judgement, units: Units = GRPO) -> Float[Tensor, "N T a b"]:
        advantage = normalise(judged.reward[:, -1], tree.prompt, units)
        return as_grid(torch.stack([advantage] * tree.steps, 1))
