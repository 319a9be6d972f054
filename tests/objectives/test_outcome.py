"""The implicit reward model of images: known rewards and maps of a flow with a known velocity, and what it learns."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from mmalign.learn.update import update
from mmalign.objectives.flow_matching import Examples, noise_like, times
from mmalign.objectives.objective import Finished
from mmalign.objectives.outcome import Outcome, reward_map
from mmalign.policy.gaussian import GaussianFlow
from mmalign.training.microbatch import AdaptiveBatch

nan = torch.nan
SCALE = 6.0


def flow(shift=0.0):
    result = GaussianFlow()
    with torch.no_grad():
        result.shift.add_(shift)
    return result


def images(count, mean=0.0, seed=0):
    return mean + torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def mapped(policy, x, draws=3, seed=7):
    index = torch.zeros(len(x), dtype=torch.long)
    return reward_map(
        policy, policy.encode(["0.0"]), x, index, draws, torch.Generator().manual_seed(seed), SCALE, batch=3
    )


def loss(policy, examples):
    return Outcome(scale=SCALE).replay(policy, policy.encode(["0.0"]), examples)[0]


def rows(x, label, seed=7):
    """Each image at one noise and time, the same for all: those of the first draw of `mapped` at this seed."""
    generator = torch.Generator().manual_seed(seed)
    noise, t = noise_like(x[:1], generator), times(flow(), 1, 1, generator)[0]
    index = torch.zeros(len(x), dtype=torch.long)
    weight = torch.as_tensor(label).expand(len(x)).clone()[:, None, None]
    return Examples(x, noise.expand_as(x), t.expand(len(x)), weight, index, index)


def test_an_adapter_that_changes_nothing_has_no_map():
    assert mapped(flow(), images(5)).eq(0).all()
    torch.testing.assert_close(loss(flow(), rows(images(5), 1.0)), torch.full((5,), 0.6931472))


def test_the_map_of_a_shifted_mean_is_known():
    """With spread 1 the velocity is (2t - 1) / V x_t less c times the shift, c = 1 + (2t - 1) (1 - t) / V."""
    shift = 0.4 * torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(1))
    x, draws, generator = images(5), 3, torch.Generator().manual_seed(7)
    noise, t = noise_like(x[:1].expand(draws, 3, 4, 4), generator), times(flow(), draws, 1, generator)[0]
    expected = torch.zeros(5, 4, 4)
    for one, time in zip(noise, t.tolist(), strict=True):
        variance = (1 - time) ** 2 + time**2
        c = 1 + (2 * time - 1) * (1 - time) / variance
        wrong = (2 * time - 1) / variance * ((1 - time) * x + time * one) - (one - x)
        expected += SCALE * (wrong**2 - (wrong - c * shift) ** 2).mean(1) / draws
    torch.testing.assert_close(mapped(flow(shift), x, draws), expected, atol=1e-4, rtol=1e-4)


def test_the_mean_of_a_map_is_the_number_that_is_trained():
    shifted, x = flow(0.3), images(5)
    reward = mapped(shifted, x, draws=1).mean((1, 2))
    for label in (0.0, 1.0):
        expected = F.binary_cross_entropy_with_logits(reward, torch.full((5,), label), reduction="none")
        torch.testing.assert_close(loss(shifted, rows(x, label)), expected)


def test_a_map_takes_two_forwards_of_an_image_and_noise_and_states_tell_by_differences():
    """Of the clean latents of successive states the rewards' differences add up to that of the ends."""
    shifted, states = flow(0.3), images(5)
    before = shifted.counts["forwards"]
    reward = mapped(shifted, states, draws=3).mean((1, 2))
    assert shifted.counts["forwards"] - before == 2 * 5 * 3
    ends = mapped(shifted, states[[0, 4]], draws=3).mean((1, 2))
    torch.testing.assert_close(reward.diff().sum(), ends[1] - ends[0])


def test_a_map_is_positive_where_the_adapter_is_right_and_negative_elsewhere():
    """The adapter expects a mean of 1 in the left half of the picture; half of the pictures have it."""
    shift = torch.zeros(3, 4, 4)
    shift[:, :, :2] = 1
    with_it, without = mapped(flow(shift), images(64) + shift, 32), mapped(flow(shift), images(64), 32)
    assert (with_it[:, :, :2].mean(0) > 0.5).all()
    assert (without[:, :, :2].mean(0) < -0.5).all()
    assert with_it[:, :, 2:].eq(0).all()
    assert without[:, :, 2:].eq(0).all()


def test_good_and_bad_images_pull_in_opposite_directions():
    x, slopes = images(5, 0.5), []
    for label in (0.0, 0.5, 1.0):
        policy = flow()
        slopes += torch.autograd.grad(loss(policy, rows(x, label)).sum(), policy.parameters())
    torch.testing.assert_close(slopes[0], -slopes[2])
    torch.testing.assert_close(slopes[1], torch.zeros_like(slopes[1]))  # neither good nor bad
    for slope, sign in ((slopes[2], 1), (slopes[0], -1)):
        assert (sign * mapped(flow(-0.01 * slope), x, draws=1).mean((1, 2)) > 0).sum() >= 4


def trained(label_of):
    """The flow after 100 steps from a shift of 0.5, on images of which every second has a mean of 0.6."""
    policy, objective = flow(0.5), Outcome(draws=4, scale=SCALE, label="reward")
    optimizer = torch.optim.Adam(policy.parameters())
    for number in range(100):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - number / 100)
        generator, good = torch.Generator().manual_seed(number), torch.arange(128) % 2
        x = images(128, 0.0, number) + 0.6 * good[:, None, None, None]
        judged = Finished(x, torch.zeros(128, dtype=torch.long), label_of(good, generator))
        batch = objective.examples(policy, judged, generator)
        update(
            policy.parameters(), optimizer, batch, partial(objective.replay, policy, policy.encode(["0.0"])), epochs=1,
            minibatches=1, micro_batch=AdaptiveBatch(512), max_grad_norm=1e9, generator=generator,
        )  # fmt: skip
    return policy


def test_a_label_that_does_not_depend_on_the_image_teaches_nothing():
    chance = trained(lambda good, generator: torch.randint(2, good.shape, generator=generator).float())
    rewards = mapped(chance, torch.cat([images(32), images(32, 0.6)]), 32).mean((1, 2))
    assert rewards.abs().mean() < 0.1
    known = trained(lambda good, _: good.float())
    bad, good = (mapped(known, images(32, mean), 32).mean((1, 2)) for mean in (0.0, 0.6))
    assert good.mean() > 0.5 > -0.5 > bad.mean()


@pytest.mark.parametrize(
    ("label", "expected"), [("siblings", [1.0, 0.0, 1.0, 0.0]), ("reward", [1.0, 0.0, 0.75, 0.5, 0.25])]
)
def test_images_without_an_outcome_have_no_row(label, expected):
    rewards = torch.tensor([3.0, -1.0, 0.75, nan, 0.5, 0.25])  # 0.5 is as often ahead as behind
    finished = Finished(images(6), torch.zeros(6, dtype=torch.long), rewards)
    made = Outcome(draws=1, label=label).examples(flow(), finished, torch.Generator().manual_seed(0))
    assert made.weight[:, 0, 0].tolist() == expected
