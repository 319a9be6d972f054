"""What a policy is to the rest of the project: `Policy` samples, `Trainable` trains; the others are optional
abilities."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
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


@runtime_checkable
class HoldsAdapters(Trainable, Protocol):
    """Has several adapters on one network, by name; that of `Trainable` is "default". `attach_lora`, `parameters`,
    `adapter` and `load_adapter` then take a `name`. Within `acting(name)` that adapter acts and takes gradients; None:
    as within `reference()`."""

    def adapters(self) -> list[str]: ...

    def acting(self, name: str | None) -> AbstractContextManager: ...


@runtime_checkable
class Fuses(Protocol):
    """Has its adapter in its weights within a block, where that is possible: cheaper forwards, other rounding. The
    adapter takes no gradients there, and must not be changed."""

    def fused(self) -> AbstractContextManager: ...


@runtime_checkable
class SavesMemory(Protocol):
    """Recomputes activations (`gradients`), decodes in tiles, and bounds the cached embeddings of `texts`."""

    def save_memory(self, gradients: bool = False, tiling: bool = False, texts: int = 1000) -> None: ...


@runtime_checkable
class Movable(Protocol):
    """Moves its weights to a device."""

    def to(self, device: str) -> None: ...


@runtime_checkable
class ChoosesAttention(Protocol):
    """Uses another attention back end. ValueError for one that does not run here."""

    def attend(self, backend: str) -> None: ...


@runtime_checkable
class Compiles(Protocol):
    """Compiles its network by `torch.compile`."""

    def compile(self) -> None: ...


@runtime_checkable
class EncodesImages(Protocol):
    """Turns images into latents."""

    def encode_images(self, images: Float[Tensor, "M 3 H W"]) -> Latents: ...


@runtime_checkable
class DecodesInGraph(Protocol):
    """Decodes with gradients: the images of `decode` in a graph, the autoencoder frozen. The clamp to [0, 1] passes
    gradients straight through; with `recompute`, activations are recomputed in the backward pass, image by image."""

    def decode_in_graph(self, x: Latents, recompute: bool = False) -> Float[Tensor, "M 3 H W"]: ...


@runtime_checkable
class Attributing(Protocol):
    """Knows the effect of the prompt: the distance of the velocity from that of the empty prompt, at two forwards."""

    def prompt_effect(
        self, x: Latents, t: Float[Tensor, "M"], cond: Any, index: Int[Tensor, "M"]
    ) -> Float[Tensor, "M h w"]: ...


@runtime_checkable
class Observable(Protocol):
    """Shows what its network makes of states, at no forward more: within the block, `features(M)` are those of the `M`
    rows of the last velocity. They depend on a row's latent, time and prompt alone. `blocks` numbers the
    blocks of the network that they come from, None for the middle one. ValueError where there is no such block."""

    def observed(
        self, blocks: Sequence[int] | None = None
    ) -> AbstractContextManager[Callable[[int], Float[Tensor, "M F"]]]: ...


@runtime_checkable
class Contrasting(Protocol):
    """Gives the velocities of the empty prompt and of the prompt, without guidance, at two forwards a row."""

    def velocities(
        self, x: Latents, t: Float[Tensor, "M"], cond: Any, index: Int[Tensor, "M"]
    ) -> tuple[Latents, Latents]: ...


@runtime_checkable
class MayBeDistilled(Protocol):
    """Says by what it is known that the model was distilled to a few steps, None where nothing says so."""

    def distilled(self) -> str | None: ...


@runtime_checkable
class Stock(Protocol):
    """Has a stock pipeline to compare with: its images of some texts, from the noise of these seeds."""

    def stock_images(self, texts: Sequence[str], seeds: Sequence[int], steps: int) -> Float[Tensor, "M 3 H W"]: ...


@runtime_checkable
class TakesLora(Protocol):
    """Takes the matrices of a LoRA file."""

    def insert_lora(self, matrices: Any) -> None: ...


@runtime_checkable
class Mixes(Protocol):
    """Acts as a mixture of adapters, by name and weight; a velocity then takes several `evaluations` of the network."""

    @property
    def evaluations(self) -> int: ...

    def mix(self, weights: Mapping[str, float]) -> None: ...


@runtime_checkable
class Inspectable(Protocol):
    """Knows its adapter's matrices by name, which layers do nothing, and what else would be trained."""

    def adapter_names(self) -> list[str]: ...

    def unused(self, x: Latents, cond: Any) -> list[str]: ...

    def trained_besides(self) -> list[str]: ...


@runtime_checkable
class Guided(Protocol):
    """Says whether its guidance evaluates the empty prompt beside each prompt."""

    @property
    def true_guidance(self) -> bool: ...


def fused(policy: Policy) -> AbstractContextManager:
    """A block in which images are drawn by the policy as it stands."""
    return policy.fused() if isinstance(policy, Fuses) else nullcontext()


def two_forwards(policy: Policy, guidance: float) -> bool:
    """Whether the velocity of a row takes two forwards at this guidance."""
    return policy.true_guidance if isinstance(policy, Guided) else guidance > 1
