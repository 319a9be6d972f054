"""A run around the iteration: its folder, evaluations, checkpoints and resumption.

One run lives in one folder: `config.yaml` (resolved), `metrics.jsonl`, `evaluations.jsonl`, `credit.jsonl`, `images/`,
`checkpoints/`, `report.html`.
"""

import json
import os
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mmalign import checkpoint, config as configs, evaluate, planner
from mmalign.config import BadInput, Config
from mmalign.session import Session, open_session
from mmalign.train import iterate
from reward_models import Prompt, trust


def train(c: Config, resume: bool = False, console: Console | None = None) -> Path:
    """Run a config to its end and return the run's folder. Raises BadInput before anything is written."""
    console = console or Console()
    out = Path(c.out)
    _check_folder(out, c, resume)
    run = open_session(c)
    console.print(planner.describe(run.config, run.cost))
    done = restore(run, out) if resume else 0
    _claim(out, c)
    _truncate(out, done)
    if done == 0 and run.held_out:
        console.print(
            f"before: {len(run.held_out)} held-out prompts, {c.eval_seeds} seeds each, {c.eval_steps} ODE steps"
        )
        with run.policy.reference():
            _evaluate(run, out, "before", 0, run.held_out, c.eval_seeds)
    began, first = time.monotonic(), done
    with _progress(console) as bar:
        task = bar.add_task("training", total=c.iterations, completed=done, note="")
        while done < c.iterations:
            shown = done + 1 == c.iterations or (c.eval_every and (done + 1) % c.eval_every == 0)
            row = iterate(run, done, out if shown else None)
            done += 1
            spent = time.monotonic() - began
            row["seconds/total"] = spent / (done - first)
            _append(out / "metrics.jsonl", row)
            rate = (row["forwards"] + row["replay_forwards"]) / sum(
                row.get(f"seconds/{k}", 0.0) for k in ("rollout", "learn")
            )
            bar.update(task, completed=done, note=f"reward {row['reward']:.3f}  {rate:.0f} NFE/s")
            if c.eval_every and done % c.eval_every == 0 and done < c.iterations and run.held_out:
                with run.averaged():
                    means = _evaluate(run, out, None, done, run.held_out[:: _stride(run, c)], 1)
                console.print(f"iteration {done}: reward {row['reward']:.3f}, held-out {_say(means)}")
            if done % c.checkpoint_every == 0 or done == c.iterations:
                save(run, out, done)
    if run.held_out:
        with run.averaged():
            _evaluate(run, out, "after", done, run.held_out, c.eval_seeds)
    return out


def _stride(run: Session, c: Config) -> int:
    return max(1, len(run.held_out) // c.eval_prompts) if c.eval_prompts else 1


def _say(means: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in means.items())


def _evaluate(
    run: Session, out: Path, name: str | None, iteration: int, prompts: list[Prompt], members: int
) -> dict[str, float]:
    """Evaluate the policy as it stands; a `name` keeps the images."""
    c = run.config
    start = time.perf_counter()
    result = evaluate.evaluate(run.policy, prompts, members, c.eval_steps, run.scorers, c.batch)
    means = result.means()
    _append(
        out / "evaluations.jsonl",
        {"iteration": iteration, "name": name, "images": len(result.images), "seconds": time.perf_counter() - start}
        | means,
    )
    evaluate.contact_sheet(result.images, out / "images" / f"{name or f'{iteration:06d}'}.png")
    if name:
        evaluate.write(result, prompts, out / "images" / name)
    return means


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(), console=console,
    )  # fmt: skip


def _append(path: Path, row: dict) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def _truncate(out: Path, done: int) -> None:
    """Drop the rows that a run resumed after `done` iterations writes again: later ones, and the last evaluation."""
    for file in (out / "metrics.jsonl", out / "evaluations.jsonl", out / "credit.jsonl"):
        if file.exists():
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            file.write_text("")
            for row in rows:
                if done and row["iteration"] <= done and row.get("name") != "after":
                    _append(file, row)


def _check_folder(out: Path, c: Config, resume: bool) -> None:
    saved = out / "config.yaml"
    if resume:
        if not os.path.exists(saved):
            raise BadInput(f"--resume: {out} holds no run")
        with configs.refusing():
            trust.closed(out)
        now, before = c.model_dump(), configs.load(saved).model_dump()
        changed = [key for key in now if now[key] != before[key]]
        if changed:
            key = changed[0]
            raise BadInput(f"--resume: {key} is {now[key]!r} and was {before[key]!r}; a run keeps its config")
    elif os.path.exists(saved):
        raise BadInput(f"{out} already holds a run; go on with --resume or choose another `out`")


def _claim(out: Path, c: Config) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.yaml").write_text(configs.dump(c))
    except OSError as error:
        raise BadInput(f"out: cannot write in {out}: {error.strerror}") from None


def save(run: Session, out: Path, iteration: int) -> None:
    adapter = run.policy.adapter()
    tensors = {"adapter": adapter, "ema": run.ema, "optimizer": checkpoint.optimizer_tensors(run.optimizer)}
    state = {"adapter_hash": checkpoint.fingerprint(adapter), "noise": run.levels, "multipliers": run.multipliers}
    checkpoint.save(out / "checkpoints", iteration, tensors, state)


def restore(run: Session, out: Path) -> int:
    """Load the newest checkpoint, or start over where there is none."""
    path = checkpoint.latest(out / "checkpoints")
    if path is None:
        return 0
    tensors, state = checkpoint.read(path)
    if state["noise"] != run.levels:
        raise BadInput(f"--resume: noise was {state['noise']} and is {run.levels} now; a run keeps its noise")
    run.policy.load_adapter(tensors["adapter"])
    for name, value in tensors["ema"].items():
        run.ema[name].copy_(value)
    run.multipliers.update(state["multipliers"])
    checkpoint.load_optimizer(run.optimizer, tensors["optimizer"])
    return state["iteration"]
