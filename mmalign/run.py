"""A run around the iteration: evaluations, checkpoints, trackers and signals.

One run lives in one folder: `config.yaml` (resolved), `metrics.jsonl`, `evaluations.jsonl`, `credit.jsonl`,
`alarms.jsonl`, `images/`, `checkpoints/`, `report.html`, and the files of trackers.
"""

import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from mmalign.activity import Work, doing
from mmalign.config import load as configs
from mmalign.config.schema import TRAINING, Config
from mmalign.distributed.processes import join
from mmalign.evaluation import evaluate, layouts
from mmalign.reporting import progress, trackers as tracking
from mmalign.reporting.trackers import Trackers
from mmalign.rewards.judge import silent, stop_if_failing
from mmalign.runs import alarms, checkpoint, folder, machine
from mmalign.runs.signals import Stop, Stopped, stopping
from mmalign.train import Row, iterate
from mmalign.training import finite, planning, refreshing, saving, snapshots
from mmalign.training.session import Session
from mmalign.training.setup import NOTHING, Given, open_session
from reward_models import Prompt, files
from reward_models.lengths import cut
from reward_models.weights import fingerprint


def train(c: Config, resume: bool = False, console: Console | None = None, given: Given = NOTHING) -> Path:
    """Run a config to its end and return the run's folder; `given` as in `open_session`. Raises BadInput before
    anything is written, Failed where it cannot continue (disk full, out of memory, scores that fail, non-finite
    values), Lost where another rank failed, and Stopped after SIGTERM or Ctrl-C. Only the main process logs and writes
    files."""
    with opened(c, resume, console, given) as training, stopping() as stop:
        for _ in training.rows(stop):
            pass
    return training.out


@dataclass
class Training:
    """A run in its folder, which has finished `done` iterations. `config` is the one that it was started with; the
    session's has been fitted to the budget and the model."""

    config: Config
    run: Session
    out: Path
    console: Console
    show_progress: progress.Refresh
    done: int

    def rows(self, stop: Stop) -> Iterator[Row]:
        """Run it to its end; yields the row of each iteration once it is written. A caller that leaves early leaves a
        run that can be resumed."""
        c, out, ranks = self.config, self.out, self.run.ranks
        say = partial(self.console.print, markup=False, highlight=False, soft_wrap=True)
        tracked = c if ranks.main else c.model_copy(update={"trackers": []})
        with tracking.opened(tracked, out, self.done, self.console) as trackers, folder.failing(out):
            if ranks.main:
                files.replace(out / "config.yaml", configs.dump(c).encode())
                folder.rewind(out, self.done, say)
                refreshing.rewind(out, self.done)
                saving.prune(c, out, self.done)
            ranks.barrier("the run's folder")
            try:
                yield from self._continue(trackers, stop, alarms.Watch(c, out, say, ranks.main))
            except GeneratorExit:
                saving.save(self.run, out, self.done)
                return
        best = saving.best(out, c.best_by)
        if best is not None and best != c.iterations:
            say(f"best held-out {c.best_by}: {out / 'checkpoints' / f'{best:06d}'}")

    def _continue(self, trackers: Trackers, stop: Stop, watch: alarms.Watch) -> Iterator[Row]:
        """From the state after `done` iterations to the end, or to where the KL budget is spent. It is saved before it
        is evaluated, so that an evaluation can be left at any time."""
        run, out, console = self.run, self.out, self.console
        c, clock, ranks = run.config, run.clock, run.ranks
        clock.read()  # what came before belongs to no iteration
        evaluated = ranks.all_gather_object([row["iteration"] for row in watch.evaluations], "what was evaluated")[0]
        try:
            with doing("training", "iterations", c.iterations, self.done, _besides(run, self.done, evaluated)) as work:
                while True:
                    last = self.done == c.iterations or watch.ended
                    if watch.ended:  # before all iterations
                        work.to_do |= dict.fromkeys(work.to_do, 0) | {"images": _images(run, self.done, last)}
                    if run.held_out and (last or _shown(c, self.done)) and self.done not in evaluated:
                        watch.evaluations.append(_evaluate(run, out, self.done, last, trackers, console))
                        work.did("images", _images(run, self.done, last))
                        self.show_progress()
                    if last:
                        break
                    if _refreshed(c, self.done):
                        refreshing.refresh(run, out, self.done, console.print)
                        work.did("refreshes")
                    with stop.finishing():
                        row = self._step(trackers, stop, watch, work)
                    yield row
        except Stopped:
            name = stop.received.name
            console.print(f"stopped by {name} after iteration {self.done}; --resume continues from there")
            raise

    def _step(self, trackers: Trackers, stop: Stop, watch: alarms.Watch, work: Work) -> Row:
        """One iteration, logged, and saved where a checkpoint is due."""
        run, out = self.run, self.out
        c, clock, ranks = run.config, run.clock, run.ranks
        show = partial(snapshots.write, run, out, self.done) if _shown(c, self.done + 1) else None
        row = iterate(run, self.done, show) | refreshing.since(run)
        self.done += 1
        shown = _shown(c, self.done)
        with clock.of("io"):
            if ranks.main:
                files.append(out / "metrics.jsonl", row)
                trackers.log(row, self.done)
                if shown and trackers.working:
                    trackers.show(tracking.credit(out, self.done), self.done)
            watch.look(row, run.learner.skips.reasons)
        work.notes = f"reward {row['reward']:.3f}", f"{row['nfe_per_second']:.0f} NFE/s"
        work.did("iterations")
        stop.share(ranks.all_gather_object(stop.received, "signals"))
        if stop.received or watch.ended or _saved(c, self.done):
            with clock.of("io"):
                saving.save(run, out, self.done)
            work.did("checkpoints")
        return row


@contextmanager
def opened(
    c: Config, resume: bool = False, console: Console | None = None, given: Given = NOTHING
) -> Iterator[Training]:
    """A run, loaded and checked, and with `resume` restored. Its folder is locked until the end of the block, and an
    error in the block ends all ranks. Raises as `train`."""
    ranks = join(c.patience)
    with ranks.failing():
        console, out = (console or Console()) if ranks.main else Console(quiet=True), Path(c.out)
        say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
        ranks.assert_equal(c.model_dump_json(), "the config")
        locked = folder.locked(out, say) if ranks.main else nullcontext()
        with locked, finite.oom_as_failed(), progress.shown(console) as show_progress:
            if ranks.main:
                folder.check(out, c, resume)
                with folder.failing(out):
                    folder.tidy(out)
                tracking.check(c.trackers)
            ranks.barrier("the check of the folder")
            run = open_session(c, ranks, given)
            if ranks.main:
                saved = len(checkpoint.numbered(out / "checkpoints"))
                folder.check_space(out, saving.size(run) * max(1, c.keep_checkpoints + 2 - saved))
                texts, suffixes = [p.text for p in (*run.prompts.all, *run.held_out)], run.rewards.rule.fan.values()
                read = [text + max(suffixes, key=len) for text in texts]
                long = *cut([run.policy], read), *cut(run.rewards.scorers.values(), texts)
                for line in filter(None, (*long, machine.busy(torch.get_num_threads()))):
                    print(f"mmalign: {line}", file=sys.stderr)
            say(planning.describe(run.config, run.cost))
            done = saving.restore(run, out, say) if resume else 0
            ranks.assert_equal(
                [done, fingerprint(run.policy.adapter(), digits=16)], "the iteration and the adapter to start with"
            )
            yield Training(c, run, out, console, show_progress, done)


def _shown(c: Config, done: int) -> bool:
    """Whether the state after `done` iterations is evaluated."""
    return done in (0, c.iterations) or (c.eval_every > 0 and done % c.eval_every == 0)


def _refreshed(c: Config, done: int) -> bool:
    """Whether the reward is refreshed after `done` iterations."""
    return c.refresh is not None and c.refresh.due(done, c.iterations)


def _saved(c: Config, done: int) -> bool:
    """Whether the state after `done` iterations is saved: before it is evaluated, or used to refresh the reward."""
    return _shown(c, done) or _refreshed(c, done) or done % c.checkpoint_every == 0


def in_between(c: Config, held_out: int) -> int:
    """Evaluations between the first and the last use every n-th held-out prompt; returns n."""
    return max(1, held_out // c.eval_prompts) if c.eval_prompts else 1


def _images(run: Session, done: int, last: bool) -> int:
    """The images of the evaluation after `done` iterations."""
    directions = len(_fan(run, done))
    if last or done == 0:
        return directions * len(run.held_out) * run.config.eval_seeds
    return directions * len(run.held_out[:: in_between(run.config, len(run.held_out))]) * run.config.eval_siblings


def _fan(run: Session, done: int) -> dict[str, str]:
    """The suffixes of an evaluation by name: none for a model that has not been trained with them."""
    return run.rewards.rule.fan if done else {"": ""}


def _besides(run: Session, done: int, evaluated: Collection[int]) -> dict[str, int]:
    """What a run still takes besides iterations, after `done` of them: checkpoints, refreshes, and images of
    evaluations."""
    c = run.config
    states = range(done, c.iterations + 1)
    shown = [i for i in states if _shown(c, i) and i not in evaluated]
    saved = [i for i in states if i > done and _saved(c, i)]
    refreshed = [i for i in states if _refreshed(c, i)]
    images = sum(_images(run, i, i == c.iterations) for i in shown)
    besides = {"images": images, "checkpoints": len(saved)}
    return besides | ({"refreshes": len(refreshed)} if c.refresh else {})


def _evaluate(run: Session, out: Path, done: int, last: bool, trackers: Trackers, console: Console) -> dict:
    """Evaluate the state after `done` iterations, at the start and the end on all held-out prompts and with all images
    written, in between on some prompts and with a few. The row, which is returned, is written last: it implies that the
    images are there."""
    c, start = run.config, time.perf_counter()
    name = "after" if last else None if done else "before"
    kind = TRAINING if c.held_out == TRAINING else "held-out"
    stride = in_between(c, len(run.held_out))
    prompts, seeds = (run.held_out, c.eval_seeds) if name else (run.held_out[::stride], c.eval_siblings)
    if name == "before":
        console.print(f"before: {len(prompts)} {kind} prompts, {seeds} seeds each, {c.eval_steps} ODE steps")
    with run.clock.of("evaluate"), run.learner.averaged() if done else run.policy.reference():
        work = partial(
            evaluate.evaluate_distributed, run.ranks, run.policy, prompts, seeds, c.eval_steps, run.rewards.scorers,
            parts=c.rollout_parts,
        )  # fmt: skip
        result, front = None, {}
        for direction, suffix in _fan(run, done).items():
            measured = run.fits["batch"](partial(work, suffix=suffix))
            result = result or measured
            if direction and measured:
                front |= {f"fan/{direction}/{part}": float(x.nanmean()) for part, x in measured.parts.items()}
    if result is None:  # only the main process has it
        return {"iteration": done, "name": name}
    _stop_if_failing(run, done, result, prompts)
    means = result.means()
    seconds = time.perf_counter() - start
    row = {"iteration": done, "name": name, "images": len(result.images), "seconds": seconds} | refreshing.since(run)
    if c.best_by:
        shared = (result.member == 0) & (result.prompt % (stride if name else 1) == 0)
        row["compared"] = float(result.parts[c.best_by][shared].nanmean())
    with run.clock.of("io"):
        sheet = out / "images" / f"{name or f'{done:06d}'}.png"
        evaluate.contact_sheet(result.images, sheet)
        layouts.write(result if name else evaluate.few(result), prompts, out / "images" / (name or f"{done:06d}"))
        row |= means | evaluate.agreements(result, c.rewards, c.watch) | front
        row |= {} if name else layouts.changes(out / "images" / "before", result, prompts)
        files.append(out / "evaluations.jsonl", row)
        logged = {key: value for key, value in row.items() if key not in ("iteration", "name")}
        trackers.log({f"held_out/{key}": value for key, value in logged.items()}, done)
        trackers.show(tracking.sheet(sheet), done)
    if name is None:
        scores = ", ".join(f"{name} {value:.3f}" for name, value in means.items())
        console.print(f"iteration {done}: {kind} prompts: {scores}")
    return row


def _stop_if_failing(run: Session, done: int, result: evaluate.Evaluation, prompts: Sequence[Prompt]) -> None:
    """Raises Failed where too many images have no reward, unless rewards are only shown (with records). Nothing of the
    evaluation is written then: a resumed run repeats it."""
    if not run.config.rewards or run.records:
        return
    reward = run.rewards.combination(done, prompts, evaluation=True)(result.parts, result.prompt)
    missing = reward.isnan().nonzero()[:, 0].tolist()
    parts = {name: result.parts[name] for name in run.config.rewards}
    stop_if_failing(
        {i: result.failures.get(i, silent(parts)) for i in missing}, len(result.images), run.config.max_failed
    )
