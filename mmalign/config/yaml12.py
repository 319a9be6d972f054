"""YAML 1.2 of plain values, read and written: null, true and false, numbers, texts, lists, and mappings of texts.

A plain word is what the core schema of YAML 1.2.2 (section 10.3.2) says: `no`, `on` and `2024-01-01` are texts, `010`
is ten, `0o10` eight, `7e-1` a number. PyYAML's own table is that of YAML 1.1, where they are not; its parser is used
with the table below. Nothing else is taken: no tag of another type, no key twice, of which one would be lost, no
aliases, which can grow without bound, and no line ends that are none in YAML 1.2 (U+0085, U+2028, U+2029).
"""

import math
import re
from typing import Any, ClassVar

import yaml

UNPRINTED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
LINE_ENDS = re.compile("[\x85\u2028\u2029]")
TAG = "tag:yaml.org,2002:"
# what a plain word stands for, and the characters it may begin with
SCHEMA = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict] = {}
    yaml_constructors: ClassVar[dict] = {}

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "an alias (*) is not taken", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def mapping(self, node):
        if not isinstance(node, yaml.MappingNode):
            raise yaml.constructor.ConstructorError(None, None, "a mapping is needed", node.start_mark)
        value = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise ValueError(f"the key {shown(key)} is not text; put it in quotes")
            if key in value:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is there twice", key_node.start_mark)
            value[key] = self.construct_object(value_node, deep=True)
        return value


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: ClassVar[dict] = {}

    def ignore_aliases(self, data):
        return True


def _null(loader: _Loader, node: yaml.Node) -> None:
    _word(loader, node, "null")


def _bool(loader: _Loader, node: yaml.Node) -> bool:
    return _word(loader, node, "bool").lower() == "true"


def _int(loader: _Loader, node: yaml.Node) -> int:
    word = _word(loader, node, "int")
    return int(word, 0) if word[:2] in ("0o", "0x") else int(word)


def _float(loader: _Loader, node: yaml.Node) -> float:
    word = _word(loader, node, "float")
    return float(word.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _word(loader: _Loader, node: yaml.Node, kind: str) -> str:
    """The text of a node that is of a kind, by the word itself or by a tag before it."""
    word = loader.construct_scalar(node)
    pattern = next(pattern for name, pattern, _ in SCHEMA if name == kind)
    if not re.fullmatch(pattern, word):
        raise ValueError(f"{shown(word)} is not a {kind}")
    return word


for _kind, _pattern, _first in SCHEMA:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(TAG + _kind, re.compile(rf"(?:{_pattern})\Z"), _first)
for _kind, _made in (("null", _null), ("bool", _bool), ("int", _int), ("float", _float)):
    _Loader.add_constructor(TAG + _kind, _made)
_Loader.add_constructor(TAG + "str", lambda loader, node: loader.construct_scalar(node))
_Loader.add_constructor(TAG + "seq", lambda loader, node: loader.construct_sequence(node, deep=True))
_Loader.add_constructor(TAG + "map", _Loader.mapping)
_Loader.add_constructor(None, yaml.constructor.SafeConstructor.construct_undefined)
_Dumper.add_representer(
    str, lambda dumper, text: dumper.represent_scalar(f"{TAG}str", text, style='"' if LINE_ENDS.search(text) else None)
)


def parsed(text: str) -> Any:
    """The plain value that a YAML text stands for. ValueError, in one line, where it is none, and for numbers without
    an end or beyond 64 bits, and control characters."""
    if (odd := LINE_ENDS.search(text)) is not None:
        raise ValueError(f"not YAML: it holds U+{ord(odd[0]):04X}, a line end for some readers and not for others")
    try:
        loader = _Loader(text)
        try:
            value = loader.get_single_data()
        finally:
            loader.dispose()
        _plain(value, "")
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (yaml.YAMLError, UnicodeError, OverflowError) as error:
        raise ValueError(f"not YAML: {' '.join(str(error).split())}") from None
    return value


def written(value: Any) -> str:
    """The YAML text of a plain value, its mappings in their order; `parsed` gives the value again."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _plain(value: Any, where: str) -> None:
    """ValueError for what no setting is: numbers without an end or too large, control characters."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _plain(key, where)
            _plain(inner, f"{where.removesuffix(': ')}.{key}: ".removeprefix("."))
    elif isinstance(value, list):
        for inner in value:
            _plain(inner, where)
    elif isinstance(value, str):
        if UNPRINTED.search(value):
            raise ValueError(f"{where}{shown(value)} holds characters that cannot be printed")
    elif isinstance(value, int | float) and not (math.isfinite(value) and abs(value) < 2**63):
        raise ValueError(f"{where}{shown(value)} is not a usable number")


def shown(value: Any) -> str:
    """A value in at most about 200 characters."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
