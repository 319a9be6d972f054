"""Train each kind of run for two iterations, take its last checkpoint away, resume it, and compare.

    python scripts/resume_kinds.py                   # on the GPU if there is one; exit code 1 if a run differs
    python scripts/resume_kinds.py --only nft --only window

The kinds are all objectives that sample, with the credits, masks, losses, selections and combination rules between
them, on the embedded model with a few prompts. A run is good if its adapter moved, and if what was resumed equals the
uninterrupted run in every bit of adapter, averages and optimiser, and in every number of its record that is not a time.
"""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from kill_and_resume import outcome
from rich.console import Console

from mmalign import policy as policies, run as runs
from mmalign.config import load as configs
from mmalign.runs import jsonl
from reward_models import files

ALL = [
    "prompts_per_iteration=4", "warmup=0", "cooldown=0", "iterations=2", "eval_every=1", "eval_prompts=8",
    "eval_seeds=1", "checkpoint_every=1",
]  # fmt: skip
SDE = ["plan=sde", "seeds=4"]
ODE = ["plan=ode", "seeds=4", "credit=null", "kernel=flow_sde"]
PLAIN = [*ODE, "advantage=null"]
KINDS = {
    "branch": [],
    "gain": [*SDE, "credit={type: gain, control: fit}", "region=shapes", "advantage.scale=group",
             "advantage.saturated=0.99"],
    "terminal": [*SDE, "credit=terminal", "objective.beta=0.01", "mask={type: prompt, share: 0.5}", "max_kl=1.0"],
    "window": ["plan={type: window, steps: [0,2]}", "credit=terminal", "seeds=4", "precision=bfloat16",
               "rollout_parts=2", "loss=guard", "prompts_per_iteration=8"],  # of 4, each may have equal rewards
    "gdpo": [*SDE, "credit=terminal", "combine=gdpo", "at_least={clip.cosine: {bound: 0.7}}"],
    "nft": [*ODE, "objective={type: nft, pull: 0.1, lag: {most: 0.5, rate: 0.2}}"],
    "nft of regions": [*ODE, "objective=nft", "region=shapes", "region_grid=[2,2]"],
    "awm": [*ODE, "objective={type: awm, weight: huber}", "minibatches=2", "select={type: extremes, keep: 2}"],
    "advantage_flow": [*ODE, "objective=advantage_flow", "scouts={ratio: 2, steps: 3}", "draw=pass_rate"],
    "online_dpo": [*PLAIN, "objective=online_dpo"],
    "rft": [*PLAIN, "objective=rft"],
    "backprop": [*PLAIN, "objective={type: backprop, way: sparse}", "rewards={clip.cosine: 1.0}"],
    "sum": [*PLAIN, "objective={type: sum, parts: [rft, backprop]}", "rewards={clip.cosine: 1.0}"],
    "srum": [*PLAIN, "objective=srum", "region=shapes"],
    "rgdpo": [*PLAIN, "objective=rgdpo", "region=shapes"],
}  # fmt: skip


def tried(name: str, place: Path) -> tuple[str, bool]:
    """Train, resume and compare in a folder: what came of it, and whether it is good."""
    held_out, out, quiet = place / "held_out.jsonl", place / "run", Console(quiet=True)
    lines = files.lines(files.text("assets/prompts/validation.jsonl"))
    files.write(held_out, "\n".join(lines[:8]) + "\n")
    c = configs.load("configs/tiny_branch.yaml", [*ALL, *KINDS[name], f"held_out={held_out}", f"out={out}"])
    runs.train(c, console=quiet)
    whole = outcome(out)
    shutil.rmtree(out / "checkpoints" / "000002")
    before = outcome(out)
    runs.train(c, resume=True, console=quiet)
    again, rows = outcome(out), jsonl.rows(out / "metrics.jsonl")
    different = [part for part in whole if again[part] != whole[part]]
    moved = before["adapter"] != whole["adapter"]
    trained = sum(row["transitions"] for row in rows)
    figure = f"{trained} rows, adapter {'moved' if moved else 'the same after an iteration'}, "
    return figure + f"resumed, these differ: {', '.join(different) or 'none'}", moved and not different


def results(names: list[str]) -> Iterator[tuple[str, str, bool]]:
    for name in names:
        with tempfile.TemporaryDirectory() as place:
            yield name, *tried(name, Path(place))


def main(only: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(KINDS)}")] = None) -> None:
    if unknown := {*(only or ())} - {*KINDS}:
        print(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}", file=sys.stderr)
        raise typer.Exit(2)
    policies.quiet()
    good = True
    for name, figure, fine in results(only or [*KINDS]):
        print(f"{name}: {figure}", flush=True)
        good = good and fine
    raise typer.Exit(0 if good else 1)


if __name__ == "__main__":
    typer.run(main)
