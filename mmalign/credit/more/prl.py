"""Outcome less the log-ratio to go (PRL, by our reading): the KL penalty as a reward of each step.

The objective `E R - beta KL` is a sum over steps. What step k can still change of it is the reward less `beta` times
the log-ratios of the steps from k on, which replaces a separate KL term in the loss.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor

from mmalign.credit.groups import GRPO, Credit, Units, as_grid, normalise
from mmalign.types import Judgement, Tree, over


@dataclass(frozen=True)
class Prl(Credit):
    """`A[n, k] = normalise(R[n] - beta sum_{u >= k} z[n, u])` over the images of a prompt, where `z` is the log of the
    density of step u under the policy that drew it less that under the model without adapter, in nats per latent
    element. A forward of each stochastic step measures it at the rollout. `beta` 0 is terminal credit."""

    beta: Annotated[float, Ge(0)] = 0.01
    type, drifts = "prl", True

    def __call__(self, tree: Tree, judged: Judgement, units: Units = GRPO) -> Float[Tensor, "N T a b"]:
        if judged.log_ratio is None:
            raise ValueError("credit prl needs the log-ratios of the steps that were drawn")
        to_go = judged.log_ratio.flip(1).cumsum(1).flip(1)
        reward = judged.reward[:, -1]
        values = [reward - self.beta * over(to_go[:, k], reward) for k in range(tree.steps)]
        return as_grid(torch.stack([normalise(value, tree.prompt, units) for value in values], 1))

    def statistics(self, tree: Tree, judged: Judgement) -> dict[str, float]:
        """`log_ratio/reference`: the mean over trajectories of the sum over their steps, an estimate of the KL
        divergence to the model without adapter, per latent element."""
        return {} if judged.log_ratio is None else {"log_ratio/reference": float(judged.log_ratio.sum(1).mean())}
