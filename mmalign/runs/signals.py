"""SIGTERM and SIGINT (Ctrl-C) while a run trains: finish, save, leave; a second one stops at once.

The exit code is 128 + the signal's number, 143 or 130, as a shell reports a process that a signal ended: to a scheduler
or a loop around the command the run is neither done (0) nor failed (1) but to be started again, with `--resume`.
"""

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """The process was asked to stop, and what had to be finished is. `code` is its exit code. Nothing that catches
    errors catches it, nor what keeps a scorer from ending the run by SystemExit."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


@dataclass
class Stop:
    """Whether one was `asked` to stop, by which signal. Outside `finishing` that takes effect at once."""

    asked: signal.Signals | None = None
    _held: bool = False

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Work that is done to its end before Stopped is raised."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self.asked:
            raise Stopped(128 + self.asked)

    def heed(self, told: Sequence[int | None]) -> None:
        """Stop with the others of many processes: `told` is what each was asked by."""
        self.asked = self.asked or next((signal.Signals(number) for number in told if number), None)

    def _on(self, number: int, frame: object) -> None:
        if self.asked:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.asked = signal.Signals(number)
        if not self._held:
            raise Stopped(128 + number)
        line = f"\nmmalign: {self.asked.name}: finishing this iteration, then saving; once more stops at once\n"
        os.write(2, line.encode())  # print is not safe here: it may have been interrupted itself


@contextmanager
def stopping() -> Iterator[Stop]:
    """Listen to both signals, unless they are ignored (nohup), and then leave them as they were. Outside the main
    thread, which alone may listen, nothing happens."""
    stop, before = Stop(), {}
    if threading.current_thread() is threading.main_thread():
        before = {own: signal.getsignal(own) for own in SIGNALS if signal.getsignal(own) not in (signal.SIG_IGN, None)}
    for own in before:
        signal.signal(own, stop._on)
    try:
        yield stop
    finally:
        for own, handler in before.items():
            signal.signal(own, handler)
