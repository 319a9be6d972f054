"""The reward by the base model itself: what it is 0 for, what it does not depend on, and what it costs."""

import pytest
import torch
from run_config import rows, run

from mmalign import policy as policies
from mmalign.checks import estimate
from mmalign.config import load as configs
from mmalign.errors import BadInput
from mmalign.policy.gaussian import GaussianFlow
from mmalign.rewards.self_reward import SelfReward
from mmalign.seeds import gaussian, seed_of
from mmalign.training.setup import open_session
from reward_models import Prompt

TEXTS = ["a red circle", "two blue squares", ""]


@pytest.fixture(scope="module")
def policy(random_model):
    policy = policies.load(random_model, dtype="float32", device="cpu", guidance=3.0)
    policy.attach_lora(2, 4.0, None, 0)
    return policy


def scorer(policy, **settings):
    scorer = SelfReward(**{"times": (0.7, 0.5), "noises": 1} | settings)
    scorer.bind(policy)
    return scorer


def pictures(policy, count=3, seed=0):
    return torch.rand(count, 3, *policy.image_size, generator=torch.Generator().manual_seed(seed))


def test_it_is_the_gap_and_the_recovery_of_a_known_flow():
    """Of the closed-form flow: the velocities of both means, computed by hand."""
    flow, x0, t = GaussianFlow(), torch.tensor([[0.6, 0.5]]), 0.5
    images = x0[:, :, None, None, None].expand(1, 2, 3, 4, 4)[0]
    values = scorer(flow, times=(t,))(images, [Prompt("2.0")] * 2).values

    def error(x, mean, noise):
        x_t = (1 - t) * x + t * noise
        v = (t - (1 - t)) / ((1 - t) ** 2 + t**2) * (x_t - (1 - t) * mean) - mean  # spread 1
        return (v - (noise - x)).square().mean()

    noise = gaussian(flow.latent_shape, seed_of(0, "self", "2.0", str(t), 0))
    for i, latent in enumerate(flow.encode_images(images)):
        empty, wanted = error(latent, 0.0, noise), error(latent, 2.0, noise)
        torch.testing.assert_close(values[i], torch.stack([(empty - wanted) / empty, -wanted.log()]))
    assert float(values[0, 0]) > float(values[1, 0])  # nearer to the prompt's mean


def test_the_empty_prompt_has_no_gap(policy):
    gap = scorer(policy)(pictures(policy), [Prompt(text) for text in TEXTS]).values[:, 0]
    assert abs(float(gap[2])) < 1e-5
    assert float(gap[:2].abs().min()) > 1e-5


def test_it_depends_on_image_and_prompt_alone(policy):
    """Not on the batch, the order, the global random numbers or the guidance; equal images are equal."""
    images, prompts = pictures(policy), [Prompt(text) for text in TEXTS]
    torch.manual_seed(1)
    whole = scorer(policy)(images, prompts).values
    torch.manual_seed(2)
    assert torch.equal(scorer(policy)(images, prompts).values, whole)
    torch.testing.assert_close(scorer(policy, batch=1)(images, prompts).values, whole, atol=1e-5, rtol=1e-5)
    turned = scorer(policy)(images.flip(0), prompts[::-1]).values.flip(0)
    torch.testing.assert_close(turned, whole, atol=1e-5, rtol=1e-5)
    same = scorer(policy)(images[:1].repeat(2, 1, 1, 1), prompts[:1] * 2).values
    torch.testing.assert_close(same[0], same[1], atol=1e-6, rtol=1e-6)


def test_the_adapter_changes_nothing_in_it_and_stays_as_it_is(policy):
    images, prompts = pictures(policy), [Prompt(text) for text in TEXTS]
    before = scorer(policy)(images, prompts).values
    saved = policy.adapter()
    policy.load_adapter({name: value + 0.1 for name, value in saved.items()})
    x, cond, index = torch.zeros(1, *policy.latent_shape), policy.encode(TEXTS[:1]), torch.zeros(1, dtype=torch.long)
    on = policy.velocity(x, torch.ones(1), cond, index)
    assert torch.equal(scorer(policy)(images, prompts).values, before)
    assert torch.equal(policy.velocity(x, torch.ones(1), cond, index), on)
    with policy.reference():  # within which it leaves the adapter off
        off = policy.velocity(x, torch.ones(1), cond, index)
        scorer(policy)(images, prompts)
        assert torch.equal(policy.velocity(x, torch.ones(1), cond, index), off)
    assert not torch.equal(on, off)
    policy.load_adapter(saved)


def test_its_forwards_are_counted_and_estimated(settings):
    changed = dict(
        rewards={"self.gap": 1.0, "self.recovery": 0.1}, scorers={"self": {"times": [0.5], "noises": 2}}, iterations=2,
        objective={"type": "grpo", "beta": 0.1}, eval_every=0,
    )  # fmt: skip
    figures, metrics = (
        estimate.estimate(configs.build(settings | changed, "test")),
        rows(run(settings, **changed) / "metrics.jsonl"),
    )
    for count in ("forwards", "replay_forwards", "decodes", "rewards"):
        assert [row[count] for row in metrics] == [figures["iteration"][count]] * 2
    plain = estimate.estimate(
        configs.build(settings | changed | {"rewards": {"jpeg_size.kilobytes": 1.0}, "scorers": {}}, "test")
    )
    assert figures["iteration"]["forwards"] - plain["iteration"]["forwards"] == 4 * figures["iteration"]["decodes"]
    assert {"part/self.gap", "part/self.recovery"} <= metrics[0].keys()
    assert (
        figures["evaluations"]["forwards"] - plain["evaluations"]["forwards"] == 4 * figures["evaluations"]["decodes"]
    )


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"scorers": {"self": {"times": [1.5]}}}, "times"),
        ({"scorers": {"self": {"noises": 0}}}, "noises"),
        ({"scorers": {"self": {"steps": 3}}}, "it has times, noises"),
        ({"rollout_parts": 2}, "rollout_parts"),
        ({"rewards": {"self.other": 1.0}}, "gap, recovery"),
    ],
)
def test_what_it_cannot_do_is_refused(settings, changed, problem):
    with pytest.raises(BadInput, match=problem):
        open_session(configs.build(settings | {"rewards": {"self.gap": 1.0}} | changed, "test"))
