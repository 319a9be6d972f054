"""Equal rewards carry no gradient, at any scale and in groups of any size; different ones do."""

import pytest
import torch
from hypothesis import given, strategies as st
from trajectories import sampled

from mmalign.config.schema import Config
from mmalign.credit.gain import Gain, fitted
from mmalign.credit.groups import Units, dead, group_std, normalise
from mmalign.flow import plan as plans
from mmalign.rewards.combination import Combination, Gdpo, Mrn, Product, Sum
from mmalign.runs.alarms import ALARMS
from mmalign.sampling.kernels import FlowSde
from mmalign.types import Judgement
from reward_models.combine import ROUNDING, alive, health, mean_and_std, normalised, whitened

SCALES = ["group", "batch", "none"]


@pytest.mark.parametrize("value", [21.7, 0.1, 1 / 3, -21.7, 1e6 + 0.1, 1e-8, 3e-30, 0.0])
@pytest.mark.parametrize("g", [2, 3, 6, 7, 12, 24, 100])
@pytest.mark.parametrize("scale", SCALES)
def test_equal_rewards_have_no_advantage_and_are_dead(value, g, scale):
    values, group = torch.full((2 * g,), value), torch.arange(2).repeat(g)
    assert normalise(values, group, Units(scale)).eq(0).all()
    assert dead(values, group).eq(1).all()
    assert group_std(values, group).eq(0).all()
    assert normalised(values[:, None], group, torch.ones(1)).eq(0).all()
    assert whitened(values[:, None], group, torch.ones(1)).eq(0).all()
    assert health(values[:, None], ["one"], group)["dead/one"] == 1


@given(
    g=st.integers(2, 64),
    value=st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    scale=st.sampled_from(SCALES),
)
def test_any_equal_numbers_of_any_type_are_dead(g, value, dtype, scale):
    values, group = torch.full((g,), value, dtype=dtype), torch.zeros(g, dtype=torch.long)
    assert torch.equal(normalise(values, group, Units(scale)), torch.zeros(g, dtype=dtype))
    assert not alive(values, group).any()
    assert torch.equal(mean_and_std(values, group)[0], values)


@given(g=st.integers(2, 24), power=st.integers(-30, 30), seed=st.integers(0, 99))
def test_a_difference_is_one_at_any_scale(g, power, seed):
    """Powers of two change no digit, so advantages in units of the group are the same to the bit."""
    generator = torch.Generator().manual_seed(seed)
    values, group = torch.rand(g, generator=generator), torch.zeros(g, dtype=torch.long)
    scaled = values * 2.0**power
    assert dead(scaled, group).eq(0).all()
    assert torch.equal(normalise(scaled, group), normalise(values, group))


@pytest.mark.parametrize(
    "values",
    [
        [1e6, 1e6 + 1, 1e6, 1e6],
        [1e-8, 2e-8, 1e-8, 1e-8],
        [1e-8, 1.001e-8, 1e-8, 1e-8],
        [21.7, 21.7001, 21.7, 21.7],
        [1e6, -1e6, 1e-8, 0.0],
    ],
)
def test_real_differences_are_alive_and_have_their_known_advantage(values):
    values, group = torch.tensor(values), torch.zeros(4, dtype=torch.long)
    exact = values.double()
    assert dead(values, group).eq(0).all()
    torch.testing.assert_close(
        normalise(values, group), ((exact - exact.mean()) / exact.std(correction=0)).float(), atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("value", [21.7, 1e6, 1e-8, 0.3])
def test_the_last_digit_of_a_float_is_rounding(value):
    one = torch.tensor(value)
    values = torch.stack([one, torch.nextafter(one, torch.tensor(torch.inf))] * 3)
    group = torch.zeros(6, dtype=torch.long)
    assert values.unique().numel() == 2
    assert dead(values, group).eq(1).all()
    assert normalise(values, group).eq(0).all()
    assert dead(values + 100 * ROUNDING * values * torch.tensor([0.0, 1] * 3), group).eq(0).all()


def test_a_floor_of_ones_own_adds_to_the_rule():
    values, group = torch.tensor([0.5, 0.52, 0.5, 0.52]), torch.zeros(4, dtype=torch.long)
    assert normalise(values, group, Units(dead=0.02)).eq(0).all()
    assert normalise(values, group, Units(dead=0.005)).tolist() == pytest.approx([-1, 1, -1, 1], abs=1e-4)


def test_gains_are_judged_by_the_size_of_what_they_are_differences_of():
    """Two scores of 21.7 that differ in their last digit give a gain of 2e-6: no preference."""
    tree = sampled(plans.sde(torch.linspace(1, 0, 5), FlowSde(0.7)), starts=6).tree
    reward = torch.full((6, 5), 21.7)
    reward[::2, 1:] = torch.nextafter(reward[::2, 1:], torch.tensor(torch.inf))
    assert Gain()(tree, Judgement(reward, {})).eq(0).all()
    reward[::2, 1:] += 1e-3
    assert Gain()(tree, Judgement(reward, {}))[:, 0, 0, 0].tolist() == pytest.approx([1, -1] * 3, abs=1e-3)


def test_the_share_worth_subtracting_does_not_depend_on_the_scale():
    before, group = torch.rand(12, generator=torch.Generator().manual_seed(0)), torch.zeros(12, dtype=torch.long)
    for scale in (1.0, 2.0**-27, 2.0**20):
        assert fitted(before * scale, before * scale / 2, group) == pytest.approx(0.5)
    assert fitted(torch.full((12,), 21.7), before, group) == 1.0


def test_equal_scores_of_several_parts_are_seen_by_the_alarm():
    parts = {"a.one": torch.full((12,), 21.7), "b.two": torch.full((12,), 0.3)}
    owner = torch.arange(2).repeat_interleave(6)
    for rule in (Sum(), Product(), Mrn(), Gdpo()):
        reward = Combination({"a.one": 0.7, "b.two": 0.1}, rule)(parts, owner)
        assert dead(reward, owner).mean() == 1
    row = {"dead_groups": float(dead(parts["a.one"], owner).mean())}
    assert "nothing is trained" in ALARMS["constant_reward"](
        Config(plan="sde", credit="terminal", seeds=6), [row] * 5, []
    )
