"""How many rows of one forward fit in memory: found by halving, once it turns out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")


@dataclass
class Fit:
    """At most `rows` at once. Work that runs out of the accelerator's memory is done again from its beginning with half
    as many, and so is all work after it; results do not depend on the number."""

    rows: int
    fixed: bool = False  # other processes take part in every forward: they would wait for one that begins again

    def __call__(self, work: Callable[[int], T]) -> T:
        """`work(rows)`. Raises torch.OutOfMemoryError where not even one row fits."""
        while True:
            try:
                return work(self.rows)
            except torch.OutOfMemoryError:
                if self.rows == 1 or self.fixed:
                    raise
            # out of the handler: the error holds on to the tensors of what it interrupted
            self.rows = -(-self.rows // 2)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
