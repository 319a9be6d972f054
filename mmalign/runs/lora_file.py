"""Read a LoRA from a safetensors file, in the names of diffusers, ComfyUI or peft.

The tensors alone give the matrices. The header of a file from `mmalign.policy.export` gives defaults of precision,
guidance and size. peft's settings are beside its file, and decide how strong the adapter is.
"""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, Json, ValidationError
from torch import Tensor

from mmalign.runs import tensors as safetensors_files
from reward_models import files, limits
from reward_models.errors import first_problem

PREFIXES = ("transformer.", "diffusion_model.", "base_model.model.")  # of diffusers', ComfyUI's and peft's names
PEFT_CONFIG = "adapter_config.json"
Size = tuple[Annotated[int, Field(ge=1, le=4096)], Annotated[int, Field(ge=1, le=4096)]]


class Header(BaseModel):
    """The fields of a header of `mmalign.policy.export` that are read here."""

    model_config = ConfigDict(frozen=True)

    base_hash: str | None = Field(None, pattern="^[0-9a-f]{16}$")
    precision: Literal["float32", "bfloat16"] = "float32"
    guidance: float = Field(1.0, ge=0, le=1000, allow_inf_nan=False)
    size: Json[Size] | None = None


class Peft(BaseModel):
    """peft's settings of a LoRA that decide its strength. The others must have peft's own defaults, except those that
    act in training alone."""

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


# values of `init_lora_weights` that do not change the base model's weights
INITIAL = (None, True, False, "gaussian", "orthogonal", "eva")
IN_TRAINING = {  # peft's settings that do not change the effect of saved matrices
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "lora_dropout", "layers_to_transform", "layers_pattern",
    "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "qalora_group_size", "runtime_config", "ensure_weight_tying",
}  # fmt: skip


def read(file: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], Header]:
    """The matrices A and B of each layer, with the adapter's strength in B, and the header. ValueError, in one line
    that names the file, for anything else in it."""
    from mmalign.policy import lora

    tensors, metadata = safetensors_files.read(file)
    try:
        header = Header.model_validate(
            {name.removeprefix("mmalign."): value for name, value in metadata.items() if name.startswith("mmalign.")}
        )
        prefix, names = split_prefix(tensors)
        matrices = lora.matrices(names)
        if not matrices:
            raise ValueError("no matrix of a LoRA")
        ranks = {layer: len(a) for layer, (a, _) in matrices.items()}
        if prefix == PREFIXES[2] and os.path.lexists(file.with_name(PEFT_CONFIG)):
            matrices = lora.matrices(_alphas(_peft(file.with_name(PEFT_CONFIG)), ranks) | names)
        elif "lora_adapter_metadata" in metadata:
            _check_strength(metadata["lora_adapter_metadata"], names, ranks)
    except ValidationError as error:
        raise ValueError(f"{file}: its header's {first_problem(error.errors())}") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return matrices, header


def split_prefix(tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """The prefix of all names, and the tensors by the rest of their names."""
    first = min(tensors, default="")
    prefix = next((known for known in PREFIXES if first.startswith(known)), None)
    if prefix is None:
        raise ValueError(f"{first!r} begins with none of {', '.join(PREFIXES)}")
    foreign = sorted(name for name in tensors if not name.startswith(prefix))
    if foreign:
        raise ValueError(f"{foreign[0]!r} does not begin with {prefix!r}")
    return prefix, {name.removeprefix(prefix): value for name, value in tensors.items()}


def _peft(path: Path) -> Peft:
    content = files.parsed(files.text(path, limits.STATE))
    if not isinstance(content, dict):
        raise ValueError(f"{PEFT_CONFIG} is not a JSON object")
    return _settings(content, PEFT_CONFIG)


def _settings(content: Mapping[str, Any], name: str) -> Peft:
    decisive = {key: value for key, value in content.items() if key not in IN_TRAINING}
    if content.get("init_lora_weights") not in INITIAL:
        raise ValueError(f"{name}: init_lora_weights {content['init_lora_weights']!r} changes the model's own weights")
    for key, value in decisive.items():
        if key not in {*Peft.model_fields, "init_lora_weights"} and value not in (None, False, "none", [], {}):
            raise ValueError(f"{name}: {key} {value!r} is more than a plain LoRA, and only plain ones are supported")
    try:
        return Peft.model_validate({key: value for key, value in decisive.items() if key in Peft.model_fields})
    except ValidationError as error:
        raise ValueError(f"{name}: {first_problem(error.errors())}") from None


def _alphas(settings: Peft, ranks: Mapping[str, int]) -> dict[str, Tensor]:
    return {f"{layer}.alpha": torch.tensor(settings.alpha(layer, rank)) for layer, rank in ranks.items()}


def _check_strength(text: str, names: Mapping[str, Tensor], ranks: Mapping[str, int]) -> None:
    """ValueError where diffusers' header gives a layer another strength than its tensors alone, which most loaders
    use."""
    content = files.parsed(text)
    if not isinstance(content, dict):
        raise ValueError("its header's lora_adapter_metadata is not a JSON object")
    given = {key.removeprefix("transformer."): v for key, v in content.items() if key.startswith("transformer.")}
    if not given:
        return
    settings = _settings({"peft_type": "LORA"} | given, "lora_adapter_metadata")
    for layer, rank in ranks.items():
        alpha = settings.alpha(layer, rank)
        if f"{layer}.alpha" not in names and alpha != rank:
            raise ValueError(
                f"its header gives {layer} an alpha of {alpha:g} at rank {rank} and its tensors give none, so that "
                "loaders do not agree; multiply each lora_B by alpha / rank, or write the file with `mmalign export`"
            )


def _matching(patterns: Mapping[str, Any], layer: str, otherwise: Any) -> Any:
    """The value of the first of peft's patterns that is a layer's name or its end. Patterns are regular expressions
    from an untrusted file, so that only plain names are accepted."""
    for pattern, value in patterns.items():
        if not re.fullmatch(r"\^?[\w.\\-]+\$?", pattern):
            raise ValueError(f"the pattern {pattern!r} is not the name of a layer")
        name = pattern.strip("^$").replace("\\", "")
        if layer == name or (not pattern.startswith("^") and layer.endswith("." + name)):
            return value
    return otherwise
