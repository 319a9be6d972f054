"""How far the policy that draws has moved from the model without adapter, step by step."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.flow.kernels import log_ratio
from mmalign.flow.sample import distinct
from mmalign.policy.protocol import Trainable
from mmalign.types import Trajectories


@torch.no_grad()
def from_reference(policy: Trainable, paths: Trajectories, cond: Any, batch: int) -> Float[Tensor, "N T"]:
    """Log of the density of each stochastic step under the policy that drew it less that under the model without
    adapter, in nats per latent element; 0 at deterministic steps. A forward of each distinct step, `batch` at once. On
    the CPU."""
    tree = paths.tree
    rows, cols = (tree.std > 0).nonzero(as_tuple=True)
    number, first = distinct(torch.stack([cols, tree.node[rows, cols + 1]], 1))

    def each(part: Tensor) -> Tensor:
        i, k = rows[part], cols[part]
        t, s, noise, index = (
            column.to(policy.device) for column in (tree.t[i, k], tree.t[i, k + 1], tree.noise[i, k], tree.prompt[i])
        )
        x = paths.state(i, k)
        with policy.reference():
            v = policy.velocity(x, t, cond, index).float()
        mean, std = paths.kernel.step(x, v, t, s, noise, paths.t_max)
        return -log_ratio(paths.state(i, k + 1), mean, paths.mean_of(i, k), std).mean((1, 2)).cpu()

    result = torch.zeros_like(tree.std)
    result[rows, cols] = torch.cat([each(part) for part in first.split(batch)])[number]
    return result
