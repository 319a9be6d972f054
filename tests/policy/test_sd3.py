"""The SD3 policy against the stock diffusers pipeline."""

import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file
from tiny_policies import moved

from mmalign import policy as policies
from mmalign.flow import plan as plans
from mmalign.flow.sample import sample
from mmalign.learn.loss import LOSSES
from mmalign.learn.update import update
from mmalign.objectives.replay import Surrogate, transitions
from mmalign.sampling.kernels import KERNELS
from mmalign.seeds import gaussian, seed_of
from mmalign.training.microbatch import AdaptiveBatch

TEXTS = ["a red circle", "three green squares", "a blue triangle left of a yellow circle", 'the text "O H"']
LEVELS = {"flow_sde": 0.7, "dance_sde": 0.3, "cps": 0.8, "ddim": 1.0, "scheduled": 0.5}
STEPS = 5


def stock(model) -> StableDiffusion3Pipeline:
    pipe = StableDiffusion3Pipeline.from_pretrained(model, dtype=torch.float32, text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock_images(pipe, guidance, size=(32, 32), texts=TEXTS):
    return pipe(
        texts,
        height=size[0],
        width=size[1],
        num_inference_steps=STEPS,
        sigmas=np.linspace(1, 1 / STEPS, STEPS).tolist(),
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(i) for i in range(len(texts))],
        max_sequence_length=0,
        output_type="pt",
    ).images


def ours(policy, batch=256, texts=TEXTS):
    start = torch.stack([gaussian(policy.latent_shape, i) for i in range(len(texts))])
    cond, index = policy.encode(texts), torch.arange(len(texts))
    return policy.decode(
        sample(policy.velocity, start, cond, index, plans.ode(policy.times(STEPS)), batch=batch).x[:, -1]
    )


@pytest.mark.parametrize("guidance", [1.0, 3.5])
@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
def test_ode_sampling_is_the_stock_pipeline(random_model, guidance, size):
    expected = stock_images(stock(random_model), guidance, size)
    assert expected.std() > 0.05
    images = ours(policies.load(random_model, guidance=guidance, size=size))
    assert (images - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("model", "side", "texts"),
    [("tiny_sd3", 32, TEXTS), ("tiny_things", 64, ["two red cats", "a shaded drawing of a camel"])],
    ids=["shapes", "things"],
)
def test_the_embedded_models_too(model, side, texts, tmp_path):
    pipe, policy = stock(f"assets/{model}"), policies.load(f"assets/{model}", guidance=2.0)
    assert (ours(policy, texts=texts) - stock_images(pipe, 2.0, (side, side), texts)).abs().max() < 1e-4
    images = ours(moved(policy), texts=texts)
    policy.export(tmp_path)
    pipe.load_lora_weights(tmp_path)
    assert (stock_images(pipe, 2.0, (side, side), texts) - images).abs().max() < 1e-4


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_lora_off_is_the_untouched_model_to_the_bit(random_model, guidance):
    before = ours(policies.load(random_model, guidance=guidance))
    policy = policies.load(random_model, guidance=guidance)
    policy.attach_lora(4, 8.0, None, seed=0)
    assert torch.equal(ours(policy), before)  # B = 0
    policy = moved(policies.load(random_model, guidance=guidance))
    assert not torch.allclose(ours(policy), before, atol=1e-3)
    with policy.reference():
        assert torch.equal(ours(policy), before)
    assert not torch.allclose(ours(policy), before, atol=1e-3)


def test_batch_size_does_not_change_the_images(random_model):
    policy = policies.load(random_model)
    assert torch.allclose(ours(policy, batch=1), ours(policy), atol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_exported_lora_gives_our_images_in_stock_diffusers(random_model, guidance, tmp_path):
    policy = moved(policies.load(random_model, guidance=guidance))
    images = ours(policy)
    assert policy.export(tmp_path).exists()
    policy.check_export(tmp_path)
    assert torch.equal(ours(policy), images)  # the check left no trace
    pipe = stock(random_model)
    pipe.load_lora_weights(tmp_path)
    assert (stock_images(pipe, guidance) - images).abs().max() < 1e-4


def test_a_wrong_export_is_noticed(random_model, tmp_path):
    policy = moved(policies.load(random_model))
    policy.export(tmp_path)
    with torch.no_grad():
        policy.parameters()[1].add_(0.5)
    with pytest.raises(ValueError, match="changes the velocity"):
        policy.check_export(tmp_path)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kind: kind.type)
@pytest.mark.parametrize("guidance", [1.0, 3.5])
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda kind: kind.type)
def test_on_policy_ratio_is_one(random_model, kernel, guidance, size, loss):
    policy = moved(policies.load(random_model, guidance=guidance))
    cond, index = policy.encode(TEXTS[:size]), torch.arange(size)
    start = torch.stack([gaussian(policy.latent_shape, i) for i in range(size)])
    plan = plans.sde(policy.times(STEPS), kernel(LEVELS[kernel.type]))
    paths = sample(policy.velocity, start, cond, index, plan, lambda *key: gaussian(policy.latent_shape, seed_of(*key)))
    batch = transitions(paths, torch.ones(size, STEPS, 1, 1))
    optimizer = torch.optim.SGD(policy.parameters(), 0.0)
    replay = Surrogate(policy, cond, plan.kernel, plan.t_max, loss(1e-4), beta=0.1)
    statistics = update(
        policy.parameters(), optimizer, batch, replay, epochs=1, minibatches=1, micro_batch=AdaptiveBatch(size),
        max_grad_norm=1.0, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    for k in range(STEPS - 1):
        assert statistics[f"ratio/{k}"] == pytest.approx(1, abs=1e-6)
    assert statistics["clipped_low"] == statistics["clipped_high"] == 0
    assert statistics["divergence"] < 1e-9
    assert statistics["kl"] > 0
    named = dict(policy.pipe.transformer.named_parameters())
    untouched = {name for name, p in named.items() if p.requires_grad and not p.grad.abs().sum() > 0}
    assert untouched == {
        name for name in named if "blocks.1.attn.add_q_proj.lora" in name
    }  # the last block drops its text
    assert all(p.grad is None for p in named.values() if not p.requires_grad)


def test_counters(random_model):
    policy = policies.load(random_model, guidance=3.5)
    ours(policy)
    spent = {"forwards": 2 * STEPS * len(TEXTS), "decodes": len(TEXTS)}
    assert policy.counts == spent | {"texts": len({*TEXTS, ""})}
    ours(policy)
    assert policy.counts == {name: 2 * count for name, count in spent.items()} | {"texts": len({*TEXTS, ""})}


def test_adapters_round_trip_and_must_fit(random_model):
    policy, other = moved(policies.load(random_model)), policies.load(random_model)
    other.attach_lora(4, 8.0, None, seed=9)
    other.load_adapter(policy.adapter())
    assert torch.equal(ours(policy), ours(other))
    with pytest.raises(ValueError, match="does not fit"):
        other.load_adapter({"x": torch.zeros(1)})


def test_refusals(random_model, tmp_path):
    with pytest.raises(ValueError, match="multiple of"):
        policies.load(random_model, size=(30, 32))
    with pytest.raises(ValueError, match="'to_z' matches no linear layer"):
        policies.load(random_model).attach_lora(4, 8.0, ["to_q", "to_z"], seed=0)
    with pytest.raises(ValueError, match=r"no model_index\.json"):
        policies.load(str(tmp_path))
    (tmp_path / "model_index.json").write_text('{"_class_name": "KolorsPipeline"}')
    with pytest.raises(ValueError, match="is a KolorsPipeline; known families: StableDiffusion3Pipeline"):
        policies.load(str(tmp_path))


def test_weights_that_are_pickled_are_refused(random_model, tmp_path):
    shutil.copytree(random_model, tmp_path / "pickled")
    weights = tmp_path / "pickled/transformer/diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(ValueError, match=r"pickled': its weights are needed as safetensors: .*"):
        policies.load(str(tmp_path / "pickled"))
