"""Checkpoints: a folder of safetensors and JSON, written whole or not at all."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def save(folder: Path, iteration: int, tensors: dict[str, dict[str, Tensor]], state: dict) -> Path:
    """Write `folder/<iteration>/`: one safetensors file per entry of `tensors`, and `state.json`.

    The folder appears under its name only when all of it is on disk.
    """
    final = folder / f"{iteration:06d}"
    partial = folder / f".{iteration:06d}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, values in tensors.items():
        save_file(
            {key: value.detach().cpu().contiguous() for key, value in values.items()}, partial / f"{name}.safetensors"
        )
    (partial / "state.json").write_text(json.dumps({"iteration": iteration} | state))
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    return final


def latest(folder: Path) -> Path | None:
    """The newest finished checkpoint."""
    return max((path for path in folder.glob("[0-9]*") if (path / "state.json").is_file()), default=None)


def read(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict]:
    tensors = {file.stem: load_file(file) for file in path.glob("*.safetensors")}
    return tensors, json.loads((path / "state.json").read_text())


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """The same 16 hex digits for the same names and bits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


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
