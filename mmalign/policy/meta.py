"""A policy without weights, on torch's meta device, where tensors have a shape and no storage. Latent shapes, times,
trainable parameters and peak memory come from the classes that drive the loaded model.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmalign import policy as policies
from mmalign.policy import loading
from mmalign.policy.pipeline import Conditioning, PipelinePolicy

ARCHITECTURES = {  # hub id -> folder of configs below assets/architectures, for models that are not downloaded yet
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
    """The policy of a folder or hub id, on the meta device, without tokenizers and weights.

    Raises ValueError for a model that is missing, of an unknown family, or loaded by a class of its own.
    """
    if ":" in model and not Path(model).exists():
        raise ValueError(f"model {model!r} loads itself; only a pipeline's configs can be read without its weights")
    family = policies.class_of(model)
    return family(loading.skeleton(family, model, getattr(torch, dtype)), guidance, size)


def weights(policy: PipelinePolicy) -> dict[str, int]:
    """The number of parameters of each component of the pipeline; shared ones count once."""
    return {
        name: sum(p.numel() for p in module.parameters())
        for name, module in policy.pipe.components.items()
        if isinstance(module, nn.Module)
    }


def peak(policy: PipelinePolicy, learn: bool) -> int:
    """Peak activation memory in bytes of one row's velocity, with guidance if there is any, and with `learn` of its
    backward pass: activations, tensors saved for or recomputed in the backward pass, and their gradients. Parameters
    and their accumulated gradients are not counted.

    Every storage that an operation allocates counts until it is freed. Attention allocates what fused kernels do, never
    the square matrix.
    """
    transformer = policy.pipe.transformer
    for p in policy.parameters():
        p.grad = torch.zeros_like(p)
    live = Live([*transformer.parameters(), *transformer.buffers(), *(p.grad for p in policy.parameters())])
    x, t = (torch.ones(1, *shape, device=transformer.device) for shape in (policy.latent_shape, ()))
    texts, index = loading.placeholder_texts(policy, 1), torch.zeros(1, dtype=torch.long)
    with torch.set_grad_enabled(learn), _fused(), live:
        v = policy.velocity(x, t, Conditioning(texts, texts), index)
        if learn:
            v.sum().backward()
    for p in policy.parameters():
        p.grad = None
    return live.most


@torch.no_grad()
def features(policy: PipelinePolicy, blocks: Sequence[int] | None) -> int:
    """The number of features of a state (`mmalign.policy.protocol.Observable`)."""
    x, t = (torch.ones(1, *shape, device=policy.device) for shape in (policy.latent_shape, ()))
    texts, index = loading.placeholder_texts(policy, 1), torch.zeros(1, dtype=torch.long)
    with policy.observed(blocks) as rows:
        policy.velocity(x, t, Conditioning(texts, texts), index)
        return rows(1).shape[1]


class Live(TorchDispatchMode):
    """Bytes of the storages that operations have allocated and that still exist, beside those of `known`."""

    def __init__(self, known: Sequence[Tensor]):
        super().__init__()
        self.known = known  # keeps them alive, so that no other storage gets their address
        self.bytes = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.now, self.most = 0, 0

    def __torch_dispatch__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in self.bytes:
                storage = value.untyped_storage()
                self.bytes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata)
        self.most = max(self.most, self.now)
        return out

    def _free(self, key: int) -> None:
        self.now -= self.bytes.pop(key)


@contextmanager
def _fused() -> Iterator[None]:
    """Attention that allocates what fused kernels do; on the meta device torch would choose the kernel that allocates
    the square matrix. A dispatch mode would not reach what gradient checkpointing recomputes."""
    original = nn.functional.scaled_dot_product_attention
    nn.functional.scaled_dot_product_attention = _attention
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = original


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_, **__) -> Tensor:
    return _Attention.apply(query, key, value, attn_mask)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        out = torch.empty_like(query)
        sums = torch.empty(query.shape[:-1], device=query.device)
        context.save_for_backward(query, key, value, mask, out, sums)
        return out

    @staticmethod
    def backward(context: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return *(torch.empty_like(saved) for saved in context.saved_tensors[:3]), None
