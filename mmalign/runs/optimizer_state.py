"""The optimiser's state in a checkpoint: to and from named tensors, and checked before it is loaded."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mmalign.runs.state import refused

NONNEGATIVE = ("exp_avg_sq", "state2", "step")  # entries of an optimiser's state that are never below 0


def tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """An optimiser's per-parameter state by name ("3.exp_avg"; bitsandbytes' state has one level more)."""

    def flat(value: Any, *path: str) -> dict[str, Tensor]:
        if isinstance(value, dict):
            return {name: leaf for key, child in value.items() for name, leaf in flat(child, *path, str(key)).items()}
        return {".".join(path): torch.as_tensor(value).clone()}

    return flat(optimizer.state_dict()["state"])


def load(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `tensors`."""
    state: dict = {}
    for key, value in tensors.items():
        i, *path, name = key.split(".")
        level = state.setdefault(int(i), {})
        for step in path:
            level = level.setdefault(step, {})
        level[name] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def check(
    path: Path, learnt: Sequence[int] | None, saved: Mapping[str, Tensor], adapter: Sequence[nn.Parameter], kind: type,
    name: str = "optimizer",
) -> None:  # fmt: skip
    """BadInput unless `saved`, an optimiser's state by name from the file `name` of the checkpoint at `path`, has
    finite moments of each matrix of the `adapter` that was trained, those of the numbers `learnt` (None: not known):
    all that an optimiser of the class `kind` has."""
    file, by_matrix, expected = path / f"{name}.safetensors", defaultdict(dict), {}
    for key, value in saved.items():
        by_matrix[_number(key)][key.partition(".")[2]] = value
    if odd := by_matrix.keys() - {*range(len(adapter))}:
        raise refused(file, f"moments of {len(odd)} matrices that the adapter, of {len(adapter)}, does not have")
    if learnt is not None and (odd := by_matrix.keys() ^ {*learnt}):
        count = len(by_matrix)
        raise refused(file, f"{count} matrices have moments, and {len(learnt)} were trained, e.g. {min(odd)}")
    for i, moments in sorted(by_matrix.items()):
        shape = adapter[i].shape
        if shape not in expected:
            expected[shape] = _moments(adapter[i], kind)
        if odd := sorted(expected[shape].keys() ^ moments.keys()):
            raise refused(file, f"matrix {i} {'has no' if odd[0] in expected[shape] else 'has an odd'} {odd[0]!r}")
        for name, value in moments.items():
            if (value.shape, value.dtype) != (expected[shape][name].shape, expected[shape][name].dtype):
                raise refused(file, f"{i}.{name} is {_described(value)}, not {_described(expected[shape][name])}")
            if not bool(value.isfinite().all()) or (name in NONNEGATIVE and bool((value < 0).any())):
                raise refused(file, f"{i}.{name} is not finite, or below 0")


def trained(tensors: Mapping[str, Tensor]) -> list[int]:
    """The numbers of the matrices that an optimiser's state has moments of."""
    return sorted({_number(key) for key in tensors})


def _number(key: str) -> int:
    """The number that a key begins with, -1 where it begins otherwise."""
    number = key.partition(".")[0]
    return int(number) if re.fullmatch("0|[1-9][0-9]{0,8}", number) else -1


def _moments(p: nn.Parameter, kind: type) -> dict[str, Tensor]:
    """The state that an optimiser of a class has of a parameter of that shape."""
    twin = nn.Parameter(torch.zeros_like(p))
    twin.grad = torch.zeros_like(p)
    optimizer = kind([twin])
    optimizer.step()
    return {key.partition(".")[2]: value for key, value in tensors(optimizer).items()}


def _described(value: Tensor) -> str:
    return f"{[*value.shape]} of {value.dtype}"
