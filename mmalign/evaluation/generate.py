"""Sample images by ODE from fixed seeds."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.flow.plan import ode
from mmalign.flow.sample import chunks, gaussian, sample
from mmalign.types import Trajectories, Velocity
from reward_models import Prompt


def generate(
    policy,
    prompts: Sequence[Prompt],
    seeds: Sequence[Sequence[int]],
    steps: int,
    batch: int,
    velocity: Velocity | None = None,
) -> tuple[Tensor, Tensor]:
    """Images `[N, 3, H, W]` of each prompt from each of its seeds, by ODE along `velocity`, by default the policy's,
    and the prompt of each row.

    A seed gives the latents that a stock pipeline draws from a CPU generator with that seed.
    """
    start, owner = starts(policy, seeds)
    walks = walked(policy, prompts, start, owner, policy.times(steps), batch, velocity)
    return torch.cat([policy.decode(paths.finals).cpu() for paths in walks]), owner


def starts(policy, seeds: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """The starting noise of each prompt's seeds, a row each, and the prompt of each row."""
    rows = [(p, seed) for p, own in enumerate(seeds) for seed in own]
    noise = torch.stack([gaussian(policy.latent_shape, seed) for _, seed in rows]).to(policy.device)
    return noise, torch.tensor([p for p, _ in rows])


def walked(
    policy,
    prompts: Sequence[Prompt],
    start: Tensor,
    owner: Int[Tensor, "N"],
    times: Float[Tensor, "states"],
    batch: int,
    velocity: Velocity | None = None,
) -> Iterator[Trajectories]:
    """Walks by ODE from each start, for the prompt `owner` of each, `batch` at a time."""
    for part in chunks(len(start), batch):
        used, index = owner[part].unique(return_inverse=True)
        cond = policy.encode([prompts[p].text for p in used.tolist()])
        own = velocity or policy.velocity
        yield sample(own, start[part], cond, index.to(policy.device), ode(times), batch=batch)
