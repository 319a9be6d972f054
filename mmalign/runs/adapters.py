"""The adapter that `--adapter` names: the averaged adapter of a run, or a LoRA file from any program."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmalign import errors
from mmalign.config import load as configs
from mmalign.config.schema import Config
from mmalign.errors import BadInput
from mmalign.policy.protocol import TakesLora
from mmalign.runs import checkpoint, lora_file, state as states
from reward_models.allowlist import no_links_out

NAMES = ("pytorch_lora_weights.safetensors", "comfyui_lora.safetensors", "adapter_model.safetensors")  # in a folder


@dataclass(frozen=True)
class Adapter:
    """An adapter and its settings: `model` (None: the file names none), `precision`, `guidance` and `size` ((height,
    width) in pixels, None: the model's default). `attach(policy, name)` adds it by a name; ValueError where it does not
    fit."""

    model: str | None
    precision: str
    guidance: float
    size: tuple[int, int] | None
    attach: Callable[..., None]


def read(path: Path) -> Adapter:
    """The adapter of a run's newest checkpoint, of one of its checkpoints, or of a LoRA file or its folder. BadInput
    where there is none or it is damaged."""
    if is_run(path):
        return of_run(*saved(path))
    with errors.refusing():
        return of_file(_file(path))


# --------------------------------------------------------------------------------------------------------------- runs


def is_run(path: Path) -> bool:
    """Whether it is the folder of a run, or of one of its checkpoints."""
    return (path / "config.yaml").is_file() or _is_checkpoint(path)


def saved(run: Path) -> tuple[Config, Path]:
    """The config of a run, and its newest checkpoint; or `run` itself, where it is the folder of a checkpoint."""
    is_checkpoint = _is_checkpoint(run)
    c = configs.load(config_of(run.parents[1] if is_checkpoint else run))
    newest = run if is_checkpoint else checkpoint.latest(run / "checkpoints")
    if newest is None:
        raise BadInput(f"{run}: the run has no complete checkpoint yet")
    return c, newest


def config_of(run: Path) -> Path:
    """The config file in a run's folder. BadInput without one, and for a folder with links that lead out of it."""
    if not (run / "config.yaml").is_file():
        raise BadInput(f"{run}: no run there (config.yaml is missing)")
    with errors.refusing():
        no_links_out(run)
    return run / "config.yaml"


def of_run(c: Config, path: Path) -> Adapter:
    """The averaged adapter of a run's checkpoint."""
    tensors, state = states.read(path)

    def attach(policy: Any, *name: str) -> None:
        policy.attach_lora(c.lora_rank, c.lora_alpha, c.lora_targets, 0, *name)
        states.check_adapter(path, tensors, policy.adapter(*name))
        states.check_config(path, state, c.model_dump(mode="json"))
        policy.load_adapter(tensors["ema"], *name)

    return Adapter(c.model, c.precision, c.guidance, c.size, attach)


def _is_checkpoint(path: Path) -> bool:
    return checkpoint.is_checkpoint(path) and path.parent.name == "checkpoints"


# -------------------------------------------------------------------------------------------------------------- files


def of_file(file: Path) -> Adapter:
    """The adapter in a safetensors file. ValueError, in one line, for anything else in it."""
    matrices, header = lora_file.read(file)

    def attach(policy: Any, *name: str) -> None:
        if not isinstance(policy, TakesLora):
            raise ValueError(f"{file}: a {type(policy).__name__} takes no adapter from a file (insert_lora)")
        try:
            policy.insert_lora(matrices, *name)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        if header.base_hash not in (None, policy.fingerprint()):
            print(
                f"mmalign: {file} was made for other weights, {header.base_hash}; those of this model are "
                f"{policy.fingerprint()}",
                file=sys.stderr,
            )

    return Adapter(None, header.precision, header.guidance, header.size, attach)


def _file(path: Path) -> Path:
    """The file itself, or the one in a folder."""
    if not path.is_dir():
        if os.path.lexists(path):
            return path
        raise ValueError(f"{path}: no run there (config.yaml is missing), and no file of an adapter")
    if (path / "model_index.json").exists():
        raise ValueError(f"{path} is a complete pipeline; load it by --model {path}, without --adapter")
    present = [name for name in NAMES if os.path.lexists(path / name)]
    if not present:
        raise ValueError(f"{path}: no run there (config.yaml is missing), and no adapter ({', '.join(NAMES)})")
    if len(present) > 1:
        raise ValueError(f"{path}: found {' and '.join(present)}; name one of the files")
    return path / present[0]
