"""Settings of a config that are methods: one of a table of frozen dataclasses, chosen by name.

`credit: gain` is the method with its defaults, `credit: {type: gain, control: fit}` changes some. `type` may be an
import path, `my_module:MyCredit`, of a module that is allowed (`reward_models.allowlist`); in Python the object itself
will do. A setting that a method does not have is refused, and so it cannot be without effect. A field with the metadata
`one_of` takes a method of that table, one with `methods` a list of methods of the table that its owner is from.
"""

import dataclasses
import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any

from pydantic import ConfigDict, PlainSerializer, PlainValidator, TypeAdapter, ValidationError

from mmalign.objectives.objective import name_of as named
from reward_models.allowlist import import_allowed
from reward_models.combine import Ramp

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def one_of(kinds: Sequence[type], what: str, optional: bool = False, total: type | None = None) -> Any:
    """The type of a config's field that takes one of `kinds`, or a dataclass from elsewhere, or null if `optional`; or
    a list of them, each with a `weight`, which stands for their sum: a `total(parts, weights)`."""
    table = {kind.type: kind for kind in kinds}
    chosen, written = partial(_chosen, table, what, optional), partial(_written, table)
    if total is not None:
        chosen, written = partial(_added, total, chosen), partial(_listed, total, written)
    return Annotated[Any, PlainValidator(chosen), PlainSerializer(written)]


def settings(kind: type, optional: bool = False) -> Any:
    """The type of a field that takes the settings of one dataclass, or null if `optional`."""
    filled, written = partial(_filled, kind, None, optional=optional), partial(_written, None)
    return Annotated[Any, PlainValidator(filled), PlainSerializer(written)]


def described(method: Any) -> str:
    """A method and its settings in a line, e.g. `branch (steps 0 1 2, children 6)`."""
    if hasattr(method, "weighted"):  # a sum
        each = ((part, f"{w.start:g} to {w.end:g}" if isinstance(w, Ramp) else f"{w:g}") for part, w in method.weighted)
        return " + ".join(f"{w} x {described(part)}" for part, w in each)
    words = []
    for key in _fields(type(method)):
        value = getattr(method, key)
        if value is None or key == "type":
            continue
        if key in _several(type(method)):
            value = tuple(map(described, value))
        if dataclasses.is_dataclass(value):
            value = described(value) if hasattr(value, "type") else dataclasses.asdict(value)
        words.append(f"{key} {' '.join(map(str, value)) if isinstance(value, tuple) else value}")
    return named(method) + (f" ({', '.join(words)})" if words else "")


def _written(table: Mapping[str, type] | None, method: Any) -> dict[str, Any] | None:
    """A method as a file has it: `type` is its name in the table, or its import path. Settings that came `later` are
    left out while they have their defaults, as files and checkpoints from before leave them out."""
    if method is None:
        return None
    later = {f.name: f.default for f in dataclasses.fields(method) if f.metadata.get("later")}
    values = dataclasses.asdict(method)
    values = {key: value for key, value in values.items() if key not in later or value != later[key]}
    values = json.loads(json.dumps(values))
    if table is None:
        return values
    values |= {key: [_written(table, part) for part in getattr(method, key)] for key in _several(type(method))}
    known = table.get(getattr(method, "type", None)) is type(method)
    return {"type": method.type if known else f"{type(method).__module__}:{type(method).__qualname__}"} | values


def _added(total: type, chosen: Callable, value: Any, info: Any) -> Any:
    """A list of methods with weights (1 where none is given) as their sum; anything else as one method."""
    if isinstance(value, str):
        value = (info.context or {}).get(value, value)
    if isinstance(value, total):
        items = [*zip(value.parts, value.weights, strict=True)]
    elif isinstance(value, list):
        items = [_weighed(item) for item in value]
    else:
        return chosen(value, info)
    return total(tuple(chosen(item, info) for item, _ in items), tuple(_weight(weight) for _, weight in items))


def _weighed(item: Any) -> tuple[Any, Any]:
    if not isinstance(item, Mapping):
        return item, 1.0
    return {key: value for key, value in item.items() if key != "weight"}, item.get("weight", 1.0)


def _weight(value: Any) -> Any:
    value = dataclasses.asdict(value) if isinstance(value, Ramp) else value
    try:
        return TypeAdapter(float | Ramp, config=STRICT).validate_json(json.dumps(value))
    except ValidationError:
        needed = "a number, or {start, end, over: linear or cosine}"
        raise ValueError(f"weight: {needed} is needed, got {json.dumps(value)}") from None


def _listed(total: type, written: Callable, method: Any) -> Any:
    if not isinstance(method, total):
        return written(method)
    weights = (dataclasses.asdict(w) if isinstance(w, Ramp) else w for w in method.weights)
    return [written(part) | {"weight": w} for part, w in zip(method.parts, weights, strict=True)]


def _chosen(table: Mapping[str, type], what: str, optional: bool, value: Any, info: Any) -> Any:
    if isinstance(value, str) and value in (info.context or {}):
        value = info.context[value]
    if value is None and optional:
        return None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):  # an object is held to the same bounds
        parts = {key: getattr(value, key) for key in _several(type(value))}
        return _filled(type(value), what, dataclasses.asdict(value) | parts, info, within=(table, what))
    name = value.get("type") if isinstance(value, Mapping) else value
    if not isinstance(name, str):
        raise ValueError(f"a name or {{type: NAME, ...}} is needed; known: {', '.join(table)}")
    if name in table:
        kind = table[name]
    elif ":" in name:
        kind = import_allowed(name, f"{what} {name!r}")
        if not dataclasses.is_dataclass(kind):
            raise ValueError(f"{name} must be a frozen dataclass with its settings as fields")
    else:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no {what} called {name!r}{hint}; known: {', '.join(table)}, or my_module:MyClass")
    values = {k: v for k, v in value.items() if k != "type"} if isinstance(value, Mapping) else {}
    return _filled(kind, name, values, info, within=(table, what))


def _filled(
    kind: type, name: str | None, value: Any, info: Any = None, optional: bool = False,
    within: tuple[Mapping[str, type], str] | None = None,
) -> Any:  # fmt: skip
    """An instance of the dataclass with the settings of a mapping; `within` is the table that it is from, and what is
    in it. ValueError with the first problem."""
    if info is not None and isinstance(value, str) and value in (info.context or {}):
        value = info.context[value]
    if value is None and optional:
        return None
    value = dataclasses.asdict(value) if isinstance(value, kind) else value
    if not isinstance(value, Mapping):
        raise ValueError(f"a mapping of its settings is needed: {', '.join(_fields(kind))}")
    if "__pydantic_config__" not in vars(kind):
        kind.__pydantic_config__ = STRICT
    tables = {f.name: f.metadata["one_of"] for f in dataclasses.fields(kind) if "one_of" in f.metadata}
    parts = {key: _part(tables[key], key, value[key]) for key in value if key in tables}
    parts |= {key: _parts(kind, within, key, value[key], info) for key in _several(kind) if key in value and within}
    try:
        rest = {key: each for key, each in value.items() if key not in parts}
        method = TypeAdapter(kind).validate_json(json.dumps(rest))
    except ValidationError as error:
        raise ValueError(_first(kind, name, error)) from None
    return dataclasses.replace(method, **parts) if parts else method


def _part(kinds: Sequence[type], key: str, value: Any) -> Any:
    """One of `kinds`, in a setting of a method: its name, or a mapping of its settings with its `type`."""
    table = {kind.type: kind for kind in kinds}
    value = {"type": value} if isinstance(value, str) else value
    if not isinstance(value, Mapping) or value.get("type") not in table:
        raise ValueError(f"{key}: a name or {{type: NAME, ...}} is needed, of {', '.join(table)}; got {value}")
    try:
        return _filled(table[value["type"]], value["type"], value)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def _parts(kind: type, within: tuple[Mapping[str, type], str], key: str, value: Any, info: Any) -> tuple[Any, ...]:
    """Several methods of the table that `kind` is from, in a setting of it; none is a `kind` itself."""
    table, what = within
    if not isinstance(value, list | tuple):
        raise ValueError(f"{key}: a list of methods is needed, each a name or {{type: NAME, ...}}; got {value}")
    others = {name: other for name, other in table.items() if other is not kind}
    try:
        return tuple(_chosen(others, what, False, part, info) for part in value)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def _first(kind: type, name: str | None, error: ValidationError) -> str:
    problem = error.errors()[0]
    key = str(problem["loc"][0]) if problem["loc"] else ""
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        near = difflib.get_close_matches(key, _fields(kind), n=1)
        hint = f", did you mean {near[0]!r}?" if near else f"; it has {', '.join(_fields(kind)) or 'no settings'}"
        return f"{name + ' has ' if name else ''}no setting {key!r}{hint}"
    message = problem["msg"].removeprefix("Value error, ")
    if not key:
        return message
    messages = dict.fromkeys(p["msg"] for p in error.errors() if p["loc"][:1] == problem["loc"][:1])
    return f"{key}: {' or '.join(messages)}, got {json.dumps(problem['input'])}"


def _several(kind: type) -> list[str]:
    """The settings that are lists of methods of the same table."""
    return [field.name for field in dataclasses.fields(kind) if field.metadata.get("methods")]


def _fields(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]
