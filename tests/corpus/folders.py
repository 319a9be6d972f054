"""Hostile and damaged model folders: each builder takes a good folder and spoils it. Nothing in any of them may run,
and each is refused in one line or loads as the good one does."""

import json
import os
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

PYTHON = (  # where libraries, Python and pytest would look for code: none may be imported
    "__init__.py", "modeling_mine.py", "tokenization_mine.py", "processing_mine.py", "configuration_mine.py",
    "image_processing_mine.py", "pipeline.py", "hubconf.py", "sitecustomize.py", "usercustomize.py", "conftest.py",
    "yaml.py", "transformers.py", "diffusers.py", "custom_generate/generate.py",
)  # fmt: skip


def plant(folder: Path, mark: Path) -> None:
    """Python files in a folder and in those of its parts; each makes the file `mark` when it is run."""
    for place in [folder, *(path for path in folder.iterdir() if path.is_dir())]:
        for name in PYTHON:
            path = place / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"open({str(mark)!r}, 'a').write(__name__ + ' ')\nclass Mine:\n    pass\n")


CODE = {  # what a setting at the top of every JSON file may be, for a library to look for code
    "auto_map": {
        **{f"Auto{kind}": f"{kind.lower()}_mine.Mine" for kind in ("Config", "Model", "Processor", "ImageProcessor")},
        "AutoTokenizer": ["tokenization_mine.Mine", None],
        "AutoModelForObjectDetection": "modeling_mine.Mine",
    },
    "auto_map elsewhere": {"AutoConfig": "other/repo--configuration_mine.Mine"},
    "trust_remote_code": True,
    "custom_pipelines": "pipeline",
    "custom_generate": "custom_generate",
    "use_kernels": True,
    "kernel_config": {"kernel_mapping": {"RMSNorm": "stranger/norm:RMSNorm"}},
    "attn_implementation": "stranger/attention@main:run",
    "_attn_implementation": "stranger/attention",
    "_attn_implementation_internal": "kernels-community/flash-attn2",
    "attn_implementation by part": {"text_config": "stranger/attention"},
    "quantization_config": {"quant_method": "quark", "export": "mine"},
    "auto_mapping": {"base_model_class": "Mine", "parent_library": "modeling_mine"},
    "hf_model_name": "./text_encoder",
    "hf_tokenizer_name": "../elsewhere",
    "timm_model_name": "local-dir:.",
    "backbone": "hf-hub:stranger/backbone",
    "base_model_name_or_path": "stranger/base",
    "tokenizer_class": "mine.Mine",
    "processor_class": "os.path/Mine",
    "tokenizer_kwargs": {"trust_remote_code": True},
}


def order(folder: Path, name: str) -> None:
    """Give a setting of `CODE` to every JSON object in a folder, and to the objects in it that libraries look into."""
    for path in settings_of(folder):
        value = json.loads(path.read_text())
        key = name.split()[0]
        for place in (value, *(member for member in value.values() if isinstance(member, dict))):
            place[key] = CODE[name]
        path.write_text(json.dumps(value))


def settings_of(folder: Path) -> list[Path]:
    """The JSON files of a folder that hold settings."""
    words = ("vocab.json", "tokenizer.json", "added_tokens.json")
    return sorted(path for path in folder.rglob("*.json") if path.name not in words and "index.json" not in path.name)


DAMAGE: dict[str, Callable[[Path], Any]] = {  # of a JSON file: it is refused
    "empty": lambda path: path.write_text(""),
    "cut": lambda path: path.write_text(path.read_text()[:-10]),
    "100,000 brackets": lambda path: path.write_text("[" * 100_000),
    "objects in objects": lambda path: path.write_text('{"a":' * 100_000),
    "a list": lambda path: path.write_text("[]"),
    "a number": lambda path: path.write_text("1"),
    "NaN": lambda path: path.write_text('{"shift": NaN}'),
    "UTF-16": lambda path: path.write_bytes(path.read_text().encode("utf-16")),
    "not text": lambda path: path.write_bytes(b"\xff\x00\xfe" * 9),
    "too long": lambda path: path.write_text('{"a": "' + "x" * (17 * 2**20) + '"}'),
    "a FIFO": lambda path: (path.unlink(), os.mkfifo(path)),
    "a link to itself": lambda path: (path.unlink(), path.symlink_to(path.name)),
}

WEIGHTS: dict[str, Callable[[Path], Any]] = {  # of a safetensors file: it is refused
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-64]),
    "a header beyond the file": lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]),
    "a header of brackets": lambda path: path.write_bytes((100_000).to_bytes(8, "little") + b"[" * 100_000),
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a FIFO": lambda path: (path.unlink(), os.mkfifo(path)),
}

VALUES = (
    None, True, -1, 0, 0.5, 2, 3, 10**6, 10**30, "x", "", [], {}, [1], [[]], {"a": 1}, -0.0, 1e308, "1", [0] * 40,
)  # fmt: skip


def mutations(value: Any) -> Iterator[tuple[str, Any]]:
    """A JSON value with one of its members removed, or of another kind or size; and what was changed."""
    for path in _paths(value):
        yield f"{'.'.join(map(str, path))} removed", _changed(value, path, None, removed=True)
        for other in VALUES:
            yield f"{'.'.join(map(str, path))} = {str(other)[:30]!r}", _changed(value, path, other)


def _paths(value: Any, path: tuple = ()) -> Iterator[tuple]:
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, member in members:
        if isinstance(value, list) and key > 2:
            break
        yield (*path, key)
        yield from _paths(member, (*path, key))


def _changed(value: Any, path: tuple, other: Any, removed: bool = False) -> Any:
    whole = deepcopy(value)
    place = whole
    for key in path[:-1]:
        place = place[key]
    if removed:
        del place[path[-1]]
    else:
        place[path[-1]] = other
    return whole
