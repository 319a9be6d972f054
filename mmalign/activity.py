"""What this process is doing: named where it is done, read where progress is shown, with nothing passed in between.

    with doing("sampling", "images", 496) as work:
        for images in batches:
            work.did("images", len(images))

Time left comes from what this process has measured and from nothing else: amounts to do times the pace of each kind.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean
from typing import NamedTuple, TypeVar

RECENT = 20  # measurements that a pace rests on
TOGETHER = 0.1  # seconds: what follows sooner was done together with what came before, as the rows of a batch are

T = TypeVar("T")
Spans = tuple[tuple[int | float, int], ...]  # seconds and amount of each measurement, in order


class Left(NamedTuple):
    """Seconds of the work to do; `bound`: at least these, because the pace of a part is not known yet."""

    seconds: int | float
    bound: bool


def pace(spans: Spans) -> int | float:
    """Seconds for one: the mean over the measurements, without the longest and the shortest where there are three or
    more. The one that came first, which warms up, counts only while it is alone."""
    each = sorted(seconds / amount for seconds, amount in spans[1:] or spans)
    return fmean(each[1:-1] or each)


def left(to_do: Mapping[str, int], paces: Mapping[str, int | float]) -> Left | None:
    """The time that the amounts `to_do` take at these paces (seconds for one), by kind. None while the kind that is
    named first has no pace; a lower bound while another has none."""
    missing = [kind for kind, amount in to_do.items() if amount and kind not in paces]
    if next(iter(to_do)) in missing:
        return None
    return Left(sum(amount * paces.get(kind, 0) for kind, amount in to_do.items()), bool(missing))


@dataclass(eq=False)
class Work:
    """A piece of work. Where it is counted, `done` of `total` `unit`s are finished, some of them perhaps by an earlier
    process; `besides` are amounts of other kinds that it takes. `notes` are shown beside it, the important ones first.
    `now` gives seconds."""

    name: str
    unit: str = ""
    total: int = 0
    done: int = 0
    besides: Mapping[str, int] = field(default_factory=dict)
    now: Callable[[], int | float] = time.monotonic
    notes: Sequence[str] = ()

    def __post_init__(self):
        self.to_do = {self.unit: self.total - self.done, **self.besides}
        self.spans: dict[str, Spans] = dict.fromkeys(self.to_do, ())
        self.last = self.now()

    def did(self, kind: str, amount: int = 1) -> None:
        """So much of a kind was done in the time since the last call."""
        before, self.last = self.last, self.now()
        seconds, spans = self.last - before, self.spans[kind]
        if spans and seconds < TOGETHER:
            self.spans[kind] = (*spans[:-1], (spans[-1][0] + seconds, spans[-1][1] + amount))
        else:
            self.spans[kind] = (*spans, (seconds, amount))[-RECENT - 1 :]
        self.to_do[kind] -= amount
        self.done += amount * (kind == self.unit)

    def left(self) -> Left | None:
        """The time left now. It runs on between two measurements, for as long as the next one should take."""
        paces = {kind: pace(spans) for kind, spans in self.spans.items() if spans}
        rest = left(self.to_do, paces)
        if rest is None:
            return None
        piece = paces[self.unit] * self.spans[self.unit][-1][1] if self.to_do[self.unit] else rest.seconds
        return Left(rest.seconds - min(self.now() - self.last, piece), rest.bound)


_open: list[Work] = []  # of all threads, in the order they were begun


def current() -> list[Work]:
    """What this process is doing, from the whole to its parts."""
    return [*_open]


@contextmanager
def doing(
    name: str, unit: str = "", total: int = 0, done: int = 0, besides: Mapping[str, int] | None = None
) -> Iterator[Work]:
    """Work that this process does inside, as `Work` describes it."""
    work = Work(name, unit, total, done, besides or {})
    _open.append(work)
    try:
        yield work
    finally:
        _open.remove(work)


def counted(rows: Iterable[T], done: int, total: int, name: str, unit: str) -> Iterator[T]:
    """The rows, counted while they are made: `done` of the `total` were there before."""
    with doing(name, unit, total, done) as work:
        for row in rows:
            yield row
            work.did(unit)
