"""Load a pipeline from its folder: check its index and configs, build it without weights, then read the weights.

The pipeline is first built from its configs on torch's meta device, where tensors have a shape and no storage. A folder
whose components do not fit each other is so refused before any weights are read.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from mmalign import policy as policies
from mmalign.policy.family import Family
from reward_models.allowlist import import_allowed
from reward_models.model_folders import LIBRARIES, check_size, complete, counted, loading, pinned


def _torchao_int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return diffusers.TorchAoConfig(Int8WeightOnlyConfig())


# storage of a transformer's weights -> diffusers' config
QUANTIZED: Mapping[str, Callable[[torch.dtype], Any]] = {
    "int8": lambda dtype: _torchao_int8(),
    "llm_int8": lambda dtype: diffusers.BitsAndBytesConfig(load_in_8bit=True),
    "nf4": lambda dtype: diffusers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    ),
}

_FITTING: set[str] = set()  # configs that `_check_shapes` has passed: the check takes half of the time of a small model


def pipeline(
    family: type[Family],
    model: str,
    empty: DiffusionPipeline,
    dtype: torch.dtype,
    device: str,
    quantize: str | None,
    offload: bool,
) -> DiffusionPipeline:
    """The pipeline with its weights, of which `empty` is the skeleton: on `device`, or with `offload` only its
    transformer there. ValueError for a folder that does not hold what its index names, and for weights that are missing
    or of other shapes than its configs describe."""
    what, kind = f"model {model!r}", getattr(diffusers, family.pipeline)
    with loading(what, "it"):
        revision = pinned(model, what)
        folder = Path(kind.download(model, use_safetensors=True, **revision)) if revision else Path(model)
        index = kind.load_config(folder)
        components = dict(family.absent(index))
    for name, entry in index.items():
        expected = _is_component(kind, name, entry) and entry and entry[0] and name not in components
        if expected and not (folder / name).is_dir():
            raise ValueError(f"{what}: it has no folder {name!r}")  # diffusers would look for the component beside it
    for name, component in empty.components.items():
        if isinstance(component, nn.Module) and index[name][0] in LIBRARIES:
            config = QUANTIZED[quantize](dtype) if quantize and name == "transformer" else None
            check_size(counted(component), folder / name, what)
            with loading(what if config is None else f"quantize: {quantize}", f"its {name}"):
                components[name] = _load_weights(_component_class(name, index[name]), folder, name, dtype, config, what)
    with loading(what, "its tokenizers and scheduler"):
        pipe = kind.from_pretrained(folder, dtype=dtype, use_safetensors=True, **components)
    pipe.set_progress_bar_config(disable=True)
    for name, component in pipe.components.items():
        on_gpu = name == "transformer" and quantize in ("llm_int8", "nf4")  # bitsandbytes loads to the GPU
        if isinstance(component, nn.Module) and not on_gpu and (name == "transformer" or not offload):
            component.to(device)
    return pipe


def skeleton(family: type[Family], model: str, dtype: torch.dtype) -> DiffusionPipeline:
    """The pipeline without weights, tokenizers and processors, on the meta device. One velocity and one image are tried
    in shapes alone. ValueError for a model that is missing, and for components that cannot be built, do not fit each
    other, or generate nothing."""
    (folder, _), what = policies.checked_index(model), f"model {model!r}"
    with loading(what, "its configs"):
        kind = getattr(diffusers, family.pipeline)
        index = kind.load_config(folder)
        components = {}
        for name, entry in (index | family.absent(index)).items():
            if not name.startswith("_"):
                with loading(what, f"its {name}"):
                    is_component = _is_component(kind, name, entry)
                    components[name] = _without_weights(folder, name, entry) if is_component else entry
        pipe = kind(**components)
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                component.to(dtype)
        smallest = family.pixels_of(pipe) * family.grain_of(pipe)
        parts = [getattr(part, "config", None) for part in pipe.components.values()]
        configs = str((family, index, dtype, parts))
        if family.text_shapes is not Family.text_shapes and configs not in _FITTING:
            _check_shapes(family(pipe, 1.0, (smallest, smallest)))
            _FITTING.add(configs)
    return pipe


def placeholder_texts(policy: Family, rows: int) -> dict[str, Tensor]:
    """Embeddings of `rows` texts of the greatest length, on the meta device. A mask is real, because shapes depend on
    its values."""
    dtype = policy.pipe.transformer.dtype
    return {
        name: torch.ones(rows, *shape, dtype=torch.long)
        if name == "mask"
        else torch.empty(rows, *shape, device="meta", dtype=dtype)
        for name, shape in policy.text_shapes().items()
    }


def _check_shapes(policy: Family) -> None:
    """One velocity and one image in shapes alone. ValueError for components that do not fit each other, and for times
    that nothing can be generated with; whatever the libraries raise for other faults."""
    times = policy.times(4)
    if not times.isfinite().all() or times[0] > 1 or not (times.diff() < 0).all() or times[-1] != 0:
        raise ValueError(f"its scheduler's times do not fall from 1 to 0: {[round(t, 4) for t in times.tolist()]}")
    x = torch.empty(1, *policy.latent_shape, device="meta", dtype=policy.pipe.transformer.dtype)
    with torch.no_grad():
        v = policy.network(x, torch.empty(1, device="meta"), placeholder_texts(policy, 1))
        image = policy.pixels(x.to(policy.pipe.vae.dtype))
    if v.shape != x.shape or image.shape != (1, 3, *policy.image_size):
        raise ValueError(f"latents {list(x.shape)} become {list(v.shape)} and images {list(image.shape)}")


def _is_component(kind: type, name: str, entry: Any) -> bool:
    """Whether a name in a pipeline's index is that of a component, whose entry is then its library and class.
    ValueError if the entry is something else."""
    if name not in kind._get_signature_keys(kind)[0]:
        return False
    pair = isinstance(entry, list | tuple) and len(entry) == 2
    if entry is not None and not (pair and all(isinstance(word, str | None) for word in entry)):
        raise ValueError(f"model_index.json: {name}: {str(entry)[:100]!r} is not the library and the class of a part")
    return True


def _component_class(name: str, entry: Sequence[str]) -> type:
    """The class that a pipeline's index names for a component. ValueError if it does not exist or cannot be loaded."""
    kind = import_allowed(f"{entry[0]}:{entry[1]}", name, ours=entry[0] in LIBRARIES)
    if not isinstance(kind, type) or not hasattr(kind, "from_pretrained"):
        raise ValueError(f"model_index.json: {name}: {entry[1]!r} is not the class of a part")
    return kind


def _without_weights(folder: Path, name: str, entry: Sequence[str | None] | None) -> Any:
    """A component built from its config on the meta device; None for tokenizers and processors."""
    if entry is None or entry[0] is None or name.startswith(("tokenizer", "processor", "feature_extractor")):
        return None
    kind = _component_class(name, entry)
    if name == "scheduler":
        return kind.from_pretrained(folder, subfolder=name)
    with torch.device("meta"):
        if entry[0] == "diffusers":
            return kind.from_config(kind.load_config(folder, subfolder=name))
        return kind(kind.config_class.from_pretrained(folder, subfolder=name))


def _load_weights(kind: type, folder: Path, name: str, dtype: torch.dtype, quantization: Any, what: str) -> nn.Module:
    """A component with all of its weights; transformers alone would fill missing ones with random numbers."""
    more = {} if quantization is None else {"quantization_config": quantization}
    try:
        component, info = kind.from_pretrained(
            folder, subfolder=name, dtype=dtype, use_safetensors=True, output_loading_info=True, **more
        )
    except OSError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{what}: its weights are needed as safetensors: {name}: {reason}") from None
    complete(component, info)
    return component
