"""Policies: one file per model family; diffusers and peft live only here.

A policy gets texts and latents, never prompts or scores. Add a family: `texts` and `network` in a file
(`mmalign.policy.pipeline` says what else can differ), and a line in the table.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reward_models import files
from reward_models.trust import check, imported

POLICIES = {  # a pipeline's class -> ours
    "StableDiffusion3Pipeline": "mmalign.policy.sd3:SD3Policy",
    "ZImagePipeline": "mmalign.policy.z_image:ZImagePolicy",
    "QwenImagePipeline": "mmalign.policy.qwen_image:QwenImagePolicy",
    "Flux2KleinPipeline": "mmalign.policy.flux2:Flux2KleinPolicy",
    "FluxPipeline": "mmalign.policy.flux:FluxPolicy",
}

LIBRARIES = ("diffusers", "transformers")  # whose classes a pipeline's parts are


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
    `my_module:MyPolicy`, whose `load` takes the same settings; its module must be allowed (`reward_models.trust`).

    `quantize` names how the transformer's weights are stored (`mmalign.policy.pipeline.QUANTIZED`); with `offload` text
    encoders and autoencoder wait in main memory while idle. Raises ValueError for a model that is not there or of a
    family we do not drive, and for settings that cannot act here.
    """
    import torch

    settings = dict(
        dtype=getattr(torch, dtype), device=device, guidance=guidance, size=size, quantize=quantize, offload=offload
    )
    if ":" in model and not os.path.exists(model):
        return imported(model, f"model {model!r}").load(model, **settings)
    try:
        return family(model).load(model, **settings)
    except OSError as error:
        raise ValueError(f"model {model!r}: {error}") from None


def family(model: str) -> type:
    """The policy's class for a local folder or a hub id of a diffusers pipeline."""
    name = _pipeline_class(model)
    if name not in POLICIES:
        raise ValueError(f"model {model!r} is a {name}; known families: {', '.join(POLICIES)}")
    return imported(POLICIES[name], name, ours=True)


def quiet() -> None:
    """Only errors from the model libraries, and none of their progress bars: the command line has its own."""
    import logging

    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    for library in (of_diffusers, of_transformers):
        library.set_verbosity_error()
        library.disable_progress_bar()
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao's, when peft imports it


def _pipeline_class(model: str) -> str:
    """`_class_name` of a pipeline's index, read before any weights. The index names a module for each part, which
    diffusers imports: others than its own must be allowed."""
    index = _index(model)
    for part, own in index.items():
        if isinstance(own, list) and own and own[0] is not None and own[0] not in LIBRARIES:
            check(str(own[0]), f"model {model!r}: the part {part!r}")
    if not isinstance(index.get("_class_name"), str):
        raise ValueError(f"model {model!r}: its model_index.json names no pipeline")
    return index["_class_name"]


def _index(model: str) -> Mapping[str, Any]:
    if os.path.exists(model):
        place = Path(model) / "model_index.json"
        if not place.is_file():
            raise ValueError(f"model {model!r}: no model_index.json in that folder; a diffusers pipeline is needed")
        index = files.parsed(files.text(place))
        if not isinstance(index, dict):
            raise ValueError(f"model {model!r}: its model_index.json is no JSON object")
        return index
    from diffusers import DiffusionPipeline

    try:
        return DiffusionPipeline.load_config(model)
    except OSError as error:
        raise ValueError(f"model {model!r} is neither a folder here nor a model the hub knows: {error}") from None
