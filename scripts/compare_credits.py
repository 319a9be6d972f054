"""Compare credits on the embedded model, at equal training time on one core.

    for seed in 0 1 2; do for v in terminal guard window dense-1 dense-2 dense "dense-2, window" "dense, fitted" \\
            branch; do
        OMP_NUM_THREADS=1 python scripts/compare_credits.py run "$v" $seed
    done; done
    python scripts/compare_credits.py table

Every run has the quickstart's adapter, rate and kernel; the differences are in the table below. The number of
iterations is what fits the time, measured on the run's own iterations; evaluations do not count. `table` prints the
final scores and the time at which each reached the final score of `terminal`, and draws the curves.
"""

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from mmalign import policy as policies, run as runs, train as trainer
from mmalign.config import load as configs
from mmalign.runs import jsonl
from mmalign.training import setup

SDE = "plan=sde seeds=12"
DENSE = f"{SDE} credit=gain"
VARIANTS = {  # prompts per iteration: what makes an iteration take about as long as the others'
    "terminal": f"{SDE} credit=terminal prompts_per_iteration=8",
    "guard": f"{SDE} credit=terminal prompts_per_iteration=8 loss=guard loss.clip=2e-6 objective=grpo",
    "window": f"{SDE} credit=terminal prompts_per_iteration=12 plan=window plan.steps=[0,2]",
    "dense-1": f"{DENSE} prompts_per_iteration=7 credit.completion=1",
    "dense-2": f"{DENSE} prompts_per_iteration=6 credit.completion=2",
    "dense": f"{DENSE} prompts_per_iteration=4",
    "dense-2, window": f"{DENSE} prompts_per_iteration=20 seeds=4 credit.completion=2 plan=window plan.steps=[0,3]",
    "dense, fitted": f"{DENSE} prompts_per_iteration=5 plan=window plan.steps=[0,3] credit.control=fit",
    "branch": "prompts_per_iteration=12",
}
EVALUATIONS = 6
SCORES = ("shapes.strict", "clip.cosine")
Out = Annotated[Path, typer.Option(help="folder of the runs")]
app = typer.Typer(add_completion=False)


def seconds_of(row: dict) -> float:
    return sum(row[f"seconds/{part}"] for part in ("rollout", "decode", "reward", "learn"))


def folder_of(out: Path, variant: str, seed: int | str) -> Path:
    return out / f"{variant.replace(', ', '-')}-{seed}"


def train_for(seconds: float, folder: Path, overrides: list[str]) -> None:
    """The quickstart with these overrides for about `seconds` of training."""
    policies.quiet()
    torch.set_flush_denormal(True)
    base = [*overrides, f"out={folder}", "eval_every=0"]
    trial = setup.open_session(configs.load("configs/quickstart.yaml", base))
    rows = [trainer.iterate(trial, i) for i in range(3)]
    count = max(EVALUATIONS, round(seconds / statistics.mean(seconds_of(row) for row in rows[1:])))
    schedule = [f"iterations={count}", f"cooldown={count - 5}", f"eval_every={-(-count // EVALUATIONS)}"]
    runs.train(configs.load("configs/quickstart.yaml", [*base, *schedule, f"checkpoint_every={count}"]))


@app.command()
def run(variant: str, seed: int, seconds: float = 150.0, out: Out = Path("runs/compare")) -> None:
    """Train one variant for about `seconds`."""
    train_for(seconds, folder_of(out, variant, seed), [*VARIANTS[variant].split(), f"seed={seed}"])


def curve(folder: Path) -> dict[str, np.ndarray]:
    """Training seconds, held-out strict, clip and diversity of siblings at each evaluation of one run."""
    metrics = jsonl.rows(folder / "metrics.jsonl")
    evaluations = jsonl.rows(folder / "evaluations.jsonl")
    spent = np.cumsum([0.0, *(seconds_of(row) for row in metrics)])
    out = {name: np.array([row[name] for row in evaluations]) for name in SCORES if name in evaluations[0]}
    out["diversity"] = np.array([row["diversity"] for row in (evaluations[0], evaluations[-1])])
    out |= {"seconds": spent[[row["iteration"] for row in evaluations]], "iterations": np.array(len(metrics))}
    work = [row["forwards"] + row["replay_forwards"] for row in metrics]
    return out | {"forwards": np.array(np.mean(work)), "images": np.array(np.mean([row["decodes"] for row in metrics]))}


@app.command()
def table(out: Out = Path("runs/compare"), figure: Path = Path("docs/figures/credits.png")) -> None:
    """Print the table (Markdown) and draw the curves: mean over seeds, and their range."""
    report(out, VARIANTS, "terminal", figure)


def report(out: Path, variants: Iterable[str], goal: str, figure: Path) -> None:
    """The table and the curves of the finished runs; `goal` is the variant whose final score the others are timed to
    reach."""
    folders = {v: sorted(folder_of(out, v, "x").parent.glob(folder_of(out, v, "[0-9]").name)) for v in variants}
    runs = {v: [curve(f) for f in paths if (f / "images" / "after").is_dir()] for v, paths in folders.items()}
    runs = {v: finished for v, finished in runs.items() if finished}
    end = min(c["seconds"][-1] for finished in runs.values() for c in finished)
    grid = np.linspace(0, end, 101)  # seeds are evaluated at different times: linear between evaluations
    curves = {v: np.array([np.interp(grid, c["seconds"], c["shapes.strict"]) for c in cs]) for v, cs in runs.items()}
    reached = curves[goal].mean(0)[-1]
    shown = [name for name in SCORES[1:] if name in next(iter(runs.values()))[0]] + ["diversity"]
    headings = ["credit", "iterations", "forwards, images each", "strict (range)", *shown, f"{goal}'s end at"]
    print(f"| {' | '.join(headings)} |\n|{'---|' * len(headings)}")
    for v, finished in runs.items():
        last = [float(c["shapes.strict"][-1]) for c in finished]
        past = grid[curves[v].mean(0) >= reached]
        when = f"{past[0] / end:.0%}" if len(past) else "not"
        means = [f"{float(np.mean([c[name][-1] for c in finished])):.3f}" for name in shown]
        iterations = np.mean([c["iterations"] for c in finished])
        cells = [v, f"{iterations:.0f}", f"{finished[0]['forwards']:.0f}, {finished[0]['images']:.0f}"]
        cells += [f"{np.mean(last):.3f} ({min(last):.3f} to {max(last):.3f})", *means, when]
        print(f"| {' | '.join(cells)} |")
    before = runs[goal][0]
    print("\nbefore: " + ", ".join(f"{name} {before[name][0]:.3f}" for name in ("shapes.strict", *shown)))
    draw(grid, curves, reached, figure)


def draw(grid: np.ndarray, curves: dict[str, np.ndarray], reached: float, figure: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plot, axis = plt.subplots(figsize=(7, 4.2))
    for v, scores in curves.items():
        (line,) = axis.plot(grid, scores.mean(0), label=v)
        axis.fill_between(grid, scores.min(0), scores.max(0), color=line.get_color(), alpha=0.1)
    axis.axhline(reached, color="#bbb", lw=0.8, zorder=0)
    axis.set_xlabel("training time of one core [s]")
    axis.set_ylabel("held-out strict score")
    axis.legend(frameon=False, ncols=2)
    plot.tight_layout()
    figure.parent.mkdir(parents=True, exist_ok=True)
    plot.savefig(figure, dpi=110)


if __name__ == "__main__":
    app()
