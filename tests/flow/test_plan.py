"""Plans as tables: completions, their lengths and their closed-form costs."""

import pytest
import torch
from trajectories import sampled

from mmalign.flow import plan as plans
from mmalign.policy.gaussian import GaussianFlow
from mmalign.sampling.kernels import Cps, Ddim, FlowSde, Scheduled
from mmalign.training.planning import noise_after
from mmalign.types import Plan

STOCK = torch.tensor([1.0, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0.0])  # of SD3.5
KERNEL = FlowSde(0.7)


def rollout(plan, starts=3, flow=None):
    return sampled(plan, starts, flow=flow)


def test_points_of_short_completions_are_the_papers():
    t = torch.linspace(1, 0, 8)  # seven steps remain
    at = lambda n: [7 - round(7 * float(x)) for x in plans.remaining(t, n)]  # noqa: E731
    assert at(7) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert at(1) == [0, 7]
    assert at(2) == [0, 4, 7]  # tau, floor(tau / 2), 0 steps left
    assert at(3) == [0, 3, 5, 7]
    finer = plans.remaining(STOCK, 20)
    assert torch.allclose(finer[::2], STOCK)
    assert torch.allclose(finer[1::2], (STOCK[1:] + STOCK[:-1]) / 2)


def test_dense_costs_ten_and_forty_five_forwards():
    """T = 10, all remaining steps, 24 images: 1,320 forwards, not 1,560: a completion starts from the velocity its
    state already has. The last step is deterministic, so the state before it is completed by the trajectory itself."""
    flow, t = GaussianFlow(), GaussianFlow().times(10)
    plan = plans.complete(plans.sde(t, KERNEL), range(10))
    assert plan.cost == (55, 10, 9, 9)
    paths = rollout(plan, 24, flow=flow)
    assert flow.counts["forwards"] == 1320
    assert len(paths.finals) == 240
    assert len(paths.x) == 24
    assert (paths.tree.final >= 0).all()


@pytest.mark.parametrize(("length", "forwards"), [(1, 10), (2, 10 + 9), (3, 10 + 9 + 8), (None, 10 + 45)])
def test_cost_of_capped_completions(length, forwards):
    """A completion of n steps costs n - 1 forwards; the last states have fewer steps left."""
    t = GaussianFlow().times(10)
    plan = plans.complete(plans.sde(t, KERNEL), range(10), length)
    flow = GaussianFlow()
    rollout(plan, 2, flow=flow)
    assert plan.cost[0] == forwards
    assert flow.counts["forwards"] == 2 * forwards


def test_branch_costs_and_images_in_closed_form():
    t, children = GaussianFlow().times(10), 6
    plan = plans.branch(t, KERNEL, range(9), children)
    assert plan.cost == (children * 45 + 9, children * 9, children * 9, 9)
    assert [4 * n for n in plan.cost] == [1116, 216, 216, 36]
    valued = plans.complete(plan, range(9))  # the trunk's own image stands for all its states
    assert valued.cost == (children * 45 + 10, children * 9 + 1, children * 9, 9)


def test_completing_from_noise_is_plain_ode_sampling():
    t = GaussianFlow().times(6)
    plan = plans.complete(plans.sde(t, KERNEL), [0])
    paths, plain = rollout(plan), rollout(plans.ode(t))
    assert torch.equal(paths.finals[paths.tree.final[:, 0]], plain.x[:, -1])


def test_one_step_completion_is_the_predicted_clean_latent():
    flow, t = GaussianFlow(), GaussianFlow().times(6)
    paths = rollout(plans.complete(plans.sde(t, KERNEL), range(6), 1))
    for k in range(6):
        x = paths.x[:, k]
        clean = x - t[k] * flow.velocity(x, t[k].expand(3), flow.encode(["0.0"]), paths.tree.prompt)
        assert torch.equal(paths.finals[paths.tree.final[:, k]], clean)


def test_completions_equal_completing_each_state_alone():
    """Different lengths in one batch change nothing but the time it takes."""
    flow, t = GaussianFlow(), GaussianFlow().times(6)
    paths = rollout(plans.complete(plans.sde(t, KERNEL), range(6)))
    for i in range(3):
        for k in range(6):
            x = paths.x[i : i + 1, k]
            for j in range(k, 6):
                x = x - (t[j] - t[j + 1]) * flow.velocity(x, t[j : j + 1], flow.encode(["0.0"]), paths.tree.prompt[:1])
            assert torch.allclose(paths.finals[paths.tree.final[i, k]], x[0], atol=1e-6)


def test_completing_states_changes_no_trajectory():
    t = GaussianFlow().times(6)
    bare = rollout(plans.sde(t, KERNEL))
    for length in (None, 1, 2, 9):
        completed = rollout(plans.complete(plans.sde(t, KERNEL), range(6), length))
        assert torch.equal(completed.x[:, :7], bare.x)
        assert torch.equal(completed.finals[completed.tree.final[:, -1]], bare.x[:, -1])


def test_finer_completions_come_nearer_to_the_exact_flow():
    """More steps where noise is high: the flow of Gaussian data is known, x_0 = x_1 here."""
    errors = []
    for n in (6, 12, 48):
        paths = rollout(plans.complete(plans.sde(GaussianFlow().times(6), KERNEL), [0], [n]))
        errors.append(float((paths.finals[paths.tree.final[:, 0]] - paths.x[:, 0]).abs().max()))
    assert errors[1] * 12 == pytest.approx(errors[0] * 6, rel=0.1)
    assert errors[2] * 48 == pytest.approx(errors[0] * 6, rel=0.1)  # the Euler error falls like 1 / n


def test_plans_of_different_windows_are_sampled_together_as_apart():
    t = GaussianFlow().times(6)
    early, late = (plans.complete(plans.window(t, KERNEL, k, k + 2), [k, k + 1, k + 2]) for k in (0, 3))
    both = rollout([early, late], 2)
    assert torch.equal((both.tree.std > 0).nonzero()[:, 1], torch.tensor([0, 1, 3, 4]))
    for i, plan in enumerate((early, late)):
        alone = rollout(plan, 2)
        assert torch.equal(both.x[i], alone.x[i])
        completed = alone.tree.final[i] >= 0
        assert torch.equal(both.tree.final[i] >= 0, completed)
        assert torch.equal(both.finals[both.tree.final[i, completed]], alone.finals[alone.tree.final[i, completed]])
    with pytest.raises(ValueError, match="must agree"):
        rollout([early, plans.ode(GaussianFlow().times(5))], 2)


def test_children_of_a_window_share_the_ode_before_it():
    flow, t = GaussianFlow(), GaussianFlow().times(10)
    plan = plans.window(t, KERNEL, 4, 6, children=3)
    paths = rollout(plan, 2, flow=flow)
    assert flow.counts["forwards"] == 2 * (5 + 3 * 5) == 2 * plan.cost[0]
    assert len(paths.x[:, 4].unique(dim=0)) == 2
    assert len(paths.x[:, 5].unique(dim=0)) == 6


def test_what_a_plan_refuses():
    t = torch.linspace(1, 0, 7)
    sde = plans.sde(t, KERNEL)
    with pytest.raises(ValueError, match="state 6 is outside the plan's 6 steps"):
        plans.complete(sde, [6])
    with pytest.raises(ValueError, match="at least one step"):
        plans.complete(sde, [0], 0)
    with pytest.raises(ValueError, match="3 noise levels for 6 steps"):
        plans.sde(t, Scheduled((0.1, 0.2, 0.3)))
    with pytest.raises(ValueError, match=r"noise must be positive at a stochastic step, got 0\.0 at step 2"):
        plans.window(t, Scheduled((0.1, 0.2, 0.0, 0.0, 0.0, 0.0)), 0, 3)
    other = plans.complete(sde, [1])
    wrong = other.finished_by.clone()
    wrong[0, 2] = other.finished_by[0, 1]  # leaves the trajectory a step before the state it is to complete
    with pytest.raises(ValueError, match="route 1 does not complete state 2 of route 0"):
        Plan(other.kernel, other.t, other.noise, other.draw, other.t_max, wrong)


def test_noise_left_by_the_stock_schedules_dangerous_step():
    """From t = 0.278 to 0.0089 in one step: 27 times too much noise with flow_sde, the right amount with ddim
    and cps."""
    for kernel, factor in ((KERNEL, 26.9), (Ddim(1.0), 1.0), (Cps(0.8), 1.0)):
        left = noise_after(kernel, STOCK, kernel.noise, 8)[0] / float(STOCK[9])
        assert left == pytest.approx(factor, rel=0.01)
    assert noise_after(KERNEL, STOCK, 0.7, 0)[0] / float(STOCK[1]) == pytest.approx(1.04, abs=0.01)


@pytest.mark.parametrize(("steps", "children"), [((0, 2), 3), ((1, 3, 4), 2), ((2,), 4)])
def test_a_trees_cost_and_leaves_in_closed_form(steps, children):
    """Of T = 8: a step is evaluated in each of the states that the branchings before it have made."""
    flow, t = GaussianFlow(), GaussianFlow().times(8)
    plan = plans.tree(t, KERNEL, steps, children)
    forwards = sum(children ** sum(k < step for k in steps) for step in range(8))
    edges = sum(children**level for level in range(1, len(steps) + 1))
    assert plan.cost == (forwards, children ** len(steps), edges, edges // children)
    paths = rollout(plan, 2, flow=flow)
    assert flow.counts["forwards"] == 2 * forwards
    assert len(paths.finals) == len(paths.finals.flatten(1).unique(dim=0)) == 2 * children ** len(steps)
    assert paths.tree.final[:, -1].tolist() == list(range(2 * children ** len(steps)))


def test_a_tree_of_one_step_is_a_branch_to_the_bit():
    t = GaussianFlow().times(6)
    one, other = rollout(plans.tree(t, KERNEL, [1], 3)), rollout(plans.branch(t, KERNEL, [1], 3))
    for name in ("x", "mean", "finals"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    for name, column in vars(one.tree).items():
        assert torch.equal(column, getattr(other.tree, name)), name


def test_a_tree_is_refused_without_steps_or_with_one_twice():
    for steps in ((), (1, 1)):
        with pytest.raises(ValueError, match="a tree needs at least one step, each once"):
            plans.tree(GaussianFlow().times(6), KERNEL, steps, 2)
