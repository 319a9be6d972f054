"""Read a config file, apply overrides, and report every mistake in one line."""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ValidationError

from mmalign.config import old_form, paths, yaml12
from mmalign.config.schema import Config
from mmalign.errors import BadInput
from reward_models import files

LONGEST = 2**20  # bytes of a config
METHODS = ("plan", "kernel", "credit", "objective", "loss", "combine", "advantage", "mask", "draw", "select", "extend")


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


def load(path: str | Path, overrides: Sequence[str] = (), objects: Mapping[str, Any] = MappingProxyType({})) -> Config:
    """Read a YAML 1.2 file, or the config of that name that comes with the project (`mmalign.config.paths.config`),
    apply `key=value` overrides (values as YAML), and check everything. Raises BadInput.

    `credit.control=fit` changes one setting of a method, or one item of a mapping. `objects` replace keys by values, in
    which methods may be objects (`build`)."""
    values = parse(_read(paths.config(path)), str(path))
    if not isinstance(values, dict):
        raise BadInput(f"{path}: a mapping of keys to values is needed, got {type(values).__name__}")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise BadInput(f"override {override!r} must look like key=value")
        _override(values, key.strip(), parse(text, f"override {override!r}"))
    return build({**values, **objects}, str(path))


def _override(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a key, or one setting of a method by `method.setting`, or of a method in one by `method.setting.setting`; the
    items of a list are numbered from 0. The names of scorers have dots of their own."""
    method, *path = key.split(".")
    if not path or method not in METHODS:
        values[key] = value
        return
    at: Any = values
    values[method] = values.get(method) or getattr(Config(), method)
    for name in (method, *path[:-1]):
        place = _place(at, name, key)
        inner = _settings(at[place] if isinstance(at, list) else at.get(place))
        at[place] = inner
        at = inner
    at[_place(at, path[-1], key)] = value


def _settings(known: Any) -> dict[str, Any] | list[Any]:
    """The settings of a method in a config, as a mapping of its own to change; a list as a list."""
    if is_dataclass(known):
        return {"type": known.type} if hasattr(known, "type") else {}
    if isinstance(known, list):
        return [*known]
    return {"type": known} if isinstance(known, str) else {**known} if isinstance(known, dict) else {}


def _place(at: dict[str, Any] | list[Any], name: str, key: str) -> Any:
    """A key of a mapping, or the number of an item of a list. BadInput where there is no such item."""
    if isinstance(at, dict):
        return name
    if not name.isdecimal() or int(name) >= len(at):
        raise BadInput(f"override {key}: {name!r}: a number from 0 to {len(at) - 1} is needed, of a list's item")
    return int(name)


def build(values: dict[str, Any], source: str) -> Config:
    """A checked config from a mapping, in which methods may be objects; every mistake in one line that names the
    value. Raises BadInput."""
    if (refusal := old_form.refused(values)) is not None:
        raise BadInput(f"{source}: {refusal}")
    objects = {f"object {key}": value for key, value in values.items() if is_dataclass(value)}
    plain = {key: f"object {key}" if is_dataclass(value) else value for key, value in values.items()}
    try:
        # as JSON, where a list may be a tuple, and true is not a number
        return Config.model_validate_json(json.dumps(plain, default=_plain), context=objects)
    except TypeError as error:
        raise BadInput(f"{source}: {error}") from None
    except ValidationError as error:
        problems = [e for e in error.errors() if e["type"] != "default_factory_not_called"]
        raise BadInput(f"{source}: " + "; ".join(map(_line, problems))) from None


def _plain(value: Any) -> Any:
    """A value of Python as JSON has it. TypeError for one that no config can hold."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"a {type(value).__name__} cannot be a setting, got {str(value)[:60]!r}")


def _line(error: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, Config.model_fields, n=1)
        return f"unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else "")
    message = error["msg"].removeprefix("Value error, ")
    if not key or key in METHODS:  # a method's message names its value
        return f"{key}: {message}" if key else message
    return f"{key}: {message}, got {yaml12.shown(error['input'])}"


def dump(config: Config) -> str:
    return yaml12.written(config.model_dump(mode="json"))
