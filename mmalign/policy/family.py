"""The interface of a model family: how its texts become embeddings, how its transformer is called, how its latents are
scaled. `texts` and `network` are needed; the other methods have defaults for diffusers' usual conventions.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor, nn

from mmalign.types import Latents
from reward_models.lengths import Reader
from reward_models.limits import PIXELS

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")  # Flow-GRPO's
FEW_STEPS = re.compile(r"turbo|schnell|lightning|hyper-?sd|\blcm|distill", re.IGNORECASE)


class Family(ABC):
    """A pipeline of a family, with frozen weights in eval mode, at an image size and a guidance scale.

    `guidance` is the scale in rollout and replay. What it means is the family's: true classifier-free guidance with the
    empty prompt (at 1 or less none, at half the forwards), or a number that the network takes.

    `size`, then `image_size`, is (height, width) in pixels. ValueError for a size that the model cannot generate.
    """

    pipeline: ClassVar[str]
    tag: ClassVar[str | None] = None  # the family's on the Hugging Face hub
    targets: ClassVar[Sequence[str]] = ATTENTION
    packed: ClassVar[bool] = False  # whether the network takes 2 x 2 latent positions as the channels of one token

    def __init__(self, pipe: DiffusionPipeline, guidance: float = 1.0, size: tuple[int, int] | None = None):
        self.pipe, self.guidance = pipe, guidance
        for module in pipe.components.values():
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval()
        factor = self.pixels_of(pipe)
        height, width = size or self._default_size(pipe)
        unit = factor * self.grain_of(pipe)
        if height % unit or width % unit:
            raise ValueError(f"size {height}x{width} must be a multiple of {unit} pixels")
        for side, most in zip((height, width), self.positions(pipe) or (), strict=False):
            if side > factor * most:
                raise ValueError(f"size {height}x{width}: the model has positions for {factor * most} pixels a side")
        self.image_size = (height, width)
        self.latent_shape = (self.channels(pipe), height // factor, width // factor)

    def distilled(self) -> str | None:
        """By what it is known that the model was distilled to a few steps, here the name of its repository or folder;
        None where nothing says so."""
        name = Path(str(getattr(self.pipe.config, "_name_or_path", ""))).name
        return f"its name, {name}" if FEW_STEPS.search(name) else None

    @staticmethod
    def _default_size(pipe: DiffusionPipeline) -> tuple[int, int]:
        """The size of the images that the model was trained on. ValueError if its config has no usable size."""
        sample = pipe.default_sample_size
        if not isinstance(sample, int) or not 0 < (sample * pipe.vae_scale_factor) ** 2 <= PIXELS:
            raise ValueError(f"the model's config has sample_size {sample!r}, not a size of images; give a size")
        return (sample * pipe.vae_scale_factor,) * 2

    # ----------------------------------------------------------------------------------------------- pipeline and size

    @classmethod
    def absent(cls, index: Mapping[str, Any]) -> dict[str, None]:
        """Components of the pipeline that are optional and missing from its index; by default none."""
        return {}

    @classmethod
    def channels(cls, pipe: DiffusionPipeline) -> int:
        """Channels of a latent."""
        return pipe.transformer.config.in_channels // (4 if cls.packed else 1)

    @staticmethod
    def pixels_of(pipe: DiffusionPipeline) -> int:
        """Pixels of a latent position's side."""
        return pipe.vae_scale_factor

    @classmethod
    def grain_of(cls, pipe: DiffusionPipeline) -> int:
        """Latent positions that a side must be a multiple of."""
        return 2 if cls.packed else pipe.transformer.config.patch_size

    @classmethod
    def positions(cls, pipe: DiffusionPipeline) -> tuple[int, int] | None:
        """The greatest height and width in latent positions; None where the network has no table of positions."""
        return None

    def stock_settings(self, count: int) -> dict[str, Any]:
        """The arguments of the stock pipeline's `__call__`, beside those that all families have, that generate `count`
        images as this policy does."""
        return {"guidance_scale": self.guidance}

    def stock_noise(self, x: Latents) -> Tensor:
        """Noise in the form that the stock pipeline takes as `latents`."""
        return self.pipe._pack_latents(x, *x.shape) if self.packed else x

    # ----------------------------------------------------------------------------------------------------------- texts

    @abstractmethod
    def texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Embeddings of texts by name, a row each."""

    @property
    def together(self) -> int:
        """How many texts are embedded at once. Above 1 only where `texts` gives all texts one length: a text's bits may
        then depend on this number, and not on the others."""
        return 1

    def readers(self) -> list[Reader]:
        """The text encoders that read a text of a limited length."""
        return []

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each of `texts`' embeddings, for one text of the greatest length. It is used where there are no
        weights to embed a text with (`mmalign.policy.meta`)."""
        raise ValueError(f"{type(self).__name__} does not give the shapes of its texts' embeddings (text_shapes)")

    # --------------------------------------------------------------------------------------------- network and guidance

    @abstractmethod
    def network(self, x: Tensor, t: Tensor, embeds: dict[str, Tensor]) -> Tensor:
        """The velocity at latents `x [M, C, h, w]` and times `t [M]` in [0, 1], with a row of embeddings each."""

    def blocks(self) -> nn.ModuleList:
        """The blocks of the network whose output has tokens of the image."""
        return self.pipe.transformer.transformer_blocks

    def tokens(self, output: Any) -> list[Float[Tensor, "M L D"]]:
        """The image's tokens in a block's output, then the text's where all texts have one length: a mean over padding
        would depend on the other texts."""
        text, image = output
        padded = "mask" in self.text_shapes()
        return [image] if text is None or padded else [image, text]

    @property
    def true_guidance(self) -> bool:
        """Whether guidance evaluates the network twice."""
        return self.guidance > 1

    def guided(self, empty: Latents, wanted: Latents) -> Latents:
        """The velocity of true guidance, from that of the empty prompt and of the prompt."""
        return empty + self.guidance * (wanted - empty)

    # ----------------------------------------------------------------------------------------------------- autoencoder

    def pixels(self, latents: Latents) -> Tensor:
        """The autoencoder's image in [-1, 1]."""
        return self.pipe.vae.decode(latents, return_dict=False)[0]

    def compressed(self, images: Tensor) -> Latents:
        """The autoencoder's latents of images in [-1, 1]: the mode of their distribution."""
        return self.pipe.vae.encode(images).latent_dist.mode()

    def units(self, x: Latents) -> tuple[Any, Any]:
        """Mean, and one over the standard deviation, of the autoencoder's latents, as numbers or per channel of `x`."""
        config = self.pipe.vae.config
        return config.shift_factor or 0, config.scaling_factor

    def scaled(self, x: Latents) -> Latents:
        """Latents as the network takes them, from the autoencoder's."""
        mean, factor = self.units(x)
        return (x - mean) * factor

    def unscaled(self, x: Latents) -> Latents:
        """The inverse of `scaled`."""
        mean, factor = self.units(x)
        return x / factor + mean

    # ----------------------------------------------------------------------------------------------------------- times

    def times(self, steps: int) -> Float[Tensor, "states"]:
        """`[steps + 1]`: linear from 1 to 1/steps, shifted once by the pipeline's scheduler (for the image's size where
        it shifts by size), then 0.

        The stock pipelines use the same times with `sigmas=linspace(1, 1/steps, steps)`.
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


def chat(tokenizer: Any, thinking: bool) -> Callable[[str], str]:
    """The chat message that some families' text encoders take for a text."""

    def message(text: str) -> str:
        messages = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )

    return message


def ragged(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """Embeddings of texts of different lengths, [L, D] each, as `tokens` [P, L, D] and their `mask`."""
    tokens = nn.utils.rnn.pad_sequence([*rows], batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(row), device=row.device) for row in rows], batch_first=True)
    return {"tokens": tokens, "mask": mask.long()}
