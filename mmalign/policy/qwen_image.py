"""Qwen-Image, through diffusers' stock pipeline.

Conventions: the transformer takes 2 x 2 latent positions as one token (packed here), timestep = t, and a mask over
texts of different lengths. True guidance with a blank prompt, after which each token's velocity is rescaled to its norm
without guidance. The autoencoder is a video model, used with one frame, and scales each channel by its mean and
standard deviation.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmalign.policy.family import ragged
from mmalign.policy.pipeline import PipelinePolicy
from mmalign.types import Latents
from reward_models.lengths import Reader, reader

BLANK = " "  # the model's unconditional text in training


class QwenImagePolicy(PipelinePolicy):
    pipeline = "QwenImagePipeline"
    tag = "qwen-image"
    packed = True

    def texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        tokens, mask = self.pipe.encode_prompt([text or BLANK for text in texts], self.device)
        mask = torch.ones(tokens.shape[:2], device=tokens.device) if mask is None else mask
        return ragged([row[valid.bool()] for row, valid in zip(tokens, mask, strict=True)])

    def readers(self) -> list[Reader]:
        pipe = self.pipe
        most = pipe.tokenizer_max_length + pipe.prompt_template_encode_start_idx  # the template's tokens count
        return [reader("text_encoder", pipe.tokenizer, most, pipe.prompt_template_encode.format)]

    def stock_settings(self, count: int) -> dict[str, Any]:
        if not self.true_guidance:
            return {"true_cfg_scale": 1.0}
        return {"true_cfg_scale": self.guidance, "negative_prompt": [BLANK] * count}

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        length = self.pipe.tokenizer_max_length
        return {"tokens": (length, self.pipe.transformer.config.joint_attention_dim), "mask": (length,)}

    def network(self, x: Tensor, t: Tensor, embeds: dict[str, Tensor]) -> Tensor:
        count, _, high, wide = x.shape
        v = self.pipe.transformer(
            hidden_states=self._packed(x.to(embeds["tokens"].dtype)),
            timestep=t.to(embeds["tokens"].dtype),
            encoder_hidden_states=embeds["tokens"],
            encoder_hidden_states_mask=embeds["mask"].to(x.device),
            img_shapes=[[(1, high // 2, wide // 2)]] * count,
            return_dict=False,
        )[0]
        return self._unpacked(v)

    def guided(self, empty: Latents, wanted: Latents) -> Latents:
        mixed = self._packed(super().guided(empty, wanted))
        norm = self._packed(wanted).norm(dim=-1, keepdim=True)
        return self._unpacked(mixed * (norm / mixed.norm(dim=-1, keepdim=True)))

    def _packed(self, x: Tensor) -> Tensor:
        return self.pipe._pack_latents(x, *x.shape)

    def _unpacked(self, x: Tensor) -> Tensor:
        return self.pipe._unpack_latents(x, *self.image_size, self.pipe.vae_scale_factor)[:, :, 0]

    def pixels(self, latents: Latents) -> Tensor:
        return self.pipe.vae.decode(latents[:, :, None], return_dict=False)[0][:, :, 0]

    def compressed(self, images: Tensor) -> Latents:
        return self.pipe.vae.encode(images[:, :, None]).latent_dist.mode()[:, :, 0]

    def units(self, x: Latents) -> tuple[Tensor, Tensor]:
        config = self.pipe.vae.config
        mean, std = (
            torch.tensor(values).to(x)[None, :, None, None] for values in (config.latents_mean, config.latents_std)
        )
        return mean, 1 / std
