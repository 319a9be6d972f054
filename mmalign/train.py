"""The iteration: prompts -> rollout -> judgement -> advantages -> update.

Every random number comes from a seed derived from (run seed, iteration, prompt id, member, step), so results depend
neither on batch sizes nor on the number of processes nor on whether the run was interrupted.

Left out on purpose: a replay buffer (each iteration learns from its own images) and reward models that are trained
along.
"""

from functools import partial
from pathlib import Path

from mmalign import errors
from mmalign.data import prompts as prompt_files
from mmalign.distributed.gather import gather
from mmalign.rewards.judge import stop_if_failing, unscored
from mmalign.training import finite as guards, metrics as measures, rollout, snapshots as exhibit
from mmalign.training.advantages import advantages
from mmalign.training.learning import Lesson, finished, from_records, learn, of_images, of_walks
from mmalign.training.session import Session
from mmalign.types import Judgement


def iterate(run: Session, iteration: int, keep: Path | None = None) -> dict[str, int | float]:
    """Roll out, judge, credit, learn; with records, learn from those. Returns the row for metrics.jsonl; a few images
    go with their credit to the folder `keep`."""
    c, policy, clock, ranks = run.config, run.policy, run.clock, run.ranks
    policy.counts.clear()
    run.skips.reasons.clear()
    run.set_rate(iteration)
    try:
        lesson, row = from_records(run, iteration) if run.records else _from_rollout(run, iteration, keep)
    except errors.NonFinite as found:
        run.skips.leave_out(iteration, found)
        lesson, row = None, {"reward": float("nan"), "rewards": 0}
    forwards = policy.counts["forwards"]
    with clock.of("learn"):
        statistics = learn(run, lesson, iteration) if lesson else {"transitions": 0}
    spent = {"forwards": forwards, "replay_forwards": policy.counts["forwards"] - forwards}
    spent["decodes"] = policy.counts["decodes"]
    row = {"iteration": iteration + 1} | row | ranks.all_reduce_sum(spent, "counts") | run.asked()
    row |= {
        "skipped": len(run.skips.reasons),
        "lr": run.optimizer.param_groups[0]["lr"],
        **{f"fit/{name}": fit.rows for name, fit in run.fits.items() if fit.rows < getattr(c, name)},
    }
    return row | statistics | run.pace(row["forwards"] + row["replay_forwards"])


def _drawn(run: Session, iteration: int) -> tuple[rollout.Batch, Judgement]:
    c = run.config
    prompts = run.ranks.local(prompt_files.batch(run.prompts, c.prompts_per_iteration, iteration, c.seed))
    own = rollout.roll_out(run, prompts, run.levels, iteration)
    return own, rollout.judged(run, own, iteration)


def _from_rollout(run: Session, iteration: int, keep: Path | None) -> tuple[Lesson, dict[str, int | float]]:
    c, clock = run.config, run.clock
    own, seen = guards.together(run.ranks.all_gather_object, partial(_drawn, run, iteration))
    paths, judged = gather(run.ranks, own.paths, seen)
    stop_if_failing(unscored(paths, judged), len(paths.owner), c.max_failed)
    with clock.of("learn"):
        if c.objective == "grpo":
            credit = advantages(c, paths, judged)
            lesson = of_walks(run, own.cond, own.paths, credit[run.ranks.is_local(paths.prompt)])
        else:
            credit, lesson = None, of_images(run, own.prompts, own.cond, finished(own.paths, seen), iteration)
    if keep:
        clock.timed("io", exhibit.write)(run, keep, iteration, own, paths, judged, credit)
    deviation = measures.deviations(run.ranks, own.paths, own.images)
    return lesson, measures.of(c, paths, judged, deviation, run.combination(iteration)) | run.move_multipliers(judged)
