"""Pages of fitted and evaluated reward models: tables, the course of the training, calibration curves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reward_models import files, pages

COMMAND = "mmalign reward"
WIDE, HIGH = 320, 180  # of a chart, in its units
Points = Sequence[tuple[int | float, int | float]]


@dataclass(frozen=True)
class Table:
    """A table of texts."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Chart:
    """Lines through points, by name, in one system of axes."""

    title: str
    across: str
    lines: Mapping[str, Points]

    @property
    def bounds(self) -> tuple[int | float, ...]:
        """Left, right, low and high."""
        xs, ys = zip(*(point for line in self.lines.values() for point in line), strict=True)
        return min(xs), max(xs), min(ys), max(ys)

    def path(self, name: str) -> str:
        """The points of a line as SVG has them, with the origin at the upper left."""
        left, right, low, high = self.bounds
        wide, tall = (right - left) or 1.0, (high - low) or 1.0
        return " ".join(f"{(x - left) / wide * WIDE:.1f},{(high - y) / tall * HIGH:.1f}" for x, y in self.lines[name])


def write(page: Path, title: str, tables: Sequence[Table], charts: Sequence[Chart]) -> None:
    """Write a page with these tables and charts; charts without points are left out."""
    shown = [chart for chart in charts if any(chart.lines.values())]
    text = pages.render("reward.html", command=COMMAND, title=title, tables=tables, charts=shown, wide=WIDE, high=HIGH)
    files.write(page, text)


def ours(text: str) -> bool:
    """Whether a text is a page that `write` wrote."""
    return pages.written_by(COMMAND, text)


# ------------------------------------------------------------------------------------------------------- what is shown


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def of_share(row: Mapping[str, Any]) -> list[str]:
    """The mean, the interval and the number of pairs of a `statistics.Share`."""
    interval = "" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"
    return [number(row["mean"]), interval, str(row["pairs"])]


def of_card(card: Mapping[str, Any]) -> Table:
    """The accuracies of a fitted model on each part of its pairs."""
    rows = [
        [part, *of_share(row["accuracy"]), number(row["with_ties"]["mean"]), str(card["prompts"][part])]
        for part, row in card["accuracy"].items()
    ]
    return Table("pair accuracy", ["pairs to", "accuracy", "95 %", "pairs", "ties half", "prompts"], rows)


def of_training(points: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """The losses and the accuracy after each epoch, of each member of an ensemble."""
    members = sorted({point["member"] for point in points})

    def lines(*keys: str) -> dict[str, Points]:
        return {
            f"{key.replace('_', ' ')}{f', member {m}' if len(members) > 1 else ''}": [
                (p["epoch"], p[key]) for p in points if p["member"] == m and p[key] is not None
            ]
            for key in keys
            for m in members
        }

    return [
        Chart("Loss", "epoch", lines("train_loss", "stop_loss")),
        Chart("Accuracy on the pairs to stop by", "epoch", lines("stop_accuracy")),
    ]


def of_evaluation(result: Mapping[str, Any]) -> tuple[list[Table], list[Chart]]:
    """The tables and the calibration curves of `evaluate`."""
    rewards = result["rewards"]
    headings = ["", "accuracy", "95 %", "pairs", "ties half", "missing"]
    rows = [_row(name, row) for name, row in rewards.items()]
    tables = [Table("Pair accuracy", headings, rows)]
    for label in ("by_tag", "by_aspect", "by_spread"):
        of_label = {name: row.get(label, {}) for name, row in rewards.items()}
        rows = [_row(f"{name}, {part}", one) for name, parts in of_label.items() for part, one in parts.items()]
        tables += [Table(f"Pair accuracy {label.replace('_', ' ')}", headings, rows)] if rows else []
    compared = {name: row for name, row in result["compared"].items() if row["pairs"]}
    if compared:
        rows = [[n, str(r["only_one"]), str(r["only_other"]), f"{r['p']:.2g}"] for n, r in compared.items()]
        tables.append(Table("Compared", ["two", "only the first right", "only the second", "p (McNemar)"], rows))
    swapped = {name: row["swapped"] for name, row in rewards.items() if "swapped" in row}
    if swapped:
        headings = ["judge", "same verdict in both orders", "95 %", "pairs"]
        tables.append(Table("Swap consistency", headings, [[n, *of_share(r)] for n, r in swapped.items()]))
    calibrated = {name: row["calibration"] for name, row in rewards.items() if row.get("calibration", {}).get("pairs")}
    if calibrated:
        rows = [[n, *(number(r[key]) for key in ("ece", "brier", "temperature"))] for n, r in calibrated.items()]
        tables.append(Table("Calibration", ["", "ECE", "Brier", "temperature"], rows))
    lines = {
        name: [(point["probability"], point["frequency"]) for point in row["curve"]] for name, row in calibrated.items()
    }
    perfect = {"perfect": [(0.5, 0.5), (1.0, 1.0)]} if lines else {}
    return tables, [Chart("Frequency with which the preferred image was chosen", "probability", lines | perfect)]


def of_calibration(table: Mapping[str, Mapping[str, Sequence[float]]]) -> Table:
    """The figures of `calibrating.figures`: before, and by each map."""
    headings = ["probabilities", "ECE", "95 %", "change", "Brier", "95 %", "change"]
    rows = []
    for name, row in table.items():
        cells = [name]
        for key in ("ece", "brier"):
            change = row.get(f"change in {key}")
            cells += [number(row[key][0]), _ends(row[key]), _ends(change, "+.3f") if change else ""]
        rows.append(cells)
    return Table("Calibration, on prompts that the maps were not fitted to", headings, rows)


def of_experts(made: Mapping[str, Any]) -> Table:
    """The accuracy of a mixture on new prompts with equal, fixed and prompt-dependent weights."""
    test = made["test"]
    rows = [
        [
            name,
            *of_share(test[name]["accuracy"]),
            number(test[name]["loss"]),
            "written" if made["written"] == name else "",
        ]
        for name in ("equal", "fixed", "by prompt")
    ]
    return Table("Pair accuracy on new prompts", ["weights", "accuracy", "95 %", "pairs", "loss", ""], rows)


def _ends(interval: Sequence[float], form: str = ".3f") -> str:
    return f"{interval[1]:{form}} to {interval[2]:{form}}"


def _row(name: str, row: Mapping[str, Any]) -> list[str]:
    return [name, *of_share(row["accuracy"]), number(row["with_ties"]["mean"]), str(row["missing"])]
