"""Show what this process is doing (`mmalign.activity`), how far it is, and how long the rest takes.

A terminal gets one line that is kept up to date, a notebook an output that is, and anything else (a log, a dumb
terminal) a line now and then. A thread draws, so that work which takes long is seen to be waited for.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.text import Text

from mmalign import activity
from mmalign.activity import Left, Work

DRAWN = 0.25  # seconds between two drawings in a terminal or notebook
WRITTEN = 30.0  # seconds between two lines of a log
BAR, LONGEST_BAR = 10, 30  # columns
GAP = "  "
ORDER = ("title", "bar", "count", "unit", "note", "more", "left", "phase", "elapsed")  # from left to right
KEEP = ("count", "phase", "left", "note", "bar", "title", "elapsed", "unit", "more")  # the first are dropped last
PHASE = 16  # columns that the phase may take before others are shown, so that they do not come and go with it

Refresh = Callable[[], None]


def span(seconds: int | float) -> str:
    """A time in its two largest units at most: "95 s", "12 min", "3 h 10 min", "2 d 4 h"."""
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours = round(seconds / 3600)
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 48 * 60 else f"{hours // 24} d {hours % 24} h"


def remaining(rest: Left | None) -> str:
    """The time left in words; nothing while it is not known, and where the work takes longer than it should."""
    if rest is None or rest.seconds < 0.5:
        return ""
    return f"{'over ' if rest.bound else ''}{span(rest.seconds)} left"


def phases(works: Sequence[Work]) -> tuple[str, ...]:
    """What is being waited for, in full and then ever shorter; empty where nothing is."""
    if not works:
        return ()
    *outer, work = works
    verb = work.name.split()[0]
    counted = f" {work.done}/{work.total}" if work.total else ""
    middle = f"{work.name}{counted} {work.unit}".rstrip()
    full = ": ".join([*(other.name for other in outer if other.name.split()[0] != verb), middle])
    return full, middle, f"{verb}{counted}"


class Display:
    """What is shown at a moment. `main` is the outermost work that is counted, which stays when it has ended."""

    def __init__(self, now: Callable[[], int | float] = time.monotonic):
        self.now, self.start, self.main = now, now(), None

    def parts(self) -> tuple[dict[str, str], tuple[str, ...]]:
        """The parts of the line that are not empty, by name, and the phase in full and ever shorter."""
        works = activity.current()
        self.main = main = next((work for work in works if work.total), self.main)
        inner = works[works.index(main) + 1 :] if main in works else works
        if main is None and not inner:
            return {}, ()
        parts = {"elapsed": f"{span(self.now() - self.start)} elapsed"}
        if main is not None:
            note, *more = [*main.notes, ""]
            parts |= {"title": main.name, "count": f"{main.done}/{main.total}", "unit": main.unit, "note": note}
            parts |= {"more": GAP.join(filter(None, more)), "left": remaining(main.left()) if main in works else ""}
        return {name: text for name, text in parts.items() if text}, phases(inner)

    def text(self) -> str:
        """The line of a log."""
        parts, names = self.parts()
        head = " ".join(parts[name] for name in ("title", "count", "unit") if name in parts)
        rest = [*map(parts.get, ("note", "more")), *names[:1], *map(parts.get, ("elapsed", "left"))]
        return ", ".join(text for text in (head, *rest) if text)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The line of a terminal, with the parts for which there is room."""
        parts, names = self.parts()
        line = fitting(parts | ({"bar": " " * BAR} if "count" in parts else {}), names, options.max_width)
        for number, (name, text) in enumerate(line.items()):
            yield Segment(GAP if number else "")
            if name == "bar":
                bar = ProgressBar(self.main.total, self.main.done, len(text))
                yield from Segment.adjust_line_length([*console.render(bar, options)], len(text))
            else:
                yield Text(text, overflow="crop", no_wrap=True, end="")


def fitting(parts: Mapping[str, str], names: Sequence[str], width: int) -> dict[str, str]:
    """The parts that fit into `width` columns, from left to right: those of `KEEP` come first, the phase is the longest
    of its `names` that fits beside them, and a bar takes a share of what is left."""
    reserved = min(max([PHASE, *map(cell_len, names[-1:])]), width)
    wanted, line = dict(parts), {}
    if names or "left" in parts:  # nothing is waited for at the end
        wanted["phase"] = " " * reserved
    for name in KEEP:
        if name in wanted and columns(more := line | {name: wanted[name]}) <= width:
            line = more
    if "bar" in line:
        line["bar"] += " " * min(LONGEST_BAR - BAR, width - columns(line) - PHASE)
    line["phase"] = next((name for name in names if columns(line | {"phase": name}) <= width), "")
    return {name: line[name] for name in ORDER if line.get(name)}


def columns(parts: Mapping[str, str]) -> int:
    return sum(map(cell_len, parts.values())) + len(GAP) * (len(parts) - 1)


@contextmanager
def shown(console: Console) -> Iterator[Refresh]:
    """Show inside, on this console, what the process is doing. Yields a function that adds a line to a log at once, and
    elsewhere draws. A quiet console shows nothing."""
    if console.quiet:
        yield lambda: None
        return
    if console.is_jupyter:
        form, every = _notebook, DRAWN
    elif console.is_interactive and console.file.isatty():  # rich takes a file for a terminal where colours are forced
        form, every = _terminal, DRAWN
    else:
        form, every = _log, WRITTEN
    with form(console, Display()) as refresh:
        done = threading.Event()
        thread = threading.Thread(target=_draw, args=(refresh, done, every), daemon=True)
        thread.start()
        try:
            yield refresh
        finally:
            done.set()
            thread.join()


def _draw(refresh: Refresh, done: threading.Event, every: float) -> None:
    while not done.wait(every):
        try:
            refresh()
        except Exception:  # of any kind: where nothing can be shown, on a closed pipe say, the work continues
            return


@contextmanager
def _terminal(console: Console, display: Display) -> Iterator[Refresh]:
    """Messages go above the line, unless they go to a file. The cursor stays, so that even a process that is killed
    leaves a terminal in order."""
    messages = {f"redirect_{name}": getattr(sys, name).isatty() for name in ("stdout", "stderr")}
    live = Live(display, console=console, auto_refresh=False, **messages)
    live.start()
    console.show_cursor(True)
    try:
        yield live.refresh
    finally:
        live.transient = display.main is None  # nothing was counted: there is nothing to look back at
        live.stop()


@contextmanager
def _notebook(console: Console, display: Display) -> Iterator[Refresh]:
    from IPython.display import display as show  # rich's needs ipywidgets, which many notebooks lack

    handle = show({"text/plain": ""}, raw=True, display_id=True)

    def refresh() -> None:
        handle.update({"text/plain": display.text()}, raw=True)

    try:
        yield refresh
    finally:
        refresh()


@contextmanager
def _log(console: Console, display: Display) -> Iterator[Refresh]:
    def write() -> None:
        if line := display.text():
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    yield write
