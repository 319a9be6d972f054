"""Draw images of a run's held-out captions before and after training: same noise, a green frame where all is right.

    python scripts/before_after.py assets/figures/before_after.png runs/quickstart

The captions are evenly spaced through the list, not selected.
"""

import textwrap
from pathlib import Path
from typing import Annotated

import matplotlib
import typer

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from mmalign.runs import jsonl
from reward_models.images import levels

GREEN, RED = "#1a9641", "#d7191c"


def main(
    figure: Annotated[Path, typer.Argument(help="PNG to write")],
    run: Annotated[Path, typer.Argument(help="folder of a run")],
    score: Annotated[str, typer.Option(help="score that is 1 where all is right")] = "shapes.strict",
    count: Annotated[int, typer.Option(min=2, help="captions")] = 12,
) -> None:
    sides = {side: jsonl.rows(run / "images" / side / "scores.jsonl") for side in ("before", "after")}
    spaced = [round(i * (len(sides["before"]) - 1) / (count - 1)) for i in range(count)]
    plot, axes = plt.subplots(2, count, figsize=(0.92 * count, 2.7), facecolor="white")
    for axis_row, (side, rows) in zip(axes, sides.items(), strict=True):
        axis_row[0].set_ylabel(side, fontsize=10)
        for axis, row in zip(axis_row, (rows[i] for i in spaced), strict=True):
            axis.imshow(levels(run / "images" / side / row["image"]), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if side == "before":
                axis.set_title(textwrap.fill(row["prompt"], 14), fontsize=8, pad=4)
            for line in axis.spines.values():
                line.set(color=GREEN if row["scores"][score] == 1 else RED, linewidth=2.5)
    plot.subplots_adjust(left=0.025, right=0.995, top=0.75, bottom=0.02, wspace=0.08, hspace=0.06)
    figure.parent.mkdir(parents=True, exist_ok=True)
    plot.savefig(figure, dpi=100)


if __name__ == "__main__":
    typer.run(main)
