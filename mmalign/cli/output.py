"""The output of commands: results on standard output; warnings, errors and progress on standard error."""

import io
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

from rich.console import Console, RenderableType

from mmalign.distributed.launched import is_main
from mmalign.errors import Failed
from mmalign.reporting import progress

console = Console(markup=False)  # names and texts from files are printed literally
LONGEST = 2000  # characters of the line that ends a command


def print_lines(*lines: RenderableType) -> None:
    """Print lines and tables; of several processes the main one does."""
    for line in lines if is_main() else ():
        console.print(line, highlight=False, soft_wrap=isinstance(line, str))


def show(result: Any, as_json: bool, *lines: RenderableType) -> None:
    """Print a result as JSON, or else the lines and tables that describe it."""
    if as_json and is_main():
        print(json.dumps(result))
    elif not as_json:
        print_lines(*lines)


def warn(text: str) -> None:
    """One line on standard error."""
    print(f"mmalign: {printable(text)}", file=sys.stderr)


def warn_cut(texts: Iterable[str], *models: Any) -> None:
    """Report how many prompts are longer than what a policy or scorer reads."""
    from reward_models.lengths import cut

    for line in cut(models, [*texts]) if is_main() else ():
        warn(line)


def complain(text: str) -> None:
    """The line that ends a command, where standard error can be written; of a very long one, both ends."""
    short = text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} [...] {text[-LONGEST // 2 :]}"
    with suppress(OSError):
        warn(short)


def printable(text: str) -> str:
    """The text with line ends and control characters escaped; a file's name can hold them."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def progressing() -> AbstractContextManager:
    """Shows inside on standard error what the command is doing; of several processes what the main one does."""
    return progress.shown(Console(stderr=True)) if is_main() else nullcontext()


# ----------------------------------------------------------------------------------------------------- standard output


class Output(io.TextIOWrapper):
    """Standard output. Characters that its encoding lacks are escaped; a failing write becomes Failed, in one line."""

    def write(self, text: str) -> int:
        with _failing(self):
            return super().write(text)

    def flush(self) -> None:
        with _failing(self):
            super().flush()


@contextmanager
def _failing(stream: Output) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # takes the rest of the buffer when Python exits
        raise Failed(f"standard output cannot be written: {error.strerror}") from None


@contextmanager
def checked() -> Iterator[None]:
    """Standard output as an `Output`, flushed at the end."""
    plain = sys.stdout
    if not isinstance(plain, io.TextIOWrapper):
        yield
        return
    sys.stdout = Output(plain.buffer, plain.encoding, "backslashreplace", line_buffering=plain.line_buffering)
    try:
        yield
    finally:
        try:
            sys.stdout.flush()
        finally:
            sys.stdout.detach()
            sys.stdout = plain
