"""What a run's checkpoint says, held to the run before any of it is used: a manifest vouches for bytes alone.

`adapter` and `ema` are matrices of the run's model, all of them and finite; `optimizer` has moments of each matrix that
was learnt; the state names what the run is made of. What does not hold is refused in one line that names the file.
"""

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import Tensor, nn

from mmalign.errors import BadInput
from mmalign.runs import checkpoint
from mmalign.runs.checkpoint import Tensors
from reward_models.weights import fingerprint

HELD = ("lora_rank", "lora_alpha", "lora_targets", "precision", "guidance", "size")  # what decides an adapter's images
LIBRARIES = ("torch", "diffusers", "transformers", "peft")
SQUARES = ("exp_avg_sq", "state2", "step")  # of an optimiser's state what is never below 0
TENSORS = {"adapter", "ema", "optimizer"}
COUNTED = {"threads": "thread", "processes": "process"}


class State(BaseModel):
    """`state.json`. `config` and `made` are what the run must go on with (`mmalign.run`), `machine` what the bits of
    results depend on besides, `learnt` the numbers of the matrices that the optimiser has moments of; older checkpoints
    have neither of the last two."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    iteration: int = Field(ge=0)
    adapter_hash: str = Field(pattern="^[0-9a-f]{16}$")
    multipliers: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]
    config: dict[str, Any]
    made: dict[str, Any]
    machine: dict[str, int | str] | None = None
    learnt: list[int] | None = None

    @model_validator(mode="after")
    def _of_one_age(self) -> "State":
        if (self.machine is None) != (self.learnt is None):
            raise ValueError(f"no {'machine' if self.machine is None else 'learnt'}")
        return self

    @field_validator("made")
    @classmethod
    def _of_a_model(cls, made: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(made.get("model"), str):
            raise ValueError("no text called 'model', which names the weights")
        return made


def read(path: Path) -> tuple[Tensors, State]:
    """A checkpoint's tensors by file, and its state. BadInput where it is broken, or its parts are not of one run."""
    try:
        tensors, content = checkpoint.read(path)
    except checkpoint.Broken as error:
        raise BadInput(str(error)) from None
    file = path / checkpoint.STATE
    try:
        state = State.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        why = first["msg"].removeprefix("Value error, ")
        raise refused(file, ": ".join(filter(None, [".".join(map(str, first["loc"])), why]))) from None
    if state.iteration != int(path.name):
        raise refused(file, f"iteration: {state.iteration}, in the folder of {int(path.name)}")
    if missing := sorted(TENSORS - set(tensors)):
        raise refused(path / f"{missing[0]}.safetensors", f"not in {checkpoint.MANIFEST}")
    if fingerprint(tensors["adapter"], digits=16) != state.adapter_hash:
        raise refused(path / "adapter.safetensors", f"not the adapter that {checkpoint.STATE} names")
    return tensors, state


def refused(file: Path, why: str) -> BadInput:
    """The error that names a checkpoint's file, and the checkpoint before it, if there is one."""
    path = file.parent
    older = [own for own in checkpoint.numbered(path.parent) if int(own.name) < int(path.name)]
    hint = f"; with {path.name} removed, {older[-1].name} before it is used" if older else ""
    return BadInput(f"{file}: {why}{hint}")


def fit(path: Path, tensors: Tensors, expected: Mapping[str, Tensor]) -> None:
    """BadInput unless the adapter and its average have the names, shapes and types of the `expected` matrices, and
    finite numbers."""
    for name in ("adapter", "ema"):
        file, given = path / f"{name}.safetensors", tensors[name]
        odd = sorted({(n, *v.shape) for n, v in expected.items()} ^ {(n, *v.shape) for n, v in given.items()})
        if odd:
            raise refused(
                file, f"does not fit this model and rank: {len({n for n, *_ in odd})} matrices differ, e.g. {odd[0][0]}"
            )
        for matrix, value in given.items():
            if value.dtype != expected[matrix].dtype:
                raise refused(file, f"{matrix} is of {value.dtype}, not {expected[matrix].dtype}")
            if not bool(value.isfinite().all()):
                raise refused(file, f"{matrix} is not finite")


def same(path: Path, state: State, config: Mapping[str, Any]) -> None:
    """BadInput where the run's config has another adapter, or draws otherwise, than that which a checkpoint was written
    with."""
    for key in HELD:
        if key not in state.config:
            raise refused(path / checkpoint.STATE, f"config: no {key!r}")
        was, now = (json.dumps(own[key]) for own in (state.config, config))
        if was != now:
            raise refused(path / checkpoint.STATE, f"config: {key} is {was}, and {now} in the run's config.yaml")


def whole(path: Path, state: State, moments: Mapping[str, Tensor], adapter: Sequence[nn.Parameter], like: type) -> None:
    """BadInput unless an optimiser's state, as `checkpoint.optimizer_tensors` names it, is of the matrices of the
    `adapter` that the state says were learnt: of each all that an optimiser of the class `like` keeps, finite."""
    file, kept, known = path / "optimizer.safetensors", defaultdict(dict), {}
    for key, value in moments.items():
        kept[_number(key)][key.partition(".")[2]] = value
    if odd := kept.keys() - {*range(len(adapter))}:
        raise refused(file, f"moments of {len(odd)} matrices that the adapter, of {len(adapter)}, does not have")
    if state.learnt is not None and (odd := kept.keys() ^ {*state.learnt}):
        raise refused(file, f"{len(kept)} matrices have moments, and {len(state.learnt)} were learnt, e.g. {min(odd)}")
    for i, own in sorted(kept.items()):
        shape = adapter[i].shape
        if shape not in known:
            known[shape] = _moments(adapter[i], like)
        if odd := sorted(known[shape].keys() ^ own.keys()):
            raise refused(file, f"matrix {i} {'has no' if odd[0] in known[shape] else 'has an odd'} {odd[0]!r}")
        for name, value in own.items():
            if (value.shape, value.dtype) != (known[shape][name].shape, known[shape][name].dtype):
                raise refused(file, f"{i}.{name} is {_kind(value)}, not {_kind(known[shape][name])}")
            if not bool(value.isfinite().all()) or (name in SQUARES and bool((value < 0).any())):
                raise refused(file, f"{i}.{name} is not finite, or below 0")


def learnt(moments: Mapping[str, Tensor]) -> list[int]:
    """The numbers of the matrices that an optimiser's state is of."""
    return sorted({_number(key) for key in moments})


def _number(key: str) -> int:
    """The number that a key begins with, -1 where that is none."""
    number = key.partition(".")[0]
    return int(number) if re.fullmatch("0|[1-9][0-9]{0,8}", number) else -1


def _moments(p: nn.Parameter, like: type) -> dict[str, Tensor]:
    """What an optimiser keeps of a parameter of that shape."""
    twin = nn.Parameter(torch.zeros_like(p))
    twin.grad = torch.zeros_like(p)
    optimizer = like([twin])
    optimizer.step()
    return {key.partition(".")[2]: value for key, value in checkpoint.optimizer_tensors(optimizer).items()}


def _kind(value: Tensor) -> str:
    return f"{[*value.shape]} of {value.dtype}"


def machine(processes: int, device: torch.device) -> dict[str, int | str]:
    """What the bits of a result depend on beside the run: threads and processes share sums out, and instructions,
    devices and libraries round in their own ways."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "threads": torch.get_num_threads(), "processes": processes,
        "instructions": torch.backends.cpu.get_cpu_capability(), "device": name,
    } | {library: version(library) for library in LIBRARIES}  # fmt: skip


def elsewhere(was: Mapping[str, int | str] | None, now: Mapping[str, int | str]) -> str | None:
    """What to say of a run that goes on elsewhere than where it was saved; None where that is the same."""
    ends = "results are equal to rounding, not to the bit"
    if was is None:
        return f"resumed from a checkpoint that does not say what machine wrote it; on another, {ends}"
    changed = [
        f"{_named(name, value)} instead of {was.get(name, 'what is not known')}"
        for name, value in now.items()
        if was.get(name) != value
    ]
    return f"resumed with {', '.join(changed)}: {ends}" if changed else None


def _named(name: str, value: int | str) -> str:
    if name in COUNTED:
        return f"{value} {COUNTED[name] if value == 1 else name}"
    return f"{name} {value}"
