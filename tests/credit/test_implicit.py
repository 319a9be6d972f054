"""Rewards of steps that an adapter learns from outcomes: what they are, what they add up to, and how they learn."""

import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from corpus import checkpoints as corpus
from run_config import cut_off, rows, run
from safetensors.torch import load_file
from torch.nn import functional as F
from trajectories import judged_as, plan_by_hand, sampled

from mmalign.checks import estimate
from mmalign.config import load as configs
from mmalign.credit import Implicit, Terminal
from mmalign.credit.groups import normalise
from mmalign.credit.more.implicit import ahead
from mmalign.errors import BadInput
from mmalign.flow import plan as plans
from mmalign.flow.kernels import gaussian_kl, log_density
from mmalign.learn.update import Alone
from mmalign.policy.gaussian import GaussianFlow
from mmalign.sampling.kernels import FlowSde
from mmalign.training import saving
from mmalign.training.setup import open_session
from mmalign.training.step_rewards import NAME, StepRewards
from mmalign.types import Judgement

T = 4
PLAN = plans.sde(torch.linspace(1, 0, T + 1), FlowSde(0.7))


@dataclass
class One(Alone):
    """One process, as `mmalign.distributed.processes.Ranks` would be."""

    def local_rows(self, prompt, what):
        return torch.ones_like(prompt, dtype=torch.bool)

    def all_reduce_sum(self, counts, what):
        return counts


@dataclass
class Bench:
    """A run with a Gaussian flow, its reward adapter at a `shift`, and trajectories."""

    flow: GaussianFlow
    rollout: Any
    step_rewards: StepRewards
    run: Any

    def process(self):
        return self.step_rewards.of(self.run, self.rollout, self.step_rewards.steps(self.run, self.rollout))


def bench(credit: Implicit, shift: float = 0.0, starts: int = 8, prompts: int = 2, plan=PLAN, acts="default") -> Bench:
    flow = GaussianFlow()
    flow.attach_lora(1, 1.0, None, 0, NAME)
    with torch.no_grad():
        flow.shifts[NAME].fill_(shift)
    with flow.acting(acts):
        paths = sampled(plan, starts, prompts, flow=flow)
    rollout = SimpleNamespace(
        prompts=["0.0"] * prompts, cond=flow.encode(["0.0"] * prompts), paths=paths, forwards=None
    )
    at_once = lambda work: work(3)  # noqa: E731
    skips = SimpleNamespace(may_step=lambda *_: True)
    learner = SimpleNamespace(micro_batch=at_once, skips=skips)
    config = SimpleNamespace(seed=0, max_grad_norm=1e9)
    session = SimpleNamespace(
        config=config, policy=flow, ranks=One(), fits={"batch": at_once}, learner=learner, rewards=None
    )
    optimizer = torch.optim.SGD(flow.parameters(NAME), lr=credit.rate)
    return Bench(flow, rollout, StepRewards(credit, optimizer), session)


def test_an_adapter_that_changes_nothing_gives_nothing():
    b = bench(Implicit())
    assert b.process().shape == (8, T, 1, 1)
    assert b.process().eq(0).all()


def test_a_reward_is_a_log_density_ratio_and_all_add_up_to_that_of_the_trajectory():
    b = bench(Implicit(scale=3.0), shift=0.4)
    paths, process = b.rollout.paths, b.process()
    tree, total = paths.tree, torch.zeros(8)
    assert float(tree.std[0, -1]) == 0
    for k in range(T):
        if tree.std[0, k] == 0:
            assert process[:, k].eq(0).all()  # the last step draws nothing
            continue
        density = {}
        for name in (NAME, None):
            with b.flow.acting(name), torch.no_grad():
                v = b.flow.velocity(paths.x[:, k], tree.t[:, k], b.rollout.cond, tree.prompt)
            mean, std = paths.kernel.step(
                paths.x[:, k], v, tree.t[:, k], tree.t[:, k + 1], tree.noise[:, k], paths.t_max
            )
            density[name] = log_density(paths.x[:, k + 1], mean, std).mean((1, 2))
        expected = 3.0 * (density[NAME] - density[None])
        torch.testing.assert_close(process[:, k, 0, 0], expected, rtol=1e-4, atol=1e-5)
        total += expected
    torch.testing.assert_close(process.sum(1)[:, 0, 0], total, rtol=1e-4, atol=1e-5)


def test_the_mean_of_a_map_is_the_number():
    whole, cells = (bench(Implicit(grid=grid), shift=0.4).process() for grid in (None, (2, 4)))
    assert cells.shape[2:] == (2, 4)
    torch.testing.assert_close(cells.mean((2, 3)), whole[:, :, 0, 0])


@pytest.mark.parametrize(("acts", "sign"), [(NAME, 1), (None, -1)])
def test_its_mean_is_the_divergence(acts, sign):
    """Over trajectories of the adapter it is KL(adapter || base), over those of the base the negative of it."""
    b = bench(Implicit(scale=1.0), shift=1.0, starts=256, prompts=1, acts=acts)
    paths, process = b.rollout.paths, b.process()[:, 1, 0, 0]
    means = []
    for name in (NAME, None):
        with b.flow.acting(name), torch.no_grad():
            v = b.flow.velocity(paths.x[:, 1], paths.tree.t[:, 1], b.rollout.cond, paths.tree.prompt)
        means.append(paths.kernel.step(paths.x[:, 1], v, *paths.tree.t[:, 1:3].T, 0.7, paths.t_max))
    kl = float(gaussian_kl(means[0][0], means[1][0], means[0][1]).mean())
    assert kl > 0
    error = 5 * float(process.std()) / 16
    assert float(process.mean()) == pytest.approx(sign * kl, abs=error)
    assert error < kl  # so that the sign is known


def test_an_update_takes_the_gradient_of_whole_trajectories():
    credit = Implicit(scale=20.0, rate=0.1)
    b = bench(credit, shift=0.2)
    tree = b.rollout.paths.tree
    verdict = judged_as(tree, torch.tensor([1.0, 0.0, 1.0, 0.0, 0.3, 0.7, 0.2, float("nan")]))
    label = torch.tensor([1.0, 0.0, 1.0, 0.0, float("nan"), 1.0, 0.0, float("nan")])
    assert torch.equal(credit.outcomes(tree, verdict).nan_to_num(9), label.nan_to_num(9))

    steps = b.step_rewards.steps(b.run, b.rollout)
    with b.flow.acting(NAME):
        score = steps.spread(b.step_rewards._rewards(b.run, b.rollout, steps.rows), b.rollout.paths).sum((1, 2, 3))
    known = ~label.isnan()
    loss = F.binary_cross_entropy_with_logits(score[known], label[known], reduction="sum") / len(steps.rows)
    [gradient] = torch.autograd.grad(loss, b.flow.parameters(NAME))
    before, policy = b.flow.shifts[NAME].detach().clone(), b.flow.shift.detach().clone()
    b.step_rewards.learn(b.run, b.rollout, steps, verdict, 0)
    torch.testing.assert_close(b.flow.shifts[NAME].detach(), before - 0.1 * gradient, rtol=1e-4, atol=1e-6)
    assert torch.equal(b.flow.shift, policy)  # the policy is never the adapter that learns rewards
    assert b.flow.shift.grad is None


def test_the_loss_of_a_group_by_hand():
    """Advantages -1 and 1 of one prompt, of equal rewards none, and of a single reward none: with m the mean of
    advantage times score over a group, the loss of each of its members is log(1 + e^-m), and its slope in the score of
    one of G is -A (1 - sigmoid(m)) / G, of all losses together -A (1 - sigmoid(m))."""
    tree = sampled(PLAN, 6, 3).tree
    verdict = judged_as(tree, torch.tensor([0.0, 4.0, 2.0, 2.0, float("nan"), 7.0]))
    score = torch.tensor([-1.0, 2.0, 5.0, -5.0, 3.0, 3.0], requires_grad=True)
    loss = Implicit(form="preference").loss(score, tree, verdict)
    expected = [math.log1p(math.exp(-1.5))] * 2 + [math.log(2)] * 4
    torch.testing.assert_close(loss.detach(), torch.tensor(expected))
    [slope] = torch.autograd.grad(loss.sum(), score)
    part = 1 / (1 + math.exp(1.5))
    torch.testing.assert_close(slope, torch.tensor([part, -part, 0.0, 0.0, 0.0, 0.0]))


def test_a_component_may_be_the_outcome():
    tree = sampled(PLAN, 5).tree
    reward, given = torch.tensor([1.0, 2.0, 3.0, float("nan"), 5.0]), torch.tensor([0.25, 1.5, -0.5, 1.0, float("nan")])
    verdict = replace(judged_as(tree, reward), parts={"judge.right": given})
    credit, score = Implicit(label="judge.right"), torch.full((5,), 2.0)
    label = torch.tensor([0.25, 1.0, 0.0, float("nan"), float("nan")])
    torch.testing.assert_close(credit.outcomes(tree, verdict), label, equal_nan=True)
    right, wrong = math.log1p(math.exp(-2.0)), math.log1p(math.exp(2.0))
    expected = torch.tensor([0.25 * right + 0.75 * wrong, right, wrong, 0.0, 0.0])
    torch.testing.assert_close(credit.loss(score, tree, verdict), expected)


def test_it_learns_what_its_credit_measures():
    """Where a judge is shown finished images alone, its scores are the outcomes, and not their sum with the others."""
    b = bench(Implicit(scale=20.0), shift=0.2)
    tree = b.rollout.paths.tree
    ends, states = torch.tensor([1.0, 0, 1, 0, 1, 0, 1, 0]), torch.tensor([-9.0, 9] * 4)
    both = replace(judged_as(tree, ends + states), ends=torch.stack([states, ends], 1))
    shifts = []
    for verdict in (both, judged_as(tree, ends), judged_as(tree, ends + states)):
        with torch.no_grad():
            b.flow.shifts[NAME].fill_(0.2)
        b.step_rewards.learn(b.run, b.rollout, b.step_rewards.steps(b.run, b.rollout), verdict, 0)
        shifts.append(b.flow.shifts[NAME].detach().clone())
    assert torch.equal(shifts[0], shifts[1])
    assert not torch.allclose(shifts[0], shifts[2])


@pytest.mark.parametrize("form", ["outcome", "preference"])
def test_outcomes_alone_teach_which_trajectories_are_good(form):
    """Good images are bright: the adapter's shift rises, and its scores order trajectories that it was not trained
    on. With the true direction as its shift the correlation is 0.88: the starting noise, in which no score is,
    decides the rest."""
    b = bench(Implicit(scale=30.0, rate=3.0, updates=8, form=form), starts=128)
    reward = b.rollout.paths.finals.mean((1, 2, 3))
    steps, verdict = b.step_rewards.steps(b.run, b.rollout), judged_as(b.rollout.paths.tree, reward)
    statistics = b.step_rewards.learn(b.run, b.rollout, steps, verdict, 0)
    assert statistics["process/agrees"] > 0.6
    assert float(b.flow.shifts[NAME].detach().mean()) > 0.1
    b.rollout.paths = sampled(PLAN, 128, 2, seed=5)
    both = torch.stack([b.process().sum((1, 2, 3)), b.rollout.paths.finals.mean((1, 2, 3))])
    assert float(torch.corrcoef(both)[0, 1]) > 0.6


def test_routes_that_share_a_step_share_its_reward_and_its_slope():
    """Two routes part after the first step: the step is one row, with the slopes of both."""
    times, level = torch.tensor([1.0, 0.7, 0.4, 0.0]), 0.7
    table = plan_by_hand(times, torch.tensor([[level, level, 0.0]] * 2), torch.tensor([[0, 0, 0], [0, 1, 0]]))
    b = bench(Implicit(), shift=0.4, starts=2, prompts=1, plan=table)
    steps = b.step_rewards.steps(b.run, b.rollout)
    assert len(steps.rows) == 2 * 3
    process = b.process()[:, :, 0, 0]
    assert torch.equal(process[0, 0], process[1, 0])
    assert process[0, 1] != process[1, 1]


def test_advantages_by_hand():
    """Return to go among siblings at each step, plus the outcome's advantage."""
    tree = sampled(PLAN, 3).tree
    process = torch.zeros(3, T, 1, 1)
    process[:, :3, 0, 0] = torch.tensor([[1.0, 0, 2], [0, 1, 1], [2, 0, 0]])
    reward = torch.tensor([0.0, 1.0, 2.0])
    verdict = replace(judged_as(tree, reward), process=process)
    both = Implicit()(tree, verdict)[:, :, 0, 0]
    one = torch.zeros(3, dtype=torch.long)
    for k, to_go in enumerate(([3.0, 2, 2], [2.0, 2, 0], [2.0, 1, 0])):
        expected = normalise(torch.tensor(to_go), one) + normalise(reward, one)
        torch.testing.assert_close(both[:, k], expected)
    alone = Implicit(outcome=0.0)(tree, verdict)
    torch.testing.assert_close(alone[:, 3], torch.zeros(3, 1, 1))  # no noise, no reward of its own
    untrained = replace(verdict, process=torch.zeros_like(process))
    assert torch.equal(Implicit()(tree, untrained), Terminal()(tree, verdict))


def test_half_of_a_group_is_ahead():
    group = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 3])
    reward = torch.tensor([0.0, 1.0, 2.0, 1.0, 0.0, 0.0, 4.0, 4.0, float("nan")])
    label = ahead(reward, group)
    nan = float("nan")
    torch.testing.assert_close(label, torch.tensor([0.0, nan, 1, 1, 0, 0, nan, nan, nan]), equal_nan=True)


@pytest.mark.parametrize(
    ("settings_of", "message"),
    [
        ({"credit": {"type": "implicit", "process": 0.0}}, "process: 0"),
        ({"credit": {"type": "implicit", "label": "clip.cosine"}}, "clip.cosine"),
        ({"credit": {"type": "implicit", "label": "shapes.strict", "form": "preference"}}, "shapes.strict"),
        ({"credit": "implicit", "region": "shapes"}, "region"),
    ],
)
def test_what_cannot_act_is_refused(settings, settings_of, message):
    with pytest.raises(ValueError, match=message):
        configs.build(settings | settings_of, "test")


LEARNT = {"credit": {"type": "implicit", "grid": (2, 2)}, "plan": "sde", "iterations": 3, "eval_every": 0,
          "objective": {"type": "grpo", "beta": 0.1}, "checkpoint_every": 1}  # fmt: skip


def test_a_run_costs_what_was_estimated_and_resumes_to_the_bit(settings, tmp_path):
    whole = run(settings, **LEARNT, out=str(tmp_path / "whole"))
    figures = estimate.estimate(configs.build(settings | LEARNT, "test"))
    metrics = rows(whole / "metrics.jsonl")
    for count in estimate.COUNTS:
        assert [row[count] for row in metrics] == [figures["iteration"][count]] * 3
    assert any("no outcome" in note for note in figures["bounds"])
    assert all(0 <= row["process/agrees"] <= 1 for row in metrics if row["process/agrees"] is not None)
    cut = str(tmp_path / "cut")
    with cut_off(2):
        run(settings, **LEARNT, out=cut)
    again = run(settings, resume=True, **LEARNT, out=cut)
    for name in ("adapter", "reward", "reward_optimizer", "optimizer"):
        one, two = ((out / "checkpoints/000003" / f"{name}.safetensors").read_bytes() for out in (whole, again))
        assert one == two, name
    refuses_forgeries(open_session(configs.build(settings | LEARNT, "test")), whole / "checkpoints/000003", tmp_path)


def refuses_forgeries(session, saved, place):
    """Of the adapter and its moments, whose hashes are right: none is taken for what it says."""
    made = [("reward_optimizer", "no list", lambda p: corpus.restated(p, lambda s: s.pop("learnt_reward")))]
    for name in ("reward", "reward_optimizer"):
        [one, *_] = load_file(saved / f"{name}.safetensors").items()
        made += [(name, *each) for each in corpus.of_tensors(name, dict([one]))]
        made.append((name, "no file", lambda p, name=name: missing(p, name)))
    for number, (name, what, forge) in enumerate(made):
        out = place / f"forged{number}"
        forge(Path(shutil.copytree(saved, out / "checkpoints/000003")))
        with pytest.raises(BadInput) as error:
            saving.restore(session, out, lambda line: None)
        assert name in str(error.value), what
        assert "\n" not in str(error.value), what
    assert len(made) > 15


def missing(checkpoint, name):
    (checkpoint / f"{name}.safetensors").unlink()
    corpus.sealed(checkpoint)


def test_judgements_without_rewards_of_steps_are_refused():
    tree = sampled(PLAN, 2).tree
    with pytest.raises(ValueError, match="adapter gives"):
        Implicit()(tree, Judgement(torch.zeros(2, T + 1), {}))
