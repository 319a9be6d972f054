"""Stable Diffusion 3 and 3.5, through diffusers' stock pipeline.

Conventions: the transformer is told 1000 t; true classifier-free guidance with the empty prompt, unconditional half
first; latents decode as `vae(x / scaling_factor + shift_factor)`. A pipeline saved without T5 gets no padding in its
place (`max_sequence_length=0`), where stock diffusers appends 256 zero tokens unless told otherwise.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.checkpoint import fingerprint
from mmalign.policy import lora
from mmalign.types import Latents

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")  # Flow-GRPO's


@dataclass(frozen=True)
class Conditioning:
    """Text embeddings of P prompts: `tokens [P, L, D]`, `pooled [P, d]`, and the same of the empty prompt, P = 1."""

    tokens: Float[Tensor, "P L D"]
    pooled: Float[Tensor, "P d"]
    empty_tokens: Float[Tensor, "1 L D"]
    empty_pooled: Float[Tensor, "1 d"]


class SD3Policy:
    """`guidance` is the classifier-free guidance scale in rollout and replay; 1 or less means none, at half the
    forwards.

    `size`, then `image_size`, is (height, width) in pixels. `spent` counts network forwards (one row of one batch
    each) and decoded images.
    """

    def __init__(self, pipe: StableDiffusion3Pipeline, guidance: float = 1.0, size: tuple[int, int] | None = None):
        self.pipe, self.guidance = pipe, guidance
        for module in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3):
            if module is not None:
                module.requires_grad_(False).eval()
        factor = pipe.vae_scale_factor
        height, width = size or (pipe.default_sample_size * factor,) * 2
        if height % (factor * pipe.patch_size) or width % (factor * pipe.patch_size):
            raise ValueError(f"size {height}x{width} must be a multiple of {factor * pipe.patch_size} pixels")
        self.image_size = (height, width)
        self.latent_shape = (pipe.transformer.config.in_channels, height // factor, width // factor)
        self.spent: Counter[str] = Counter()

    @classmethod
    def load(cls, model: str, *, dtype: torch.dtype, device: str, guidance: float, size=None) -> "SD3Policy":
        parts = StableDiffusion3Pipeline.load_config(model)
        absent = {name: None for name in ("text_encoder_3", "tokenizer_3") if parts.get(name, [None])[0] is None}
        pipe = StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype, **absent)
        pipe.set_progress_bar_config(disable=True)
        return cls(pipe.to(device), guidance, size)

    @property
    def device(self) -> torch.device:
        return next(self.pipe.transformer.parameters()).device  # diffusers' own `device` walks all modules for hooks

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Conditioning:
        length = 0 if self.pipe.text_encoder_3 is None else 256
        positive, empty, pooled, empty_pooled = self.pipe.encode_prompt(
            [*texts], None, None, device=self.device, negative_prompt="", max_sequence_length=length
        )
        return Conditioning(positive, pooled, empty[:1], empty_pooled[:1])

    def times(self, steps: int) -> Float[Tensor, "states"]:
        """`[steps + 1]`: linear from 1 to 1/steps, shifted once by the pipeline's scheduler, then 0.

        The stock pipeline walks the same times when it is given `sigmas=linspace(1, 1/steps, steps)`; its own default
        shifts twice and so ends with a step that does next to nothing.
        """
        self.pipe.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist(), device="cpu")
        return self.pipe.scheduler.sigmas.float().cpu()

    def velocity(self, x: Latents, t: Float[Tensor, "M"], cond: Conditioning, index: Int[Tensor, "M"]) -> Latents:
        if self.guidance <= 1:
            self.spent["forwards"] += len(x)
            return self._forward(x, t, cond.tokens[index], cond.pooled[index])
        empty, wanted = self._both(x, t, cond, index)
        return empty + self.guidance * (wanted - empty)

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
        tokens, pooled = cond.tokens[index], cond.pooled[index]
        tokens = torch.cat([cond.empty_tokens.expand_as(tokens), tokens])
        pooled = torch.cat([cond.empty_pooled.expand_as(pooled), pooled])
        return self._forward(torch.cat([x, x]), torch.cat([t, t]), tokens, pooled).chunk(2)

    def _forward(self, x: Tensor, t: Tensor, tokens: Tensor, pooled: Tensor) -> Tensor:
        return self.pipe.transformer(
            hidden_states=x.to(tokens.dtype),
            timestep=1000 * t,
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
            return_dict=False,
        )[0]

    @torch.no_grad()
    def decode(self, x: Latents) -> Float[Tensor, "M 3 H W"]:
        """Images in [0, 1], float32."""
        self.spent["decodes"] += len(x)
        vae = self.pipe.vae
        image = vae.decode(x.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
        return (image.float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode_images(self, images: Float[Tensor, "M 3 H W"]) -> Latents:
        """The latents of images in [0, 1], float32: the mode of the encoder's distribution."""
        vae = self.pipe.vae
        latents = vae.encode((2 * images - 1).to(vae.dtype)).latent_dist.mode().float()
        return (latents - vae.config.shift_factor) * vae.config.scaling_factor

    def fingerprint(self) -> str:
        """Names the weights that make images of embeddings, as they are without an adapter."""
        parts = (("transformer", self.pipe.transformer), ("vae", self.pipe.vae))
        return fingerprint({f"{part}.{name}": w for part, module in parts for name, w in module.state_dict().items()})

    def attach_lora(self, rank: int, alpha: float, targets: Sequence[str] | None, seed: int) -> None:
        lora.attach(self.pipe.transformer, rank, alpha, targets or TARGETS, seed)

    def compile(self) -> None:
        """Compile the transformer in place; worth it for long runs only (a minute or more at the first batch)."""
        self.pipe.transformer.compile()

    def parameters(self) -> list[torch.nn.Parameter]:
        return lora.parameters(self.pipe.transformer)

    def reference(self) -> AbstractContextManager:
        return lora.disabled(self.pipe.transformer)

    def adapter(self) -> dict[str, Tensor]:
        return lora.state(self.pipe.transformer)

    def load_adapter(self, values: dict[str, Tensor]) -> None:
        lora.load_state(self.pipe.transformer, values)

    def export(self, folder: Path) -> Path:
        """Write the adapter as the LoRA file that the stock pipeline's `load_lora_weights(folder)` opens."""
        StableDiffusion3Pipeline.save_lora_weights(
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
