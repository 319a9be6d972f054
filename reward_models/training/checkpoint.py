"""The checkpoint of a training, replaced after each epoch: tensors by part, moments, and the course so far."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from reward_models import files
from reward_models.training.curves import Point
from reward_models.training.folder import CHECKPOINT, Workplace

MOMENTS = "moments"  # of the optimiser
Parts = Mapping[str, Mapping[str, Tensor]]  # such as the model's weights, or those with the least loss so far


@dataclass(frozen=True)
class Checkpoint:
    """The course of a training, and its tensors by part."""

    points: list[Point]
    tensors: Mapping[str, Tensor]

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors that were saved as this part."""
        prefix = f"{name}."
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        """The moments of the optimiser."""
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in self.part(MOMENTS).items():
            number, _, kind = name.partition(".")
            moments.setdefault(int(number), {})[kind] = value
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


def save(work: Workplace, points: list[Point], parts: Parts, optimizer: torch.optim.Optimizer) -> None:
    """Replace the checkpoint of a folder."""
    from safetensors.torch import save as packed

    every = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
    for number, moments in optimizer.state_dict()["state"].items():
        every |= {f"{MOMENTS}.{number}.{kind}": value for kind, value in moments.items()}
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in every.items()}
    header = {"key": work.key, "points": json.dumps([point.record() for point in points])}
    files.replace(work.folder / CHECKPOINT, packed(tensors, header))


def resume(work: Workplace) -> Checkpoint | None:
    """The checkpoint of an interrupted training, None without one. ValueError if it was of other data or settings, or
    cannot be read."""
    path = work.folder / CHECKPOINT
    if not path.exists():
        return None
    header, tensors = _read(path)
    if header.get("key") != work.key:
        raise ValueError(
            f"{path}: an interrupted training with other pairs or settings; remove it, or choose another folder"
        )
    return Checkpoint([Point(**record) for record in files.parsed(header["points"])], tensors)


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as stored:
            return stored.metadata() or {}, {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: {error}; remove it to begin again") from None
