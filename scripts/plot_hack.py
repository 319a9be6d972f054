"""Draw what a reward makes of the model: held-out scores against iterations, and the same images before and after.

    python scripts/plot_hack.py docs/figures/hack.png "no brakes=runs/free-0,runs/free-1" "pull=runs/held-0,runs/held-1"

Each group of runs has a name; images are those of its first run.
"""

import textwrap
from pathlib import Path
from typing import Annotated

import matplotlib
import typer

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from mmalign.errors import BadInput
from mmalign.runs import jsonl
from reward_models.images import from_file

SCORES = ("clip.cosine", "shapes.strict")
IMAGES = 12


def main(
    figure: Annotated[Path, typer.Argument(help="PNG to write")],
    groups: Annotated[list[str], typer.Argument(help="NAME=RUN,RUN,...")],
    scores: Annotated[str, typer.Option(help="comma-separated names")] = ",".join(SCORES),
) -> None:
    runs = {}
    for group in groups:
        name, equals, folders = group.partition("=")
        if not (name and equals and folders):
            raise BadInput(f"{group!r} must look like NAME=RUN,RUN")
        runs[name] = [Path(folder) for folder in folders.split(",")]
    names, rows = scores.split(","), [next(iter(runs.values()))[0] / "images" / "before"]
    rows += [folders[0] / "images" / "after" for folders in runs.values()]
    plot = plt.figure(figsize=(10, 3.2 + 0.95 * len(rows)), layout="constrained")
    top, bottom = plot.subfigures(2, 1, height_ratios=[3.2, 0.95 * len(rows)])
    for axis, name in zip(top.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        curves(axis, name, runs)
    pictures(bottom, rows, ["before", *runs])
    figure.parent.mkdir(parents=True, exist_ok=True)
    plot.savefig(figure, dpi=110)


def curves(axis, name: str, runs: dict[str, list[Path]]) -> None:
    """A line for each run, in the colour of its group."""
    for number, (group, folders) in enumerate(runs.items()):
        for folder in folders:
            shown = [row for row in jsonl.rows(folder / "evaluations.jsonl") if name in row]
            label = group if folder == folders[0] else None
            axis.plot([r["iteration"] for r in shown], [r[name] for r in shown], color=f"C{number}", label=label)
    axis.set_title(f"held-out {name}", fontsize=10)
    axis.set_xlabel("iteration")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)


def pictures(part, folders: list[Path], labels: list[str]) -> None:
    """A row of images for each folder: those of the same prompts and noises."""
    every = jsonl.rows(folders[0] / "scores.jsonl")
    chosen = every[:: max(1, len(every) // IMAGES)][:IMAGES]
    axes = part.subplots(len(folders), len(chosen), squeeze=False)
    for line, folder, label in zip(axes, folders, labels, strict=True):
        for axis, row in zip(line, chosen, strict=True):
            axis.imshow(from_file(folder / row["image"])[0].permute(1, 2, 0))
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(label, fontsize=8)
    for axis, row in zip(axes[0], chosen, strict=True):
        axis.set_title(textwrap.fill(row["prompt"], 18), fontsize=5)


if __name__ == "__main__":
    typer.run(main)
