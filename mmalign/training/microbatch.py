"""How many rows of one forward fit in memory: halved when a forward runs out of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")


@dataclass
class AdaptiveBatch:
    """At most `rows` at once. Work that runs out of the accelerator's memory is repeated from its beginning with half
    as many, and so is all later work; results do not depend on the number."""

    rows: int
    fixed: bool = False  # other ranks take part in every forward: they would wait for one that begins again

    def __call__(self, work: Callable[[int], T]) -> T:
        """`work(rows)`. Raises torch.OutOfMemoryError where not even one row fits."""
        while True:
            try:
                return work(self.rows)
            except torch.OutOfMemoryError:
                if self.rows == 1 or self.fixed:
                    raise
            # out of the handler: the error holds on to the tensors of the interrupted work
            self.rows = -(-self.rows // 2)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
