"""Tables that commands print."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text


def _table(*headings: str, left: int = 1, **settings: Any) -> Table:
    """A table whose first `left` columns are texts, and the others numbers."""
    table = Table(**({"box": box.SIMPLE, "padding": (0, 1, 0, 0)} | settings))
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number < left else "right")
    return table


def short(value: int | float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"


def rises(summary: Mapping[str, Any]) -> Table:
    """Scores of held-out prompts before and after a run, as `mmalign.reporting.report.summary` has them."""
    from mmalign.evaluation.comparison import cells

    title = f"held-out prompts, {summary['images']} images a side, same seeds before and after"
    headings = ("score", "before", "after", "rise", "95 %", "p (paired)")
    table = _table(*headings, title=title, box=box.HEAVY_HEAD, padding=(0, 1))
    for name, row in summary["rises"].items():
        table.add_row(name, *cells(row))
    return table


def estimates(estimate: Mapping[str, Any]) -> list[Table]:
    """Counts; memory and disk; seconds where they were measured: of `mmalign.checks.estimate.estimate`."""
    tables = [_counts(estimate), _bytes(estimate)]
    if "seconds" in estimate:
        table = _table("timed here", "seconds")
        for name, seconds in estimate["seconds"].items():
            table.add_row(name, f"{seconds:.3g}" if seconds < 100 else f"{seconds:,.0f}")
        tables.append(table)
    return tables


def _counts(estimate: Mapping[str, Any]) -> Table:
    ranks, iteration = estimate["ranks"], estimate["iteration"]
    columns = {"iteration": iteration}
    if len(ranks) > 1:
        columns |= {"largest rank": ranks[0], "smallest": ranks[-1]}
    columns |= {"run": estimate["run"], "evaluations": estimate["evaluations"]}
    columns |= {"refreshes": estimate["refreshes"]} if estimate["refreshes"]["refreshes"] else {}
    table = _table("", *columns)
    for name in iteration:
        counts = (f"{column[name]:,}" if name in column else "" for column in columns.values())
        table.add_row(name.replace("_", " "), *counts)
    return table


def _bytes(estimate: Mapping[str, Any]) -> Table:
    def gib(count: int | float) -> str:
        return f"{count / 2**30:.3f}"

    memory, disk = estimate["memory"], estimate["disk"]
    table = _table("", "parameters", "GiB of the largest rank")
    for name, count in memory["device"].items():
        parameters = estimate["parameters"].get(name)
        end = name in ("latents", "replay")
        table.add_row(name, f"{parameters:,}" if parameters else "", gib(count), end_section=end)
    table.add_row("main memory: images", "", gib(memory["main"]["images"]))
    files = f"disk: {disk['checkpoints']} x checkpoint of {gib(disk['checkpoint'])}, images"
    table.add_row(files, "", gib(disk["total"]))
    return table


def means(by_tag: Mapping[str, Mapping[str, float]], title: str) -> Table:
    """Mean scores, a row for each kind of prompt."""
    names = [name for name in by_tag["all"] if all(name in row for row in by_tag.values())]
    table = Table(title=title)
    for heading in ("prompts", *names):
        table.add_column(heading)
    for tag, row in by_tag.items():
        table.add_row(tag, *(f"{row[name]:.3f}" for name in names))
    return table


def scores(summary: Mapping[str, Any]) -> Table:
    """Statistics of each score, of `reward_models.tools.score_files.summarise`."""
    rows = summary["scores"]
    every = ("count", "missing", "mean", "std", "min", "max", "best", "agrees")
    columns = [column for column in every if any(row.get(column) not in (None, 0) for row in rows.values())]
    ties = f"; ties, which `agrees` leaves out: {summary['ties']}" if "ties" in summary else ""
    table = _table(title=f"{summary['images']} images{ties}", collapse_padding=True)
    for heading in ("score", *columns):
        table.add_column(heading, justify="left" if heading == "score" else "right", no_wrap=heading == "score")
    for name, row in rows.items():
        table.add_row(name, *(short(row.get(column)) for column in columns))
    return table


def refined(summary: Mapping[str, Any], by: str) -> Table:
    """The summary of `mmalign.refinement.trace.refine_prompts`, decided by the component `by`."""
    title = f"{summary['prompts']} prompts, images in {summary['out']}"
    table = Table(title=title, box=box.SIMPLE, show_header=False)
    first, best = (short(summary[key]) or "none" for key in ("first", "best"))
    rows = {
        f"{by}, first image": first,
        f"{by}, best image": best,
        "prompts with a better image": summary["gained"],
        "images": summary["images"],
        "network forwards": summary["forwards"],
        "ended": ", ".join(f"{reason} {count}" for reason, count in summary["stopped"].items()),
    }
    rows |= {f"judge, {name}": count for name, count in summary.get("judge", {}).items()}
    rows |= {"done before": summary["before"]} if summary["before"] else {}
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


def collected(summary: Mapping[str, Any], by: str) -> Table:
    """The summary of `mmalign.evaluation.collect.collect`, paired by the score `by`."""
    table = Table(title=f"{summary['prompts']} prompts, all in {summary['out']}", box=box.SIMPLE, show_header=False)
    rows = {"images": summary["images"], f"pairs by {by}": summary["pairs"]}
    rows |= {f"without {by}": summary["unscored"]} if summary["unscored"] else {}
    rows |= {"done before": summary["before"]} if summary["before"] else {}
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


def corruptions(card: Mapping[str, Any]) -> Table:
    """How well the scorer `natural` tells pictures from each corruption."""
    table = _table("corruption", "AUC", "AUC if new", title="pictures that were not trained on")
    for kind, value in card["auc"].items():
        table.add_row(kind, short(value), short(card["auc_if_new"][kind]))
    return table


def checks(name: str, rows: Sequence[Any]) -> Table:
    """The checks of `doctor`, of a run or of a scorer: `reward_models.tools.examine.Check`."""
    table = _table("check", "", "seen", "what to do", left=4, title=name, title_justify="left", padding=(0, 1))
    for row in rows:
        mark = {True: Text("good", "green"), False: Text("bad", "red"), None: "unknown"}[row.good]
        table.add_row(row.check, mark, row.result, "" if row.good else row.advice)
    return table


def texts(table: Any) -> Table:
    """A table of texts, such as `reward_models.training.page.Table`, without empty columns."""
    used = [k for k in range(len(table.headings)) if not k or any(row[k] for row in table.rows)]
    shown = _table(*(table.headings[k] for k in used), title=table.title)
    for row in table.rows:
        shown.add_row(*(row[k] for k in used))
    return shown


def cache(summary: Mapping[str, Any]) -> list[str]:
    """How many scores were cached."""
    counts = summary.get("cache", {}).items()
    return [f"cache: {count['hits']} of {count['asked']} scores of {name} were there" for name, count in counts]
