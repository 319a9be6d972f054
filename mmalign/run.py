"""A run around the iteration: evaluations, checkpoints, trackers and signals.

One run lives in one folder: `config.yaml` (resolved), `metrics.jsonl`, `evaluations.jsonl`, `credit.jsonl`,
`alarms.jsonl`, `images/`, `checkpoints/`, `report.html`, and the files of trackers.
"""

import sys
import time
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from rich.console import Console

from mmalign.activity import doing
from mmalign.config import load as configs
from mmalign.config.schema import Config
from mmalign.distributed.processes import Ranks, join
from mmalign.evaluation import evaluate, layouts
from mmalign.policy.protocol import Trainable
from mmalign.reporting import progress, trackers as tracking
from mmalign.reporting.trackers import Trackers
from mmalign.rewards.judge import silent, stop_if_failing
from mmalign.runs import alarms, checkpoint, folder
from mmalign.runs.signals import Stop, Stopped, stopping
from mmalign.train import iterate
from mmalign.training import finite, planning, saving, snapshots
from mmalign.training.session import Session
from mmalign.training.setup import open_session
from reward_models import RewardModel, files
from reward_models.lengths import cut
from reward_models.weights import fingerprint


def train(
    c: Config,
    resume: bool = False,
    console: Console | None = None,
    policy: Trainable | None = None,
    scorers: Mapping[str, RewardModel] | None = None,
) -> Path:
    """Run a config to its end and return the run's folder; `policy` and `scorers` as in `open_session`. Raises BadInput
    before anything is written, Failed where it cannot continue (disk full, out of memory, scores that fail, non-finite
    values), Lost where another rank failed, and Stopped after SIGTERM or Ctrl-C. Only the main process logs and writes
    files."""
    ranks = join(c.patience)
    with ranks.failing():
        console = (console or Console()) if ranks.main else Console(quiet=True)
        return _train(c, resume, console, ranks, policy, scorers)


def _train(
    c: Config,
    resume: bool,
    console: Console,
    ranks: Ranks,
    policy: Trainable | None,
    scorers: Mapping[str, RewardModel] | None,
) -> Path:
    say, out = partial(console.print, markup=False, highlight=False, soft_wrap=True), Path(c.out)
    ranks.assert_equal(c.model_dump_json(), "the config")
    locked = folder.locked(out, say) if ranks.main else nullcontext()
    with locked, finite.oom_as_failed(), progress.shown(console) as show_progress:
        if ranks.main:
            folder.check(out, c, resume)
            with folder.failing(out):
                folder.tidy(out)
            tracking.check(c.trackers)
        ranks.barrier("the check of the folder")
        run = open_session(c, ranks, policy, scorers)
        if ranks.main:
            saved = len(checkpoint.numbered(out / "checkpoints"))
            folder.check_space(out, saving.size(run) * max(1, c.keep_checkpoints + 2 - saved))
        if ranks.main:
            for line in cut(
                (run.policy, *run.rewards.scorers.values()), [p.text for p in (*run.prompts.all, *run.held_out)]
            ):
                print(f"mmalign: {line}", file=sys.stderr)
        say(planning.describe(run.config, run.cost))
        done = saving.restore(run, out, say) if resume else 0
        ranks.assert_equal(
            [done, fingerprint(run.policy.adapter(), digits=16)], "the iteration and the adapter to start with"
        )
        tracked = c if ranks.main else c.model_copy(update={"trackers": []})
        with tracking.opened(tracked, out, done, console) as trackers, folder.failing(out), stopping() as stop:
            if ranks.main:
                files.replace(out / "config.yaml", configs.dump(c).encode())
                folder.rewind(out, done, say)
                saving.prune(c, out, done)
            ranks.barrier("the run's folder")
            _continue(run, out, done, trackers, stop, alarms.Watch(c, out, say, ranks.main), console, show_progress)
        best = saving.best(out, c.best_by)
        if best is not None and best != c.iterations:
            say(f"best held-out {c.best_by}: {out / 'checkpoints' / f'{best:06d}'}")
    return out


def _continue(
    run: Session,
    out: Path,
    done: int,
    trackers: Trackers,
    stop: Stop,
    watch: alarms.Watch,
    console: Console,
    show_progress: progress.Refresh,
) -> None:
    """From the state after `done` iterations to the end, or to where the KL budget is spent. It is saved before it is
    evaluated, so that an evaluation can be left at any time."""
    c, clock, ranks = run.config, run.clock, run.ranks
    clock.read()  # what came before belongs to no iteration
    evaluated = ranks.all_gather_object([row["iteration"] for row in watch.evaluations], "what was evaluated")[0]
    try:
        with doing("training", "iterations", c.iterations, done, _besides(run, done, evaluated)) as work:
            while True:
                last = done == c.iterations or watch.ended
                if watch.ended:  # before all iterations
                    work.to_do |= {"iterations": 0, "checkpoints": 0, "images": _images(run, done, last)}
                if run.held_out and (last or _shown(c, done)) and done not in evaluated:
                    watch.evaluations.append(_evaluate(run, out, done, last, trackers, console))
                    work.did("images", _images(run, done, last))
                    show_progress()
                if last:
                    break
                with stop.finishing():
                    row = iterate(run, done, partial(snapshots.write, run, out, done) if _shown(c, done + 1) else None)
                    done += 1
                    with clock.of("io"):
                        if ranks.main:
                            files.append(out / "metrics.jsonl", row)
                            trackers.log(row, done)
                            if _shown(c, done) and trackers.working:
                                trackers.show(tracking.credit(out, done), done)
                        watch.look(row, run.learner.skips.reasons)
                    work.notes = f"reward {row['reward']:.3f}", f"{row['nfe_per_second']:.0f} NFE/s"
                    work.did("iterations")
                    stop.share(ranks.all_gather_object(stop.received, "signals"))
                    if stop.received or watch.ended or _shown(c, done) or done % c.checkpoint_every == 0:
                        with clock.of("io"):
                            saving.save(run, out, done)
                        work.did("checkpoints")
    except Stopped:
        console.print(f"stopped by {stop.received.name} after iteration {done}; --resume continues from there")
        raise


def _shown(c: Config, done: int) -> bool:
    """Whether the state after `done` iterations is evaluated."""
    return done in (0, c.iterations) or (c.eval_every > 0 and done % c.eval_every == 0)


def in_between(c: Config, held_out: int) -> int:
    """Evaluations between the first and the last use every n-th held-out prompt; returns n."""
    return max(1, held_out // c.eval_prompts) if c.eval_prompts else 1


def _images(run: Session, done: int, last: bool) -> int:
    """The images of the evaluation after `done` iterations."""
    if last or done == 0:
        return len(run.held_out) * run.config.eval_seeds
    return len(run.held_out[:: in_between(run.config, len(run.held_out))])


def _besides(run: Session, done: int, evaluated: Collection[int]) -> dict[str, int]:
    """What a run still takes besides iterations, after `done` of them: checkpoints, and images of evaluations."""
    c = run.config
    states = range(done, c.iterations + 1)
    shown = [i for i in states if _shown(c, i) and i not in evaluated]
    saved = [i for i in states if i > done and (_shown(c, i) or i % c.checkpoint_every == 0)]
    return {"images": sum(_images(run, i, i == c.iterations) for i in shown), "checkpoints": len(saved)}


def _evaluate(run: Session, out: Path, done: int, last: bool, trackers: Trackers, console: Console) -> dict:
    """Evaluate the state after `done` iterations, at the start and the end on all held-out prompts and with the images
    written. The row, which is returned, is written last: it implies that the images are there."""
    c, start = run.config, time.perf_counter()
    name = "after" if last else None if done else "before"
    stride = in_between(c, len(run.held_out))
    prompts, seeds = (run.held_out, c.eval_seeds) if name else (run.held_out[::stride], 1)
    if name == "before":
        console.print(f"before: {len(prompts)} held-out prompts, {seeds} seeds each, {c.eval_steps} ODE steps")
    with run.clock.of("evaluate"), run.learner.averaged() if done else run.policy.reference():
        work = partial(
            evaluate.evaluate_distributed, run.ranks, run.policy, prompts, seeds, c.eval_steps, run.rewards.scorers
        )
        result = run.fits["batch"](work)
    if result is None:  # only the main process has it
        return {"iteration": done, "name": name}
    _stop_if_failing(run, done, result)
    means = result.means()
    seconds = time.perf_counter() - start
    row = {"iteration": done, "name": name, "images": len(result.images), "seconds": seconds}
    if c.best_by:
        shared = (result.member == 0) & (result.prompt % (stride if name else 1) == 0)
        row["compared"] = float(result.parts[c.best_by][shared].nanmean())
    with run.clock.of("io"):
        sheet = out / "images" / f"{name or f'{done:06d}'}.png"
        evaluate.contact_sheet(result.images, sheet)
        if name:
            layouts.write(result, prompts, out / "images" / name)
        row |= means
        files.append(out / "evaluations.jsonl", row)
        logged = {key: value for key, value in row.items() if key not in ("iteration", "name")}
        trackers.log({f"held_out/{key}": value for key, value in logged.items()}, done)
        trackers.show(tracking.sheet(sheet), done)
    if name is None:
        scores = ", ".join(f"{name} {value:.3f}" for name, value in means.items())
        console.print(f"iteration {done}: held-out {scores}")
    return row


def _stop_if_failing(run: Session, done: int, result: evaluate.Evaluation) -> None:
    """Raises Failed where too many images have no reward, unless rewards are only shown (with records). Nothing of the
    evaluation is written then: a resumed run repeats it."""
    if not run.config.rewards or run.records:
        return
    missing = run.rewards.combination(done)(result.parts, result.prompt).isnan().nonzero()[:, 0].tolist()
    parts = {name: result.parts[name] for name in run.config.rewards}
    stop_if_failing(
        {i: result.failures.get(i, silent(parts)) for i in missing}, len(result.images), run.config.max_failed
    )
