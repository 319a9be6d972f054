"""Credit by a value head: what its gains add up to, what the head learns, and what a run has of it."""

import math
from contextlib import nullcontext
from dataclasses import replace
from functools import cache

import pytest
import torch
from run_config import cut_off, rows, run
from trajectories import judged_as, sampled

from mmalign.checks import doctor, estimate
from mmalign.config import load as configs
from mmalign.credit import Gain, Mix, Terminal, Value
from mmalign.credit.groups import Units, group_mean
from mmalign.credit.more.value import traced
from mmalign.errors import BadInput
from mmalign.evaluation.best_of_n import best_of
from mmalign.flow import plan as plans
from mmalign.learn.loss import Clipped
from mmalign.objectives.replay import Surrogate, transitions
from mmalign.policy.gaussian import GaussianFlow
from mmalign.runs import checkpoint
from mmalign.sampling.kernels import FlowSde
from mmalign.training import values as heads
from mmalign.training.setup import open_session
from mmalign.training.values import Head, Values
from reward_models import Card, Prompt, Scores

T = 6
TIMES = torch.linspace(1, 0, T + 1)
SDE = plans.sde(TIMES, FlowSde(0.7))
RUN = dict(plan="sde", seeds=4, credit={"type": "value", "warmup": 1, "floor": 0.0, "replay": 2, "width": 8})


def observed(starts=12, prompts=2, seed=0, plan=SDE, batch=128):
    """Trajectories of the closed-form flow with their features, and the reward of each image."""
    flow = GaussianFlow()
    with flow.observed() as features:
        paths = sampled(plan, starts, prompts, seed, flow, features=features, batch=batch)
    return paths, paths.finals[paths.tree.final[:, -1]].mean((1, 2, 3)) * 12


def judgement(tree, reward, values=None):
    return replace(judged_as(tree, reward), values=values)


def guesses(tree, seed=0):
    return torch.randn(tree.std.shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------- the credit


def test_gains_add_up_to_the_reward_less_the_value_of_the_start():
    paths, reward = observed()
    tree, values = paths.tree, guesses(paths.tree)
    credit, valued = traced(tree, judgement(tree, reward, values), 0.0)
    torch.testing.assert_close(credit.sum(1), reward - group_mean(reward, tree.prompt) - values[:, 0])
    assert bool(valued.all())


def test_the_trace_goes_from_one_gain_to_the_reward_less_a_baseline():
    paths, reward = observed()
    tree, values = paths.tree, guesses(paths.tree)
    centred = (reward - group_mean(reward, tree.prompt))[:, None]
    whole, _ = traced(tree, judgement(tree, reward, values), 1.0)
    torch.testing.assert_close(whole, centred - values)
    gains, _ = traced(tree, judgement(tree, reward, values), 0.0)
    part, _ = traced(tree, judgement(tree, reward, values), 0.5)
    torch.testing.assert_close(part[:, 2], sum(0.5**j * gains[:, 2 + j] for j in range(T - 2)))


def test_without_a_trusted_value_it_is_terminal_credit_to_the_bit():
    paths, reward = observed()
    tree, wanted = paths.tree, Terminal()(paths.tree, judgement(paths.tree, reward))
    unknown = torch.full_like(tree.std, torch.nan)
    assert torch.equal(Value()(tree, judgement(tree, reward)), wanted)
    assert torch.equal(Value()(tree, judgement(tree, reward, unknown)), wanted)


def test_a_step_has_it_where_the_state_that_it_reaches_is_trusted():
    paths, reward = observed()
    tree, values = paths.tree, guesses(paths.tree)
    values[:, [0, 1, 3]] = torch.nan
    advantage = Value()(tree, judgement(tree, reward, values))[:, :, 0, 0]
    terminal = Terminal()(tree, judgement(tree, reward))[:, :, 0, 0]
    same = [torch.equal(advantage[:, k], terminal[:, k]) for k in range(T - 1)]
    assert same == [True, False, True, False, False]  # the states after the steps are 1 to 5
    centred = values[:, 2] - group_mean(values[:, 2], tree.prompt)  # the value before step 1 counts as 0
    spread = group_mean(centred**2, tree.prompt).sqrt()
    torch.testing.assert_close(advantage[:, 1], centred / spread)


def test_equal_rewards_and_missing_ones_have_no_advantage():
    paths, reward = observed()
    tree, values = paths.tree, guesses(paths.tree)
    assert not Value()(tree, judgement(tree, torch.ones_like(reward), values)).any()
    reward[3] = torch.nan
    advantage = Value()(tree, judgement(tree, reward, values), Units("batch"))
    assert not advantage[3].any()
    assert bool(advantage[2, : T - 1].all())
    assert bool(advantage.isfinite().all())


def test_a_map_of_rewards_has_terminal_credit():
    paths, reward = observed()
    tree = paths.tree
    places = reward[:, None, None, None] * torch.rand(len(reward), T + 1, 2, 2)
    judged = replace(judgement(tree, reward, guesses(tree)), reward=places)
    assert torch.equal(Value()(tree, judged), Terminal()(tree, judged))


WEIGHTS = torch.linspace(-1, 1, 8).view(2, 2, 2)


@cache
def linear(starts=3000):
    """Trajectories of a flow of eight elements, whose reward is linear in the image, and the exact gradient of its mean
    with respect to the shift of the noisy steps. The value of a state is linear in it, by a slope for each step."""
    flow = GaussianFlow((2, 2, 2))
    paths = sampled(SDE, starts, flow=flow, batch=10**6)
    x = torch.zeros(1, 2, 2, 2)
    for k in range(T):
        times, level = (TIMES[k + j].expand(1) for j in (0, 1)), paths.tree.noise[:1, k]
        with nullcontext() if paths.tree.std[0, k] else flow.reference():  # a step without noise is not learnt
            v = flow.velocity(x, TIMES[k].expand(1), flow.encode(["0.0"]), torch.zeros(1, dtype=torch.long))
        x, _ = paths.kernel.step(x, v, *times, level, paths.t_max)  # the mean of a linear flow needs no noise
    [exact] = torch.autograd.grad((WEIGHTS * x).sum(), flow.shift)
    states = (WEIGHTS * paths.x).sum((2, 3, 4))
    centred = states - states.mean(0)
    slopes = (centred * centred[:, -1:]).sum(0) / centred.square().sum(0)
    return flow, paths, states[:, -1], (slopes * centred)[:, :-1], exact.flatten()


@pytest.mark.parametrize(
    ("trace", "scale", "unbiased"), [(0.0, 1.0, True), (0.5, 1.0, True), (1.0, 1.0, True), (1.0, -2.0, True),
                                     (0.0, -2.0, False)],
)  # fmt: skip
def test_its_gradient_is_the_exact_one(trace, scale, unbiased):
    """By the true values at any trace, and with a trace of 1 by wrong ones too, which are a baseline alone. In
    direction and length: a mean over the steps, and a ratio per element."""
    flow, paths, reward, values, exact = linear()
    advantage = Value(trace=trace)(paths.tree, judgement(paths.tree, reward, scale * values), Units("none"))
    replay = Surrogate(flow, flow.encode(["0.0"]), paths.kernel, paths.t_max, Clipped(1.0))
    loss, _ = replay(transitions(paths, advantage))
    estimated = -torch.autograd.grad(loss.mean(), flow.shift)[0].flatten() * (T - 1) * 8
    share = float(estimated @ exact / exact.square().sum())
    if not unbiased:
        assert share < 0
        return
    assert torch.cosine_similarity(estimated, exact, dim=0) > 0.98
    assert share == pytest.approx(1, abs=0.08)


def test_where_rewards_are_of_finished_images_alone_the_head_expects_these():
    paths, reward = observed()
    tree, rest = paths.tree, torch.linspace(-1, 1, 12)
    both = replace(judged_as(tree, reward + rest), ends=torch.stack([reward, rest], 1))
    learnt, credited = [], []
    for verdict in (both, judged_as(tree, rest), judged_as(tree, reward + rest)):
        values = Values(Value(), 48, T, 0)
        values.judge(tree, verdict, paths.features, 0)
        learnt.append(values.tensors())
        credited.append(Mix((Gain(), Value(trace=1.0)), (0.0, 1.0))(tree, replace(verdict, values=guesses(tree))))
    assert all(torch.equal(value, learnt[1][name]) for name, value in learnt[0].items())
    assert not torch.equal(learnt[0]["head.out.weight"], learnt[2]["head.out.weight"])
    assert torch.equal(credited[0], credited[1])
    assert not torch.allclose(credited[0], credited[2])


# -------------------------------------------------------------------------------------------------------- the features


def test_features_follow_their_trajectories():
    plan = plans.branch(TIMES, FlowSde(0.7), [0, 2], 2)
    paths, _ = observed(plan=plan, batch=3)
    for k in range(T):
        assert torch.equal(paths.features[:, k], paths.x[:, k].flatten(1))


# ------------------------------------------------------------------------------------------------------------ the head


def fitted(iterations=12, seed=0, reward=None, **settings):
    """A head that has learnt from trajectories of the closed-form flow, whose late states tell the reward."""
    values = Values(Value(**{"warmup": 1, "passes": 8, "learning_rate": 3e-3} | settings), 48, T, seed)
    rows_ = []
    for i in range(iterations):
        paths, given = observed(24, 4, seed=100 + i)
        given = given if reward is None else reward(given)
        shown, row = values.judge(paths.tree, judgement(paths.tree, given), paths.features, i)
        rows_.append((shown, row))
    return values, rows_


def test_the_head_learns_to_tell_the_reward_and_late_states_best():
    values, judged = fitted(20, passes=4)
    explained = values.explained
    assert float(explained[-1]) > 0.5  # of 0.96, what the state at t = 1/6 tells of the mean of its image
    assert bool((explained[1:] > explained[:-1]).all())
    assert bool(judged[0][0].isnan().all())  # warm-up
    trusted = ~judged[-1][0].isnan()
    assert bool(trusted[:, -1].all())
    assert bool((trusted == trusted[:1]).all())
    a, b = torch.nn.functional.softplus(values.head.spread.detach())
    assert float(a) > float(b)  # equal at first: early states are uncertain


def test_the_loss_is_the_likelihood_of_the_difference_from_the_group():
    """(R - u)^2 / 2 s^2 + log s, s^2 = a t + b, of u less its mean over the group, in units of the reward's spread."""
    head = Head(1, 4, None, 0)
    features, t = torch.tensor([[1.0], [2.0], [3.0], [9.0]]), torch.tensor([0.5, 0.5, 0.5, 0.25])
    target = torch.tensor([3.0, 0.0, -3.0, 0.0])
    head.standardise(features, target)
    assert float(head.unit) == pytest.approx(4.5**0.5)
    with torch.no_grad():
        head.spread.copy_(torch.tensor([0.5, -1.0]))
    states = heads.States(features, t, target, torch.tensor([0, 0, 0, 1]))

    def by_hand(u):
        a, b = (math.log1p(math.exp(s)) for s in (0.5, -1.0))
        each = [((r / 4.5**0.5 - e) ** 2, a * s + b + heads.LEAST) for r, e, s in zip(target, u, t, strict=True)]
        return sum(float(off / v + v.log()) / 2 for off, v in each) / 4

    expected = by_hand([0.0] * 4)  # a new head expects the mean
    assert float(head.loss(states).detach()) == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        head.out.weight.fill_(1.0)
        u = head(features, t)
        mean = u[:3].mean()
    assert float(head.loss(states).detach()) == pytest.approx(by_hand([*(u[:3] - mean), 0.0]), rel=1e-5)


def test_what_is_explained_is_measured_before_it_is_learnt():
    paths, reward = observed(24, 4)
    values = Values(Value(), 48, T, 0)
    _, row = values.judge(paths.tree, judgement(paths.tree, reward), paths.features, 0)
    assert all(row[f"value/explained/{k}"] == 0.0 for k in range(T))  # a new head expects the mean
    _, row = values.judge(paths.tree, judgement(paths.tree, reward), paths.features, 1)
    assert bool(values.head.out.weight.any())
    assert row["value/explained/5"] != 0.0


def test_a_constant_reward_trains_nothing():
    values, judged = fitted(3, reward=torch.ones_like)
    fresh = Values(values.settings, 48, T, 0)
    assert all(torch.equal(v, fresh.tensors()[name]) for name, v in values.tensors().items())
    assert bool(judged[-1][0].isnan().all())


def test_equal_states_have_equal_values_and_units_are_those_of_the_reward():
    values, _ = fitted(4)
    x, t = torch.randn(5, 48), torch.full((5,), 0.3)
    x[3] = x[1]
    u = values.head.value(x, t)
    assert u[3] == u[1]
    assert u[0] != u[1]
    larger, _ = fitted(4, reward=lambda r: 1024 * r)
    assert torch.equal(larger.head.value(x, t), 1024 * u)


def test_a_missing_reward_teaches_nothing():
    values, _ = fitted(2)
    paths, reward = observed(24, 4)
    reward[5] = torch.nan
    shown, _ = values.judge(paths.tree, judgement(paths.tree, reward), paths.features, 2)
    assert len(values.past[-1].t) == 23 * T
    assert bool(values.explained.isfinite().all())
    assert shown.shape == (24, T)


def test_a_saved_head_is_that_head_and_a_forged_one_is_refused():
    values, _ = fitted(3, replay=2)
    saved = values.tensors()
    again = Values(values.settings, 48, T, 0)
    again.load(saved)
    paths, reward = observed(24, 4, seed=7)
    one, two = (v.judge(paths.tree, judgement(paths.tree, reward), paths.features, 3) for v in (values, again))
    assert one[1] == two[1]
    assert all(torch.equal(v, again.tensors()[name]) for name, v in values.tensors().items())
    head = heads.saved_head(saved, values.settings)
    other = Values(values.settings, 48, T, 0)
    other.load(saved)
    x, t = torch.randn(2, 48), torch.tensor([0.1, 0.9])
    assert torch.equal(head.value(x, t), other.head.value(x, t))
    for name, wrong in {
        "head.mean": torch.zeros(47, dtype=torch.float64), "head.variance": -saved["head.variance"],
        "past.0.t": torch.full_like(saved["past.0.t"], torch.nan), "past.9.t": torch.zeros(3),
        "optimizer.0.exp_avg": torch.zeros(3), "left": saved["left"].float(),
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=name.replace("past.9.t", "past|states of 3")):
            again.load(saved | {name: wrong})
    with pytest.raises(ValueError, match="total"):
        again.load({name: value for name, value in saved.items() if name != "total"})


# ---------------------------------------------------------------------------------------------------------------- runs


def test_a_run_takes_no_more_than_terminal_credit_and_resumes_to_the_bit(settings, tmp_path):
    out = run(settings, **RUN, iterations=4, checkpoint_every=2, out=str(tmp_path / "whole"))
    plain = rows(
        run(settings, **RUN | {"credit": "terminal"}, iterations=4, out=str(tmp_path / "plain")) / "metrics.jsonl"
    )
    metrics = rows(out / "metrics.jsonl")
    for count in ("forwards", "decodes", "rewards", "transitions"):
        assert [row[count] for row in metrics] == [row[count] for row in plain]
    assert "value/explained/2" in metrics[-1]
    assert "value/explained/2" not in plain[-1]
    with cut_off(2):
        run(settings, **RUN, iterations=4, checkpoint_every=2, out=str(tmp_path / "cut"))
    run(settings, True, **RUN, iterations=4, checkpoint_every=2, out=str(tmp_path / "cut"))
    one, two = (checkpoint.read(tmp_path / name / "checkpoints/000004")[0] for name in ("whole", "cut"))
    for kind in ("adapter", "values"):
        assert one[kind].keys() == two[kind].keys()
        assert all(torch.equal(value, two[kind][name]) for name, value in one[kind].items())
    figures = estimate.estimate(configs.build(settings | RUN | {"iterations": 4}, "test"))
    assert [row["forwards"] for row in metrics] == [figures["iteration"]["forwards"]] * 4
    size = sum(file.stat().st_size for file in (out / "checkpoints/000004").iterdir())
    assert figures["disk"]["checkpoint"] == pytest.approx(size, rel=0.1)
    assert figures["memory"]["main"]["features"] > 0


def test_a_run_whose_rewards_are_constant_is_that_of_terminal_credit(settings, tmp_path):
    same = dict(
        rewards={"odd_scorers:Constant.mean": 1.0}, held_out=None, iterations=2, checkpoint_every=2, max_failed=1.0
    )
    one, two = (
        checkpoint.read(run(settings, **RUN | same | {"credit": c}, out=str(tmp_path / n)) / "checkpoints/000002")[0]
        for n, c in (("value", RUN["credit"]), ("terminal", "terminal"))
    )
    assert all(torch.equal(value, two["adapter"][name]) for name, value in one["adapter"].items())
    assert not one["values"]["head.out.weight"].any()


def test_what_it_needs_is_refused_in_one_line(settings, tmp_path):
    with pytest.raises(BadInput, match="compile"):
        open_session(configs.build(settings | RUN | {"compile": True}, "test"))
    with pytest.raises(BadInput, match="blocks"):
        open_session(configs.build(settings | RUN | {"credit": {"type": "value", "blocks": [77]}}, "test"))
    out = run(settings, **RUN | {"credit": "terminal"}, iterations=1, out=str(tmp_path / "plain"))
    with pytest.raises(BadInput, match="credit: value"):
        heads.read(out)


def test_the_doctor_finds_nothing(settings):
    assert [check for check in doctor.examine(configs.build(settings | RUN, "test")) if check.good is False] == []


# ------------------------------------------------------------------------------------------------------- at test time


class Oracle(Head):
    """Expects most of the latents whose mean is highest."""

    def value(self, features, t):
        return features.mean(1)


class Mean:
    names = ("mean",)
    card = Card("mean")

    def __call__(self, images, prompts):
        return Scores(self.names, images.mean((1, 2, 3))[:, None])


def test_a_head_prunes_without_a_decode():
    flow, prompts, seeds = GaussianFlow(), [Prompt("0.0", {}, 0), Prompt("1.0", {}, 1)], [[*range(8)]] * 2
    whole = best_of(flow, prompts, seeds, T, Mean(), "mean")
    decodes = flow.counts["decodes"]
    pruned = best_of(flow, prompts, seeds, T, Mean(), "mean", survivors=3, after=2, head=Oracle(48, 2, None, 0))
    assert (pruned.forwards, pruned.judgements) == (2 * (8 * 3 + 3 * 4), 6)
    assert flow.counts["decodes"] - decodes == 6
    torch.testing.assert_close(pruned.score, whole.score)  # an ODE of this flow keeps the order
    assert torch.equal(pruned.member, whole.member)
