"""What a policy is to the rest of the project: `Policy` samples and `Trainable` trains."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import Parameter

from mmalign.types import Latents


@runtime_checkable
class Policy(Protocol):
    """A text-to-image flow model; one file per model family under `mmalign/policy/`.

    `encode` gives the conditioning of P texts, of which `velocity` takes one row per latent (`index [M]`).
    `times(steps)` are the model's own. `counts` holds forwards and decodes so far. `image_size` is (H, W).
    """

    latent_shape: tuple[int, int, int]
    image_size: tuple[int, int]
    device: torch.device
    counts: Counter[str]

    def encode(self, texts: Sequence[str]) -> Any: ...

    def times(self, steps: int) -> Float[Tensor, "states"]: ...

    def velocity(self, x: Latents, t: Float[Tensor, "M"], cond: Any, index: Int[Tensor, "M"]) -> Latents: ...

    def decode(self, x: Latents) -> Float[Tensor, "M 3 H W"]: ...


@runtime_checkable
class Trainable(Policy, Protocol):
    """A policy that `mmalign train` can train: it takes an adapter, which begins as the identity.

    `fingerprint` names the frozen weights. `adapter` and `load_adapter` copy the adapter's tensors out and in, by
    name. `reference()` switches the adapter off for a while.
    """

    def fingerprint(self) -> str: ...

    def attach_lora(self, rank: int, alpha: float, targets: Sequence[str] | None, seed: int) -> None: ...

    def parameters(self) -> list[Parameter]: ...

    def adapter(self) -> dict[str, Tensor]: ...

    def load_adapter(self, tensors: Mapping[str, Tensor]) -> None: ...

    def reference(self) -> AbstractContextManager: ...
