"""Validation errors in one line."""

from collections.abc import Mapping, Sequence
from typing import Any


def first_problem(problems: Sequence[Mapping[str, Any]]) -> str:
    """Where the first problem is and what it is, in at most 300 characters, without the rejected value. `problems`: the
    `errors()` of a validation error of pydantic or FastAPI."""
    first = problems[0]
    message = first["msg"].removeprefix("Value error, ")
    return f"{'.'.join(map(str, first['loc']))[:100] or 'body'}: {message}"[:300]
