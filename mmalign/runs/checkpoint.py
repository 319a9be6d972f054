"""Checkpoints: folders of safetensors and JSON that are whole, or known not to be.

A checkpoint is written beside its place, flushed to the disk and then renamed; `manifest.json` holds the SHA-256 of its
other files. What a kill left half written, or half removed, has another name (`.partial`) and goes at the next start or
save; what the disk or a hand has damaged since does not match its manifest, and the one before it is used.
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
import torch
from torch import Tensor

from mmalign.runs import tensors as safe
from reward_models import files, limits

MANIFEST, STATE = "manifest.json", "state.json"
FILES = re.compile(r"(adapter|ema|optimizer)\.safetensors|state\.json")  # what a manifest may name
Tensors = dict[str, dict[str, Tensor]]  # by file and name


class Broken(ValueError):
    """A checkpoint that is not as it was written."""


def save(folder: Path, iteration: int, tensors: Tensors, state: dict) -> Path:
    """Write `folder/<iteration>/`: one safetensors file per entry of `tensors`, and `state.json`.

    The folder appears under its name only when all of it is on disk. Where that fails (OSError), nothing of it stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files.sync(folder.parent)
    tidy(folder)
    final, partial = folder / f"{iteration:06d}", folder / f".{iteration:06d}.partial"
    try:
        partial.mkdir()
        digests = {f"{name}.safetensors": _put(partial / f"{name}.safetensors", own) for name, own in tensors.items()}
        digests[STATE] = _put(partial / STATE, {"iteration": iteration} | state)
        _put(partial / MANIFEST, digests)
        files.sync(partial)
        if final.exists():  # it was broken when the run resumed from the one before
            _discard(final)
        os.replace(partial, final)
        files.sync(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def _put(path: Path, content: dict) -> str:
    """Write a file and return the SHA-256 of what was to be written."""
    if path.suffix == ".json":
        data = json.dumps(content).encode()
    else:
        data = safetensors.torch.save({name: value.detach().cpu().contiguous() for name, value in content.items()})
    files.put(path, data)
    return hashlib.sha256(data).hexdigest()


def _discard(path: Path) -> None:
    """Remove a checkpoint; half removed, it no longer has the name of one."""
    gone = path.with_name(f".{path.name}.gone.partial")
    os.replace(path, gone)
    shutil.rmtree(gone)


def tidy(folder: Path) -> None:
    """Remove what a kill left half written or half removed in a folder."""
    for path in folder.glob(".*.partial"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def is_one(path: Path) -> bool:
    """Whether this is the name of a checkpoint: a number."""
    return path.name.isascii() and path.name.isdigit()


def numbered(folder: Path) -> list[Path]:
    """The checkpoints under their names, oldest first, whole or not."""
    return sorted(filter(is_one, folder.glob("*")), key=lambda path: int(path.name))


def prune(folder: Path, newest: int, keep: int, best: int | None) -> None:
    """Of the checkpoints keep the `keep` last, up to that of iteration `newest`, which must be on disk, and the `best`.

    A later one is left from before the run resumed, which did without it because it was broken.
    """
    own = numbered(folder)
    kept = [path for path in own if int(path.name) <= newest][-keep:]
    for path in own:
        if path not in kept and int(path.name) != best:
            _discard(path)
    files.sync(folder)


def _warn(line: str) -> None:
    print(f"mmalign: {line}", file=sys.stderr)


def latest(folder: Path, say: Callable[[str], None] = _warn) -> Path | None:
    """The newest checkpoint that is whole. Each one passed over is named with the reason, in a line given to `say`."""
    for path in reversed(numbered(folder)):
        try:
            read(path)
        except Broken as why:
            say(f"a broken checkpoint is left out: {why}")
        else:
            return path
    return None


def read(path: Path) -> tuple[Tensors, dict]:
    """The tensors by file, and the state. Raises Broken where a file is not what was written."""
    digests = _object(path / MANIFEST, _bytes(path / MANIFEST, limits.STATE))
    odd = [name for name in digests if not FILES.fullmatch(name)]
    if odd:
        raise Broken(f"{path / MANIFEST}: {odd[0]!r} is no file of a checkpoint")
    found = {name: _bytes(path / name, limits.STATE if name == STATE else limits.TENSORS) for name in [*digests, STATE]}
    for name, data in found.items():
        if hashlib.sha256(data).hexdigest() != digests.get(name):
            raise Broken(f"{path / name}, {len(data)} bytes, is not what was written")
    state = _object(path / STATE, found.pop(STATE))
    return {Path(name).stem: _tensors(path / name, data) for name, data in found.items()}, state


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
        found = files.parsed(data)
    except ValueError as error:
        raise Broken(f"{path}, {len(data)} bytes, is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise Broken(f"{path}, {len(data)} bytes, is not JSON of an object")
    return found


def _tensors(path: Path, data: bytes) -> dict[str, Tensor]:
    try:
        return safe.parsed(data)
    except ValueError as error:
        raise Broken(f"{path}: {error}") from None


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's per-parameter state as named tensors ("3.exp_avg"; bitsandbytes' has another level)."""

    def flat(value, *path) -> dict[str, Tensor]:
        if isinstance(value, dict):
            return {name: leaf for key, own in value.items() for name, leaf in flat(own, *path, str(key)).items()}
        return {".".join(path): torch.as_tensor(value).clone()}

    return flat(optimizer.state_dict()["state"])


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict = {}
    for key, value in tensors.items():
        i, *path, name = key.split(".")
        own = state.setdefault(int(i), {})
        for part in path:
            own = own.setdefault(part, {})
        own[name] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
