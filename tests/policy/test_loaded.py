"""A pipeline that is handed over loaded: trained, and given back as it came, but for the adapter."""

import pytest
import torch
from tiny_pipelines import FAMILIES
from torch import nn

import mmalign
from mmalign.errors import BadInput
from mmalign.policy import lora

SMALL = dict(
    iterations=2, prompts_per_iteration=2, seeds=2, steps=2, eval_steps=2, lora_rank=2, learning_rate=0.05,
    held_out=None,
)  # fmt: skip


stock = FAMILIES["Stable Diffusion 3"].stock


def brightness(images, prompts):
    return [sum(image.resize((1, 1)).getpixel((0, 0))) / 765 for image in images]


def state(pipe):
    """Everything about a pipeline's modules and schedule that training could leave behind."""
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    flags = {f"{name}.{child}": each.training for name, part in modules.items() for child, each in part.named_modules()}
    needs = {f"{name}.{p}": v.requires_grad for name, part in modules.items() for p, v in part.named_parameters()}
    memory = {
        name: (getattr(part, "gradient_checkpointing", None), vars(part).get("use_tiling"))
        for name, part in modules.items()
    }
    schedule = {key: str(value) for key, value in vars(pipe.scheduler).items()}
    return flags, needs, memory, schedule


def weights(pipe):
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    return {
        f"{name}.{key}": value.clone() for name, part in modules.items() for key, value in part.state_dict().items()
    }


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_comes_back_with_an_adapter_and_nothing_else(family, folders, tmp_path):
    pipe = FAMILIES[family].stock(folders(family))
    before, weights_before = state(pipe), weights(pipe)
    run = mmalign.align(
        pipe, ["a circle", "a square"], brightness, out=tmp_path / "run", size=FAMILIES[family].sizes[0],
        gradient_checkpointing=True, **SMALL,
    )  # fmt: skip
    assert run.pipeline is pipe
    schedule = state(pipe)[2]
    assert [*pipe.transformer.peft_config] == ["default"]
    adapter = {name: value.clone() for name, value in lora.state(pipe.transformer).items()}
    assert any(value.abs().sum() > 0 for name, value in adapter.items() if "lora_B" in name)
    with_adapter = run.sample(["a circle"], steps=2)[0].tobytes()
    without = run.sample(["a circle"], steps=2, base=True)[0].tobytes()
    assert with_adapter != without
    pipe.unload_lora_weights()
    assert state(pipe)[:2] == before[:2]
    assert schedule == before[2]
    assert equal(weights(pipe), weights_before)


def test_drawing_with_it_changes_nothing(random_model, tmp_path):
    pipe = stock(random_model)
    run = mmalign.align(pipe, ["a circle", "a square"], brightness, out=tmp_path / "run", **SMALL)
    before = state(pipe)
    drawn = mmalign.evaluate(run.pipeline, ["a circle"], brightness, steps=2)
    assert state(pipe) == before
    assert torch.equal(drawn.images, run.evaluate(["a circle"], steps=2).images)


def test_the_run_is_that_of_its_folder(random_model, tmp_path):
    pipe = stock(random_model)
    handed = mmalign.align(pipe, ["a circle", "a square"], brightness, out=tmp_path / "handed", **SMALL)
    named = mmalign.align(random_model, ["a circle", "a square"], brightness, out=tmp_path / "named", **SMALL)
    assert equal(lora.state(handed.pipeline.transformer), lora.state(named.pipeline.transformer))
    assert handed.config.model == named.config.model == random_model  # so that its adapter can be exported later


def test_bfloat16_weights_stay_as_they_are(random_model, tmp_path):
    pipe = stock(random_model).to(torch.bfloat16)
    weights_before = weights(pipe)
    run = mmalign.align(pipe, ["a circle", "a square"], brightness, out=tmp_path / "run", **SMALL)
    assert run.config.precision == "bfloat16"
    run.pipeline.unload_lora_weights()
    assert equal(weights(pipe), weights_before)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda pipe: pipe.transformer.add_adapter(adapter_config()), "has the adapter 'default' already"),
        (lambda pipe: pipe.to(torch.float16), "has weights of torch.float16; load it with torch_dtype"),
        (lambda pipe: pipe.text_encoder.half(), "a text_encoder of torch.float16 and a transformer of torch.float32"),
        (lambda pipe: setattr(pipe, "vae", None), "has no vae"),
        (lambda pipe: setattr(pipe.vae, "_hf_hook", object()), "moves its components by hooks"),
    ],
)
def test_pipelines_that_cannot_be_trained(damage, says, random_model, tmp_path):
    pipe = stock(random_model)
    damage(pipe)
    with pytest.raises(BadInput, match=says):
        mmalign.align(pipe, ["a circle", "a square"], brightness, out=tmp_path / "run", **SMALL)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(quantize="nf4"), "quantize: the pipeline is loaded already"),
        (dict(learning_rate=-1.0), "learning_rate"),
        (dict(lora_targets=["nothing"]), "matches no linear layer"),
        (dict(prompts_per_iteration=3), "prompts_per_iteration: 3 requested"),
    ],
)
def test_a_run_that_does_not_begin_leaves_no_adapter(change, says, random_model, tmp_path):
    pipe = stock(random_model)
    before, weights_before = state(pipe), weights(pipe)
    with pytest.raises(BadInput, match=says):
        mmalign.align(pipe, ["a circle", "a square"], brightness, **{**SMALL, "out": tmp_path / "run", **change})
    assert state(pipe) == before
    assert equal(weights(pipe), weights_before)


def adapter_config():
    from peft import LoraConfig

    return LoraConfig(r=1, target_modules=["to_q"])
