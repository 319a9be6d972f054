"""Measure where the time of an iteration goes."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from mmalign.activity import doing

PHASES = {  # what a phase is shown as while it lasts
    "rollout": "sampling", "decode": "decoding", "reward": "scoring", "learn": "learning", "evaluate": "evaluating",
    "io": "saving", "refresh": "refreshing the reward",
}  # fmt: skip


@dataclass
class Clock:
    """Seconds by name, and `total`, since the last reading. Time that a thread spends in parallel counts too."""

    now: Callable[[], float] = time.perf_counter
    seconds: Counter = field(default_factory=Counter)

    def __post_init__(self):
        self.last = self.now()

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        start = self.now()
        try:
            with doing(PHASES.get(name, name)):
                yield
        finally:
            self.seconds[name] += self.now() - start

    def timed(self, name: str, function: Callable) -> Callable:
        def run(*args: Any) -> Any:
            with self.of(name):
                return function(*args)

        return run

    def read(self) -> dict[str, float]:
        """Seconds since the last reading, which start again from 0."""
        before, self.last = self.last, self.now()
        out, self.seconds = dict(self.seconds), Counter()
        return out | {"total": self.last - before}

    def pace(self, forwards: int) -> dict[str, float]:
        """A row of the seconds of each part, and network forwards per second of rollout and learning."""
        seconds = self.read()
        rate = forwards / (seconds.get("rollout", 0.0) + seconds["learn"])
        return {"nfe_per_second": rate} | {f"seconds/{name}": spent for name, spent in seconds.items()}
