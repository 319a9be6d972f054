"""Make an image once more: from another request, seed or guidance, from a time on, or only in part.

A part of an image is redrawn by a flow that keeps the rest: outside the mask the velocity is `(x_t - x_0) / t`, that of
the straight line to the known latent `x_0`, which every step therefore meets exactly. Inside, the walk takes fresh
noise at each step (`ddim` at eta 1), so that what is new comes to fit what is kept; as an ODE the two do not meet.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.flow.plan import ode, sde
from mmalign.flow.sample import gaussian, sample, seed_of
from mmalign.refine import velocity as guide
from mmalign.refine.velocity import keeping
from mmalign.types import Latents


@dataclass(frozen=True)
class Attempt:
    """How an image is made. `start`: the time the walk begins at, below 1 from an image before, noised that far.
    `strength`: how much of the adapter acts."""

    request: str
    seed: int
    guidance: float
    start: float = 1.0
    strength: float = 1.0


@dataclass(frozen=True)
class Base:
    """The image an attempt begins from, and where it is redrawn: `mask` [h, w], 1 there, 0 where it is kept."""

    latent: Float[Tensor, "C h w"]
    mask: Float[Tensor, "h w"]


def times_from(times: Float[Tensor, "states"], start: float) -> Float[Tensor, "fewer"]:
    """The schedule's times below `start`, and `start`."""
    if start >= 1:
        return times
    return torch.cat([torch.tensor([start]), times[times < start - 1e-4]])


@contextmanager
def _guided(policy, guidance: int | float) -> Iterator[None]:
    usual, policy.guidance = policy.guidance, guidance
    try:
        yield
    finally:
        policy.guidance = usual


def cost(policy, attempt: Attempt, steps: int) -> int:
    """The network evaluations an attempt takes at most: one a step, twice as many with true guidance, and twice as many
    where the model without adapter is asked too."""
    with _guided(policy, attempt.guidance):
        halves = 2 if getattr(policy, "true_guidance", attempt.guidance > 1) else 1
    models = 1 if attempt.strength in (0, 1) else 2
    return (len(times_from(policy.times(steps), attempt.start)) - 1) * halves * models


def draw(
    policy, attempts: Sequence[Attempt], bases: Sequence[Base | None], steps: int, batch: int
) -> tuple[Latents, list[float]]:
    """The latents of the attempts, and the network evaluations each took. Those that walk alike go together. An attempt
    with a base whose mask is 1 everywhere, and start 1, is drawn from noise alone."""
    alike = defaultdict(list)
    for i, (own, base) in enumerate(zip(attempts, bases, strict=True)):
        part = base is not None and bool((base.mask < 1).any())
        alike[own.guidance, own.start, own.strength, part].append(i)
    latents = torch.empty(len(attempts), *policy.latent_shape, device=policy.device)
    forwards = [0.0] * len(attempts)
    for (guidance, start, strength, part), rows in alike.items():
        for at in range(0, len(rows), batch):
            some, before = rows[at : at + batch], policy.counts["forwards"]
            own = [attempts[i] for i in some]
            with _guided(policy, guidance):
                latents[some] = _walk(policy, own, [bases[i] for i in some], steps, start, strength, part)
            spent = (policy.counts["forwards"] - before) / len(some)
            for i in some:
                forwards[i] = spent
    return latents, forwards


def _walk(policy, attempts, bases, steps: int, start: float, strength: float, part: bool) -> Latents:
    noise = torch.stack([gaussian(policy.latent_shape, own.seed) for own in attempts]).to(policy.device)
    velocity, x = policy.velocity, noise
    if strength != 1:
        velocity = guide.guided(policy, torch.ones(policy.latent_shape[1:], device=noise.device), strength)
    if start < 1 or part:
        known = torch.stack([base.latent for base in bases]).to(noise)
        x = (1 - start) * known + start * noise
    if part:
        velocity = keeping(velocity, known, torch.stack([base.mask for base in bases]).to(noise))
    times = times_from(policy.times(steps), start)
    cond = policy.encode([own.request for own in attempts])
    index = torch.arange(len(attempts), device=noise.device)
    if not part:
        return sample(velocity, x, cond, index, ode(times), batch=len(attempts)).ends

    def fresh(row: int, step: int, path: tuple[int, ...]) -> Tensor:
        return gaussian(policy.latent_shape, seed_of("redraw", attempts[row].seed, step))

    return sample(velocity, x, cond, index, sde(times, "ddim", 1.0), fresh, batch=len(attempts)).ends
