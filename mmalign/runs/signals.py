"""SIGTERM and SIGINT (Ctrl-C) while a run trains: finish the iteration, save, exit; a second signal exits at once.

The exit code is 128 + the signal's number, 143 or 130, as a shell reports a process that a signal ended. For a
scheduler or a loop around the command, the run is then neither done (0) nor failed (1): it continues with `--resume`.
"""

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """The process received a signal and has finished its work; `code` is its exit code. A BaseException, so that code
    that catches errors, or a scorer's SystemExit, does not catch it."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


@dataclass
class Stop:
    """The signal that was `received`, if any. Outside `finishing` it takes effect at once."""

    received: signal.Signals | None = None
    _deferred: bool = False

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Work that is completed before Stopped is raised."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self.received:
            raise Stopped(128 + self.received)

    def share(self, signals: Sequence[int | None]) -> None:
        """Stop together with the other ranks: `signals` holds the signal that each received."""
        self.received = self.received or next((signal.Signals(number) for number in signals if number), None)

    def _on(self, number: int, frame: object) -> None:
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = signal.Signals(number)
        if not self._deferred:
            raise Stopped(128 + number)
        line = (
            f"\nmmalign: {self.received.name}: finishing this iteration, then saving; a second signal exits at once\n"
        )
        os.write(2, line.encode())  # print is not safe here: it may have been interrupted itself


@contextmanager
def stopping(stop: Stop | None = None) -> Iterator[Stop]:
    """Handle both signals, unless they are ignored (nohup), and restore their handlers at the end. Only the main thread
    can install handlers; in others nothing happens."""
    stop, before = stop or Stop(), {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        before = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, stop._on)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
