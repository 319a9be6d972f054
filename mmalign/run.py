"""A run around the iteration: evaluations, checkpoints and resumption.

One run lives in one folder: `config.yaml` (resolved), `metrics.jsonl`, `evaluations.jsonl`, `credit.jsonl`,
`alarms.jsonl`, `images/`, `checkpoints/`, `report.html`, and what trackers keep. What the next iteration does is a
function of the config, the iteration and what a checkpoint holds, so a resumed run ends with the bits of one that was
never interrupted.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mmalign.config import load as configs
from mmalign.config.schema import RESUMABLE, Config
from mmalign.distributed.processes import Ranks, join
from mmalign.errors import BadInput
from mmalign.evaluation import evaluate, layouts
from mmalign.policy.protocol import Trainable
from mmalign.reporting import trackers as tracking
from mmalign.reporting.trackers import Trackers
from mmalign.rewards.judge import silent, stop_if_failing
from mmalign.runs import alarms, checkpoint, folder, jsonl, machine, optimizer_state, state as states
from mmalign.runs.signals import Stop, Stopped, stopping
from mmalign.seeds import gaussian, seed_of
from mmalign.train import iterate
from mmalign.training import finite, planning, snapshots
from mmalign.training.learner import optimizer_class
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
    with folder.locked(out, say) if ranks.main else nullcontext(), finite.oom_as_failed():
        if ranks.main:
            folder.check(out, c, resume)
            with folder.failing(out):
                folder.tidy(out)
            tracking.check(c.trackers)
        ranks.barrier("the check of the folder")
        run = open_session(c, ranks, policy, scorers)
        if ranks.main:
            saved = len(checkpoint.numbered(out / "checkpoints"))
            folder.check_space(out, _size(run) * max(1, c.keep_checkpoints + 2 - saved))
        if ranks.main:
            for line in cut(
                (run.policy, *run.rewards.scorers.values()), [p.text for p in (*run.prompts.all, *run.held_out)]
            ):
                print(f"mmalign: {line}", file=sys.stderr)
        console.print(planning.describe(run.config, run.cost))
        done = restore(run, out, say) if resume else 0
        ranks.assert_equal(
            [done, fingerprint(run.policy.adapter(), digits=16)], "the iteration and the adapter to start with"
        )
        tracked = c if ranks.main else c.model_copy(update={"trackers": []})
        with tracking.opened(tracked, out, done, console) as trackers, folder.failing(out), stopping() as stop:
            if ranks.main:
                files.replace(out / "config.yaml", configs.dump(c).encode())
                folder.rewind(out, done, say)
                _prune(c, out, done)
            ranks.barrier("the run's folder")
            _continue(run, out, done, trackers, stop, alarms.Watch(c, out, say, ranks.main), console)
        best = _best(out, c.best_by)
        if best is not None and best != c.iterations:
            say(f"best held-out {c.best_by}: {out / 'checkpoints' / f'{best:06d}'}")
    return out


def _continue(
    run: Session, out: Path, done: int, trackers: Trackers, stop: Stop, watch: alarms.Watch, console: Console
) -> None:
    """From the state after `done` iterations to the end, or to where the KL budget is spent. It is saved before it is
    evaluated, so that an evaluation can be left at any time."""
    c, clock, ranks = run.config, run.clock, run.ranks
    clock.read()  # what came before belongs to no iteration
    evaluated = ranks.all_gather_object([row["iteration"] for row in watch.evaluations], "what was evaluated")[0]
    try:
        with _progress(console) as bar:
            task = bar.add_task("training", total=c.iterations, completed=done, note="")
            while True:
                last = done == c.iterations or watch.ended
                if run.held_out and (last or _shown(c, done)) and done not in evaluated:
                    watch.evaluations.append(_evaluate(run, out, done, last, trackers, console))
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
                    note = f"reward {row['reward']:.3f}  {row['nfe_per_second']:.0f} NFE/s"
                    bar.update(task, completed=done, note=note)
                    stop.share(ranks.all_gather_object(stop.received, "signals"))
                    if stop.received or watch.ended or _shown(c, done) or done % c.checkpoint_every == 0:
                        with clock.of("io"):
                            save(run, out, done)
    except Stopped:
        console.print(f"stopped by {stop.received.name} after iteration {done}; --resume continues from there")
        raise


def _shown(c: Config, done: int) -> bool:
    """Whether the state after `done` iterations is evaluated."""
    return done in (0, c.iterations) or (c.eval_every > 0 and done % c.eval_every == 0)


def in_between(c: Config, held_out: int) -> int:
    """Evaluations between the first and the last use every n-th held-out prompt; returns n."""
    return max(1, held_out // c.eval_prompts) if c.eval_prompts else 1


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


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(), console=console,
    )  # fmt: skip


def _size(run: Session) -> int:
    """Bytes of a checkpoint, about: adapter, average and two moments."""
    return 4 * 4 * sum(p.numel() for p in run.policy.parameters())


def _best(out: Path, name: str | None) -> int | None:
    """The saved iteration with the highest held-out mean of `name`, on the images that all evaluations share."""
    saved = {int(path.name) for path in checkpoint.numbered(out / "checkpoints")}
    rows = jsonl.rows(out / "evaluations.jsonl") if name else []
    means = {row["iteration"]: row["compared"] for row in rows if row["iteration"] in saved}
    return max((done for done, mean in means.items() if mean == mean), key=means.get, default=None)


def _kept(run: Session, iteration: int) -> dict[str, dict]:
    """What a run must go on with: its config, what it is made of, and what it draws next. Prompts, windows and noise
    have no state to be saved; a resumed run shows that it draws the same."""
    c = run.config
    prompts = run.prompts(iteration)
    noise = gaussian((8,), seed_of(c.seed, "rollout", iteration, prompts[0].id, 0))
    draws = {
        "order of prompts": [p.id for p in prompts],
        "windows": [planning.position_of(c, iteration, p.id) for p in prompts],
        "random numbers": fingerprint({"noise": noise}, digits=16),
    }
    made = run.origin | {"reference": run.rewards.reference} | draws
    return json.loads(json.dumps({"config": c.model_dump(mode="json", exclude={*RESUMABLE}), "made": made}))


def _machine(run: Session) -> dict[str, int | str]:
    return machine.describe(run.ranks.size, run.ranks.accelerator.device)


def save(run: Session, out: Path, iteration: int) -> None:
    adapter = run.policy.adapter()
    adapter_hash = fingerprint(adapter, digits=16)
    run.ranks.assert_equal(adapter_hash, f"the adapter after iteration {iteration}")
    optimizer = optimizer_state.tensors(run.learner.optimizer)  # of which each process may have a part
    if not run.ranks.main:
        return
    tensors = {"adapter": adapter, "ema": run.learner.ema, "optimizer": optimizer}
    state = {"adapter_hash": adapter_hash, "multipliers": run.rewards.multipliers, "machine": _machine(run)}
    state |= {"learnt": optimizer_state.trained(optimizer)} | _kept(run, iteration)
    folder.sync(out)
    checkpoint.save(out / "checkpoints", iteration, tensors, state)
    _prune(run.config, out, iteration)


def _prune(c: Config, out: Path, done: int) -> None:
    """Keep the checkpoints that are to be kept, where the newest is that of `done` iterations: one that is passed over,
    for it is broken, stays until a run is further."""
    saved = checkpoint.numbered(out / "checkpoints")
    if saved and int(saved[-1].name) <= done:
        checkpoint.prune(out / "checkpoints", done, c.keep_checkpoints, _best(out, c.best_by))


def restore(run: Session, out: Path, say: Callable[[str], None]) -> int:
    """Load the newest checkpoint that is whole and return its iteration; 0, to start over, where none was written."""
    saved = out / "checkpoints"
    path = checkpoint.latest(saved, say)
    if path is None and checkpoint.numbered(saved):
        raise BadInput(f"--resume: no checkpoint in {saved} is whole; to start over, remove {out}")
    if path is None:
        say(f"--resume: {out} has no checkpoint yet; starting from the beginning")
        return 0
    tensors, state = states.read(path)
    done = _held(run, path, state)
    states.check_adapter(path, tensors, run.learner.ema)
    optimizer_state.check(path, state, tensors["optimizer"], run.policy.parameters(), optimizer_class(run.config))
    run.policy.load_adapter(tensors["adapter"])
    optimizer_state.load(run.learner.optimizer, tensors["optimizer"])
    run.rewards.multipliers.update(state.multipliers)
    for name, value in tensors["ema"].items():
        run.learner.ema[name].copy_(value)
    changed = machine.difference(state.machine, _machine(run))
    if changed and run.ranks.main:
        print(f"mmalign: {changed}", file=sys.stderr)
    return done


def _held(run: Session, path: Path, state: states.State) -> int:
    """The iteration of a checkpoint of this run. BadInput for one of another."""
    file, done = path / checkpoint.STATE, state.iteration
    if done > run.config.iterations:
        raise states.refused(file, f"iteration: {done}, of a run of {run.config.iterations}")
    if state.multipliers.keys() != run.rewards.multipliers.keys():
        odd = min(state.multipliers.keys() ^ run.rewards.multipliers.keys())
        raise states.refused(file, f"multipliers: {odd!r} is in one of checkpoint and config alone")
    for kind, now in _kept(run, done).items():
        saved = getattr(state, kind)
        for what in dict.fromkeys([*saved, *now]):
            if what not in saved or what not in now:
                raise states.refused(file, f"{kind}: {'no' if what in now else 'unknown key'} {what!r}")
            if json.dumps(saved[what], sort_keys=True) != json.dumps(now[what], sort_keys=True):
                raise BadInput(f"--resume: {what} was {saved[what]} and is {now[what]} now; a run keeps its {what}")
    return done
