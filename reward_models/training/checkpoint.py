"""The checkpoint of a training, replaced after each epoch: weights, those to keep, moments, and the course so far."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from reward_models import files
from reward_models.training.curves import Point
from reward_models.training.folder import CHECKPOINT, Workplace


@dataclass(frozen=True)
class Checkpoint:
    """The course of a training, its weights, and the weights with the least loss to stop by."""

    points: list[Point]
    weights: dict[str, Tensor]
    chosen: dict[str, Tensor]


def save(work: Workplace, state: Checkpoint, optimizer: torch.optim.Optimizer) -> None:
    """Replace the checkpoint of a folder."""
    from safetensors.torch import save as packed

    tensors = {f"model.{name}": value for name, value in state.weights.items()}
    tensors |= {f"chosen.{name}": value for name, value in state.chosen.items()}
    for number, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"moments.{number}.{name}": value.detach().cpu().clone() for name, value in moments.items()}
    header = {"key": work.key, "points": json.dumps([point.record() for point in state.points])}
    content = packed({name: value.contiguous() for name, value in tensors.items()}, header)
    files.replace(work.folder / CHECKPOINT, content)


def resume(work: Workplace, optimizer: torch.optim.Optimizer) -> Checkpoint | None:
    """The checkpoint of an interrupted training, None without one. The moments of the optimiser are restored.
    ValueError if it was of other data or settings, or cannot be read."""
    path = work.folder / CHECKPOINT
    if not path.exists():
        return None
    header, tensors = _read(path)
    if header.get("key") != work.key:
        raise ValueError(
            f"{path}: an interrupted training with other pairs or settings; remove it, or choose another folder"
        )
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in _below(tensors, "moments.").items():
        number, _, kind = name.partition(".")
        moments.setdefault(int(number), {})[kind] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    points = [Point(**record) for record in files.parsed(header["points"])]
    return Checkpoint(points, _below(tensors, "model."), _below(tensors, "chosen."))


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as stored:
            return stored.metadata() or {}, {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: {error}; remove it to begin again") from None
