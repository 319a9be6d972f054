"""Errors that end a command in one line: bad input, a failure, a lost process, a non-finite value."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from reward_models import Prompt


class BadInput(ValueError):
    """A user's mistake: shown as one line, exit code 2."""


class Failed(RuntimeError):
    """What the world did to a run, such as a full disk: shown as one line, exit code 1."""


class Lost(Failed):
    """A run that ends because of another of its processes, which failed or was waited for in vain: one line, exit
    code 1."""


class Orphaned(Lost):
    """Lost, and the process that speaks for all with it."""


@contextmanager
def refusing() -> Iterator[None]:
    """What the parts refuse while they are being set up is the user's input: a ValueError becomes BadInput."""
    try:
        yield
    except ValueError as error:
        raise BadInput(" ".join(str(error).split())) from error


SHOWN = 3  # prompts of a batch that are named


class NonFinite(Failed):
    """A value that is not finite, and the prompts it is of."""


def non_finite(what: str, prompts: Sequence[Prompt], rows: Iterable[int]) -> NonFinite:
    """The error that names the prompts in these rows."""
    bad = {prompts[i].id: prompts[i].text for i in sorted(set(rows))}
    named = ", ".join(f"{number} {text[:60]!r}" for number, text in [*bad.items()][:SHOWN])
    more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    return NonFinite(f"{what} not finite; prompts: {named}{more}")
