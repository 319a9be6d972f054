"""Errors that end a command in one line: bad input, a failure, a lost process, a non-finite value."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from reward_models import Prompt


class BadInput(ValueError):
    """A user's mistake: shown as one line, exit code 2."""


class Failed(RuntimeError):
    """An environment failure, such as a full disk: shown as one line, exit code 1."""


class Lost(Failed):
    """A run that ends because another of its processes failed or did not arrive in time: one line, exit code 1."""


class Orphaned(Lost):
    """Lost, together with the process that holds the store."""


@contextmanager
def refusing() -> Iterator[None]:
    """Convert ValueErrors raised during setup to BadInput."""
    try:
        yield
    except ValueError as error:
        raise BadInput(" ".join(str(error).split())) from error


SHOWN = 3  # prompts that an error names at most


class NonFinite(Failed):
    """A non-finite value, and the prompts that caused it."""


def non_finite(what: str, prompts: Sequence[Prompt], rows: Iterable[int]) -> NonFinite:
    """The error that names the prompts in these rows."""
    bad = {prompts[i].id: prompts[i].text for i in sorted(set(rows))}
    named = ", ".join(f"{number} {text[:60]!r}" for number, text in [*bad.items()][:SHOWN])
    more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    return NonFinite(f"{what} not finite; prompts: {named}{more}")
