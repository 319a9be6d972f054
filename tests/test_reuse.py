"""An update from the rollout's own forwards: the gradient of a replay, without its forwards."""

from dataclasses import replace

import pytest
import torch
from run_config import rows, run

from mmalign import train
from mmalign.checks.estimate import estimate
from mmalign.config import load as configs
from mmalign.errors import BadInput
from mmalign.training.setup import open_session

STEPS = {
    "rewards": {"smooth:Smooth.red": 1.0}, "plan": "sde", "credit": "terminal", "seeds": 3, "held_out": None,
    "max_grad_norm": 1e6, "checkpoint_every": 4, "eval_every": 0,
}  # fmt: skip
PLANS = {
    "sde, in small batches and parts": {"batch": 2, "micro_batch": 3, "rollout_parts": 2},
    "window": {"plan": {"type": "window", "steps": [1, 2]}},
    "branches": {"plan": {"type": "branch", "steps": [0, 1], "children": 2}, "credit": "branch"},
    "guidance": {"guidance": 3.0},
    "a selection": {"select": {"type": "extremes", "keep": 2}},
}


def moved(session):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in session.policy.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("name", PLANS)
def test_gradients_are_those_of_a_replay(settings, name):
    session = open_session(configs.build(settings | STEPS | PLANS[name] | {"reuse": True}, "test"))
    moved(session)
    policy, prompts = session.policy, session.prompts(0)
    batch, _ = train.from_rollout(session, prompts, 0, None)
    learner = replace(session.learner, optimizer=torch.optim.SGD(policy.parameters(), lr=0.0))
    with policy.reference():  # as scorers do in between
        assert not any(p.requires_grad for p in policy.parameters())

    def gradients(batch):
        before = policy.counts["forwards"]
        statistics = learner.update(batch, prompts, 0)
        return [p.grad for p in policy.parameters()], policy.counts["forwards"] - before, statistics

    reused, none, statistics = gradients(batch)
    replayed, forwards, plain = gradients(replace(batch, rows=replace(batch.rows, v=None), at_once=False))
    assert forwards > none == 0
    assert [g is None for g in reused] == [g is None for g in replayed]
    off = sum(float((a - b).square().sum()) for a, b in zip(reused, replayed, strict=True) if a is not None) ** 0.5
    assert off < 1e-5 * statistics["grad_norm"] > 0  # rounding: the forwards were in other batches
    assert statistics["ratio"] == 1
    assert statistics["log_ratio"] == 0
    assert {*statistics} == {*plain}
    assert all(statistics[each] == pytest.approx(plain[each], rel=1e-4, abs=1e-5) for each in plain)


def test_a_run_takes_no_replay_forwards_and_its_estimate_says_so(settings):
    settings = settings | STEPS | {"reuse": True, "iterations": 2, "watch": []}
    metrics, figures = rows(run(settings) / "metrics.jsonl"), estimate(configs.build(settings, "test"))
    without = estimate(configs.build(settings | {"reuse": False}, "test"))
    for row in metrics:
        assert row["replay_forwards"] == figures["iteration"]["replay_forwards"] == 0
        assert row["forwards"] == figures["iteration"]["forwards"] == without["iteration"]["forwards"]
        assert row["transitions"] == figures["iteration"]["transitions"] == 2 * 3 * 3
    held = figures["memory"]["device"]["replay"], without["memory"]["device"]["replay"]
    assert held[0] == held[1]  # a micro-batch had room for all rows
    few = settings | {"micro_batch": 2}
    held = (estimate(configs.build(few | {"reuse": of}, "test"))["memory"]["device"]["replay"] for of in (True, False))
    assert next(held) == 9 * next(held)


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"minibatches": 2}, "minibatches"),
        ({"epochs": 2}, "epochs"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing"),
        ({"objective": {"type": "grpo", "beta": 0.1}}, "beta"),
        ({"max_kl": 0.1}, "max_kl"),
        ({"credit": "gain"}, "gain"),
        ({"credit": "value"}, "credit"),
        ({"plan": "ode", "objective": "nft", "credit": None}, "nft"),
    ],
)
def test_what_needs_other_forwards_is_refused(settings, changed, what):
    with pytest.raises(BadInput, match=f"reuse.*{what}"):
        configs.build(settings | STEPS | {"reuse": True} | changed, "test")
