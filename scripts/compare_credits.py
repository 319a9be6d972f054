"""Compare credits and objectives on the embedded model, at equal processor time of one core.

    export OMP_NUM_THREADS=1
    for m in nft awm ...; do for k in 0 1 2; do python scripts/compare_credits.py tune "$m" $k; done; done
    for m in nft awm ...; do for s in 0 1 2 3 4 5; do python scripts/compare_credits.py run "$m" $s; done; done
    python scripts/compare_credits.py table

Every run has the adapter of configs/tiny_branch.yaml; METHODS has what differs, and TRIALS the other settings that each
was tried with. `tune` trains trial k with one seed and evaluates it on the validation captions; `run` takes the trial
that ended highest there, and evaluates on the test captions. The number of iterations is what fits the processor time,
measured on the first of the run's own iterations; loading and evaluations do not count. With `--world things` all is
done on the other embedded world; give it another `--out`.
"""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from tiny_worlds import SHAPES, WORLDS, World, world_of

from mmalign import policy as policies, train as trainer
from mmalign.config import load as configs
from mmalign.evaluation.comparison import cluster_means, over_runs
from mmalign.evaluation.evaluate import Evaluation, evaluate
from mmalign.training import setup
from mmalign.training.session import Session
from reward_models import Prompt, files
from reward_models.meaning import clusters

BASE = "configs/tiny_branch.yaml"
SDE = "plan=sde seeds=12 prompts_per_iteration=8 credit=terminal"
EARLY = "plan=window plan.steps=[0,3] seeds=12 prompts_per_iteration=9"
DENSE = "plan=sde seeds=12 credit=gain"
PUBLISHED = (
    "plan=sde seeds=12 prompts_per_iteration=2 credit=gain steps=10 kernel=flow_sde kernel.noise=0.7 "
    "advantage.scale=group objective.weighting=none"
)
IMAGES = (
    "plan=ode kernel=flow_sde kernel.noise=0.7 credit=null loss=null steps=4 seeds=8 prompts_per_iteration=8 ema=0.9 "
    "learning_rate=1.2e-3"
)
GRADIENTS = (
    "plan=ode kernel=flow_sde kernel.noise=0.7 credit=null loss=null advantage=null seeds=2 prompts_per_iteration=8 "
    "ema=0.9 learning_rate=3e-4 watch=[shapes,clip]"
)
GROWN = 'extend={"type":"frontier","leaves":14}'
EASY_FIRST = (
    '{"type":"stages","every":3,"tags":["colors","one_object","position","two_objects","color_attr","counting","text"]}'
)
SPARSE = {"type": "sparse", "steps": 3}
NOISED = "objective.span=[0,0.6] objective.draws=1 objective.pull=0.1"


def back(way: Mapping = SPARSE, pull: float = 0.1) -> str:
    """The objective `backprop`, as a word of the command line."""
    return json.dumps({"type": "backprop", "way": way, "pull": pull}, separators=(",", ":"))


def added(kind: str, ramp: bool = False) -> str:
    """A credit of steps added to that of finished images, whose weight rises from 0 with `ramp`, as a word."""
    terms = [{"type": kind, "completion": 2}, {"type": "terminal", "weight": {"start": 0, "end": 1} if ramp else 1}]
    return json.dumps(terms, separators=(",", ":"))


METHODS = {
    "terminal": SDE,
    "terminal, steps 0 to 2": f"{EARLY} credit=terminal",
    "guard": f"{SDE} loss=guard loss.clip=2e-6 objective=grpo",
    "clipped, 2 updates": f"{SDE} minibatches=2 loss.clip=1e-3",
    "guard, 2 updates": f"{SDE} minibatches=2 loss=guard loss.clip=2e-5 objective=grpo",
    "masked, 2 updates": f"{SDE} minibatches=2 loss=masked loss.clip=1e-5",
    "dense, published": PUBLISHED,
    "dense, n = 2": f"{DENSE} prompts_per_iteration=6 credit.completion=2",
    "dense, fitted, steps 0 to 2": f"{EARLY} prompts_per_iteration=5 credit=gain credit.control=fit",
    "branch": "prompts_per_iteration=12",
    "nft": f"{IMAGES} objective=nft {NOISED}",
    "nft, regions": f"{IMAGES} objective=nft {NOISED} region=shapes advantage.regional=0.5",
    "awm": f"{IMAGES} objective=awm {NOISED}",
    "advantage_flow": f"{IMAGES} objective=advantage_flow {NOISED}",
    "online_dpo": f"{IMAGES} advantage=null objective=online_dpo",
    "rft": f"{IMAGES} advantage=null objective=rft objective.draws=16 learning_rate=3e-4",
    "gain and terminal": f"{DENSE} prompts_per_iteration=6 credit={added('gain')}",
    "gain, then terminal": f"{DENSE} prompts_per_iteration=6 credit={added('gain', ramp=True)}",
    "renorm": f"{EARLY} prompts_per_iteration=5 credit=renorm advantage.scale=group",
    "prl": f"{EARLY} credit=prl",
    "value": f"{EARLY} credit=value credit.warmup=3",
    "implicit": f"{EARLY} prompts_per_iteration=7 credit=implicit",
    "prof": f"{EARLY} prompts_per_iteration=5 credit=gain select=prof",
    "salvage": f"{EARLY} prompts_per_iteration=5 credit=gain extend=salvage",
    "tree": "plan=tree plan.steps=[0,2] plan.children=4 prompts_per_iteration=6",
    "frontier": f"{EARLY} seeds=4 prompts_per_iteration=7 credit=branch credit.baseline=prompt {GROWN}",
    "stages": f"{EARLY} credit=terminal draw={EASY_FIRST}",
    "self.gap": f'{EARLY} prompts_per_iteration=7 credit=terminal rewards={{"self.gap":1}} watch=[shapes,clip]',
    "backprop, classifier": f'{GRADIENTS} rewards={{"shapes_classifier.logit":1}} objective={back()}',
}
FAST = "learning_rate=2.4e-3"
TRIALS = ("", "learning_rate=2.4e-3", "learning_rate=3e-4")  # beside the rate of each
TUNING = {  # where something else matters more than the rate
    "clipped, 2 updates": ("", "loss.clip=1e-4", "loss.clip=1e-2"),
    "guard, 2 updates": ("", "loss.clip=2e-6", "loss.clip=2e-4"),
    "masked, 2 updates": ("", "loss.clip=1e-6", "loss.clip=1e-4"),
    "dense, published": (*TRIALS, f"{FAST} kernel.noise=0.1", f"{FAST} kernel.noise=0.3"),  # less noise: for things
    "online_dpo": ("", "objective.scale=1", "learning_rate=3e-4"),
    "rft": ("", "learning_rate=1e-4", "learning_rate=1e-4 seeds=4 prompts_per_iteration=16"),
    "gain and terminal": ("", FAST),
    "gain, then terminal": ("", FAST),
    "renorm": ("", FAST),
    "prl": ("", FAST, f"{FAST} credit.beta=0.1"),
    "value": ("", FAST, f"{FAST} credit.floor=0", f"{FAST} plan=sde prompts_per_iteration=8 credit.floor=0.02"),
    "implicit": ("", FAST, f"{FAST} credit.process=0.3"),
    "prof": ("", FAST, f"{FAST} select.process=mean"),
    "salvage": ("", FAST, f"{FAST} extend.per_group=4"),
    "tree": ("", FAST, f"{FAST} plan.steps=[0,1] plan.children=5 prompts_per_iteration=4"),
    "frontier": ("", FAST),
    "stages": ("", FAST),
    "self.gap": ("", FAST),
    "backprop, classifier": (
        "",
        "learning_rate=1e-3",
        "learning_rate=1e-4",
        f"objective={back(way={'type': 'last', 'steps': 1})}",
        f"objective={back(way={'type': 'jump'})}",
        f"objective={back(pull=0.0)}",
        f"objective={back(pull=0.5)}",
        "steps=4 seeds=4",
        "seeds=1 prompts_per_iteration=32",
        "seeds=4 prompts_per_iteration=8 learning_rate=1e-3",
    ),
}
POINTS = 4  # evaluations, without the first
Named = Annotated[str, typer.Option("--world", help=" or ".join(WORLDS))]
Captions = Annotated[str, typer.Option(help="validation or test")]
Out = Annotated[Path, typer.Option(help="folder of the results")]
app = typer.Typer(add_completion=False)


def name_of(method: str, number: int | str) -> str:
    return f"{method.replace(', ', '-').replace(' ', '_')}-{number}.json"


def words_of(world: World, overrides: str) -> list[str]:
    """Overrides for the world of shapes, as words for a world: with its names, model and captions, and in bfloat16
    where its model was trained in it."""
    reward = json.dumps({f"{world.name}.strict": 0.5, f"{world.name}.partial": 0.5}, separators=(",", ":"))
    clip = json.dumps({"clip": {"model": world.clip}}, separators=(",", ":"))
    place = f"model=assets/{world.model} prompts=assets/prompts/{world.prompts}train.jsonl scorers={clip}"
    precision = ["precision=bfloat16"] if world.half else []
    return [*place.split(), f"rewards={reward}", *precision, *overrides.replace(SHAPES.name, world.name).split()]


def iterations_for(c, seconds: float) -> int:
    """How many iterations take so much processor time: three are timed, without the one before that warms up."""
    trial = setup.open_session(c)
    trainer.iterate(trial, 0)
    start = time.process_time()
    for i in range(1, 4):
        trainer.iterate(trial, i)
    return max(POINTS + 3, round(3 * seconds / (time.process_time() - start)))


def measured(
    config: str, overrides: Sequence[str], seconds: float, prompts: Sequence[Prompt], world: World = SHAPES
) -> dict:
    """Train for `seconds` of processor time; the scores of `prompts` before and after (two seeds), and
    at the POINTS between (one seed)."""
    policies.quiet()
    torch.set_flush_denormal(True)
    load = partial(configs.load, config)
    still = [*overrides, "held_out=null", "out=runs/none"]
    count = iterations_for(load([*still, "cooldown=0"]), seconds)
    run = setup.open_session(load([*still, f"iterations={count}", f"cooldown={count - 3}"]))
    spent, curve, work = 0.0, [], []
    with run.policy.reference():
        before = scores(run, prompts, 2)
    strict = f"{world.name}.strict"
    curve.append((0.0, before.means()[strict]))
    for i in range(count):
        start = time.process_time()
        row = trainer.iterate(run, i)
        spent += time.process_time() - start
        work.append((row["forwards"], row["replay_forwards"], row["decodes"]))
        if i + 1 < count and (i + 1) * POINTS // count > i * POINTS // count:
            with run.learner.averaged():
                curve.append((spent, scores(run, prompts, 1).means()[strict]))
    with run.learner.averaged():
        after = scores(run, prompts, 2)
    curve.append((spent, after.means()[strict]))
    return {
        "overrides": [*overrides], "iterations": count, "seconds": [t for t, _ in curve],
        "strict": [score for _, score in curve], "work": np.mean(work, 0).tolist(), "before": of(before),
        "after": of(after), "diversity": [one.means()["diversity"] for one in (before, after)],
        "validated": after.means()[strict],
    }  # fmt: skip


def scores(run: Session, prompts: Sequence[Prompt], seeds: int) -> Evaluation:
    return evaluate(run.policy, prompts, seeds, run.config.eval_steps, run.rewards.scorers, 256)


def of(result: Evaluation) -> dict[str, list[float]]:
    return {name: values.tolist() for name, values in result.parts.items()}


def write(path: Path, row: Mapping) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, json.dumps(row))


def read(path: Path) -> dict:
    return json.loads(files.text(path))


@app.command()
def tune(
    method: str, trial: int, seconds: float = 60.0, out: Out = Path("runs/compare"), name: Named = SHAPES.name
) -> None:
    """Train one trial of a method, with one seed, and evaluate it on the validation captions."""
    world = world_of(name)
    words = [*words_of(world, f"{METHODS[method]} {TUNING.get(method, TRIALS)[trial]}"), "seed=100"]
    row = measured(BASE, words, seconds, world.held_out("validation"), world)
    write(out / "tune" / name_of(method, trial), row | {"trial": TUNING.get(method, TRIALS)[trial]})
    print(f"{method}, {TUNING.get(method, TRIALS)[trial] or 'unchanged'}: {row['validated']:.3f}")


def chosen(method: str, out: Path) -> str:
    """The trial that ended highest on the validation captions; the first where none was tried."""
    rows = [read(path) for path in sorted((out / "tune").glob(name_of(method, "[0-9]")))]
    return max(rows, key=lambda row: row["validated"])["trial"] if rows else ""


@app.command()
def run(
    method: str, seed: int, seconds: float = 60.0, out: Out = Path("runs/compare"), name: Named = SHAPES.name
) -> None:
    """Train one method and evaluate it on the test captions."""
    world = world_of(name)
    words = [*words_of(world, f"{METHODS[method]} {chosen(method, out)}"), f"seed={seed}"]
    row = measured(BASE, words, seconds, world.held_out("test"), world)
    write(out / name_of(method, seed), row)
    print(f"{method}, seed {seed}: {row['validated']:.3f} after {row['iterations']} iterations")


@app.command()
def table(
    out: Out = Path("runs/compare"), figure: Path = Path("docs/figures/credits.png"),
    goal: Annotated[float, typer.Option(help="strict score that methods are timed to reach")] = 0.65,
    name: Named = SHAPES.name,
) -> None:  # fmt: skip
    """Print the table (Markdown) and draw the curves."""
    report(out, METHODS, goal, world_of(name).held_out("test"), figure, world_of(name))


def report(
    out: Path, methods: Iterable[str], goal: float, prompts: Sequence[Prompt], figure: Path, world: World = SHAPES
) -> None:
    """The table and the curves of the finished runs, with the time at which each method's mean reached `goal`."""
    rows = {m: [read(path) for path in sorted(out.glob(name_of(m, "[0-9]")))] for m in methods}
    rows = {m: runs for m, runs in rows.items() if runs}
    end = min(row["seconds"][-1] for runs in rows.values() for row in runs)
    grid = np.linspace(0, end, 101)  # seeds are evaluated at different times: linear between evaluations
    curves = {m: np.array([np.interp(grid, r["seconds"], r["strict"]) for r in runs]) for m, runs in rows.items()}
    cluster = clusters(p.text for p in prompts for _ in range(2))
    headings = ("method", "trial", "seeds", "iterations", "forwards, replayed, images", "strict", "rise, 95 %")
    strict, *shown = f"{world.name}.strict", f"{world.name}.partial", "clip.cosine"
    headings = (*headings, *shown, "diversity", f"{goal:g} at")
    print(f"| {' | '.join(headings)} |\n|{'---|' * len(headings)}")
    for m, runs in rows.items():
        print(f"| {' | '.join(cells(m, runs, curves[m], grid, goal, cluster, chosen(m, out), strict, shown))} |")
    before = next(iter(rows.values()))[0]
    first = {name: float(np.nanmean(values)) for name, values in before["before"].items()}
    print("\nbefore: " + ", ".join(f"{name} {first[name]:.3f}" for name in (strict, *shown)), end="")
    print(f", diversity {before['diversity'][0]:.3f}")
    draw(grid, curves, goal, figure)


def cells(
    method: str, runs: Sequence[dict], curves: np.ndarray, grid: np.ndarray, goal: float, cluster: torch.Tensor,
    trial: str, strict: str, shown: Sequence[str],
) -> list[str]:  # fmt: skip
    """A row of the table."""

    def rises(name: str) -> torch.Tensor:
        sides = [
            [cluster_means(torch.tensor(row[side][name]), cluster) for row in runs] for side in ("before", "after")
        ]
        return torch.stack(sides[1]) - torch.stack(sides[0])

    rise, past = over_runs(rises(strict)), grid[curves.mean(0) >= goal]
    work = np.mean([row["work"] for row in runs], 0)
    ends = [np.nanmean(row["after"][strict]) for row in runs]
    return [
        method, trial or "unchanged", str(len(runs)), f"{np.mean([row['iterations'] for row in runs]):.0f}",
        f"{work[0]:.0f}, {work[1]:.0f}, {work[2]:.0f}", f"{np.mean(ends):.3f} ({min(ends):.3f} to {max(ends):.3f})",
        f"{rise.rise:+.3f} ({rise.low:+.3f} to {rise.high:+.3f})",
        *(f"{np.mean([np.nanmean(row['after'][name]) for row in runs]):.3f}" for name in shown),
        f"{np.mean([row['diversity'][1] for row in runs]):.3f}", f"{past[0]:.0f} s" if len(past) else "not",
    ]  # fmt: skip


def draw(grid: np.ndarray, curves: dict[str, np.ndarray], goal: float, figure: Path) -> None:
    """The mean curves, each with the standard error over its seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plot, axis = plt.subplots(figsize=(8, 4.8))
    colours = plt.get_cmap("tab20").colors
    for colour, (m, scored) in zip(colours, curves.items(), strict=False):
        middle, error = scored.mean(0), scored.std(0, ddof=1) / len(scored) ** 0.5 if len(scored) > 1 else 0.0
        axis.plot(grid, middle, label=m, color=colour)
        axis.fill_between(grid, middle - error, middle + error, color=colour, alpha=0.15)
    axis.axhline(goal, color="#bbb", lw=0.8, zorder=0)
    axis.set_xlabel("training time of one core [s]")
    axis.set_ylabel("strict score")
    axis.legend(frameon=False, ncols=2, fontsize=8)
    plot.tight_layout()
    figure.parent.mkdir(parents=True, exist_ok=True)
    plot.savefig(figure, dpi=110)


if __name__ == "__main__":
    app()
