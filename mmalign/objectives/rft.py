"""Rejection-sampling fine-tuning: flow matching on each prompt's best image (RAFT, arXiv 2304.06767, for a flow)."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.objectives.flow_matching import Examples, error, examples
from mmalign.objectives.objective import Draws, Finished, OnImages
from mmalign.policy.protocol import Trainable
from mmalign.types import Plan
from reward_models.combine import alive


@dataclass(frozen=True)
class Rft(OnImages):
    """The best image of each prompt, at `draws` times and noises. A prompt whose images all have the same reward, up
    to rounding, has no best one and gives no row."""

    draws: Draws = 2
    type, siblings = "rft", 2
    fewer = "replay_forwards, transitions: fewer where a prompt's images have the same reward"

    def rows(self, plan: Plan, seeds: int) -> int:
        return self.draws

    def examples(self, policy: Trainable, images: Finished, generator: torch.Generator) -> Examples:
        differ = len(images) > 1 and bool(alive(images.reward, images.prompt).any())
        best = images[images.reward.argsort(descending=True, stable=True)[: 1 if differ else 0]]
        return examples(policy, best.x, best.prompt, torch.ones(len(best), 1, 1), self.draws, generator)

    def replay(self, policy: Trainable, cond: Any, rows: Examples) -> tuple[Float[Tensor, "M"], dict[str, Tensor]]:
        loss = error(policy, rows.x, rows.noise, rows.t, cond, rows.index).mean((1, 2))
        return loss, {"loss": loss.detach(), "error": loss.detach()}
