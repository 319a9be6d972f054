"""The forwards of a rollout, kept for the update: a replayed step then costs a backward pass alone.

Where one update follows a rollout, the policy that it replays is the one that drew, and its velocities are those of the
rollout: the ratio is exactly 1, and the gradient is that of a replay, to rounding. The activations of every step that
is trained on are held until then, which a small network allows.
"""

from collections.abc import Collection
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.policy.protocol import Trainable
from mmalign.types import Latents


class Reuse:
    """Velocities of a policy, with their graphs at the `times` that are trained on. `numbers` are the features by which
    `mmalign.flow.sample.sample` tells them apart; `of` finds them again."""

    def __init__(self, policy: Trainable, times: Collection[float]):
        self.policy, self.times = policy, torch.tensor(sorted(times))
        self.drawn: list[Latents] = []

    def velocity(self, x: Latents, t: Float[Tensor, "M"], cond: Any, index: Tensor) -> Latents:
        with torch.set_grad_enabled(bool(torch.isin(t.cpu(), self.times).any())):
            v = self.policy.velocity(x, t, cond, index).float()
        self.drawn.append(v)
        return v.detach()

    def numbers(self, rows: int) -> Float[Tensor, "M 1"]:
        """The number of each row of the last velocity; exact in float64."""
        before = sum(len(v) for v in self.drawn[:-1])
        return torch.arange(before, before + rows, dtype=torch.float64)[:, None]

    def forget(self, after: int) -> None:
        """Leave out all but the earliest so many forwards, because the others are taken again."""
        del self.drawn[after:]

    def of(self, numbers: Float[Tensor, "M"]) -> Latents:
        """The velocities of these numbers, in the graph."""
        return torch.cat(self.drawn)[numbers.long().to(self.drawn[0].device)]
