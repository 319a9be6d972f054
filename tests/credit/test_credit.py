"""Group statistics and credits on hand-made trajectories."""

from dataclasses import replace

import pytest
import torch
from trajectories import judged, judged_as, plan_by_hand, sampled

from mmalign.config.schema import Config
from mmalign.credit import Branch, Gain, Terminal
from mmalign.credit.groups import Units, dead, group_mean, group_std, normalise
from mmalign.flow import plan as plans
from mmalign.objectives.advantage import Advantage
from mmalign.sampling.kernels import FlowSde

NAN = float("nan")
KERNEL = FlowSde(0.7)
GROUP = torch.tensor([7, 7, 7, 3, 3, 3])


def test_means_and_spreads_are_the_groups_own():
    values = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, NAN])
    assert group_mean(values, GROUP).tolist() == [3.0, 3.0, 3.0, 5.0, 5.0, 5.0]
    assert group_std(values, GROUP)[0].item() == pytest.approx(torch.tensor([1.0, 2.0, 6.0]).std(correction=0).item())
    assert dead(values, GROUP).tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_constant_or_single_groups_give_zero(scale):
    advantage = normalise(torch.tensor([0.3, 0.3, 0.3, NAN, NAN, 4.0]), GROUP, Units(scale))
    assert advantage.eq(0).all()


def test_a_floor_for_each_group_leaves_noise_small():
    values, floor = torch.tensor([0.0, 0.1, 0.2, 0.0, 0.1, 0.2]), torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    advantage = normalise(values, GROUP, Units(floor=floor))
    assert torch.allclose(advantage[:3], torch.tensor([-0.1, 0.0, 0.1]))
    assert torch.equal(advantage[3:], normalise(values, GROUP)[3:])
    maps = normalise(values[:, None].expand(6, 2), GROUP, Units(floor=floor))
    assert torch.allclose(maps[:3], torch.tensor([-0.1, 0.0, 0.1])[:, None].expand(3, 2))


@pytest.mark.parametrize("credit", [Terminal(), Gain(), Branch("prompt")])
def test_a_measured_floor_is_the_noise_of_a_group(credit):
    """Where the judge is sure, nothing changes; where it varies by far more than siblings, differences stay small."""
    plan = plans.complete(plans.sde(torch.linspace(1, 0, 5), KERNEL), [*range(4)])
    paths = sampled(plan, starts=6, prompts=2)
    error = torch.tensor([0.0, 0.0, 0.0, 30.0, 40.0, NAN])
    scored = replace(judged(paths, lambda x: x.mean((1, 2, 3))), parts={"voted.share_error": error})
    floored, plain, raw = (
        Advantage(floor=floor, scale=scale)(paths.tree, scored, credit, None, 0.0)
        for floor, scale in (("voted.share_error", "group"), (0.0, "group"), (0.0, "none"))
    )
    assert torch.equal(floored[:3], plain[:3])
    assert plain[3:].count_nonzero() > 0
    assert torch.allclose(floored[3:], raw[3:] / 1250**0.5)  # the root mean square of 30 and 40


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_failed_score_touches_nobody_else(scale):
    values = torch.tensor([1.0, 2.0, NAN, 0.0, 1.0, 0.5])
    advantage = normalise(values, GROUP, Units(scale))
    alone = normalise(values[[0, 1, 3, 4, 5]], GROUP[[0, 1, 3, 4, 5]], Units(scale))
    assert advantage[2] == 0
    assert torch.equal(advantage[[0, 1, 3, 4, 5]], alone)


def test_invariances():
    torch.manual_seed(0)
    values = torch.randn(6)
    advantage = normalise(values, GROUP)
    assert torch.allclose(normalise(values + 3, GROUP), advantage, atol=1e-5)
    assert torch.allclose(normalise(values * 5, GROUP), advantage, atol=1e-5)
    order = torch.randperm(6)
    assert torch.allclose(normalise(values[order], GROUP[order]), advantage[order], atol=1e-6)
    assert torch.allclose(group_mean(advantage, GROUP), torch.zeros(6), atol=1e-6)
    assert torch.allclose(group_std(advantage, GROUP), torch.ones(6), atol=1e-5)
    assert torch.allclose(
        normalise(values * 5, GROUP, Units("none")), 5 * normalise(values, GROUP, Units("none")), atol=1e-5
    )
    assert normalise(torch.tensor([0.0] * 99 + [1.0]), torch.zeros(100, dtype=torch.long)).max() == 5  # clamped


def test_groups_never_mix():
    values = torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0, 30.0])
    other = torch.tensor([1.0, 2.0, 3.0, -7.0, 0.0, 400.0])
    assert torch.equal(normalise(values, GROUP)[:3], normalise(other, GROUP)[:3])


def test_terminal_repeats_one_advantage_over_steps():
    tree = sampled(plans.sde(torch.linspace(1, 0, 5), KERNEL), starts=6, prompts=2).tree
    reward = torch.tensor([1.0, 2.0, 3.0, 5.0, 5.0, 5.0])
    advantage = Terminal()(tree, judged_as(tree, reward))
    assert advantage.shape == (6, 4, 1, 1)
    assert torch.equal(advantage[:, :, 0, 0], normalise(reward, tree.prompt)[:, None].expand(6, 4))


def test_branch_with_prompt_baseline_on_a_plain_plan_is_terminal():
    tree = sampled(plans.sde(torch.linspace(1, 0, 5), KERNEL), starts=6, prompts=2).tree
    judged = judged_as(tree, torch.randn(6))
    terminal, branch = Terminal()(tree, judged), Branch("prompt")(tree, judged)
    assert torch.equal(branch[:, :3], terminal[:, :3])
    assert branch[:, 3].eq(0).all()  # the last step is deterministic


def test_branch_compares_children_of_one_state():
    """Two seeds, branching at steps 0 and 2 with three children: each (seed, step) is a group of its own."""
    tree = sampled(plans.branch(torch.linspace(1, 0, 6), KERNEL, [0, 2], 3), starts=2).tree
    reward = torch.tensor([1.0, 2, 3, 10, 20, 60, 5, 5, 5, 0, 0, 1])
    advantage = Branch()(tree, judged_as(tree, reward), Units("none"))[:, :, 0, 0]
    assert advantage.count_nonzero(dim=0).tolist() == [2, 0, 6, 0, 0]
    assert advantage[:3, 0].tolist() == [-1, 0, 1]
    assert torch.allclose(advantage[3:6, 2], torch.tensor([-20.0, -10, 30]))
    assert advantage[6:9].eq(0).all()
    prompt = Branch("prompt")(tree, judged_as(tree, reward), Units("none"))[:, :, 0, 0]
    at_zero = reward[[0, 1, 2, 6, 7, 8]]
    assert torch.allclose(prompt[[0, 1, 2, 6, 7, 8], 0], at_zero - at_zero.mean())


def test_value_of_a_shared_state_is_the_mean_below_it():
    """A two-level tree by hand: the first step is credited with the mean of its leaves."""
    t = torch.linspace(1, 0, 5)
    noise = torch.zeros(4, 4)
    noise[:, :2] = 0.7
    draw = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]])
    tree = sampled(plan_by_hand(t, noise, draw), starts=1).tree
    assert [len(tree.node[:, k].unique()) for k in range(5)] == [1, 2, 4, 4, 4]
    advantage = Branch()(tree, judged_as(tree, torch.tensor([0.0, 1.0, 2.0, 4.0])), Units("none"))[..., 0, 0]
    assert advantage[:, 0].tolist() == [-1.25, -1.25, 1.25, 1.25]
    assert advantage[:, 1].tolist() == [-0.5, 0.5, -1.0, 1.0]
    assert advantage[:, 2:].eq(0).all()


def test_edges_of_a_tree_add_up_to_the_reward_less_the_value_of_the_start():
    """Of two starts; siblings' advantages add up to 0, those of a path to how far its image is above the mean."""
    tree = sampled(plans.tree(torch.linspace(1, 0, 7), KERNEL, [0, 2, 3], 3), starts=2).tree
    reward = torch.randn(54, generator=torch.Generator().manual_seed(0))
    advantage = Branch()(tree, judged_as(tree, reward), Units("none"))[..., 0, 0]
    for k in (0, 2, 3):
        for node in tree.node[:, k].unique():
            assert advantage[tree.node[:, k] == node, k].sum().abs() < 1e-5
    start = torch.stack([reward[:27].mean(), reward[27:].mean()]).repeat_interleave(27)
    assert torch.allclose(advantage.sum(1), reward - start, atol=1e-5)


def test_each_child_counts_once_however_many_images_are_below_it():
    """Of three children one has two images, of mean 4: values 1, 4 and 1 have mean 2, not 2.5."""
    noise, draw = torch.zeros(4, 4), torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [2, 0, 0, 0]])
    noise[:, :2] = 0.7
    tree = sampled(plan_by_hand(torch.linspace(1, 0, 5), noise, draw), starts=1).tree
    advantage = Branch()(tree, judged_as(tree, torch.tensor([1.0, 3, 5, 1])), Units("none"))[..., 0, 0]
    assert advantage[:, 0].tolist() == [-1, 2, 2, -1]
    assert advantage[:, 1].tolist() == [0, -1, 1, 0]


def test_seeds_may_be_permuted():
    plan = plans.branch(torch.linspace(1, 0, 6), KERNEL, [0, 2], 3)
    tree = sampled(plan, starts=2).tree
    reward = torch.randn(12)
    swap = torch.cat([torch.arange(6, 12), torch.arange(6)])
    rows = ("std", "t", "noise", "node", "prompt", "member", "final")
    moved = replace(tree, **{name: getattr(tree, name)[swap] for name in rows})
    for baseline in ("state", "prompt"):
        one = Branch(baseline)(tree, judged_as(tree, reward))
        two = Branch(baseline)(moved, judged_as(moved, reward[swap]))
        assert torch.allclose(one[swap], two, atol=1e-6)


def test_unknown_choices_are_named():
    with pytest.raises(ValueError, match="baseline: Input should be 'state' or 'prompt', got \"seed\""):
        Config(credit={"type": "branch", "baseline": "seed"})
