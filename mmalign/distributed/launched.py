"""The processes of a command that a launcher may have started, without the time that accelerate takes to import where
there is none."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from mmalign.distributed.processes import Ranks

T = TypeVar("T")
PATIENCE = 7 * 86400  # seconds: a process may have that much more to do than another, and a launcher ends the rest


def use_device() -> None:
    """Make the GPU of this process of a launcher the current one, before anything is loaded."""
    import torch

    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())


def is_main() -> bool:
    """Whether this is the main process, the only one that prints."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def launched() -> Iterator["Ranks | None"]:
    """The processes that `accelerate launch` or `torchrun` started; None without a launcher. A failure of one ends
    all."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield None
        return
    from mmalign.distributed.processes import join

    ranks = join(PATIENCE)
    with ranks.failing():
        yield ranks


def in_turn(ranks: "Ranks | None", what: str, work: Callable[[], T]) -> T:
    """What `work` returns, called by one process after another, in order; the first may change files for the others."""
    if ranks is None:
        return work()
    for rank in range(ranks.size):
        if rank == ranks.rank:
            result = work()
        ranks.barrier(what)
    return result
