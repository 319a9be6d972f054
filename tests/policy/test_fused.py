"""Drawing with the adapter in the weights, and texts embedded in batches: how far it rounds, and what it leaves."""

from contextlib import nullcontext
from pkgutil import resolve_name

import pytest
import torch
from tiny_pipelines import FAMILIES
from tiny_policies import moved

from mmalign import policy as policies
from mmalign.evaluation import generate
from mmalign.flow import kernels
from mmalign.flow.plan import sde
from mmalign.flow.sample import sample
from mmalign.objectives.replay import transitions
from mmalign.policy import lora, sd3
from mmalign.policy.family import Family
from mmalign.policy.protocol import fused
from mmalign.policy.sd3 import SD3Policy
from mmalign.sampling.kernels import DanceSde, Ddim, FlowSde
from mmalign.seeds import gaussian, seed_of
from reward_models import Prompt

TEXTS = ["a red circle", "three green squares", 'the text "O H"', "a blue triangle left of a yellow circle"]
BOUND = 1e-5


def case(folders, name, dtype="float32"):
    """A policy whose adapter moves the velocity, and two rows of a forward."""
    policy = moved(policies.load(folders(name), guidance=1.0, dtype=dtype, size=FAMILIES[name].sizes[0]))
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(1))
    return policy, (x, torch.tensor([0.9, 0.4]), policy.encode(TEXTS[:2]), torch.tensor([0, 1]))


@torch.no_grad()
def velocity(policy, row):
    return policy.velocity(*row).float()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_velocity_is_that_of_side_by_side_and_everything_is_restored(folders, name):
    policy, row = case(folders, name)
    beside = velocity(policy, row)
    weights = {each: value.clone() for each, value in lora.base(policy.pipe.transformer).items()}
    with policy.reference():
        base = velocity(policy, row)
    forwards = policy.counts["forwards"]
    with policy.fused():
        within = velocity(policy, row)
        with policy.reference():
            assert torch.equal(velocity(policy, row), base)
        with policy.fused():  # once more changes nothing
            assert torch.equal(velocity(policy, row), within)
        assert torch.equal(velocity(policy, row), within)
    assert policy.counts["forwards"] == forwards + 8
    apart = float((beside - base).norm())
    assert 0 < float((within - beside).norm()) < BOUND * float(beside.norm()) < 0.1 * apart
    assert torch.equal(velocity(policy, row), beside)
    after = lora.base(policy.pipe.transformer)
    assert all(torch.equal(weights[each], after[each]) for each in weights)
    assert all(p.requires_grad for p in policy.parameters())


def test_an_error_restores_the_weights_too(folders):
    policy, row = case(folders, "Stable Diffusion 3")
    before = velocity(policy, row)
    with pytest.raises(KeyError), policy.fused():
        raise KeyError
    with pytest.raises(KeyError), policy.fused(), policy.reference():
        raise KeyError
    assert torch.equal(velocity(policy, row), before)


def test_other_weights_than_float32_keep_the_adapter_beside_them(folders):
    policy, row = case(folders, "Stable Diffusion 3", "bfloat16")
    before = velocity(policy, row)
    with policy.fused():
        assert torch.equal(velocity(policy, row), before)


def test_another_adapter_acts_within_the_block_and_a_mixture_stays_apart(folders):
    policy, row = case(folders, "Stable Diffusion 3")
    policy.attach_lora(2, 4.0, None, seed=7, name="reward")
    with torch.no_grad():
        for p in policy.parameters("reward"):
            p += 0.3
    with policy.acting("reward"):
        beside = velocity(policy, row)
    with policy.fused(), policy.acting("reward"):
        assert torch.equal(velocity(policy, row), beside)
    policy.mix({"default": 0.5, "reward": 0.5})
    mixed = velocity(policy, row)
    with policy.fused():
        assert torch.equal(velocity(policy, row), mixed)


def embedded():
    return moved(policies.load("assets/tiny_sd3", guidance=1.0))


def test_images_are_those_of_side_by_side(monkeypatch):
    policy, prompts = embedded(), [Prompt(text, {}, i) for i, text in enumerate(TEXTS)]
    together, _ = generate.generate(policy, prompts, [[0, 1]] * 4, 6, 64)
    monkeypatch.setattr(generate, "fused", lambda policy: nullcontext())
    beside, _ = generate.generate(policy, prompts, [[0, 1]] * 4, 6, 64)
    off = float((together - beside).abs().max())
    assert 0 < off < 5 * BOUND
    with policy.reference():
        base, _ = generate.generate(policy, prompts, [[0, 1]] * 4, 6, 64)
    assert float((base - beside).abs().max()) > 0.1


@pytest.mark.parametrize("kernel", [FlowSde(0.7), Ddim(1.0), DanceSde(0.05)])
def test_the_ratio_of_the_first_update_is_1(kernel):
    policy = embedded()
    cond, index = policy.encode(TEXTS), torch.arange(4).repeat_interleave(4)

    def draw(row: int, *rest) -> torch.Tensor:
        return gaussian(policy.latent_shape, seed_of(row, *rest))

    plan = sde(policy.times(6), kernel)
    with fused(policy):
        paths = sample(policy.velocity, lambda row: draw(row, "start"), cond, index, plan, draw)
    rows = transitions(paths, torch.zeros(16, 6, 1, 1))
    v = velocity(policy, (rows.x, rows.t, cond, rows.index))
    mean, std = paths.kernel.step(rows.x, v, rows.t, rows.s, rows.noise, paths.t_max)
    ratio = kernels.log_ratio(rows.y, mean, rows.mean, std).mean((1, 2)).exp()
    assert float((ratio - 1).abs().max()) < BOUND


def test_embeddings_do_not_depend_on_the_other_texts():
    alone, among, last = (policies.load("assets/tiny_sd3", guidance=1.0) for _ in range(3))
    assert alone.together > 1
    one = alone.encode(TEXTS[:1]).prompts
    few = among.encode([*TEXTS[1:], TEXTS[0]]).prompts
    many = last.encode([*(f"{n} squares" for n in range(20)), TEXTS[0]]).prompts
    assert last.counts["texts"] == 22  # the empty text too
    assert all(torch.equal(one[each][0], few[each][-1]) and torch.equal(one[each][0], many[each][-1]) for each in one)


def test_batches_of_texts_round_by_less_than_a_millionth(monkeypatch):
    together = policies.load("assets/tiny_sd3", guidance=1.0).encode(TEXTS).prompts
    monkeypatch.setattr(sd3, "SMALL", 0)
    policy = policies.load("assets/tiny_sd3", guidance=1.0)
    assert policy.together == 1
    alone = policy.encode(TEXTS).prompts
    for each, values in together.items():
        assert float((values - alone[each]).norm()) < 1e-6 * float(values.norm())


def test_only_a_family_whose_texts_have_one_length_embeds_several_at_once():
    families = {resolve_name(path) for path in policies.POLICIES.values()}
    assert {each for each in families if each.together is not Family.together} == {SD3Policy}
