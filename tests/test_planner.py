"""Windows that move, states that are needed, and budgets that are kept."""

from dataclasses import replace

import pytest
import torch

from mmalign.config import load as configs
from mmalign.errors import BadInput
from mmalign.training import planning as planner

TIMES = torch.linspace(1, 0, 11)
DENSE = dict(plan="sde", credit="gain", seeds=24, prompts_per_iteration=1)
BRANCH = dict(plan=dict(type="branch", steps=list(range(9)), children=6), seeds=4, prompts_per_iteration=1)
BETA = {"type": "grpo", "beta": 0.1}
FLOW_SDE = {"type": "flow_sde", "noise": 0.7}


def config(**changed):
    return configs.build(dict(steps=10, kernel=FLOW_SDE) | changed, "test")


def fit(c):
    return planner.fit(c, TIMES, c.guidance > 1)


def test_costs_are_the_closed_forms():
    """T = 10: 24 images of one prompt (DenseGRPO), four seeds of six children at nine steps (TempFlow-GRPO)."""
    dense, branch = fit(config(**DENSE))[1], fit(config(**BRANCH))[1]
    assert (dense.rollout, dense.replay, dense.rewards) == (1320, 216, 240)
    assert (branch.rollout, branch.replay, branch.rewards) == (1116, 36, 216)
    plain = fit(config(plan="sde", credit="terminal", seeds=24, prompts_per_iteration=1))[1]
    assert (plain.rollout, plain.replay, plain.rewards) == (240, 216, 24)
    doubled = fit(
        config(**DENSE, guidance=4.5, objective=BETA, epochs=2, rewards={"shapes.strict": 1, "clip.cosine": 1})
    )[1]
    assert (doubled.rollout, doubled.replay, doubled.rewards) == (2640, 216 * 2 * 2 * 2, 480)


@pytest.mark.parametrize("forwards", [1535, 1200, 700, 480])
def test_a_dense_budget_is_kept_by_shorter_completions_then_fewer_states(forwards):
    c, spent = fit(config(**DENSE, max_forwards=forwards))
    assert spent.forwards <= forwards
    if c.credit.states == "all":
        assert c.credit.completion >= 2
        longer = c.model_copy(update={"credit": replace(c.credit, completion=c.credit.completion + 1)})
        assert planner.cost(longer, TIMES, False).forwards > forwards
    else:
        assert c.credit.states[0] == 0
    assert (c.credit.states == "all") == (forwards > 700 - 1)


def test_a_reward_budget_thins_states_alone():
    c, spent = fit(config(**DENSE, max_rewards=100))
    assert spent.rewards <= 100
    assert c.credit.completion is None
    assert c.credit.states[0] == 0


def test_a_branch_budget_drops_late_steps_first():
    c, spent = fit(config(**BRANCH, max_rewards=100))
    assert c.plan.steps == (0, 1, 2, 3)
    assert spent.rewards == 96
    c, spent = fit(config(**BRANCH, max_rewards=12))
    assert (c.plan.steps, c.plan.children, spent.rewards) == ((0,), 3, 12)


def test_an_impossible_budget_is_refused_with_the_least_there_is():
    with pytest.raises(BadInput, match=r"takes 456 forwards and 24 rewards an iteration, allowed are 400 and any"):
        fit(config(plan="sde", credit="terminal", seeds=24, prompts_per_iteration=1, max_forwards=400))


def window(total=10, seeds=2, credit="terminal", **plan):
    return config(plan=dict(type="window", **plan), steps=total, seeds=seeds, credit=credit)


def test_progressive_windows_come_round():
    c = window(moves="progressive", every=5)
    assert [planner.position_of(c, i, 0) for i in (0, 4, 5, 34, 35, 39, 40)] == [0, 0, 1, 6, 7, 7, 0]


def test_random_windows_belong_to_groups_and_stay_in_the_first_half():
    c = window(moves="random")
    starts = {(i, p): planner.position_of(c, i, p) for i in range(20) for p in range(20)}
    assert set(starts.values()) == set(range(4))
    assert starts == {key: planner.position_of(c, *key) for key in starts}
    assert len({starts[0, p] for p in range(20)}) > 1
    assert planner.position_of(window(), 7, 3) == 0


@pytest.mark.parametrize(
    ("total", "first", "size", "starts"),
    [(10, 0, 2, range(4)), (10, 0, 1, range(5)), (10, 1, 1, range(1, 5)), (10, 0, 3, range(3)), (9, 0, 2, range(3)),
     (10, 3, 2, range(3, 4)), (10, 0, 5, range(1)), (10, 0, 7, range(1)), (10, 6, 2, range(6, 7)), (3, 0, 1, range(1))],
)  # fmt: skip
def test_a_random_window_lies_in_the_first_half_or_stays(total, first, size, starts):
    c = window(total, steps=(first, first + size), moves="random")
    assert c.plan.positions(c.steps) == starts


def test_the_cost_of_a_moving_window_is_its_dearest_place():
    shared = window(children=4, seeds=1, moves="random")
    assert planner.cost(shared, TIMES, False).rollout == shared.prompts_per_iteration * (1 + 9 * 4)
    moved = window(children=4, seeds=1, steps=(5, 7), moves="progressive")
    assert planner.cost(moved, TIMES, False).rollout == moved.prompts_per_iteration * (6 + 4 * 4)
    late = window(children=4, seeds=1, steps=(7, 9))
    assert planner.cost(late, TIMES, False).rollout == late.prompts_per_iteration * (8 + 2 * 4)


def test_needed_states_enclose_the_stochastic_steps():
    c = window(steps=(2, 4), credit="gain")
    plan = planner.plan_for(c, TIMES, 2)
    assert (plan.finished_by[0] >= 0).nonzero()[:, 0].tolist() == [2, 3, 4, 10]


def test_a_step_that_spoils_images_is_refused():
    stock = torch.tensor([1.0, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0.0])
    c = config(plan="sde", credit="terminal", seeds=2)
    with pytest.raises(BadInput, match=r"step 8, from t = 0\.278 to 0\.0089, would leave 27\.0 times the noise"):
        planner.check_noise(c, stock)
    planner.check_noise(c, TIMES)
    planner.check_noise(window(steps=(0, 8)), stock)
    with pytest.raises(BadInput, match="step 8"):
        planner.check_noise(window(moves="progressive", every=9), stock)
    ddim = config(plan="sde", credit="terminal", seeds=2, kernel={"type": "ddim", "noise": 1.0})
    planner.check_noise(ddim, stock)


def test_what_is_said_of_a_plan():
    message = planner.describe(*fit(config(**DENSE, max_rewards=100)))
    assert message.startswith("plan sde, kernel flow_sde (noise 0.7), credit gain (states 0 3 6 9, ")
