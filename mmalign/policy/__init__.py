"""Policies: text-to-image models with a trainable adapter, one file per model family.

Only this package of mmalign imports diffusers and peft. A policy takes texts and latents, never prompts or scores. To
add a family, write `texts` and `network` in a file (`mmalign.policy.family` lists what else can differ), and a line in
the table.
"""

import gc
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reward_models.allowlist import import_allowed
from reward_models.files import parsed, text
from reward_models.limits import CONFIG

POLICIES = {  # diffusers' pipeline class -> the policy's class
    "StableDiffusion3Pipeline": "mmalign.policy.sd3:SD3Policy",
    "ZImagePipeline": "mmalign.policy.z_image:ZImagePolicy",
    "QwenImagePipeline": "mmalign.policy.qwen_image:QwenImagePolicy",
    "Flux2KleinPipeline": "mmalign.policy.flux2:Flux2KleinPolicy",
    "FluxPipeline": "mmalign.policy.flux:FluxPolicy",
}


def load(
    model: str,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    guidance: float = 1.0,
    size: tuple[int, int] | None = None,
    quantize: str | None = None,
    offload: bool = False,
) -> Any:
    """The policy of a local folder or a hub id of a diffusers pipeline, or of a user's class, as `my_module:MyPolicy`,
    whose `load` takes the same settings; its module must be allowed (`reward_models.allowlist`).

    `quantize` names the storage of the transformer's weights (`mmalign.policy.loading.QUANTIZED`); with `offload` text
    encoders and autoencoder stay in main memory while idle. ValueError for a model that is missing or of an unknown
    family, and for settings that have no effect here.
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
    """The policy's class for a local folder or a hub id of a diffusers pipeline, whose settings are checked first
    (`reward_models.model_folders`)."""
    _, index = checked_index(model)
    name = index.get("_class_name")
    if not isinstance(name, str):
        raise ValueError(f"model {model!r}: its model_index.json names no pipeline")
    if name not in POLICIES:
        raise ValueError(f"model {model!r} is a {name}; known families: {', '.join(POLICIES)}")
    with importing():
        return import_allowed(POLICIES[name], name, ours=True)


def checked_index(model: str) -> tuple[Path, Mapping[str, Any]]:
    """The folder of a pipeline's settings, local or the hub's snapshot, and its index. ValueError where they are not
    safe to load."""
    from reward_models.model_folders import configs

    if os.path.exists(model) and not (Path(model) / "model_index.json").is_file():
        raise ValueError(f"model {model!r}: no model_index.json in that folder; a diffusers pipeline is needed")
    folder = configs(model, f"model {model!r}")
    return folder, parsed(text(folder / "model_index.json", CONFIG))


@contextmanager
def importing() -> Iterator[None]:
    """For imports of large libraries. The search for unused objects, which takes a fifth of the time of importing
    diffusers and finds next to nothing, waits until the end of the block."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def quiet() -> None:
    """Switch off the messages and progress bars of the model libraries: the command line has its own, and the libraries
    also raise what they log as errors."""
    quiet_imports()
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity(logging.CRITICAL)
        library.disable_progress_bar()


def quiet_imports() -> None:
    """Switch off what these log when another library imports them; without importing anything."""
    for name in ("torch.utils._pytree", "bitsandbytes", "torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)
