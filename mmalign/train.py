"""The iteration: prompts -> rollout -> judgement -> advantages -> update.

Every random number comes from a seed derived from (run seed, iteration, prompt id, member, step), so results depend
neither on batch sizes nor on whether the run was interrupted.

Left out on purpose: a replay buffer (each iteration learns from its own images) and reward models that are trained
along.
"""

from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign import ahead, exhibit, guards, measures, planner, prompts as prompt_files
from mmalign.credit.gain import gains
from mmalign.flow.plan import Noise
from mmalign.flow.sample import gaussian, sample, seed_of
from mmalign.judge import judge, stop_if_failing
from mmalign.learn.update import update
from mmalign.lessons import Lesson, advantages, finished, from_records, of_images, of_walks
from mmalign.session import Session
from mmalign.types import Judgement, Trajectories
from reward_models import Prompt


def iterate(run: Session, iteration: int, keep: Path | None = None) -> dict[str, int | float]:
    """Roll out, judge, credit, learn; with records, learn from those. Returns the row for metrics.jsonl; a few images
    go with their credit to the folder `keep`."""
    c, policy, clock = run.config, run.policy, run.clock
    policy.spent.clear()
    run.skips.reasons.clear()
    run.set_rate(iteration)
    try:
        lesson, row = from_records(run, iteration) if run.records else _from_rollout(run, iteration, keep)
    except guards.NonFinite as found:
        run.skips.leave_out(iteration, found)
        lesson, row = None, {"reward": float("nan"), "rewards": 0}
    forwards = policy.spent["forwards"]
    with clock.of("learn"):
        statistics = _learn(run, lesson, iteration) if lesson else {}
    row = {"iteration": iteration + 1} | row
    row |= {
        "forwards": forwards,
        "replay_forwards": policy.spent["forwards"] - forwards,
        "decodes": policy.spent["decodes"],
        **run.asked(),
        "transitions": len(lesson.batch) if lesson else 0,
        "skipped": len(run.skips.reasons),
        "lr": run.optimizer.param_groups[0]["lr"],
        **{f"fit/{name}": fit.rows for name, fit in run.fits.items() if fit.rows < getattr(c, name)},
    }
    return row | statistics | run.pace()


def _learn(run: Session, lesson: Lesson, iteration: int) -> dict[str, float]:
    c = run.config
    prompts = prompt_files.batch(run.prompts, c.prompts_per_iteration, iteration, c.seed)
    statistics = update(
        run.policy.parameters(), run.optimizer, lesson.batch, lesson.replay, needed=lesson.needed, epochs=c.epochs,
        minibatches=c.minibatches, micro_batch=run.fits["micro_batch"], max_grad_norm=c.max_grad_norm,
        generator=torch.Generator().manual_seed(seed_of(c.seed, "shuffle", iteration)),
        may_step=partial(run.skips.may_step, iteration, prompts),
    )  # fmt: skip
    if not run.skips.reasons:
        run.average()
    return statistics


def _from_rollout(run: Session, iteration: int, keep: Path | None) -> tuple[Lesson, dict[str, int | float]]:
    c, clock = run.config, run.clock
    own = ahead.batch(run, iteration, roll_out, decoded, judge_all)
    guards.walked(own)
    prompts, cond, paths, images, judged = own.prompts, own.cond, own.paths, own.images, own.judged()
    stop_if_failing(judged, len(images), c.max_failed)
    guards.rewarded(own, judged)
    with clock.of("learn"):
        if c.objective == "grpo":
            lesson = of_walks(run, cond, paths, judged)
        else:
            lesson = of_images(run, cond, finished(paths, judged), iteration)
    if keep:
        credit = advantages(c, paths, judged) if c.objective == "grpo" else None
        clock.timed("io", exhibit.write)(keep, iteration + 1, prompts, images, paths, judged, credit)
    return lesson, measures.of(c, paths, judged, images) | run.move_multipliers(judged)


def roll_out(run: Session, prompts: list[Prompt], levels: Noise, iteration: int) -> tuple[object, Trajectories]:
    """The conditioning of the prompts, and the walks of all their seeds."""
    c, policy = run.config, run.policy
    starts = [(p, m) for p in range(len(prompts)) for m in range(c.seeds)]
    at = [planner.window_start(c, iteration, prompt.id) for prompt in prompts]
    plan = {start: planner.plan_for(c, run.times, levels, start) for start in set(at)}

    def noise(start: int, *rest) -> Tensor:
        p, member = starts[start]
        return gaussian(policy.latent_shape, seed_of(c.seed, "rollout", iteration, prompts[p].id, member, *rest))

    cond = policy.encode([p.text for p in prompts])
    index = torch.tensor([p for p, _ in starts], device=policy.device)
    start = torch.stack([noise(i) for i in range(len(starts))]).to(policy.device)
    own = [plan[at[p]] for p, _ in starts]
    return cond, run.fits["batch"](lambda rows: sample(policy.velocity, start, cond, index, own, noise, rows))


def decoded(run: Session, paths: Trajectories) -> Float[Tensor, "E 3 H W"]:
    """The images of the finished latents, on the CPU."""

    def work(size: int) -> Tensor:
        return torch.cat([run.policy.decode(latents).cpu() for latents in paths.ends.split(size)])

    with run.clock.of("decode"):
        return run.fits["decode_batch"](work)


def judge_all(
    run: Session, paths: Trajectories, images: Float[Tensor, "E 3 H W"], prompts: list[Prompt], iteration: int
) -> Judgement:
    """The judgement by the trained rewards."""
    c = run.config
    scorers = {name: run.clock.timed("reward", run.scorers[name]) for name in c.trained}
    return judge(paths, prompts, images, scorers, run.combination(iteration), c.region, c.region_grid)


def step_gains(run: Session, levels: Tensor, number: int) -> Tensor:
    """Gains `[N, T]` of the walks of one batch of prompts with this noise, NaN at deterministic steps."""
    c = run.config
    prompts = prompt_files.batch(run.prompts, c.prompts_per_iteration, number, c.seed)
    _, paths = roll_out(run, prompts, levels.tolist(), number)
    judged = judge_all(run, paths, decoded(run, paths), prompts, 0)
    return torch.where(paths.std > 0, gains(paths, judged), torch.nan)[:, : c.steps].cpu()
