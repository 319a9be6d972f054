"""Sums of credits: linear in their weights, each part with its states and its rewards."""

from dataclasses import replace

import pytest
import torch
from trajectories import judged as judged_by, judged_as, sampled

from mmalign.config import load as configs
from mmalign.credit import Gain, Implicit, Mix, Prl, Terminal, Value
from mmalign.credit.groups import Units
from mmalign.credit.more.density import of_ends, of_states
from mmalign.errors import BadInput
from mmalign.flow import plan as plans
from mmalign.sampling.kernels import FlowSde
from mmalign.training.selecting import credit_at
from mmalign.types import Judgement
from reward_models.combine import Ramp

T = 5
SDE = plans.sde(torch.linspace(1, 0, T + 1), FlowSde(0.7))
CREDITS = [{"type": "gain", "weight": 1}, {"type": "terminal", "weight": {"start": 0, "end": 1}}]


def judged(paths):
    return judged_by(paths, lambda x: (x.flatten(1)[:, :5] ** 2).sum(1).sin())


def dense(states=range(T), starts=6):
    return sampled(plans.complete(SDE, states), starts, 2)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_it_is_linear_in_its_weights_and_one_part_is_that_credit(scale):
    paths = dense()
    tree, report, units = paths.tree, judged(paths), Units(scale)
    gain, terminal = Gain()(tree, report, units), Terminal()(tree, report, units)
    assert torch.equal(Mix((Gain(),), (1.0,))(tree, report, units), gain)
    both = (Gain(), Terminal())
    assert torch.equal(Mix(both, (1.0, 0.0))(tree, report, units), gain)
    torch.testing.assert_close(Mix(both, (0.5, -2.0))(tree, report, units), 0.5 * gain - 2 * terminal)


def test_each_part_is_clipped_before_it_is_weighed():
    tree = sampled(SDE, 8).tree
    report = judged_as(tree, torch.tensor([0.0] * 7 + [1.0]))
    mix = Mix((Terminal(), Terminal()), (3.0, 1.0))(tree, report, Units(clip=2.0))
    assert float(mix.max()) == 8.0  # 7^(1/2) = 2.65 is clipped to 2


def test_with_the_finished_image_alone_gain_and_terminal_are_one():
    paths = sampled(SDE, 6, 2)
    report, stochastic = judged(paths), paths.tree.std[:, :, None, None] > 0
    mix = Mix((Gain(), Terminal()), (1.0, 0.5))(paths.tree, report)
    terminal = Terminal()(paths.tree, report)
    torch.testing.assert_close(mix * stochastic, 1.5 * terminal * stochastic)


def test_each_part_reads_the_states_that_it_asks_for():
    """The gain from the start is not changed by states that another part has completed, and the values stay close."""
    few, every = dense([0]), dense()
    part = Gain((0,))
    one = part(few.tree, judged(few))
    torch.testing.assert_close(part(every.tree, judged(every)), one, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(Gain()(every.tree, judged(every)), one, atol=1e-2)


def test_it_completes_all_states_that_a_part_asks_for():
    assert Mix((Terminal(), Terminal()), (1.0, 1.0)).completions(SDE) == ([], ())
    mix = Mix((Gain((1, 3), (2, 2)), Gain((0, 3), completion=1), Gain((1,))), (1.0, 1.0, 1.0))
    assert mix.completions(SDE) == ([0, 1, 3], (1, 4, 2))
    assert [part.completion for part in [*Mix((Gain(), Terminal()), (1.0, 1.0)).thinner(SDE, T)][3].parts[:1]] == [2]
    one = plans.complete(SDE, *Mix((Gain(), Terminal()), (1.0, 1.0)).completions(SDE))
    assert torch.equal(one.t, plans.complete(SDE, *Gain().completions(SDE)).t)


def test_a_part_of_weight_0_is_absent_and_asks_for_nothing():
    """Neither states, nor log-ratios, nor an adapter; a ramp that begins at 0 asks for all from the start."""
    parts = (Terminal(), Gain(), Prl(), Implicit(), Value())
    mix = Mix(parts, (1.0, 0.0, 0.0, 0.0, 0.0))
    assert mix.completions(SDE) == ([], ())
    assert (mix.forwards, mix.dense, mix.drifts, mix.learner, mix.observer) == (0, False, False, None, None)
    paths = dense()
    assert torch.equal(mix(paths.tree, judged(paths)), Terminal()(paths.tree, judged(paths)))
    assert mix.statistics(paths.tree, judged(paths)) == {}
    later = Mix(parts, (1.0, Ramp(0, 1), Ramp(0, 1), Ramp(0, 1), Ramp(0, 1)))
    assert later.completions(SDE)[0] == [0, 1, 2, 3, 4]
    assert (later.forwards, later.dense, later.drifts) == (1 + Implicit().forwards, True, True)
    assert later.at(0.0).forwards == 0


def test_all_rewards_of_states_are_those_of_a_run_without_densities():
    plain, stated = (
        configs.build({"plan": "sde", "seeds": 2, "credit": "gain", "rewards": rewards}, "test")
        for rewards in ({"clip.cosine": 2.0}, {"clip.cosine": {"weight": 2.0, "density": "step"}})
    )
    assert (stated.at_end, stated.late, stated.weights) == (plain.at_end, plain.late, plain.weights) == (
        (), (), {"clip.cosine": 2.0}
    )  # fmt: skip


def test_rewards_of_finished_images_alone_go_to_parts_that_read_no_states():
    paths = dense()
    tree, report = paths.tree, judged(paths)
    rest = torch.linspace(-1, 1, 6)
    total = report.reward.clone()
    total[:, -1] += rest
    both = replace(report, reward=total, ends=torch.stack([report.reward[:, -1], rest], 1))
    mix = Mix((Gain(), Terminal()), (1.0, 0.5))
    expected = Gain()(tree, report) + 0.5 * Terminal()(tree, judged_as(tree, rest))
    torch.testing.assert_close(mix(tree, both), expected, atol=1e-4, rtol=1e-4)
    missing = replace(both, reward=torch.where(torch.arange(6)[:, None] == 0, torch.nan, total))
    assert Terminal()(tree, of_ends(missing))[0].eq(0).all()  # without a reward it is in no group


def test_large_rewards_of_finished_images_take_no_digits_from_those_of_states():
    """Equal values stay equal: the rounding of a sum with thousands is not a gain."""
    tree, end = dense([0]).tree, torch.linspace(3000, 6000, 6)
    value = torch.full_like(tree.t, 0.3)
    ends = torch.stack([value[:, -1], end], 1)
    value[:, -1] = ends.sum(1)
    assert Gain((0,))(tree, of_states(Judgement(value, {}, ends=ends))).eq(0).all()
    assert not (value[:, -1] - end - 0.3).eq(0).all()


def test_a_ramp_moves_over_the_run_and_a_config_holds_it():
    c = configs.build({"plan": "sde", "seeds": 2, "iterations": 5, "credit": CREDITS}, "test")
    assert c.credit == Mix((Gain(), Terminal()), (1.0, Ramp(0, 1)))
    assert [credit_at(c, i).weights for i in (0, 2, 4)] == [(1.0, 0.0), (1.0, 0.5), (1.0, 1.0)]
    assert configs.build(c.model_dump(mode="json"), "test") == c
    assert configs.build({"plan": "sde", "seeds": 2, "iterations": 5, "credit": c.credit}, "test") == c
    short = configs.build({"plan": "sde", "seeds": 2, "credit": ["gain", {"type": "terminal"}]}, "test")
    assert short.credit == Mix((Gain(), Terminal()), (1.0, 1.0))


DENSE = {"shapes.strict": {"density": "end"}, "clip.cosine": 1.0}
SUM = ["gain", "terminal"]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"credit": []}, "got 0, 0"),
        ({"credit": ["gain", {"type": "terminal", "weight": "much"}]}, 'weight: a number.* got "much"'),
        ({"credit": ["gain", "terminals"]}, "did you mean 'terminal'"),
        ({"credit": ["gain", {"type": "terminal", "weights": 1}]}, "terminal has no setting 'weights'"),
        ({"credit": [{"type": "gain", "weight": 0}]}, "all weights are 0 in iteration 1"),
        ({"credit": [{"type": "gain", "weight": {"start": 1, "end": 0}}]}, "all weights are 0 in iteration 100"),
        ({"credit": "gain", "rewards": DENSE}, "density: end needs a sum of credits"),
        ({"credit": "terminal", "rewards": DENSE}, "density: end needs a sum of credits"),
        ({"credit": ["gain", {"type": "terminal", "weight": 0}], "rewards": DENSE}, "density: end needs"),
        ({"credit": ["value", {"type": "value", "floor": 0.5}]}, "two credits of the sum need a value head each"),
        ({"credit": ["implicit", {"type": "implicit", "scale": 1.0}]}, "need an adapter that learns rewards each"),
        ({"credit": SUM, "rewards": {"clip.cosine": {"density": "end"}}}, "at least one reward must have"),
        ({"credit": SUM, "rewards": DENSE, "combine": "mrn", "advantage": {"scale": "none"}}, "go with combine: mrn"),
        ({"credit": SUM, "rewards": DENSE, "region": "shapes"}, "go with region"),
        ({"credit": SUM, "rewards": {"clip.cosine": {"density": "late"}}}, "density"),
        ({"credit": "renorm", "advantage": {"scale": "batch"}}, "do not act with credit: renorm"),
        ({"credit": {"type": "gain", "damping": 0.5}}, "set both"),
        ({"credit": {"type": "gain", "damping": 0.5, "saturate": 0.9, "returns": "to_go"}}, "returns: own"),
    ],
)
def test_what_does_not_go_together_is_refused(changed, says):
    with pytest.raises(BadInput, match=says):
        configs.build({"plan": "sde", "seeds": 2} | changed, "test")


def test_an_override_reaches_an_item_of_a_list(tmp_path):
    (tmp_path / "c.yaml").write_text("plan: sde\nseeds: 2\ncredit: [gain, terminal]\n")
    with pytest.raises(BadInput, match="a number from 0 to 1 is needed"):
        configs.load(tmp_path / "c.yaml", ["credit.control=fit"])
    fitted = configs.load(tmp_path / "c.yaml", ["credit.0.control=fit"])
    assert fitted.credit == Mix((Gain(control="fit"), Terminal()), (1.0, 1.0))
    assert configs.load(tmp_path / "c.yaml", ["credit=[gain]"]).credit == Mix((Gain(),), (1.0,))
