"""Random pipelines of a few thousand weights of the stock classes, one builder a family, saved as a hub repository."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_vlm
import torch
from build_tiny_model import new_text_encoder, new_vae
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tiny_worlds import SHAPES, new_tokenizer
from torch import Tensor, nn
from transformers import (
    CLIPTextModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

STEPS = 5
LETTERS = '▁abcdefghijklmnopqrstuvwxyzOH"'
DYNAMIC = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64, "max_shift": 1.15}
CHAT = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"


def lively(module: nn.Module, std: float = 0.15) -> nn.Module:
    """The default initialisation hardly lets conditioning through."""
    for p in module.parameters():
        nn.init.normal_(p, std=std)
    return module


def t5(width: int = 32) -> tuple[T5TokenizerFast, T5EncoderModel]:
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -1.0) for letter in LETTERS)]
    tokenizer = T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=48)
    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
    return tokenizer, T5EncoderModel(config)


def sd3(folder: Path) -> None:
    tokenizer = new_tokenizer(SHAPES)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        caption_projection_dim=32,
        pos_embed_max_size=8,
    )
    lively(transformer)
    vae = new_vae(SHAPES)
    vae.register_to_config(scaling_factor=1.3, shift_factor=0.1)
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0),
        vae=vae,
        text_encoder=new_text_encoder(tokenizer, 16),
        tokenizer=tokenizer,
        text_encoder_2=new_text_encoder(tokenizer, 16),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    ).save_pretrained(folder)


def flux(folder: Path, guided: bool) -> None:
    tokenizer = new_tokenizer(SHAPES)
    second, encoder = t5()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=guided,
        axes_dims_rope=(4, 6, 6),
    )
    vae = new_vae(SHAPES)
    vae.register_to_config(scaling_factor=1.3, shift_factor=0.1)
    text = CLIPTextModel(new_text_encoder(tokenizer, 16).config)
    FluxPipeline(
        FlowMatchEulerDiscreteScheduler(**DYNAMIC), vae, text, tokenizer, encoder, second, lively(transformer)
    ).save_pretrained(folder)


def qwen_sizes(words: int) -> dict[str, Any]:
    return {
        "vocab_size": words, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 1024, "bos_token_id": None,
    }  # fmt: skip


def z_image(folder: Path) -> None:
    tokenizer = tiny_vlm.new_tokenizer([])
    tokenizer.chat_template = CHAT
    encoder = Qwen3Model(Qwen3Config(**qwen_sizes(len(tokenizer)), head_dim=16))
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32,
        axes_dims=[4, 6, 6], axes_lens=[1024, 128, 128],
    )  # fmt: skip
    vae = new_vae(SHAPES)
    vae.register_to_config(scaling_factor=1.3, shift_factor=0.1)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    ZImagePipeline(scheduler, vae, lively(encoder, 0.3), tokenizer, lively(transformer)).save_pretrained(folder)


def flux2_klein(folder: Path, distilled: bool) -> None:
    tokenizer = tiny_vlm.new_tokenizer([])
    tokenizer.chat_template = CHAT
    sizes = qwen_sizes(len(tokenizer)) | {"num_hidden_layers": 28, "hidden_size": 16, "intermediate_size": 16}
    encoder = Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=8))
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=48, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64), layers_per_block=1, latent_channels=4, norm_num_groups=8, sample_size=32,
    )  # fmt: skip
    vae.bn.running_mean.copy_(torch.linspace(-0.5, 0.5, 16))
    vae.bn.running_var.copy_(torch.linspace(0.5, 2.0, 16))
    scheduler = FlowMatchEulerDiscreteScheduler(**DYNAMIC)
    Flux2KleinPipeline(
        scheduler, vae, lively(encoder, 0.3), tokenizer, lively(transformer), is_distilled=distilled
    ).save_pretrained(folder)


def qwen_image(folder: Path) -> None:
    tokenizer = tiny_vlm.new_tokenizer([])
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad")}
    text = qwen_sizes(len(tokenizer)) | {
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    }
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=ids["image_pad"], video_token_id=ids["video_pad"]
    )
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.7, 1.1, 2.0],
    )  # fmt: skip
    encoder = lively(Qwen2_5_VLForConditionalGeneration(config), 0.3)
    scheduler = FlowMatchEulerDiscreteScheduler(**DYNAMIC)
    QwenImagePipeline(scheduler, vae, encoder, tokenizer, lively(transformer)).save_pretrained(folder)


@dataclass(frozen=True)
class Family:
    """`build` saves a pipeline; `guidances` are those the family takes; `call` turns one into arguments of the stock
    pipeline beside those all families have."""

    build: Callable[[Path], None]
    guidances: tuple[float, ...]
    call: Callable[[float], dict[str, Any]]
    sizes: tuple[tuple[int, int], ...] = ((32, 32), (32, 48))
    absent: tuple[str, ...] = ()

    def stock(self, folder: str):
        """The stock pipeline."""
        return DiffusionPipeline.from_pretrained(folder, **dict.fromkeys(self.absent))


def true_scale(guidance: float) -> dict[str, Any]:
    return {"true_cfg_scale": guidance, "negative_prompt": [" "] * 3} if guidance > 1 else {"true_cfg_scale": 1.0}


FAMILIES = {
    "Stable Diffusion 3": Family(
        sd3,
        (1.0, 3.5),
        lambda g: {"guidance_scale": g, "max_sequence_length": 0},
        absent=("text_encoder_3", "tokenizer_3"),
    ),
    "FLUX.1-dev": Family(
        lambda folder: flux(folder, True), (1.0, 3.5), lambda g: {"guidance_scale": g, "max_sequence_length": 48}
    ),
    "FLUX.1-schnell": Family(lambda folder: flux(folder, False), (1.0,), lambda g: {"max_sequence_length": 48}),
    "FLUX.2-klein": Family(lambda folder: flux2_klein(folder, False), (1.0, 4.0), lambda g: {"guidance_scale": g}),
    "FLUX.2-klein, distilled": Family(lambda folder: flux2_klein(folder, True), (1.0,), lambda g: {}),
    "Qwen-Image": Family(qwen_image, (1.0, 4.0), true_scale),
    "Z-Image": Family(z_image, (1.0, 4.0), lambda g: {"guidance_scale": g - 1}),
}


# for what is tried with every family besides conformance: FLUX.2's needs 28 layers of text encoder, which load slowly
SOME = [pytest.param(name, marks=pytest.mark.slow if "klein" in name else ()) for name in FAMILIES]


def stock_images(pipe, family: Family, texts: list[str], guidance: float, size: tuple[int, int]) -> Tensor:
    """What the stock pipeline draws, each text from the seed of its place."""
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt=[*texts],  # Z-Image's writes into the list
        height=size[0],
        width=size[1],
        num_inference_steps=STEPS,
        sigmas=np.linspace(1, 1 / STEPS, STEPS).tolist(),
        generator=[torch.Generator().manual_seed(i) for i in range(len(texts))],
        output_type="pt",
        **family.call(guidance),
    ).images
