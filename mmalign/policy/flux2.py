"""FLUX.2-klein, through diffusers' stock pipeline.

Conventions: latents are the autoencoder's in blocks of 2 x 2, normalised channel by channel by the statistics it was
saved with, so that a latent position is a token; timestep = t. True guidance with the empty prompt; the distilled
models take none. The schedule is shifted by the image's size and the number of steps.
"""

from collections.abc import Sequence

from diffusers import DiffusionPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor

from mmalign.policy.family import ATTENTION, chat
from mmalign.policy.pipeline import PipelinePolicy
from mmalign.types import Latents
from reward_models.lengths import Reader, reader


class Flux2KleinPolicy(PipelinePolicy):
    pipeline = "Flux2KleinPipeline"
    tag = "flux2"
    targets = (*ATTENTION, "to_qkv_mlp_proj", "to_out")  # the last two: single blocks, with their feed-forward

    def __init__(self, pipe: DiffusionPipeline, guidance: float = 1.0, size: tuple[int, int] | None = None):
        super().__init__(pipe, guidance, size)
        if guidance > 1 and pipe.config.is_distilled:
            raise ValueError(f"guidance {guidance:g}: this FLUX.2 model does not take guidance; 1 is needed")

    def distilled(self) -> str | None:
        return "is_distilled: true" if self.pipe.config.is_distilled else super().distilled()

    @staticmethod
    def pixels_of(pipe: DiffusionPipeline) -> int:
        return 2 * pipe.vae_scale_factor

    @classmethod
    def grain_of(cls, pipe: DiffusionPipeline) -> int:
        return 1

    def shift(self, tokens: int, steps: int) -> float:
        return compute_empirical_mu(tokens, steps)

    def texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        tokens, _ = self.pipe.encode_prompt([*texts], self.device)
        return {"tokens": tokens}

    def readers(self) -> list[Reader]:
        pipe = self.pipe
        return [reader("text_encoder", pipe.tokenizer, pipe.tokenizer_max_length, chat(pipe.tokenizer, thinking=False))]

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"tokens": (self.pipe.tokenizer_max_length, self.pipe.transformer.config.joint_attention_dim)}

    def network(self, x: Tensor, t: Tensor, embeds: dict[str, Tensor]) -> Tensor:
        tokens = embeds["tokens"]
        v = self.pipe.transformer(
            hidden_states=self.pipe._pack_latents(x.to(tokens.dtype)),
            timestep=t.to(tokens.dtype),
            guidance=None,
            encoder_hidden_states=tokens,
            txt_ids=self.pipe._prepare_text_ids(tokens).to(x.device),
            img_ids=self.pipe._prepare_latent_ids(x).to(x.device),
            return_dict=False,
        )[0]
        return v.transpose(1, 2).reshape(x.shape)

    def pixels(self, latents: Latents) -> Tensor:
        return super().pixels(self.pipe._unpatchify_latents(latents))

    def compressed(self, images: Tensor) -> Latents:
        return self.pipe._patchify_latents(super().compressed(images))

    def units(self, x: Latents) -> tuple[Tensor, Tensor]:
        norm = self.pipe.vae.bn
        factor = (norm.running_var + self.pipe.vae.config.batch_norm_eps).rsqrt()
        return tuple(values.to(x)[None, :, None, None] for values in (norm.running_mean, factor))
