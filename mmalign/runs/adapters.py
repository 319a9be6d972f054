"""What `--adapter` names: a run's averaged adapter, or a LoRA file of one's own or of others.

A file is read by its tensors alone, in the names of diffusers, ComfyUI or peft. What its header says decides no
matrix: it gives the defaults of precision, guidance and size, and where it names other weights than the model's that is
said. peft's settings lie beside its file, and say how strong the adapter is.
"""

import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, Json, ValidationError
from torch import Tensor

from mmalign import errors
from mmalign.config import load as configs
from mmalign.config.schema import Config
from mmalign.errors import BadInput
from mmalign.runs import checkpoint, state as states, tensors as safe
from reward_models import files, limits
from reward_models.allowlist import no_links_out

PREFIXES = ("transformer.", "diffusion_model.", "base_model.model.")  # of diffusers', ComfyUI's and peft's names
NAMES = ("pytorch_lora_weights.safetensors", "comfyui_lora.safetensors", "adapter_model.safetensors")  # in a folder
PEFT_CONFIG = "adapter_config.json"
Size = tuple[Annotated[int, Field(ge=1, le=4096)], Annotated[int, Field(ge=1, le=4096)]]


@dataclass(frozen=True)
class Adapter:
    """An adapter and how it is drawn with: `model` (None: the file names none), `precision`, `guidance` and `size`
    ((height, width) in pixels, None: the model's own). `attach(policy)` adds it; ValueError where it does not fit."""

    model: str | None
    precision: str
    guidance: float
    size: tuple[int, int] | None
    attach: Callable[[Any], None]


def read(path: Path) -> Adapter:
    """A run's folder, for its newest checkpoint, or that of one of its checkpoints; a file, or the folder of one, that
    `export` or others wrote. BadInput."""
    if (path / "config.yaml").is_file() or _checkpoint(path):
        return of_run(*saved(path))
    with errors.refusing():
        return of_file(_file(path))


# --------------------------------------------------------------------------------------------------------------- runs


def saved(run: Path) -> tuple[Config, Path]:
    """The config of a run, and its newest checkpoint; or that checkpoint, where `run` is the folder of one."""
    one = _checkpoint(run)
    c = configs.load(config_of(run.parents[1] if one else run))
    newest = run if one else checkpoint.latest(run / "checkpoints")
    if newest is None:
        raise BadInput(f"{run}: the run has no whole checkpoint yet")
    return c, newest


def config_of(run: Path) -> Path:
    """The config's file in a run's folder, of which no link leads out."""
    if not (run / "config.yaml").is_file():
        raise BadInput(f"{run}: no run there (config.yaml is missing)")
    with errors.refusing():
        no_links_out(run)
    return run / "config.yaml"


def of_run(c: Config, path: Path) -> Adapter:
    """The averaged adapter of a run's checkpoint."""
    tensors, state = states.read(path)

    def attach(policy) -> None:
        policy.attach_lora(c.lora_rank, c.lora_alpha, c.lora_targets, 0)
        states.fit(path, tensors, policy.adapter())
        states.same(path, state, c.model_dump(mode="json"))
        policy.load_adapter(tensors["ema"])

    return Adapter(c.model, c.precision, c.guidance, c.size, attach)


def _checkpoint(path: Path) -> bool:
    return checkpoint.is_one(path) and path.parent.name == "checkpoints"


# -------------------------------------------------------------------------------------------------------------- files


class Header(BaseModel):
    """What `mmalign.policy.export` writes into a file's header, as far as it is read here."""

    model_config = ConfigDict(frozen=True)

    base_hash: str | None = Field(None, pattern="^[0-9a-f]{16}$")
    precision: Literal["float32", "bfloat16"] = "float32"
    guidance: float = Field(1.0, ge=0, le=1000, allow_inf_nan=False)
    size: Json[Size] | None = None


class Peft(BaseModel):
    """peft's settings of a LoRA, as far as they decide its strength. The others must have peft's own defaults, but for
    those that act in training alone."""

    model_config = ConfigDict(strict=True, frozen=True)

    peft_type: Literal["LORA"]
    r: int = Field(ge=1)
    lora_alpha: float = Field(allow_inf_nan=False)
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    use_rslora: bool = False

    def alpha(self, layer: str, rank: int) -> float:
        """The alpha that gives a layer its strength at its rank. ValueError for another rank than peft expects."""
        expected = _matching(self.rank_pattern, layer, self.r)
        if expected != rank:
            raise ValueError(f"{layer} has rank {expected} in {PEFT_CONFIG}, and matrices of {rank}")
        alpha = _matching(self.alpha_pattern, layer, self.lora_alpha)
        return alpha * math.sqrt(rank) if self.use_rslora else alpha


INITIAL = (
    None,
    True,
    False,
    "gaussian",
    "orthogonal",
    "eva",
)  # values of `init_lora_weights` that leave the model as it is
IN_TRAINING = {  # peft's settings that change nothing of what saved matrices do
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "lora_dropout", "layers_to_transform", "layers_pattern",
    "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "qalora_group_size", "runtime_config", "ensure_weight_tying",
}  # fmt: skip


def of_file(file: Path) -> Adapter:
    """The adapter in a safetensors file. ValueError, in one line, for anything else in it."""
    from mmalign.policy import lora

    tensors, said = safe.read(file)
    try:
        header = Header.model_validate(
            {name.removeprefix("mmalign."): value for name, value in said.items() if name.startswith("mmalign.")}
        )
        prefix, names = _names(tensors)
        matrices = lora.matrices(names)
        if not matrices:
            raise ValueError("no matrix of a LoRA")
        ranks = {layer: len(a) for layer, (a, _) in matrices.items()}
        if prefix == PREFIXES[2] and os.path.lexists(file.with_name(PEFT_CONFIG)):
            matrices = lora.matrices(_alphas(_peft(file.with_name(PEFT_CONFIG)), ranks) | names)
        elif "lora_adapter_metadata" in said:
            _agree(said["lora_adapter_metadata"], names, ranks)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{file}: its header's {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None

    def attach(policy) -> None:
        if not hasattr(policy, "insert_lora"):
            raise ValueError(f"{file}: a {type(policy).__name__} takes no adapter from a file (insert_lora)")
        try:
            policy.insert_lora(matrices)
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
        raise ValueError(f"{path} is a whole pipeline; --model {path}, without --adapter, draws with it")
    there = [name for name in NAMES if os.path.lexists(path / name)]
    if not there:
        raise ValueError(f"{path}: no run there (config.yaml is missing), and no adapter ({', '.join(NAMES)})")
    if len(there) > 1:
        raise ValueError(f"{path}: {' and '.join(there)} are there; name one of the files")
    return path / there[0]


def _names(tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """How all names begin, and the tensors by what follows."""
    first = min(tensors, default="")
    prefix = next((own for own in PREFIXES if first.startswith(own)), None)
    if prefix is None:
        raise ValueError(f"{first!r} begins with none of {', '.join(PREFIXES)}")
    foreign = sorted(name for name in tensors if not name.startswith(prefix))
    if foreign:
        raise ValueError(f"{foreign[0]!r} does not begin with {prefix!r}")
    return prefix, {name.removeprefix(prefix): value for name, value in tensors.items()}


def _peft(path: Path) -> Peft:
    content = files.parsed(files.text(path, limits.STATE))
    if not isinstance(content, dict):
        raise ValueError(f"{PEFT_CONFIG} is no JSON object")
    return _settings(content, PEFT_CONFIG)


def _settings(content: Mapping[str, Any], name: str) -> Peft:
    decisive = {key: value for key, value in content.items() if key not in IN_TRAINING}
    if content.get("init_lora_weights") not in INITIAL:
        raise ValueError(f"{name}: init_lora_weights {content['init_lora_weights']!r} changes the model's own weights")
    for key, value in decisive.items():
        if key not in {*Peft.model_fields, "init_lora_weights"} and value not in (None, False, "none", [], {}):
            raise ValueError(f"{name}: {key} {value!r} is more than a plain LoRA, which is all that is read")
    try:
        return Peft.model_validate({key: value for key, value in decisive.items() if key in Peft.model_fields})
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{name}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _alphas(settings: Peft, ranks: Mapping[str, int]) -> dict[str, Tensor]:
    return {f"{layer}.alpha": torch.tensor(settings.alpha(layer, rank)) for layer, rank in ranks.items()}


def _agree(text: str, names: Mapping[str, Tensor], ranks: Mapping[str, int]) -> None:
    """ValueError where diffusers' header makes a layer stronger or weaker than its tensors alone, which is all that
    most loaders look at."""
    content = files.parsed(text)
    if not isinstance(content, dict):
        raise ValueError("its header's lora_adapter_metadata is no JSON object")
    own = {key.removeprefix("transformer."): value for key, value in content.items() if key.startswith("transformer.")}
    if not own:
        return
    settings = _settings({"peft_type": "LORA"} | own, "lora_adapter_metadata")
    for layer, rank in ranks.items():
        alpha = settings.alpha(layer, rank)
        if f"{layer}.alpha" not in names and alpha != rank:
            raise ValueError(
                f"its header gives {layer} an alpha of {alpha:g} at rank {rank} and its tensors give none, so that "
                "loaders do not agree; multiply each lora_B by alpha / rank, or write the file with `mmalign export`"
            )


def _matching(patterns: Mapping[str, Any], layer: str, otherwise: Any) -> Any:
    """The value of the first of peft's patterns that is a layer's name or its end. Patterns are regular expressions of
    a stranger's, of which plain names alone are taken."""
    for pattern, value in patterns.items():
        if not re.fullmatch(r"\^?[\w.\\-]+\$?", pattern):
            raise ValueError(f"the pattern {pattern!r} is not the name of a layer")
        name = pattern.strip("^$").replace("\\", "")
        if layer == name or (not pattern.startswith("^") and layer.endswith("." + name)):
            return value
    return otherwise
