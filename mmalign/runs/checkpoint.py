"""Checkpoints on disk: folders of safetensors and JSON, written atomically and verified when they are read.

A checkpoint is written under another name, flushed to the disk and then renamed; `manifest.json` holds the SHA-256 of
its other files. An interrupted save or removal leaves a `.partial` folder, which the next start or save removes.
Corruption is detected by the manifest, and the previous checkpoint is used.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
from torch import Tensor

from mmalign.runs import tensors as safetensors_files
from reward_models import files, limits

MANIFEST, STATE = "manifest.json", "state.json"
FILES = re.compile(  # what a manifest may name
    r"(adapter|ema|old|optimizer|reward|reward_optimizer|values)\.safetensors|state\.json"
)
Tensors = dict[str, dict[str, Tensor]]  # by file and name


class Broken(ValueError):
    """A checkpoint that differs from what was written."""


def save(folder: Path, iteration: int, tensors: Tensors, state: dict) -> Path:
    """Write `folder/<iteration>/`: one safetensors file per entry of `tensors`, and `state.json`.

    The folder appears under its name only when all of it is on disk. Where that fails (OSError), it is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files.sync(folder.parent)
    tidy(folder)
    final, partial = folder / f"{iteration:06d}", folder / f".{iteration:06d}.partial"
    try:
        partial.mkdir()
        digests = {
            f"{name}.safetensors": _put(partial / f"{name}.safetensors", values) for name, values in tensors.items()
        }
        digests[STATE] = _put(partial / STATE, {"iteration": iteration} | state)
        _put(partial / MANIFEST, digests)
        files.sync(partial)
        if final.exists():  # it was broken, and the run resumed from the previous one
            _discard(final)
        os.replace(partial, final)
        files.sync(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def _put(path: Path, content: dict) -> str:
    """Write a file and return the SHA-256 of its content."""
    if path.suffix == ".json":
        data = json.dumps(content).encode()
    else:
        data = safetensors.torch.save({name: value.detach().cpu().contiguous() for name, value in content.items()})
    files.put(path, data)
    return hashlib.sha256(data).hexdigest()


def _discard(path: Path) -> None:
    """Remove a checkpoint; if interrupted, it no longer has the name of one."""
    removed = path.with_name(f".{path.name}.gone.partial")
    os.replace(path, removed)
    shutil.rmtree(removed)


def tidy(folder: Path) -> None:
    """Remove the remains of interrupted saves and removals in a folder."""
    for path in folder.glob(".*.partial"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def is_checkpoint(path: Path) -> bool:
    """Whether a path has the name of a checkpoint: a number."""
    return path.name.isascii() and path.name.isdigit()


def numbered(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first, complete or not."""
    return sorted(filter(is_checkpoint, folder.glob("*")), key=lambda path: int(path.name))


def prune(folder: Path, newest: int, keep: int, best: int | None) -> None:
    """Keep the last `keep` checkpoints up to that of iteration `newest`, which must be on disk, and the `best` one.

    Later ones are from before the run resumed, which did not use them because they were broken.
    """
    paths = numbered(folder)
    last = [path for path in paths if int(path.name) <= newest][-keep:]
    for path in paths:
        if path not in last and int(path.name) != best:
            _discard(path)
    files.sync(folder)


def _warn(line: str) -> None:
    print(f"mmalign: {line}", file=sys.stderr)


def latest(folder: Path, say: Callable[[str], None] = _warn) -> Path | None:
    """The newest intact checkpoint. `say` gets a line for each broken one, with the reason."""
    for path in reversed(numbered(folder)):
        try:
            read(path)
        except Broken as error:
            say(f"a broken checkpoint is left out: {error}")
        else:
            return path
    return None


def read(path: Path) -> tuple[Tensors, dict]:
    """The tensors by file, and the state. Raises Broken where a file differs from what was written."""
    digests = _object(path / MANIFEST, _bytes(path / MANIFEST, limits.STATE))
    odd = [name for name in digests if not FILES.fullmatch(name)]
    if odd:
        raise Broken(f"{path / MANIFEST}: {odd[0]!r} is not a file of a checkpoint")
    contents = {
        name: _bytes(path / name, limits.STATE if name == STATE else limits.TENSORS) for name in [*digests, STATE]
    }
    for name, data in contents.items():
        if hashlib.sha256(data).hexdigest() != digests.get(name):
            raise Broken(f"{path / name}, {len(data)} bytes, is not what was written")
    state = _object(path / STATE, contents.pop(STATE))
    return {Path(name).stem: _tensors(path / name, data) for name, data in contents.items()}, state


def _bytes(path: Path, most: int) -> bytes:
    try:
        return files.content(path, most)
    except FileNotFoundError:
        raise Broken(f"{path} is missing") from None
    except OSError as error:
        raise Broken(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise Broken(f"{path} is {error}") from None


def _object(path: Path, data: bytes) -> dict:
    try:
        content = files.parsed(data)
    except ValueError as error:
        raise Broken(f"{path}, {len(data)} bytes, is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise Broken(f"{path}, {len(data)} bytes, is not a JSON object")
    return content


def _tensors(path: Path, data: bytes) -> dict[str, Tensor]:
    try:
        return safetensors_files.parsed(data)
    except ValueError as error:
        raise Broken(f"{path}: {error}") from None
