"""Plot the held-out scores of runs against iterations, one line a run.

python scripts/plot_curves.py docs/figures/tiny_long.png runs/tiny_long-0 runs/tiny_long-1 runs/tiny_long-2
"""

from pathlib import Path
from typing import Annotated

import matplotlib
import typer

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from mmalign.runs import jsonl

SCORES = ("shapes.strict", "clip.cosine")


def main(
    figure: Annotated[Path, typer.Argument(help="PNG to write")],
    runs: Annotated[list[Path], typer.Argument(help="folders of runs")],
    scores: Annotated[str, typer.Option(help="comma-separated names")] = ",".join(SCORES),
) -> None:
    names = scores.split(",")
    plot, axes = plt.subplots(1, len(names), figsize=(4.6 * len(names), 3.4), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for run in runs:
            rows = jsonl.rows(run / "evaluations.jsonl")
            axis.plot([row["iteration"] for row in rows], [row[name] for row in rows], "o-", ms=3, label=run.name)
        axis.set_title(f"held-out {name}", fontsize=10)
        axis.set_xlabel("iteration")
        axis.grid(alpha=0.3)
    axes[0, 0].legend(frameon=False)
    plot.tight_layout()
    figure.parent.mkdir(parents=True, exist_ok=True)
    plot.savefig(figure, dpi=110)


if __name__ == "__main__":
    typer.run(main)
