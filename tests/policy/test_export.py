"""Every format gives our images in the stock pipeline, says what it is, and is refused when it is not that."""

import json
import re

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_pipelines import FAMILIES, SOME, stock_images
from tiny_policies import TEXTS, latents, moved, opened
from torch import nn

from mmalign import policy as policies
from mmalign.config import secrets
from mmalign.policy import export as exports
from reward_models.weights import fingerprint

READS_COMFYUI = ("FLUX.1-dev", "FLUX.1-schnell", "Qwen-Image", "Z-Image")  # diffusers knows no alpha for the others


def header(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.fixture
def small(random_model):
    return moved(policies.load(random_model))


@pytest.mark.parametrize("name", SOME)
def test_every_format_gives_our_images_in_the_stock_pipeline(folders, name, tmp_path):
    """The diffusers format's file, header and all, is in test_conformance."""
    family, guidance = FAMILIES[name], FAMILIES[name].guidances[-1]
    policy = moved(opened(folders, name, guidance))
    images = policy.decode(latents(policy))

    def is_ours(pipe):
        return (stock_images(pipe, family, TEXTS, guidance, family.sizes[0]) - images).abs().max() < 1e-4

    for form in exports.FORMATS:
        policy.export(tmp_path, form)
        policy.check_export(tmp_path, form)
    assert torch.equal(policy.decode(latents(policy)), images)  # none leaves a trace

    pipe = family.stock(folders(name))
    assert not is_ours(pipe)
    pipe.load_lora_weights(
        load_file(tmp_path / "pytorch_lora_weights.safetensors")
    )  # as loaders do that read no header
    assert is_ours(pipe)
    pipe.unload_lora_weights()
    single = tmp_path / "comfyui_lora.safetensors"
    if name in READS_COMFYUI:
        pipe.load_lora_weights(tmp_path, weight_name=single.name)
        assert is_ours(pipe)
        pipe.unload_lora_weights()
    else:
        with pytest.raises(ValueError, match="Invalid"):
            pipe.load_lora_weights(tmp_path, weight_name=single.name)
    plain = {key: value.clone() for key, value in pipe.transformer.state_dict().items()}
    for form in ("diffusers", "comfyui", "peft"):
        pipe.transformer.load_state_dict(plain)
        apply(pipe.transformer, load_file(tmp_path / exports.FORMATS[form].name))
        assert is_ours(pipe), form
    pipe = family.stock(folders(name))
    pipe.transformer = PeftModel.from_pretrained(pipe.transformer, tmp_path).base_model.model
    assert is_ours(pipe)
    assert is_ours(family.stock(str(tmp_path / "merged")))


def apply(transformer: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """The LoRA convention by key names alone: W + alpha / rank B A, and where there is no alpha W + B A."""
    names = {name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    for key in tensors:
        if key.endswith(".lora_A.weight"):
            path = key.removesuffix(".lora_A.weight")
            layer = next(name for name in names if path.endswith("." + name) and path.count(".") - name.count(".") < 3)
            a, b = (tensors[f"{path}.lora_{side}.weight"] for side in "AB")
            with torch.no_grad():
                transformer.get_submodule(layer).weight += tensors.get(f"{path}.alpha", len(a)) / len(a) * b @ a


@pytest.mark.parametrize("alpha", [1.0, 3.0, 4.0, 13.0])
@pytest.mark.parametrize("form", ["diffusers", "comfyui", "peft"])
def test_the_strength_is_in_the_matrices(random_model, form, alpha, tmp_path):
    """Alpha over rank, 4, whatever it is: B A as saved is the change of the weight."""
    policy = policies.load(random_model)
    policy.attach_lora(4, alpha, None, seed=0)
    layer = policy.pipe.transformer.transformer_blocks[0].attn.to_q
    with torch.no_grad():
        layer.lora_B["default"].weight.fill_(0.5)
    tensors = load_file(policy.export(tmp_path, form))
    a, b = (next(v for k, v in tensors.items() if f"blocks.0.attn.to_q.lora_{side}" in k) for side in "AB")
    torch.testing.assert_close(b @ a, layer.get_delta_weight("default"))
    assert {float(value) for key, value in tensors.items() if key.endswith("alpha")} <= {4.0}
    policy.check_export(tmp_path, form)


def test_pefts_settings_name_each_layer(folders, tmp_path):
    """By its whole name: `to_out` is the end of what peft cannot adapt, too."""
    policy = moved(opened(folders, "FLUX.2-klein", 1.0))
    policy.export(tmp_path, "peft")
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    adapted = sorted(n for n, m in policy.pipe.transformer.named_modules() if hasattr(m, "base_layer"))
    assert settings["target_modules"] == adapted
    assert (settings["peft_type"], settings["r"], settings["lora_alpha"]) == ("LORA", 4, 4)
    assert settings["inference_mode"] is True


def test_the_halves_of_flux2s_norm_out_are_swapped_as_comfyui_expects(folders, tmp_path):
    """The released weights have the shift first, diffusers the scale. ComfyUI adds the change with its halves swapped
    to the released weight; what diffusers makes of that weight is our layer's."""
    policy = opened(folders, "FLUX.2-klein", 1.0)
    policy.attach_lora(4, 8.0, ["norm_out.linear"], seed=0)
    layer = policy.pipe.transformer.norm_out.linear
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(generator=torch.Generator().manual_seed(0))
    policy.export(tmp_path, "comfyui")
    policy.check_export(tmp_path, "comfyui")
    tensors = load_file(tmp_path / "comfyui_lora.safetensors")
    name = "transformer.norm_out.linear"
    a, b = (tensors[f"{name}.lora_{side}.weight"] for side in "AB")
    assert float(tensors[f"{name}.alpha"]) == len(a)
    released = layer.base_layer.weight.detach().roll(len(b) // 2, 0) + (b @ a).roll(len(b) // 2, 0)
    made = convert_flux2_transformer_checkpoint_to_diffusers({"final_layer.adaLN_modulation.1.weight": released})
    torch.testing.assert_close(
        made["norm_out.linear.weight"], layer.base_layer.weight + layer.get_delta_weight("default")
    )


@pytest.mark.parametrize(("name", "prefix"), [("Stable Diffusion 3", "transformer"), ("Z-Image", "diffusion_model")])
def test_the_comfyui_file_has_two_matrices_and_an_alpha_for_each_layer(folders, name, prefix, tmp_path):
    policy = moved(opened(folders, name, 1.0))
    tensors = load_file(policy.export(tmp_path, "comfyui"))
    adapted = [n for n, m in policy.pipe.transformer.named_modules() if hasattr(m, "base_layer")]
    parts = ("lora_A.weight", "lora_B.weight", "alpha")
    assert set(tensors) == {f"{prefix}.{layer}.{part}" for layer in adapted for part in parts}
    assert {float(value) for key, value in tensors.items() if key.endswith("alpha")} == {4.0}


@pytest.mark.parametrize("form", exports.FORMATS)
def test_the_header_says_what_a_file_is_of(small, form, tmp_path):
    path = small.export(tmp_path, form, {"iteration": "7", "config": json.dumps({"seed": 3})})
    message = {key: value for key, value in header(exports.tensor_files(path)[0]).items() if key.startswith("mmalign.")}
    assert len(message.pop("mmalign.weights_hash")) == 16
    assert message == {
        "mmalign.base_hash": small.fingerprint(), "mmalign.pipeline": "StableDiffusion3Pipeline",
        "mmalign.family": "SD3Policy", "mmalign.rank": "4", "mmalign.alpha": "4", "mmalign.guidance": "1.0",
        "mmalign.size": "[32, 32]", "mmalign.iteration": "7", "mmalign.config": '{"seed": 3}',
    }  # fmt: skip
    if form == "diffusers":
        assert json.loads(header(path)["lora_adapter_metadata"])["transformer.lora_alpha"] == 4


def test_the_fingerprint_is_of_the_base_alone(random_model):
    plain = policies.load(random_model)
    before = plain.fingerprint()
    assert moved(plain).fingerprint() == before
    with torch.no_grad():
        plain.pipe.transformer.proj_out.bias.add_(1e-3)
    assert plain.fingerprint() != before


def test_merging_no_change_gives_the_base_to_the_bit(random_model, tmp_path):
    policy = policies.load(random_model)
    base = {name: value.clone() for name, value in policy.pipe.transformer.state_dict().items()}
    policy.attach_lora(4, 8.0, None, seed=0)
    policy.export(tmp_path, "merged")
    merged = FAMILIES["Stable Diffusion 3"].stock(str(tmp_path / "merged")).transformer.state_dict()
    assert set(merged) == set(base)
    assert all(torch.equal(merged[name], base[name]) for name in base)


@pytest.mark.parametrize("form", exports.FORMATS)
def test_half_precision_is_written_and_read_back_with_guidance(folders, form, tmp_path):
    """Rounding, four times as large by guidance, would be past the limit."""
    policy = moved(policies.load(folders("Z-Image"), dtype="bfloat16", guidance=4.0, size=(32, 32)))
    path = policy.export(tmp_path, form)
    policy.check_export(tmp_path, form)
    remaining = {value.dtype for value in load_file(exports.tensor_files(path)[0]).values()}
    assert remaining == {torch.bfloat16 if form == "merged" else torch.float32}


@pytest.mark.parametrize("form", exports.FORMATS)
def test_another_base_is_refused(small, form, tmp_path):
    small.export(tmp_path, form)
    with torch.no_grad():
        small.pipe.transformer.proj_out.bias.add_(0.1)
    with pytest.raises(ValueError, match=f"is for the base model [0-9a-f]{{16}}; this one is {small.fingerprint()}"):
        small.check_export(tmp_path, form)


@pytest.mark.parametrize("form", exports.FORMATS)
def test_a_damaged_file_is_refused(small, form, tmp_path):
    path = exports.tensor_files(small.export(tmp_path, form))[0]
    whole = path.read_bytes()
    path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])  # one bit of one number
    with pytest.raises(ValueError, match="damaged: its matrices differ from those that were written"):
        small.check_export(tmp_path, form)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is damaged: "):
        small.check_export(tmp_path, form)
    path.unlink()
    with pytest.raises(ValueError, match="no safetensors file"):
        small.check_export(tmp_path, form)


def test_a_file_of_elsewhere_is_refused(small, tmp_path):
    path = small.export(tmp_path)
    save_file(load_file(path), path)
    with pytest.raises(ValueError, match="does not name its base model"):
        small.check_export(tmp_path)


def rewritten(path, change) -> None:
    """The file with other matrices, and a header that claims they were written so."""
    message, tensors = header(path), load_file(path)
    change(tensors)
    message["mmalign.weights_hash"] = fingerprint(tensors, digits=16)
    save_file(tensors, path, message)


LAYER = "transformer.transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(f"{LAYER}.lora_B.weight"), "transformer_blocks.0.attn.to_q has no lora_B.weight"),
        (lambda t: t.pop(f"{LAYER}.alpha"), "transformer_blocks.0.attn.to_q has no alpha"),
        (lambda t: [t.pop(key) for key in [*t] if key.startswith(LAYER)], "changes the velocity by"),
        (lambda t: t.update({f"{LAYER}.alpha": torch.tensor(2.0)}), "changes the velocity by"),
        (lambda t: t[f"{LAYER}.lora_A.weight"].fill_(torch.nan), "its matrices are not finite"),
        (lambda t: t.update({f"{LAYER}.lora_A.weight": torch.ones(4, 5)}), r"a change of shape \[32, 5\]"),
        (lambda t: t.update({f"{LAYER}.lora_A.weight": torch.ones(3, 32)}), "are not a LoRA's A, B and alpha"),
        (lambda t: t.update({"diffusion_model.x.alpha": torch.tensor(1.0)}), "does not begin with 'transformer.'"),
        (lambda t: t.update({"transformer.x.alpha": torch.tensor(1.0)}), "'x.alpha' is not a matrix of a LoRA"),
        (lambda t: t.update({f"{LAYER}x.{part}": t[f"{LAYER}.{part}"].clone()
                             for part in ("lora_A.weight", "lora_B.weight", "alpha")}), "model's weight is none"),
    ],
)  # fmt: skip
def test_matrices_that_do_not_give_our_model_are_refused(small, change, says, tmp_path):
    rewritten(small.export(tmp_path, "comfyui"), change)
    with pytest.raises(ValueError, match=says):
        small.check_export(tmp_path, "comfyui")


def test_layers_and_families_that_comfyui_has_no_names_for_are_refused(folders, random_model, tmp_path):
    policy = opened(folders, "FLUX.2-klein", 1.0)
    policy.attach_lora(4, 8.0, ["to_q", "single_stream_modulation.linear"], seed=0)
    with pytest.raises(ValueError, match=r"does not know the layer .single_stream_modulation\.linear. of a Flux2Kl"):
        policy.export(tmp_path, "comfyui")
    policy.export(tmp_path)
    policy.check_export(tmp_path)
    policy = moved(policies.load(random_model))
    policy.pipeline = "AnotherPipeline"
    with pytest.raises(ValueError, match="AnotherPipeline is not one of"):
        policy.export(tmp_path, "comfyui")


@pytest.mark.parametrize(
    ("name", "without"),
    [
        ("Stable Diffusion 3", set()),
        ("FLUX.1-dev", set()),
        ("Qwen-Image", set()),
        ("Z-Image", set()),
        (
            "FLUX.2-klein",
            {
                "time_guidance_embed.timestep_embedder.linear_1", "time_guidance_embed.timestep_embedder.linear_2",
                "double_stream_modulation_img.linear", "double_stream_modulation_txt.linear",
                "single_stream_modulation.linear",
            },
        ),
    ],
)  # fmt: skip
def test_comfyui_has_names_for_all_layers_but_these(folders, name, without):
    policy = opened(folders, name, 1.0)
    layers = {layer for layer, module in policy.pipe.transformer.named_modules() if isinstance(module, nn.Linear)}
    _, known = exports.COMFYUI[policy.pipeline]
    assert {layer for layer in layers if not re.fullmatch(known, layer)} == without
    assert re.fullmatch(known, "elsewhere.to_q") is None or name == "Qwen-Image"


def test_a_config_is_given_away_without_secrets_and_places():
    given = {
        "model": "/home/someone/models/mine", "prompts": "assets/prompts/train.jsonl", "seed": 3, "size": (32, 48),
        "scorers": {
            "judge": {"key": "sk-1", "url": "https://me:pw@host:8000/v1?token=x", "max_tokens": 5},
            "own": {"HF_TOKEN": "t"},
        },
    }  # fmt: skip
    assert secrets.public(given) == {
        "model": "mine", "prompts": "assets/prompts/train.jsonl", "seed": 3, "size": [32, 48],
        "scorers": {
            "judge": {"key": "(left out)", "url": "https://host:8000/v1", "max_tokens": 5},
            "own": {"HF_TOKEN": "(left out)"},
        },
    }  # fmt: skip
