"""A stock Stable Diffusion 3 pipeline of a few thousand random weights, saved to disk once per run."""

import json

import pytest
import torch
from build_tiny_model import new_text_encoder, new_tokenizer, new_vae
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def random_model(tmp_path_factory) -> str:
    torch.manual_seed(0)
    tokenizer = new_tokenizer()
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
    for p in transformer.parameters():  # the default initialisation hardly lets conditioning through
        torch.nn.init.normal_(p, std=0.15)
    vae = new_vae()
    vae.register_to_config(scaling_factor=1.3, shift_factor=0.1)
    folder = tmp_path_factory.mktemp("random_sd3")
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
    return str(folder)


@pytest.fixture(scope="session")
def prompt_files(tmp_path_factory) -> dict[str, str]:
    """Two small disjoint files of prompts."""
    folder = tmp_path_factory.mktemp("prompts")
    texts = ["a red circle", "a blue square", "two green crosses", "a circle above a square", "a cross", "a triangle"]
    for name, own in (("train", texts[:4]), ("held_out", texts[4:])):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps({"prompt": t, "id": i}) + "\n" for i, t in enumerate(own))
        )
    return {name: str(folder / f"{name}.jsonl") for name in ("train", "held_out")}


@pytest.fixture
def settings(random_model, prompt_files, tmp_path):
    return dict(
        model=random_model,
        prompts=prompt_files["train"],
        held_out=prompt_files["held_out"],
        rewards={"jpeg_size.kilobytes": 1.0},
        out=str(tmp_path / "run"),
        iterations=4,
        prompts_per_iteration=2,
        seeds=2,
        steps=4,
        plan="branch",
        branch_steps=[0, 1],
        children=2,
        lora_rank=2,
        eval_seeds=2,
        eval_steps=2,
        eval_every=2,
        checkpoint_every=2,
    )
