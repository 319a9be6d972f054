"""Measure where the time of an iteration goes."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Clock:
    """Seconds by name, and `total`, all that passed, since the last reading. What a thread does beside counts too."""

    now: Callable[[], float] = time.perf_counter
    seconds: Counter = field(default_factory=Counter)

    def __post_init__(self):
        self.last = self.now()

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        start = self.now()
        try:
            yield
        finally:
            self.seconds[name] += self.now() - start

    def timed(self, name: str, function: Callable) -> Callable:
        def run(*args):
            with self.of(name):
                return function(*args)

        return run

    def read(self) -> dict[str, float]:
        before, self.last = self.last, self.now()
        out, self.seconds = dict(self.seconds), Counter()
        return out | {"total": self.last - before}
