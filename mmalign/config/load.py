"""Read a config file, apply overrides, and report every mistake in one line."""

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import (
    ValidationError,
)

from mmalign.config import yaml12
from mmalign.config.schema import Config
from mmalign.errors import BadInput
from reward_models import files

LONGEST = 2**20  # bytes of a config


def parse(text: str, source: str) -> Any:
    """The plain value that a YAML 1.2 text stands for. BadInput where it is none."""
    try:
        return yaml12.parsed(text)
    except ValueError as error:
        raise BadInput(f"{source}: {' '.join(str(error).split())}") from None


def _read(path: Path) -> str:
    try:
        return files.decoded(files.content(path, LONGEST))
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise BadInput(f"{path}: not YAML: {error}") from None


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML 1.2 file, apply `key=value` overrides (values as YAML), and check everything. Raises BadInput."""
    values = parse(_read(Path(path)), str(path))
    if not isinstance(values, dict):
        raise BadInput(f"{path}: a mapping of keys to values is needed, got {type(values).__name__}")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise BadInput(f"override {override!r} must look like key=value")
        values[key.strip()] = parse(text, f"override {override!r}")
    return build(values, str(path))


def build(values: dict[str, Any], source: str) -> Config:
    """A checked config from a mapping; every mistake in one line that names the value."""
    try:
        # as JSON, where a list may be a tuple, and true is no number
        return Config.model_validate_json(json.dumps(values))
    except TypeError as error:
        raise BadInput(f"{source}: {error}") from None
    except ValidationError as error:
        raise BadInput(f"{source}: " + "; ".join(_say(e) for e in error.errors())) from None


def _say(error: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, Config.model_fields, n=1)
        return f"unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else "")
    message = error["msg"].removeprefix("Value error, ")
    return f"{key}: {message}, got {yaml12.shown(error['input'])}" if key else message


def dump(config: Config) -> str:
    return yaml12.written(config.model_dump(mode="json"))
