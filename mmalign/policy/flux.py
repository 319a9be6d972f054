"""FLUX.1, through diffusers' stock pipeline.

Conventions: the transformer takes 2 x 2 latent positions as one token (packed here; latents are `[C, h, w]` everywhere
else), timestep = t, and, where it was distilled with guidance (FLUX.1-dev), the guidance scale as a number, at one
forward a row. FLUX.1-schnell takes no guidance. The schedule is shifted by the image's size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from mmalign.policy.pipeline import PipelinePolicy
from reward_models.lengths import Reader, reader


class FluxPolicy(PipelinePolicy):
    pipeline = "FluxPipeline"
    tag = "flux"
    packed = True

    def __init__(self, pipe: DiffusionPipeline, guidance: float = 1.0, size: tuple[int, int] | None = None):
        super().__init__(pipe, guidance, size)
        if guidance != 1 and not pipe.transformer.config.guidance_embeds:
            raise ValueError(f"guidance {guidance:g}: this FLUX model does not take guidance; 1 is needed")

    def distilled(self) -> str | None:
        """FLUX.1-schnell is the one that takes no guidance."""
        embeds = self.pipe.transformer.config.guidance_embeds
        return super().distilled() if embeds else "guidance_embeds: false, as FLUX.1-schnell's"

    @property
    def true_guidance(self) -> bool:
        return False

    @property
    def length(self) -> int:
        """The number of T5's tokens."""
        return min(512, self.pipe.tokenizer_2.model_max_length) if self.pipe.tokenizer_2 else 512

    def texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        tokens, pooled, _ = self.pipe.encode_prompt([*texts], None, self.device, max_sequence_length=self.length)
        return {"tokens": tokens, "pooled": pooled}

    def readers(self) -> list[Reader]:
        pipe = self.pipe
        return [
            reader("text_encoder", pipe.tokenizer, pipe.tokenizer_max_length),
            reader("text_encoder_2", pipe.tokenizer_2, self.length),
        ]

    def stock_settings(self, count: int) -> dict[str, Any]:
        return {"guidance_scale": self.guidance, "max_sequence_length": self.length}

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        config = self.pipe.transformer.config
        return {"tokens": (self.length, config.joint_attention_dim), "pooled": (config.pooled_projection_dim,)}

    def network(self, x: Tensor, t: Tensor, embeds: dict[str, Tensor]) -> Tensor:
        pipe, (count, channels, high, wide), dtype = self.pipe, x.shape, embeds["tokens"].dtype
        takes_guidance = pipe.transformer.config.guidance_embeds
        v = pipe.transformer(
            hidden_states=pipe._pack_latents(x.to(dtype), count, channels, high, wide),
            timestep=t.to(dtype),
            guidance=torch.full((count,), float(self.guidance), device=x.device) if takes_guidance else None,
            encoder_hidden_states=embeds["tokens"],
            pooled_projections=embeds["pooled"],
            txt_ids=torch.zeros(embeds["tokens"].shape[1], 3, device=x.device, dtype=dtype),
            img_ids=pipe._prepare_latent_image_ids(count, high // 2, wide // 2, x.device, dtype),
            return_dict=False,
        )[0]
        return pipe._unpack_latents(v, *self.image_size, pipe.vae_scale_factor)
