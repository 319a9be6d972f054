"""A policy without weights: the parts of a pipeline built from their configs on torch's meta device, where tensors have
a shape and no storage. Latents, times, trainable parameters and what a forward keeps for its backward pass are asked of
the same classes that the loaded model is driven by.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmalign import policy as policies
from mmalign.policy.pipeline import Conditioning, PipelinePolicy, class_of, is_part
from reward_models.model_folders import loading

ARCHITECTURES = {  # hub id -> folder of configs below assets/architectures, for models that are not here yet
    "stabilityai/stable-diffusion-3.5-medium": "stable_diffusion_3.5_medium",
    "black-forest-labs/FLUX.1-dev": "flux.1_dev",
    "black-forest-labs/FLUX.2-klein-base-4B": "flux.2_klein_base_4b",
    "black-forest-labs/FLUX.2-klein-4B": "flux.2_klein_4b",
    "Qwen/Qwen-Image": "qwen_image",
    "Tongyi-MAI/Z-Image": "z_image",
    "Tongyi-MAI/Z-Image-Turbo": "z_image_turbo",
}


def load(
    model: str, *, dtype: str = "float32", guidance: float = 1.0, size: tuple[int, int] | None = None
) -> PipelinePolicy:
    """The policy of a folder or hub id, on the meta device. It has no tokenizers and reads no weights, so it encodes
    nothing and draws nothing.

    Raises ValueError for a model that is not there, of a family we do not drive, or that loads itself.
    """
    if ":" in model and not Path(model).exists():
        raise ValueError(f"model {model!r} loads itself; only a pipeline's configs can be read without its weights")
    return of(policies.family(model), model, getattr(torch, dtype), guidance, size)


def of(
    family: type[PipelinePolicy], model: str, dtype: torch.dtype, guidance: float, size: tuple[int, int] | None
) -> PipelinePolicy:
    """The policy of a family. What its parts' configs describe is tried in shapes alone. ValueError as `load`, and for
    parts that cannot be made, do not fit each other, or draw nothing."""
    (folder, _), what = policies.opened(model), f"model {model!r}"
    with loading(what, "its configs"):
        pipe = _pipeline(folder, family, dtype, what)
        smallest = family.pixels_of(pipe) * family.grain_of(pipe)
        if family.text_shapes is not PipelinePolicy.text_shapes:  # it says what its network is given
            _try(family(pipe, 1.0, (smallest, smallest)))
    return family(pipe, guidance, size)


def _pipeline(folder: Path, family: type[PipelinePolicy], dtype: torch.dtype, what: str):
    """A pipeline with the parts that its index names, without weights, tokenizers and processors."""
    kind = getattr(diffusers, family.pipeline)
    index = kind.load_config(folder)
    parts = {}
    for name, own in (index | family.absent(index)).items():
        if not name.startswith("_"):
            with loading(what, f"its {name}"):
                parts[name] = _part(folder, name, own) if is_part(kind, name, own) else own
    pipe = kind(**parts)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.to(dtype)
    return pipe


def _part(folder: Path, name: str, own: Sequence[str | None] | None):
    """A part of a pipeline as its index has it, the library and class of a component, without its weights."""
    if own is None or own[0] is None or name.startswith(("tokenizer", "processor", "feature_extractor")):
        return None
    kind = class_of(name, own)
    if name == "scheduler":
        return kind.from_pretrained(folder, subfolder=name)
    with torch.device("meta"):
        if own[0] == "diffusers":
            return kind.from_config(kind.load_config(folder, subfolder=name))
        return kind(kind.config_class.from_pretrained(folder, subfolder=name))


def _try(policy: PipelinePolicy) -> None:
    """One velocity and one image in shapes alone. ValueError for parts that do not fit each other, and for times that
    nothing can be drawn with; whatever the libraries raise for other faults."""
    times = policy.times(4)
    if not times.isfinite().all() or times[0] > 1 or not (times.diff() < 0).all() or times[-1] != 0:
        raise ValueError(f"its scheduler's times do not fall from 1 to 0: {[round(t, 4) for t in times.tolist()]}")
    x = torch.empty(1, *policy.latent_shape, device="meta", dtype=policy.pipe.transformer.dtype)
    cond = Conditioning(texts(policy, 1), texts(policy, 1))
    with torch.no_grad():
        v = policy.velocity(x, torch.empty(1, device="meta"), cond, torch.zeros(1, dtype=torch.long))
        image = policy.pixels(x.to(policy.pipe.vae.dtype))
    if v.shape != x.shape or image.shape != (1, 3, *policy.image_size):
        raise ValueError(f"latents {list(x.shape)} become {list(v.shape)} and images {list(image.shape)}")


def weights(policy: PipelinePolicy) -> dict[str, int]:
    """Parameters of each part of the pipeline; shared ones once."""
    return {
        name: sum(p.numel() for p in part.parameters())
        for name, part in policy.pipe.components.items()
        if isinstance(part, nn.Module)
    }


def texts(policy: PipelinePolicy, rows: int) -> dict[str, Tensor]:
    """Embeddings of `rows` texts of the greatest length. A mask is real: which positions exist decides shapes."""
    dtype = policy.pipe.transformer.dtype
    return {
        name: torch.ones(rows, *shape, dtype=torch.long)
        if name == "mask"
        else torch.empty(rows, *shape, device="meta", dtype=dtype)
        for name, shape in policy.text_shapes().items()
    }


def peak(policy: PipelinePolicy, learn: bool) -> int:
    """The most bytes that exist at once while the velocity of one row is computed, with guidance if there is any, and,
    to `learn`, while its gradients are: activations, what is kept for the backward pass or computed again in it, and
    their gradients. Parameters and what their gradients are gathered in are not among them.

    Every storage that an operation makes is counted until it is gone. Attention makes what fused kernels make, never
    the square matrix.
    """
    transformer = policy.pipe.transformer
    for p in policy.parameters():
        p.grad = torch.zeros_like(p)
    live = _Live([*transformer.parameters(), *transformer.buffers(), *(p.grad for p in policy.parameters())])
    x, t = (torch.ones(1, *shape, device=transformer.device) for shape in (policy.latent_shape, ()))
    cond, index = Conditioning(texts(policy, 1), texts(policy, 1)), torch.zeros(1, dtype=torch.long)
    with torch.set_grad_enabled(learn), _fused(), live:
        v = policy.velocity(x, t, cond, index)
        if learn:
            v.sum().backward()
    for p in policy.parameters():
        p.grad = None
    return live.most


class _Live(TorchDispatchMode):
    """Bytes of the storages that operations have made and that still exist; those of `known` count nothing."""

    def __init__(self, known: Sequence[Tensor]):
        super().__init__()
        self.known = known  # alive, or another storage could take one's place
        self.bytes = {own.untyped_storage()._cdata: 0 for own in known}
        self.now, self.most = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for own in tree_leaves(out):
            if isinstance(own, Tensor) and own.untyped_storage()._cdata not in self.bytes:
                storage = own.untyped_storage()
                self.bytes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata)
        self.most = max(self.most, self.now)
        return out

    def _gone(self, key: int) -> None:
        self.now -= self.bytes.pop(key)


@contextmanager
def _fused() -> Iterator[None]:
    """Attention that makes what fused kernels make: on the meta device torch would take the one that makes all. A mode
    would not reach what gradient checkpointing computes again."""
    own = nn.functional.scaled_dot_product_attention
    nn.functional.scaled_dot_product_attention = _attention
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = own


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_, **__) -> Tensor:
    return _Attention.apply(query, key, value, attn_mask)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(context, query, key, value, mask):
        out = torch.empty_like(query)
        sums = torch.empty(query.shape[:-1], device=query.device)
        context.save_for_backward(query, key, value, mask, out, sums)
        return out

    @staticmethod
    def backward(context, _):
        return *(torch.empty_like(own) for own in context.saved_tensors[:3]), None
