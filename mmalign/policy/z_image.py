"""Z-Image, through diffusers' stock pipeline.

Conventions: the transformer takes timestep = 1 - t and returns the velocity with the opposite sign; texts differ in
length and are passed as a list. True guidance with the empty prompt is `empty + guidance (wanted - empty)`, as in all
families; the stock pipeline's `guidance_scale` is one less.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from mmalign.policy.family import chat, ragged
from mmalign.policy.pipeline import PipelinePolicy
from reward_models.lengths import Reader, reader

LENGTH = 512  # the largest number of tokens of a text


class ZImagePolicy(PipelinePolicy):
    pipeline = "ZImagePipeline"
    tag = "z-image"
    targets = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(self, pipe: DiffusionPipeline, guidance: float = 1.0, size: tuple[int, int] | None = None):
        super().__init__(pipe, guidance, size or (1024, 1024))

    @classmethod
    def channels(cls, pipe: DiffusionPipeline) -> int:
        return pipe.transformer.in_channels

    @classmethod
    def grain_of(cls, pipe: DiffusionPipeline) -> int:
        return 2

    @classmethod
    def positions(cls, pipe: DiffusionPipeline) -> tuple[int, int]:
        _, high, wide = pipe.transformer.config.axes_lens
        return 2 * high, 2 * wide

    def texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        rows, _ = self.pipe.encode_prompt(
            [*texts], self.device, do_classifier_free_guidance=False, max_sequence_length=LENGTH
        )
        return ragged(rows)

    def readers(self) -> list[Reader]:
        return [reader("text_encoder", self.pipe.tokenizer, LENGTH, chat(self.pipe.tokenizer, thinking=True))]

    def stock_settings(self, count: int) -> dict[str, Any]:
        return {"guidance_scale": self.guidance - 1}

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"tokens": (LENGTH, self.pipe.transformer.config.cap_feat_dim), "mask": (LENGTH,)}

    def blocks(self) -> nn.ModuleList:
        return self.pipe.transformer.layers

    def tokens(self, output: Tensor) -> list[Tensor]:
        """The image's tokens are before the text's, in one sequence."""
        _, high, wide = self.latent_shape
        return [output[:, : high * wide // 4]]

    def network(self, x: Tensor, t: Tensor, embeds: dict[str, Tensor]) -> Tensor:
        tokens, mask = embeds["tokens"], embeds["mask"].bool()
        rows = [row[valid] for row, valid in zip(tokens, mask, strict=True)]
        images = list(x.to(tokens.dtype).unsqueeze(2).unbind())
        out = self.pipe.transformer(images, 1 - t, rows, return_dict=False)[0]
        return -torch.stack(list(out)).squeeze(2)
