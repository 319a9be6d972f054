"""From prompts to walks, images and what the rewards say of them.

In parts (`rollout_parts`) the images of some prompts are judged in a thread while the next ones are drawn, which pays
where judges are slow and elsewhere (a server). A prompt's images stay together, and rewards are combined and credited
over the whole batch as ever; so nothing changes but the time it takes, and the rounding of forwards over other rows.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.credit.gain import gains
from mmalign.data import prompts as prompt_files
from mmalign.flow.plan import Noise
from mmalign.flow.sample import gaussian, sample, seed_of
from mmalign.rewards.judge import Seen, joined, judge, score
from mmalign.training import finite as guards, planning as planner
from mmalign.training.session import Session
from mmalign.types import Judgement, Trajectories
from reward_models import Prompt

AHEAD = 2  # parts drawn and not judged, at most: where judges are slower, drawing waits


@dataclass(frozen=True)
class Batch:
    """This process's prompts, their conditioning, walks, finished images (on the CPU) and what was seen in them."""

    prompts: list[Prompt]
    cond: Any
    paths: Trajectories
    images: Float[Tensor, "E 3 H W"]
    seen: Seen


def roll_out(run: Session, prompts: list[Prompt], levels: Noise, iteration: int) -> Batch:
    """Draw the walks of all seeds of the prompts and show their images to the trained rewards. Raises NonFinite where
    latents, images or scores are not, when all is drawn: other processes may be drawing along."""
    c, clock = run.config, run.clock
    scorers, ask = {name: run.scorers[name] for name in c.trained}, clock.timed("reward", score)

    def look(paths: Trajectories, images: Tensor) -> Seen:
        guards.walked(paths, images, prompts)
        return ask(images, [prompts[i] for i in paths.owner.tolist()], scorers)

    with clock.of("rollout"):
        cond = run.policy.encode([p.text for p in prompts])
    drawn, seen = [], []
    parts = torch.arange(len(prompts)).tensor_split(min(c.rollout_parts, len(prompts)))
    pool = ThreadPoolExecutor(1, thread_name_prefix="judge")
    begin = pool.submit if len(parts) > 1 else _now
    try:
        for part in parts:
            wait(seen[: max(0, len(seen) + 1 - AHEAD)])
            with clock.of("rollout"):
                paths = walk(run, prompts, cond, levels, iteration, part.tolist())
            drawn.append((paths, decoded(run, paths)))
            seen.append(begin(look, *drawn[-1]))
        found = joined([future.result() for future in seen])
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    paths, images = zip(*drawn, strict=True)
    return Batch(prompts, cond, stacked(paths), torch.cat(images), found)


def _now(work: Callable[..., Seen], *args) -> Future:
    done = Future()
    done.set_result(work(*args))
    return done


def walk(
    run: Session, prompts: Sequence[Prompt], cond, levels: Noise, iteration: int, rows: Sequence[int]
) -> Trajectories:
    """The walks of all seeds of the prompts in these `rows`, which are those of `cond`."""
    c, policy = run.config, run.policy
    starts = [(p, m) for p in rows for m in range(c.seeds)]
    at = {p: planner.window_start(c, iteration, prompts[p].id) for p in rows}
    plan = {start: planner.plan_for(c, run.times, levels, start) for start in {*at.values()}}

    def noise(start: int, *rest) -> Tensor:
        p, member = starts[start]
        return gaussian(policy.latent_shape, seed_of(c.seed, "rollout", iteration, prompts[p].id, member, *rest))

    index = torch.tensor([p for p, _ in starts], device=policy.device)
    start = torch.stack([noise(i) for i in range(len(starts))]).to(policy.device)
    own = [plan[at[p]] for p, _ in starts]
    return run.fits["batch"](lambda size: sample(policy.velocity, start, cond, index, own, noise, size))


def stacked(parts: Sequence[Trajectories]) -> Trajectories:
    """The walks of several parts, one after the other, numbered through: ends, and with them nodes, and members."""
    if len(parts) == 1:
        return parts[0]
    ends = [0, *accumulate(len(p.owner) for p in parts)]
    members = [0, *accumulate(int(p.member.max()) + 1 for p in parts)]
    moved = [
        {
            "node": p.node + before,
            "member": p.member + starts,
            "shown": torch.where(p.shown < 0, -1, p.shown + before),
        }
        for p, before, starts in zip(parts, ends, members, strict=False)
    ]
    columns = [vars(p) | own for p, own in zip(parts, moved, strict=True)]
    names = [field.name for field in fields(Trajectories) if field.name not in ("kernel", "t_max")]
    return Trajectories(parts[0].kernel, parts[0].t_max, **{n: torch.cat([own[n] for own in columns]) for n in names})


def decoded(run: Session, paths: Trajectories) -> Float[Tensor, "E 3 H W"]:
    """The images of the finished latents, on the CPU."""

    def work(size: int) -> Tensor:
        return torch.cat([run.policy.decode(latents).cpu() for latents in paths.ends.split(size)])

    with run.clock.of("decode"):
        return run.fits["decode_batch"](work)


def judged(run: Session, batch: Batch, iteration: int) -> Judgement:
    """What was seen as rewards, by the weights of the iteration. Raises NonFinite where one is not."""
    c = run.config
    size = tuple(batch.images.shape[2:])
    found = judge(batch.paths, batch.seen, size, run.combination(iteration), c.region, c.region_grid)
    guards.rewarded(found, batch.paths, batch.prompts)
    return found


def step_gains(run: Session, levels: Tensor, number: int) -> Tensor:
    """Gains `[N, T]` of the walks of one batch of prompts with this noise, NaN at deterministic steps."""
    c = run.config
    prompts = prompt_files.batch(run.prompts, c.prompts_per_iteration, number, c.seed)
    batch = roll_out(run, prompts, levels.tolist(), number)
    found = gains(batch.paths, judged(run, batch, 0))
    return torch.where(batch.paths.std > 0, found, torch.nan)[:, : c.steps].cpu()
