"""What every model family must do, on a tiny random pipeline of its stock classes."""

import inspect

import pytest
import torch
from tiny_pipelines import FAMILIES, STEPS, stock_images
from tiny_policies import CASES, TEXTS, latents, moved, opened

from mmalign import policy as policies
from mmalign.flow import plan as plans
from mmalign.flow.sample import sample
from mmalign.learn.loss import Clipped
from mmalign.learn.update import update
from mmalign.objectives.replay import Surrogate, transitions
from mmalign.sampling.kernels import FlowSde
from mmalign.seeds import gaussian, seed_of
from mmalign.training.microbatch import AdaptiveBatch

BOTH = pytest.mark.parametrize(("name", "guidance"), CASES)


@BOTH
@pytest.mark.parametrize("place", [0, 1])
def test_ode_sampling_is_the_stock_pipeline(folders, monkeypatch, name, guidance, place):
    size = FAMILIES[name].sizes[place]
    expected = stock_images(FAMILIES[name].stock(folders(name)), FAMILIES[name], TEXTS, guidance, size)
    assert expected.shape[2:] == size
    assert expected.std() > 0.02
    assert (expected[0] - expected[1]).abs().max() > 0.02
    policy = opened(folders, name, guidance, size)
    images = policy.decode(latents(policy))
    assert (images - expected).abs().max() < 1e-4
    monkeypatch.delattr(inspect.getmodule(type(policy.pipe)), "randn_tensor")  # it is given the noise, and draws none
    assert (images - policy.stock_images(TEXTS, range(len(TEXTS)), STEPS)).abs().max() < 1e-4


@BOTH
def test_guidance_and_prompts_matter(folders, name, guidance):
    policy = opened(folders, name, guidance)
    images = policy.decode(latents(policy))
    start, index = torch.stack([gaussian(policy.latent_shape, 0)] * 3), torch.arange(3)
    same = sample(policy.velocity, start, policy.encode(TEXTS), index, plans.ode(policy.times(STEPS))).finals
    assert (same[0] - same[1]).abs().max() > 1e-3
    if guidance != 1:
        plain = opened(folders, name, 1.0)
        assert (plain.decode(latents(plain)) - images).abs().max() > 1e-3


@BOTH
def test_rows_at_their_own_times_are_rows_alone(folders, name, guidance):
    policy = opened(folders, name, guidance)
    x = torch.stack([gaussian(policy.latent_shape, i) for i in range(3)])
    t, cond, index = torch.tensor([0.9, 0.5, 0.1]), policy.encode(TEXTS), torch.tensor([2, 0, 1])
    with torch.no_grad():
        together = policy.velocity(x, t, cond, index)
        alone = torch.cat([policy.velocity(x[i : i + 1], t[i : i + 1], cond, index[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    assert together.shape == x.shape


@BOTH
def test_lora_off_is_the_untouched_model_to_the_bit(folders, name, guidance):
    before = latents(opened(folders, name, guidance))
    policy = moved(opened(folders, name, guidance))
    assert not torch.allclose(latents(policy), before, atol=1e-3)
    with policy.reference():
        assert torch.equal(latents(policy), before)


@BOTH
def test_the_ratio_on_policy_is_one(folders, name, guidance):
    policy = moved(opened(folders, name, guidance))
    cond, index = policy.encode(TEXTS), torch.arange(len(TEXTS))
    start = torch.stack([gaussian(policy.latent_shape, i) for i in range(len(TEXTS))])
    plan = plans.sde(policy.times(STEPS), FlowSde(0.7))
    paths = sample(policy.velocity, start, cond, index, plan, lambda *key: gaussian(policy.latent_shape, seed_of(*key)))
    batch = transitions(paths, torch.ones(len(TEXTS), STEPS, 1, 1))
    replay = Surrogate(policy, cond, plan.kernel, plan.t_max, Clipped(1e-4), beta=0.1)
    statistics = update(
        policy.parameters(), torch.optim.SGD(policy.parameters(), 0.0), batch, replay, epochs=1, minibatches=1,
        micro_batch=AdaptiveBatch(len(TEXTS)), max_grad_norm=1.0, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    for k in range(STEPS - 1):
        assert statistics[f"ratio/{k}"] == pytest.approx(1, abs=1e-6)
    assert statistics["kl"] > 0
    assert all(p.grad is None for p in policy.pipe.transformer.parameters() if not p.requires_grad)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing_changes_nothing(folders, name):
    velocities = []
    for saving in (False, True):
        policy = moved(opened(folders, name, FAMILIES[name].guidances[-1]))
        policy.save_memory(gradients=saving)
        x = torch.stack([gaussian(policy.latent_shape, i) for i in range(3)])
        v = policy.velocity(x, torch.tensor([0.9, 0.5, 0.1]), policy.encode(TEXTS), torch.arange(3))
        v.square().mean().backward()
        assert policy.pipe.transformer.is_gradient_checkpointing == saving
        velocities.append([v.detach(), *(p.grad.clone() for p in policy.parameters() if p.grad is not None)])
    assert len(velocities[0]) == len(velocities[1]) > 1
    for one, two in zip(*velocities, strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)


@BOTH
def test_the_exported_lora_gives_our_images_in_the_stock_pipeline(folders, name, guidance, tmp_path):
    policy = moved(opened(folders, name, guidance))
    images = policy.decode(latents(policy))
    policy.export(tmp_path)
    policy.check_export(tmp_path)
    pipe = FAMILIES[name].stock(folders(name))
    pipe.load_lora_weights(tmp_path)
    assert (stock_images(pipe, FAMILIES[name], TEXTS, guidance, FAMILIES[name].sizes[0]) - images).abs().max() < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_an_image_comes_back_from_its_latent_at_its_place(folders, name):
    """The autoencoder is random; its latents must still be those that `decode` undoes."""
    policy = opened(folders, name, FAMILIES[name].guidances[0])
    x = torch.stack([gaussian(policy.latent_shape, 3)])
    torch.testing.assert_close(policy.scaled(policy.unscaled(x)), x, atol=1e-5, rtol=1e-5)
    assert policy.encode_images(policy.decode(x)).shape == x.shape


def test_a_size_the_model_cannot_draw_is_refused(folders):
    for name in FAMILIES:
        with pytest.raises(ValueError, match="must be a multiple of"):
            policies.load(folders(name), size=(33, 32))


def test_guidance_a_model_was_not_made_for_is_refused(folders):
    for name in ("FLUX.1-schnell", "FLUX.2-klein, distilled"):
        with pytest.raises(ValueError, match="does not take guidance; 1 is needed"):
            opened(folders, name, 3.5)


def test_a_policy_of_ones_own_by_import_path(monkeypatch):
    monkeypatch.setenv("MMALIGN_ALLOW", "own_policy,nowhere")
    mine, embedded = (policies.load(model, guidance=2.0) for model in ("own_policy:Mine", "assets/tiny_sd3"))
    assert type(mine).__name__ == "Mine"
    assert torch.equal(latents(mine), latents(embedded))
    with pytest.raises(ValueError, match="model 'own_policy:Yours'"):
        policies.load("own_policy:Yours")
    with pytest.raises(ValueError, match="no module named 'nowhere'"):
        policies.load("nowhere:Mine")
