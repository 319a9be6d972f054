"""Draw the rounds of `mmalign refine`, a row for each prompt, with the boxes and the words of the critic.

    mmalign refine "a red cat left of a blue boat" --model assets/tiny_things --critic things_critic --out rounds
    python scripts/draw_rounds.py docs/figures/things_rounds.png rounds

A green box is right, a red one wrong.
"""

import textwrap
from pathlib import Path
from typing import Annotated

import matplotlib
import typer

matplotlib.use("Agg")
from before_after import GREEN, RED
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

from mmalign.runs import jsonl
from reward_models.images import levels


def main(
    figure: Annotated[Path, typer.Argument(help="PNG to write")],
    folder: Annotated[Path, typer.Argument(help="`--out` of refine")],
) -> None:
    rows = jsonl.rows(folder / "trace.jsonl")
    columns = max(len(row["rounds"]) for row in rows)
    plot, axes = plt.subplots(len(rows), columns, figsize=(1.5 * columns, 1.85 * len(rows)), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis_row, row in zip(axes, rows, strict=True):
        axis_row[0].set_title(row["prompt"], fontsize=9, loc="left")
        for number, (axis, one) in enumerate(zip(axis_row, row["rounds"], strict=False)):
            axis.imshow(levels(folder / one["image"]), interpolation="nearest")
            for box in (one["places"] or {"boxes": ()})["boxes"]:
                left, top, right, bottom = box["box"]
                colour = GREEN if box["credit"] == 1 else RED
                axis.add_patch(
                    Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, edgecolor=colour)
                )
            words = textwrap.shorten(one["critique"] or one["failure"], 44, placeholder=" ...")
            best = " (best)" if number == row["best"] else ""
            axis.text(0, -0.04, textwrap.fill(words + best, 26), fontsize=7, va="top", transform=axis.transAxes)
    plot.tight_layout()
    figure.parent.mkdir(parents=True, exist_ok=True)
    plot.savefig(figure, dpi=90)


if __name__ == "__main__":
    typer.run(main)
