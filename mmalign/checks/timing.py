"""Time a few calls of the loaded model and scorers, and from them the seconds of a run."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import ceil

import torch

from mmalign.config.schema import Config
from mmalign.policy.protocol import two_forwards
from mmalign.training import planning
from mmalign.training.session import Session


@dataclass(frozen=True)
class Speed:
    """Seconds of: a forward in rollout; a forward with its backward pass; a decoded image; an image shown to the
    trained rewards, and to those that are watched as well."""

    forward: float
    learn: float
    decode: float
    reward: float
    judge: float


def measure(run: Session, repeats: int = 3) -> Speed:
    """A few calls of the loaded model and scorers at the config's batch sizes, and the median of `repeats` after one
    that is not timed."""
    c, policy = run.config, run.policy
    prompts = run.prompts(0)
    cond = policy.encode([p.text for p in prompts])
    plan = planning.plan_for(c, run.times)

    def velocity(rows: int) -> torch.Tensor:
        index = torch.arange(rows, device=policy.device) % len(prompts)
        x = torch.randn(rows, *policy.latent_shape, device=policy.device)
        return policy.velocity(x, torch.full((rows,), 0.5, device=policy.device), cond, index)

    def forward(rows: int) -> None:
        with torch.no_grad():
            velocity(rows)

    def learn(rows: int) -> None:
        velocity(rows).float().square().mean().backward()
        for p in policy.parameters():
            p.grad = None

    routes = len(prompts) * c.seeds * plan.routes
    rows, micro = min(c.batch, routes), min(c.micro_batch, ceil(run.cost.rows / c.minibatches))
    count = min(c.decode_batch, routes)
    x = torch.randn(count, *policy.latent_shape, device=policy.device)
    images, owners = policy.decode(x).cpu(), [prompts[i % len(prompts)] for i in range(count)]

    def score(names: Iterable[str]) -> Callable[[], None]:
        return lambda: [run.rewards.scorers[name](images, owners) for name in names] and None

    per_row = 2 if two_forwards(policy, c.guidance) else 1
    return Speed(
        seconds(lambda: forward(rows), repeats) / rows / per_row,
        seconds(lambda: learn(micro), repeats) / micro / per_row,
        seconds(lambda: policy.decode(x).cpu(), repeats) / count,
        seconds(score(c.trained), repeats) / count,
        seconds(score(run.rewards.scorers), repeats) / count,
    )


def seconds(work: Callable[[], object], repeats: int) -> float:
    """The median time of `work`, which is done once before."""
    taken = []
    for _ in range(repeats + 1):
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        taken.append(time.perf_counter() - start)
    return sorted(taken[1:])[repeats // 2]


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def durations(c: Config, estimate: dict, speed: Speed) -> dict[str, float]:
    """Seconds of the slowest rank in an iteration and in all of them, and of the evaluations, which are sharded too.

    Half of replay evaluates the model without adapter, without gradients, where the objective needs it. Nothing is
    assumed to overlap; optimiser steps, text encoders, credit, files and communication are not timed.
    """
    plain = 0.5 if c.measures_kl else 0.0
    replayed = plain * speed.forward + (1 - plain) * speed.learn

    def taken(counts: Mapping[str, int]) -> float:
        shown = counts["decodes"] * (speed.decode + speed.reward)
        backward = counts["transitions"] * (speed.learn - speed.forward) if c.reuse else 0.0
        return counts["forwards"] * speed.forward + counts["replay_forwards"] * replayed + backward + shown

    held = estimate["evaluations"]
    shown = held["forwards"] * speed.forward + held["decodes"] * (speed.decode + speed.judge)
    run, after = max(map(taken, estimate["run_ranks"])), shown / len(estimate["ranks"])
    return {"iteration": run / c.iterations, "training": run, "evaluations": after, "run": run + after}
