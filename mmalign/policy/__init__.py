"""Policies: one file per model family; diffusers and peft live only here.

A policy gets texts and latents, never prompts or scores. Add a family: `texts` and `network` in a file
(`mmalign.policy.family` lists what else can differ), and a line in the table.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reward_models.allowlist import import_allowed
from reward_models.files import parsed, text
from reward_models.limits import CONFIG
from reward_models.model_folders import configs

POLICIES = {  # a pipeline's class -> ours
    "StableDiffusion3Pipeline": "mmalign.policy.sd3:SD3Policy",
    "ZImagePipeline": "mmalign.policy.z_image:ZImagePolicy",
    "QwenImagePipeline": "mmalign.policy.qwen_image:QwenImagePolicy",
    "Flux2KleinPipeline": "mmalign.policy.flux2:Flux2KleinPolicy",
    "FluxPipeline": "mmalign.policy.flux:FluxPolicy",
}


def load(
    model: str,
    *,
    dtype="float32",
    device: str = "cpu",
    guidance: float = 1.0,
    size: tuple[int, int] | None = None,
    quantize: str | None = None,
    offload: bool = False,
):
    """A policy from a local folder or a hub id of a diffusers pipeline, or of the user's own class, as
    `my_module:MyPolicy`, whose `load` takes the same settings; its module must be allowed (`reward_models.allowlist`).

    `quantize` names how the transformer's weights are stored (`mmalign.policy.loading.QUANTIZED`); with `offload` text
    encoders and autoencoder wait in main memory while idle. Raises ValueError for a model that is not there or of a
    family we do not drive, and for settings that cannot act here.
    """
    import torch

    settings = dict(
        dtype=getattr(torch, dtype), device=device, guidance=guidance, size=size, quantize=quantize, offload=offload
    )
    if ":" in model and not os.path.exists(model):
        return import_allowed(model, f"model {model!r}", ours=model.startswith("mmalign.policy.")).load(
            model, **settings
        )
    return class_of(model).load(model, **settings)


def class_of(model: str) -> type:
    """The policy's class for a local folder or a hub id of a diffusers pipeline. Its settings are looked at first
    (`reward_models.model_folders`)."""
    _, index = opened(model)
    name = index.get("_class_name")
    if not isinstance(name, str):
        raise ValueError(f"model {model!r}: its model_index.json names no pipeline")
    if name not in POLICIES:
        raise ValueError(f"model {model!r} is a {name}; known families: {', '.join(POLICIES)}")
    return import_allowed(POLICIES[name], name, ours=True)


def opened(model: str) -> tuple[Path, Mapping[str, Any]]:
    """The folder of a pipeline's settings, here or the hub's snapshot, and its index, both looked at."""
    if os.path.exists(model) and not (Path(model) / "model_index.json").is_file():
        raise ValueError(f"model {model!r}: no model_index.json in that folder; a diffusers pipeline is needed")
    folder = configs(model, f"model {model!r}")
    return folder, parsed(text(folder / "model_index.json", CONFIG))


def quiet() -> None:
    """Nothing from the model libraries, and none of their progress bars: the command line has its own, and what they
    log as an error they raise as well."""
    import logging

    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    for library in (of_diffusers, of_transformers):
        library.set_verbosity(logging.CRITICAL)
        library.disable_progress_bar()
