"""Stable Diffusion 3 and 3.5, through diffusers' stock pipeline.

Conventions: the transformer takes timestep = 1000 t; true classifier-free guidance with the empty prompt, unconditional
half first; latents decode as `vae(x / scaling_factor + shift_factor)`. A pipeline saved without T5 gets no padding
instead of it (`max_sequence_length=0`), where stock diffusers appends 256 zero tokens by default. The stock pipeline's
default schedule shifts twice and so ends with a step of almost no effect; here it shifts once.
"""

from collections.abc import Sequence
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor

from mmalign.policy.pipeline import PipelinePolicy
from reward_models.lengths import Reader, reader

SMALL = 10_000_000  # parameters of the text encoders together, below which a batch of texts is faster than each alone


class SD3Policy(PipelinePolicy):
    pipeline = "StableDiffusion3Pipeline"
    tag = "sd3"

    @classmethod
    def absent(cls, index: dict[str, Any]) -> dict[str, None]:
        return {name: None for name in ("text_encoder_3", "tokenizer_3") if index.get(name, [None])[0] is None}

    @classmethod
    def positions(cls, pipe: DiffusionPipeline) -> tuple[int, int]:
        config = pipe.transformer.config
        return (config.pos_embed_max_size * config.patch_size,) * 2

    @property
    def length(self) -> int:
        """The number of T5's tokens."""
        return 0 if self.pipe.text_encoder_3 is None else 256

    @property
    def together(self) -> int:
        """A batch fills the processor where the encoders are small; others take no more than one text can."""
        encoders = (self.pipe.text_encoder, self.pipe.text_encoder_2, self.pipe.text_encoder_3)
        size = sum(p.numel() for encoder in encoders if encoder is not None for p in encoder.parameters())
        return 8 if size < SMALL else 1

    def texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        tokens, _, pooled, _ = self.pipe.encode_prompt(
            [*texts], None, None, device=self.device, do_classifier_free_guidance=False, max_sequence_length=self.length
        )
        return {"tokens": tokens, "pooled": pooled}

    def readers(self) -> list[Reader]:
        pipe, most = self.pipe, self.pipe.tokenizer_max_length
        clip = [reader("text_encoder", pipe.tokenizer, most), reader("text_encoder_2", pipe.tokenizer_2, most)]
        return clip + ([reader("text_encoder_3", pipe.tokenizer_3, self.length)] if self.length else [])

    def stock_settings(self, count: int) -> dict[str, Any]:
        return {"guidance_scale": self.guidance, "max_sequence_length": self.length}

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        length, config = self.pipe.tokenizer_max_length + self.length, self.pipe.transformer.config
        return {"tokens": (length, config.joint_attention_dim), "pooled": (config.pooled_projection_dim,)}

    def network(self, x: Tensor, t: Tensor, embeds: dict[str, Tensor]) -> Tensor:
        return self.pipe.transformer(
            hidden_states=x.to(embeds["tokens"].dtype),
            timestep=1000 * t,
            encoder_hidden_states=embeds["tokens"],
            pooled_projections=embeds["pooled"],
            return_dict=False,
        )[0]
