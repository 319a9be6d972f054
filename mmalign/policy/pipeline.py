"""What all model families share: a stock diffusers pipeline as a policy. A family says how its texts become embeddings,
how its transformer is called, and how its latents are scaled; nothing of a pipeline's loop is copied.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmalign.checkpoint import fingerprint
from mmalign.policy import lora
from mmalign.types import Latents

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")  # Flow-GRPO's


@dataclass(frozen=True)
class Conditioning:
    """Text embeddings by name: `own`, a row for each of P prompts, and `empty`, one row of the empty prompt, of the
    same length. Where a family's texts differ in length, `mask` [P, L] is 1 where there is text."""

    own: dict[str, Tensor]
    empty: dict[str, Tensor]


class PipelinePolicy(ABC):
    """A policy from a stock pipeline. `guidance` is the guidance scale in rollout and replay; what it means is the
    family's: true classifier-free guidance with the empty prompt (at 1 or less none, at half the forwards), or a number
    the network is told.

    `size`, then `image_size`, is (height, width) in pixels. `spent` counts network forwards (one row of one batch each)
    and decoded images. ValueError for a size the model cannot draw.
    """

    pipeline: ClassVar[str]
    targets: ClassVar[Sequence[str]] = ATTENTION
    packed: ClassVar[bool] = False  # whether the network sees 2 x 2 latent positions as one token's channels

    def __init__(self, pipe, guidance: float = 1.0, size: tuple[int, int] | None = None):
        self.pipe, self.guidance = pipe, guidance
        for module in pipe.components.values():
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval()
        factor = self.pixels_of(pipe)
        height, width = size or (pipe.default_sample_size * pipe.vae_scale_factor,) * 2
        unit = factor * self.grain_of(pipe)
        if height % unit or width % unit:
            raise ValueError(f"size {height}x{width} must be a multiple of {unit} pixels")
        self.image_size = (height, width)
        self.latent_shape = (self.channels(pipe), height // factor, width // factor)
        self.spent: Counter[str] = Counter()

    @classmethod
    def load(cls, model: str, *, dtype: torch.dtype, device: str, guidance: float, size=None):
        kind = getattr(diffusers, cls.pipeline)
        absent = cls.absent(kind.load_config(model))
        try:
            pipe = kind.from_pretrained(model, dtype=dtype, use_safetensors=True, **absent)
        except OSError as error:
            raise ValueError(f"model {model!r}: its weights are needed as safetensors: {error}") from None
        pipe.set_progress_bar_config(disable=True)
        return cls(pipe.to(device), guidance, size)

    @classmethod
    def absent(cls, index: dict[str, Any]) -> dict[str, None]:
        """Parts of the pipeline that were saved without; by default all are there."""
        return {}

    # -------------------------------------------------------------------------------- what a family says of itself

    @classmethod
    def channels(cls, pipe) -> int:
        """Channels of a latent."""
        return pipe.transformer.config.in_channels // (4 if cls.packed else 1)

    @staticmethod
    def pixels_of(pipe) -> int:
        """Pixels of a latent position's side."""
        return pipe.vae_scale_factor

    @classmethod
    def grain_of(cls, pipe) -> int:
        """Latent positions that a side must be a multiple of."""
        return 2 if cls.packed else pipe.transformer.config.patch_size

    @abstractmethod
    def texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Embeddings of texts by name, a row each."""

    @abstractmethod
    def network(self, x: Tensor, t: Tensor, own: dict[str, Tensor]) -> Tensor:
        """The velocity at latents `x [M, C, h, w]` and times `t [M]` in [0, 1], with a row of embeddings each."""

    @property
    def true_guidance(self) -> bool:
        """Whether guidance asks the network twice."""
        return self.guidance > 1

    def guided(self, empty: Latents, wanted: Latents) -> Latents:
        """The velocity of true guidance, from that of the empty prompt and of the prompt."""
        return empty + self.guidance * (wanted - empty)

    def pixels(self, latents: Latents) -> Tensor:
        """The autoencoder's image in [-1, 1]."""
        return self.pipe.vae.decode(latents, return_dict=False)[0]

    def compressed(self, images: Tensor) -> Latents:
        """The autoencoder's latents of images in [-1, 1]: the mode of their distribution."""
        return self.pipe.vae.encode(images).latent_dist.mode()

    def units(self, x: Latents) -> tuple[Any, Any]:
        """Mean, and one over spread, of the autoencoder's latents, as numbers or for each channel of `x`."""
        config = self.pipe.vae.config
        return config.shift_factor or 0, config.scaling_factor

    def scaled(self, x: Latents) -> Latents:
        """Latents as the network has them, from the autoencoder's."""
        mean, factor = self.units(x)
        return (x - mean) * factor

    def unscaled(self, x: Latents) -> Latents:
        """The reverse of `scaled`."""
        mean, factor = self.units(x)
        return x / factor + mean

    # ---------------------------------------------------------------------------------------------------- the policy

    @property
    def device(self) -> torch.device:
        return next(self.pipe.transformer.parameters()).device  # diffusers' own `device` walks all modules for hooks

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Conditioning:
        own, empty = self.texts([*texts]), self.texts([""])
        if "mask" in own:
            length = max(own["mask"].shape[1], empty["mask"].shape[1])
            own, empty = (lengthened(some, length) for some in (own, empty))
        return Conditioning(own, empty)

    def times(self, steps: int) -> Float[Tensor, "states"]:
        """`[steps + 1]`: linear from 1 to 1/steps, shifted once by the pipeline's scheduler (for the image's size where
        it shifts by size), then 0.

        The stock pipelines walk the same times when they are given `sigmas=linspace(1, 1/steps, steps)`.
        """
        scheduler, more = self.pipe.scheduler, {}
        if scheduler.config.get("use_dynamic_shifting"):
            tokens = self.latent_shape[1] * self.latent_shape[2] // self.grain_of(self.pipe) ** 2
            more["mu"] = self.shift(tokens, steps)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist(), device="cpu", **more)
        return scheduler.sigmas.float().cpu()

    def shift(self, tokens: int, steps: int) -> float:
        """The scheduler's shift for an image of so many tokens: linear between two sizes."""
        config = self.pipe.scheduler.config
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        base, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        return base + (tokens - low) * (most - base) / (high - low)

    def velocity(self, x: Latents, t: Float[Tensor, "M"], cond: Conditioning, index: Int[Tensor, "M"]) -> Latents:
        if not self.true_guidance:
            self.spent["forwards"] += len(x)
            return self.network(x, t, {name: value[index] for name, value in cond.own.items()})
        return self.guided(*self._both(x, t, cond, index))

    @torch.no_grad()
    def prompt_effect(
        self, x: Latents, t: Float[Tensor, "M"], cond: Conditioning, index: Int[Tensor, "M"]
    ) -> Float[Tensor, "M h w"]:
        """How far the prompt moves the velocity at each position: its distance from that of the empty prompt."""
        empty, wanted = self._both(x, t, cond, index)
        return (wanted - empty).float().norm(dim=1)

    def _both(self, x: Latents, t: Tensor, cond: Conditioning, index: Tensor) -> tuple[Tensor, Tensor]:
        """The velocities of the empty prompt and of the prompt, at two forwards a row."""
        self.spent["forwards"] += 2 * len(x)
        rows = {name: value[index] for name, value in cond.own.items()}
        both = {name: torch.cat([cond.empty[name].expand_as(value), value]) for name, value in rows.items()}
        return self.network(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)

    @torch.no_grad()
    def decode(self, x: Latents) -> Float[Tensor, "M 3 H W"]:
        """Images in [0, 1], float32."""
        self.spent["decodes"] += len(x)
        image = self.pixels(self.unscaled(x.to(self.pipe.vae.dtype)))
        return (image.float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode_images(self, images: Float[Tensor, "M 3 H W"]) -> Latents:
        """The latents of images in [0, 1], float32: the mode of the encoder's distribution."""
        return self.scaled(self.compressed((2 * images - 1).to(self.pipe.vae.dtype)).float())

    def fingerprint(self) -> str:
        """Names the weights that make images of embeddings, as they are without an adapter."""
        parts = (("transformer", self.pipe.transformer), ("vae", self.pipe.vae))
        return fingerprint({f"{part}.{name}": w for part, module in parts for name, w in module.state_dict().items()})

    def attach_lora(self, rank: int, alpha: float, targets: Sequence[str] | None, seed: int) -> None:
        lora.attach(self.pipe.transformer, rank, alpha, targets or self.targets, seed)

    def save_memory(self, gradients: bool) -> None:
        """With `gradients` (gradient checkpointing), activations are computed again in the backward pass."""
        if gradients:
            self.pipe.transformer.enable_gradient_checkpointing()

    def compile(self) -> None:
        """Compile the transformer in place; worth it for long runs only (a minute or more at the first batch)."""
        self.pipe.transformer.compile()

    def parameters(self) -> list[nn.Parameter]:
        return lora.parameters(self.pipe.transformer)

    def reference(self) -> AbstractContextManager:
        return lora.disabled(self.pipe.transformer)

    def adapter(self) -> dict[str, Tensor]:
        return lora.state(self.pipe.transformer)

    def load_adapter(self, values: dict[str, Tensor]) -> None:
        lora.load_state(self.pipe.transformer, values)

    def export(self, folder: Path) -> Path:
        """Write the adapter as the LoRA file that the stock pipeline's `load_lora_weights(folder)` opens."""
        save: Callable = type(self.pipe).save_lora_weights
        save(
            folder,
            transformer_lora_layers={name: value.contiguous() for name, value in self.adapter().items()},
            transformer_lora_adapter_metadata=self.pipe.transformer.peft_config["default"].to_dict(),
        )
        return folder / "pytorch_lora_weights.safetensors"

    @torch.no_grad()
    def check_export(self, folder: Path) -> None:
        """Load the exported file through the stock pipeline and compare one velocity with ours; raises ValueError."""
        cond, index = self.encode(["a"]), torch.zeros(1, dtype=torch.long, device=self.device)
        x = torch.ones(1, *self.latent_shape, device=self.device)
        t = torch.full((1,), 0.5, device=self.device)
        ours = self.velocity(x, t, cond, index)
        self.pipe.load_lora_weights(folder, adapter_name="exported")
        try:
            self.pipe.transformer.set_adapter("exported")
            worst = float((self.velocity(x, t, cond, index) - ours).abs().max())
        finally:
            self.pipe.transformer.set_adapter("default")
            self.pipe.delete_adapters("exported")
        if not worst < 1e-4 * max(1.0, float(ours.abs().max())):
            raise ValueError(f"the exported LoRA changes the velocity by {worst:.2g}; it must not")


def lengthened(own: dict[str, Tensor], length: int) -> dict[str, Tensor]:
    """Embeddings `[P, L, ...]` with noughts up to a length."""
    more = length - own["mask"].shape[1]
    return {
        name: torch.cat([value, value.new_zeros(len(value), more, *value.shape[2:])], 1) for name, value in own.items()
    }


def ragged(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """Embeddings of texts of unlike length, [L, D] each, as `tokens` [P, L, D] and their `mask`."""
    tokens = nn.utils.rnn.pad_sequence([*rows], batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(row), device=row.device) for row in rows], batch_first=True)
    return {"tokens": tokens, "mask": mask.long()}
