"""Export an adapter for other programs, in a table of formats, and verify an export against the policy.

A LoRA's strength, alpha over rank, is folded into its matrices: the alpha of a file equals its rank, so that a loader
may read alpha, guess it or ignore it. No header is needed to read a file back.

The header of every safetensors file records its origin, as strings: `mmalign.base_hash` (of the base model, in the
precision it was loaded in), `.pipeline`, `.family`, `.rank`, `.alpha` (equal to the rank), `.guidance`, `.size` (height
and width in pixels), `.weights_hash` (of the tensors in the file), and what the caller adds.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmalign.policy import lora
from mmalign.policy.protocol import Policy
from reward_models import files
from reward_models.weights import fingerprint

# ComfyUI's names: the prefix of its keys, and the layers of diffusers that it finds by them. Where it accepts two
# prefixes, the one that diffusers reads too. Diffusers swaps the halves of the released `norm_out`, and ComfyUI swaps
# those of its change.
BLOCK = r"transformer_blocks\.\d+\."
JOINT = r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
FORWARD = r"ff(_context)?\.net\.(0\.proj|2)|norm1(_context)?\.linear"
ENDS = r"context_embedder|x_embedder|proj_out"
TIMES = r"norm_out\.linear|time_text_embed\.(timestep|text|guidance)_embedder\.linear_[12]"
COMFYUI = {
    "StableDiffusion3Pipeline": (
        "transformer", rf"{BLOCK}({JOINT}|attn2\.(to_[qkv]|to_out\.0)|{FORWARD})|{ENDS}|{TIMES}",
    ),
    "FluxPipeline": (
        "transformer",
        rf"{BLOCK}({JOINT}|{FORWARD})|single_{BLOCK}(attn\.to_[qkv]|proj_mlp|proj_out|norm\.linear)|{ENDS}|{TIMES}",
    ),
    "Flux2KleinPipeline": (
        "transformer",
        rf"{BLOCK}({JOINT}|ff(_context)?\.linear_(in|out))|single_{BLOCK}attn\.(to_qkv_mlp_proj|to_out)|{ENDS}|"
        r"norm_out\.linear",
    ),
    "QwenImagePipeline": ("diffusion_model", r".*"),
    "ZImagePipeline": (
        "diffusion_model",
        r"(layers|noise_refiner|context_refiner)\.\d+\."
        r"(attention\.(to_[qkv]|to_out\.0)|feed_forward\.w[123]|adaLN_modulation\.0)|"
        r"all_x_embedder\.2-1|all_final_layer\.2-1\.(linear|adaLN_modulation\.1)|cap_embedder\.1|t_embedder\.mlp\.[02]",
    ),
}  # fmt: skip
PEFT, PEFT_CONFIG = (
    "base_model.model.",
    "adapter_config.json",
)  # the prefix of peft's keys, and the name of its settings
# the largest change of the velocity by rounding, relative to its largest value
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}


@dataclass(frozen=True)
class Format:
    """`name` is the file or folder in the folder of the export; `write(policy, path)` writes it, and within
    `opened(policy, path)` the policy's network is the one read from it."""

    name: str
    write: Callable[..., None]
    opened: Callable[..., AbstractContextManager]


def export(policy: Policy, folder: Path, form: str, about: Mapping[str, str]) -> Path:
    """Write the policy's adapter in a format of the table, and `about` into its header as `mmalign.NAME`. ValueError
    for a format that does not support the model or its adapted layers."""
    path = folder / FORMATS[form].name
    folder.mkdir(parents=True, exist_ok=True)
    FORMATS[form].write(policy, path)
    config = policy.pipe.transformer.peft_config["default"]
    origin = {
        "base_hash": policy.fingerprint(), "pipeline": type(policy.pipe).__name__, "family": type(policy).__name__,
        "rank": config.r, "alpha": config.r, "guidance": policy.guidance, "size": json.dumps([*policy.image_size]),
    }  # fmt: skip
    header = {f"mmalign.{name}": str(value) for name, value in (origin | dict(about)).items()}
    for file in tensor_files(path):
        _stamp(file, header)
    return path


@torch.no_grad()
def check(policy: Policy, folder: Path, form: str) -> None:
    """Verify an export: complete, for this base model, and reproducing the policy's velocity. ValueError."""
    path = folder / FORMATS[form].name
    files = tensor_files(path)
    if not files:
        raise ValueError(f"{path}: no safetensors file")
    base = policy.fingerprint()
    for file in files:
        _check_file(file, base)
    ours = _velocity(policy)
    with FORMATS[form].opened(policy, path):
        change = float((_velocity(policy) - ours).abs().max())
    most = TOLERANCE[policy.pipe.transformer.dtype] * max(1.0, float(ours.abs().max()))
    if not change < most:
        raise ValueError(f"{path} changes the velocity by {change:.2g}, and rounding by at most {most:.2g}")


def tensor_files(path: Path) -> list[Path]:
    """The file itself, or the files of a pipeline's transformer."""
    return [path] if path.is_file() else sorted((path / "transformer").glob("*.safetensors"))


def header(file: Path) -> dict[str, str]:
    """The entries of `export` in a file's header, by name; empty for other files. ValueError for a damaged file."""
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    return {name.removeprefix("mmalign."): value for name, value in metadata.items() if name.startswith("mmalign.")}


def _stamp(file: Path, about: Mapping[str, str]) -> None:
    """Add to a file's header; the file is replaced atomically, because its tensors may be mapped from it."""
    with safe_open(file, "pt") as opened:
        before = opened.metadata() or {}
    tensors, partial = load_file(file), file.with_name(f".{file.name}.partial")
    save_file(tensors, partial, before | dict(about) | {"mmalign.weights_hash": fingerprint(tensors, digits=16)})
    os.replace(partial, file)


def _check_file(file: Path, base: str) -> None:
    about = header(file)
    if "base_hash" not in about:
        raise ValueError(f"{file} does not name its base model (base_hash)")
    if about["base_hash"] != base:
        raise ValueError(f"{file} is for the base model {about['base_hash']}; this one is {base}")
    if fingerprint(load_file(file), digits=16) != about["weights_hash"]:
        raise ValueError(f"{file} is damaged: its matrices differ from those that were written")


def _velocity(policy: Policy) -> Tensor:
    """The network's velocity at one latent, with and without a prompt. Without guidance, which would multiply rounding
    errors."""
    cond = policy.encode(["a"])
    rows = {name: torch.cat([value, cond.empty[name]]) for name, value in cond.prompts.items()}
    x, t = torch.ones(2, *policy.latent_shape, device=policy.device), torch.full((2,), 0.5, device=policy.device)
    return policy.network(x, t, rows).float()


# ------------------------------------------------------------------------------------------------------- the formats


def _write_diffusers(policy: Policy, path: Path) -> None:
    save: Callable = type(policy.pipe).save_lora_weights
    network = policy.pipe.transformer
    save(
        path.parent,
        weight_name=path.name,
        transformer_lora_layers=lora.named(lora.folded(network)),
        transformer_lora_adapter_metadata=lora.config(network),
    )


@contextmanager
def _opened_diffusers(policy: Policy, path: Path) -> Iterator[None]:
    """A stock network into which the pipeline's own loader loads the tensors, without the header."""
    with _instead(policy.pipe, lora.changed(policy.pipe.transformer, {})):
        policy.pipe.load_lora_weights(load_file(path))
        yield


def _write_comfyui(policy: Policy, path: Path) -> None:
    prefix, known = _comfyui(policy)
    matrices = lora.folded(policy.pipe.transformer)
    for layer in matrices:
        if not re.fullmatch(known, layer):
            raise ValueError(f"format comfyui: ComfyUI does not know the layer {layer!r} of a {policy.pipeline}")
    save_file(lora.named(matrices, f"{prefix}.", alphas=True), path)


@contextmanager
def _opened_comfyui(policy: Policy, path: Path) -> Iterator[None]:
    tensors = _within(load_file(path), _comfyui(policy)[0] + ".", path)
    for layer in lora.layers(tensors):
        if f"{layer}.alpha" not in tensors:
            raise ValueError(f"{layer} has no alpha")
    with _adapted(policy, tensors):
        yield


def _write_peft(policy: Policy, path: Path) -> None:
    network = policy.pipe.transformer
    save_file(lora.named(lora.folded(network), PEFT), path)
    config = lora.config(network) | {"inference_mode": True, "base_model_name_or_path": None}
    files.write(path.with_name(PEFT_CONFIG), json.dumps(config, indent=2, sort_keys=True) + "\n")


@contextmanager
def _opened_peft(policy: Policy, path: Path) -> Iterator[None]:
    with _adapted(policy, _within(load_file(path), PEFT, path)):
        yield


def _within(tensors: Mapping[str, Tensor], prefix: str, path: Path) -> dict[str, Tensor]:
    """The tensors without the prefix that all their names must have."""
    foreign = [name for name in tensors if not name.startswith(prefix)]
    if foreign:
        raise ValueError(f"{path}: {foreign[0]!r} does not begin with {prefix!r}")
    return {name.removeprefix(prefix): value for name, value in tensors.items()}


def _adapted(policy: Policy, tensors: Mapping[str, Tensor]) -> AbstractContextManager:
    """Within this block the policy has a stock network with the matrices added to its weights."""
    network = policy.pipe.transformer
    return _instead(policy.pipe, lora.changed(network, lora.changes(lora.matrices(tensors))))


def _comfyui(policy: Policy) -> tuple[str, str]:
    if policy.pipeline not in COMFYUI:
        raise ValueError(f"format comfyui: {policy.pipeline} is not one of {', '.join(COMFYUI)}, whose names are known")
    return COMFYUI[policy.pipeline]


def _write_merged(policy: Policy, path: Path) -> None:
    transformer = policy.pipe.transformer
    with _instead(policy.pipe, lora.changed(transformer, lora.changes(lora.folded(transformer)))):
        policy.pipe.save_pretrained(path)


@contextmanager
def _opened_merged(policy: Policy, path: Path) -> Iterator[None]:
    network = policy.pipe.transformer
    saved = type(network).from_pretrained(path, subfolder="transformer", dtype=network.dtype)
    with _instead(policy.pipe, saved.to(policy.device).eval()):
        yield


@contextmanager
def _instead(pipe: DiffusionPipeline, network: nn.Module) -> Iterator[None]:
    """Within this block the pipeline has another transformer."""
    before, pipe.transformer = pipe.transformer, network
    try:
        yield
    finally:
        pipe.transformer = before


FORMATS = {
    "diffusers": Format("pytorch_lora_weights.safetensors", _write_diffusers, _opened_diffusers),
    "comfyui": Format("comfyui_lora.safetensors", _write_comfyui, _opened_comfyui),
    "peft": Format("adapter_model.safetensors", _write_peft, _opened_peft),
    "merged": Format("merged", _write_merged, _opened_merged),
}
