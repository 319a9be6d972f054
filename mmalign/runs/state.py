"""The state in a checkpoint, and checks of a checkpoint against its run; a manifest guarantees bytes alone.

`adapter` and `ema` must be all matrices of the run's model, and finite; the state must have been written by the same
run. A file that does not fit is refused in one line that names it. `mmalign.runs.optimizer_state` checks the optimiser.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import Tensor

from mmalign.errors import BadInput
from mmalign.runs import checkpoint
from mmalign.runs.checkpoint import Tensors
from reward_models.weights import fingerprint

# settings that decide an adapter's images
IMAGE_SETTINGS = ("lora_rank", "lora_alpha", "lora_targets", "precision", "guidance", "size")
TENSORS = {"adapter", "ema", "optimizer"}


class State(BaseModel):
    """`state.json`. With `config` and `made` the run must continue (`mmalign.run`); `machine` is what the bits of
    results depend on besides; `learnt` holds the numbers of the matrices that the optimiser has moments of. Older
    checkpoints have neither of these two. `learnt_reward` is `learnt` of an adapter that learns rewards of steps.
    `rates` is what a `draw` that learns knows of the prompts, by id."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    iteration: int = Field(ge=0)
    adapter_hash: str = Field(pattern="^[0-9a-f]{16}$")
    multipliers: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]
    config: dict[str, Any]
    made: dict[str, Any]
    machine: dict[str, int | str] | None = None
    learnt: list[int] | None = None
    learnt_reward: list[int] | None = None
    rates: dict[str, Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]] | None = None

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
    """A checkpoint's tensors by file, and its state. BadInput where it is broken, or its files are not of one run."""
    try:
        tensors, content = checkpoint.read(path)
    except checkpoint.Broken as error:
        raise BadInput(str(error)) from None
    file = path / checkpoint.STATE
    try:
        state = State.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        reason = first["msg"].removeprefix("Value error, ")
        raise refused(file, ": ".join(filter(None, [".".join(map(str, first["loc"])), reason]))) from None
    if state.iteration != int(path.name):
        raise refused(file, f"iteration: {state.iteration}, in the folder of {int(path.name)}")
    if missing := sorted(TENSORS - set(tensors)):
        raise refused(path / f"{missing[0]}.safetensors", f"not in {checkpoint.MANIFEST}")
    if fingerprint(tensors["adapter"], digits=16) != state.adapter_hash:
        raise refused(path / "adapter.safetensors", f"not the adapter that {checkpoint.STATE} names")
    return tensors, state


def refused(file: Path, reason: str) -> BadInput:
    """The error that names a checkpoint's file, and the previous checkpoint, if there is one."""
    path = file.parent
    older = [other for other in checkpoint.numbered(path.parent) if int(other.name) < int(path.name)]
    hint = f"; with {path.name} removed, {older[-1].name} before it is used" if older else ""
    return BadInput(f"{file}: {reason}{hint}")


def check_adapter(
    path: Path, tensors: Tensors, expected: Mapping[str, Tensor], names: Sequence[str] = ("adapter", "ema")
) -> None:
    """BadInput unless the adapter and its averages, the files of these `names`, have the names, shapes and types of the
    `expected` matrices, and finite numbers."""
    for name in names:
        file = path / f"{name}.safetensors"
        if name not in tensors:
            raise refused(file, f"not in {checkpoint.MANIFEST}")
        given = tensors[name]
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


def check_config(path: Path, state: State, config: Mapping[str, Any]) -> None:
    """BadInput where the run's config has another adapter or other settings of images than the config that the
    checkpoint was written with."""
    for key in IMAGE_SETTINGS:
        if key not in state.config:
            raise refused(path / checkpoint.STATE, f"config: no {key!r}")
        was, now = (json.dumps(settings[key]) for settings in (state.config, config))
        if was != now:
            raise refused(path / checkpoint.STATE, f"config: {key} is {was}, and {now} in the run's config.yaml")
