"""Regenerate images: from another request, seed or guidance, from a later time, or in a region only.

A region is redrawn by a flow that preserves the rest: outside the mask the velocity is `(x_t - x_0) / t`, that of the
straight line to the known latent `x_0`, which every step therefore meets exactly. Inside, each step draws fresh noise
(`ddim` at eta 1), so that the new content fits what surrounds it; with an ODE the two do not meet.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.evaluation.toward import Toward
from mmalign.flow.plan import ode, sde
from mmalign.flow.sample import sample
from mmalign.policy.protocol import Mixes, Policy, fused, two_forwards
from mmalign.refinement.velocity import inpaint, regional_guidance
from mmalign.sampling.kernels import Ddim
from mmalign.seeds import gaussian, seed_of
from mmalign.types import Latents, Velocity
from reward_models import Prompt


@dataclass(frozen=True)
class Attempt:
    """How an image is made. `start`: the time the trajectory begins at, below 1 from an earlier image, noised to that
    time. `strength`: how much of the adapter acts. `toward`: with guidance toward a scorer."""

    request: str
    seed: int
    guidance: float
    start: float = 1.0
    strength: float = 1.0
    toward: bool = False


@dataclass(frozen=True)
class Base:
    """The image that an attempt begins from, and its mask: 1 where it is redrawn, 0 where it is preserved."""

    latent: Float[Tensor, "C h w"]
    mask: Float[Tensor, "h w"]

    @property
    def preserves(self) -> bool:
        """Whether anything of the image is preserved."""
        return bool((self.mask < 1).any())


def times_from(times: Float[Tensor, "states"], start: float) -> Float[Tensor, "fewer"]:
    """`start`, and the times of the schedule below it."""
    if start >= 1:
        return times
    return torch.cat([torch.tensor([start]), times[times < start - 1e-4]])


@contextmanager
def _guidance(policy: Policy, guidance: int | float) -> Iterator[None]:
    usual, policy.guidance = policy.guidance, guidance
    try:
        yield
    finally:
        policy.guidance = usual


def cost(policy: Policy, attempt: Attempt, steps: int) -> int:
    """The most network forwards an attempt takes: one a step, twice as many with true guidance, and more for a mixture
    of adapters and where the model without adapter is evaluated too. Guidance toward a scorer takes none."""
    with _guidance(policy, attempt.guidance):
        halves = 2 if two_forwards(policy, attempt.guidance) else 1
    acting = policy.evaluations if isinstance(policy, Mixes) else 1
    models = {0: 1, 1: acting}.get(attempt.strength, 1 + acting)
    return (len(times_from(policy.times(steps), attempt.start)) - 1) * halves * models


def draw(
    policy: Policy, attempts: Sequence[Attempt], bases: Sequence[Base | None], steps: int, batch: int,
    toward: Toward | None = None, prompts: Sequence[Prompt] = (),
) -> tuple[Latents, list[float]]:  # fmt: skip
    """The latents of the attempts, and the network forwards each took. Attempts with equal settings share a batch. An
    attempt with a base that preserves nothing, and start 1, is drawn from noise alone. `toward` is the guidance of
    attempts that have it, for the `prompts` of all attempts."""
    groups = defaultdict(list)
    for i, (attempt, base) in enumerate(zip(attempts, bases, strict=True)):
        inpainted = base is not None and base.preserves
        groups[attempt.guidance, attempt.start, attempt.strength, inpainted, attempt.toward].append(i)
    latents = torch.empty(len(attempts), *policy.latent_shape, device=policy.device)
    forwards = [0.0] * len(attempts)
    for (guidance, start, strength, inpainted, guided), members in groups.items():
        for first in range(0, len(members), batch):
            rows, before = members[first : first + batch], policy.counts["forwards"]
            with _guidance(policy, guidance), fused(policy) if strength == 1 else nullcontext():
                velocity = _velocity(policy, strength)
                if guided:
                    velocity = toward.guided(policy, velocity, [prompts[i] for i in rows])
                latents[rows] = _sample(
                    policy, velocity, [attempts[i] for i in rows], [bases[i] for i in rows], steps, start, inpainted
                )
            share = (policy.counts["forwards"] - before) / len(rows)
            for i in rows:
                forwards[i] = share
    return latents, forwards


def _velocity(policy: Policy, strength: float) -> Velocity:
    """The velocity with so much of the adapter."""
    if strength == 1:
        return policy.velocity
    return regional_guidance(policy, torch.ones(policy.latent_shape[1:], device=policy.device), strength)


def _sample(
    policy: Policy,
    velocity: Velocity,
    attempts: Sequence[Attempt],
    bases: Sequence[Base | None],
    steps: int,
    start: float,
    inpainted: bool,
) -> Latents:
    """The latents of attempts with equal settings."""
    noise = torch.stack([gaussian(policy.latent_shape, attempt.seed) for attempt in attempts]).to(policy.device)
    x = noise
    if start < 1 or inpainted:
        known = torch.stack([base.latent for base in bases]).to(noise)
        x = (1 - start) * known + start * noise
    if inpainted:
        velocity = inpaint(velocity, known, torch.stack([base.mask for base in bases]).to(noise))
    times = times_from(policy.times(steps), start)
    cond = policy.encode([attempt.request for attempt in attempts])
    index = torch.arange(len(attempts), device=noise.device)
    if not inpainted:
        return sample(velocity, x, cond, index, ode(times), batch=len(attempts)).finals

    def fresh(row: int, step: int, path: tuple[int, ...]) -> Tensor:
        return gaussian(policy.latent_shape, seed_of("redraw", attempts[row].seed, step))

    return sample(velocity, x, cond, index, sde(times, Ddim(1.0)), fresh, batch=len(attempts)).finals
