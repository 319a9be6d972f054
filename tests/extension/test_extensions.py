"""Extensions by hand: what they draw again, and what they keep."""

from dataclasses import replace

import pytest
import torch
from trajectories import judged_as, sampled

from mmalign.config.schema import Config
from mmalign.extension import Frontier, Revise, Salvage
from mmalign.flow import plan as plans
from mmalign.sampling.kernels import FlowSde
from mmalign.types import Judgement

TIMES, KERNEL = torch.linspace(1, 0, 6), FlowSde(0.7)
NAN = torch.nan


def valued(*rows):
    """Trajectories of four noisy steps of one prompt, with the values of all their states."""
    table = torch.tensor(rows)
    plan = plans.complete(plans.sde(TIMES, KERNEL), [0, 1, 2, 3])
    return sampled(plan, len(rows)).tree, Judgement(table, {})


def test_salvage_cuts_the_worst_before_their_first_fall():
    tree, judged = valued(
        [0.5, 0.6, 0.7, 0.8, 0.9, 0.9],  # good
        [0.5, 0.5, 0.45, 0.1, 0.2, 0.2],  # falls at step 2; 0.05 at step 1 is not enough
        [0.5, 0.2, 0.3, 0.0, 0.0, 0.0],  # falls at steps 0 and 2
        [0.3, 0.3, 0.3, 0.3, 0.3, 0.3],  # bad, and never fell
        [0.5, 0.5, 0.5, NAN, 0.1, 0.1],  # falls where a score failed: nowhere
    )
    assert Salvage(drop=0.1, per_group=2)(tree, judged, []) == ([2, 1], [0, 2], None)
    assert Salvage(drop=0.1, per_group=1)(tree, judged, []) == ([2], [0], None)
    assert Salvage(drop=0.32, per_group=2)(tree, judged, []) == ([1], [2], None)


def test_salvage_never_cuts_at_a_step_without_noise():
    """A short completion may judge the last state before the image worse than it is: only steps that drew are cut."""
    plan = plans.complete(plans.window(TIMES, KERNEL, 0, 1), [0, 1, 2])
    tree = sampled(plan, 2).tree
    judged = Judgement(torch.tensor([[0.5, 0.5, 0.5, 0.1, 0.1, 0.1], [0.5, 0.9, 0.9, 0.9, 0.9, 0.9]]), {})
    assert Salvage()(tree, judged, []).row == []


def test_salvage_compares_the_rewards_that_all_states_have():
    """What a judge of finished images alone gives does not make the last step a fall."""
    tree, judged = valued([0.5, 0.5, 0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.3, 0.4, 0.4, 0.4])
    last, alone = judged.reward[:, -1].clone(), torch.tensor([0.0, -0.9])
    judged.reward[:, -1] += alone
    both = replace(judged, ends=torch.stack([last, alone], 1))
    assert Salvage(drop=0.1)(tree, both, []) == ([1], [1], None)
    assert Salvage(drop=0.3)(tree, both, []).row == []


def test_what_salvage_keeps_has_gained():
    new, before, best = torch.tensor([0.5, 0.25, 0.25, NAN]), torch.full((4,), 0.25), torch.ones(4)
    assert Salvage().accepted(new, before, best).tolist() == [True, False, False, False]
    assert Salvage(gain=0.25).accepted(new, before, best).tolist() == [False] * 4


def test_revision_draws_the_best_image_of_a_group_that_has_no_good_one():
    """Four groups: one with a good image, one without, one whose critic has no request, one without any score."""
    tree = sampled(plans.sde(TIMES, KERNEL), 8, prompts=4).tree
    judged = judged_as(tree, torch.tensor([0.2, 1.0, 0.1, 0.6, 0.3, 0.2, NAN, NAN]))
    requests = ["a", "b", "c", "two red circles", "", "d", "e", "f"]
    assert Revise()(tree, judged, requests) == ([3], [0], ["two red circles"])
    assert Revise(good=2.0)(tree, judged, requests) == ([1, 3], [0, 0], ["b", "two red circles"])


def test_a_revision_is_kept_only_above_the_best():
    new, before, best = torch.tensor([0.7, 0.6, NAN]), torch.full((3,), 0.1), torch.full((3,), 0.6)
    assert Revise().accepted(new, before, best).tolist() == [True, False, False]


def of_window(reward):
    """One start; two children of its first step, which continue with noise at steps 1 and 2."""
    tree = sampled(plans.window(TIMES, KERNEL, 0, 3, 2), 1).tree
    return tree, judged_as(tree, torch.tensor(reward))


def test_a_frontier_expands_the_states_of_most_promise():
    """Of the states 1 and 2 of both trajectories, by value, by depth, and within the budget of images."""
    tree, judged = of_window([0.0, 1.0])
    by_value = Frontier(leaves=9, expand=2, children=3, depth=0.0)
    assert by_value(tree, judged, []) == ([1, 1, 1, 1], [1, 1, 2, 2], None)
    by_depth = Frontier(leaves=9, expand=2, children=2, value=0.0, spread=0.0, depth=1.0)
    assert by_depth(tree, judged, []) == ([0, 1], [2, 2], None)
    assert Frontier(leaves=3, expand=2, children=3)(tree, judged, []).row == [1]
    assert Frontier(leaves=2, expand=2, children=3)(tree, judged, []).row == []


@pytest.mark.parametrize("rewards", [[0.3, 0.3], [21.7, 21.700001907348633], [0.3, NAN]])
def test_of_equal_rewards_a_frontier_takes_the_deepest(rewards):
    """Nothing is made of the rounding of scores; a state above a missing one comes last."""
    tree, judged = of_window(rewards)
    deep = Frontier(leaves=9, expand=2, children=2, value=5.0, spread=0.0, depth=0.25)
    expected = ([0, 0], [2, 1], None) if rewards[1] != rewards[1] else ([0, 1], [2, 2], None)
    assert deep(tree, judged, []) == expected
    assert Frontier(leaves=9)(tree, judged_as(tree, torch.full((2,), NAN)), []).row != []


def test_prompts_have_frontiers_of_their_own():
    plan = plans.window(TIMES, KERNEL, 0, 3, 2)
    tree, judged = (each := sampled(plan, 2, prompts=2).tree), judged_as(each, torch.tensor([0.0, 1.0, 9.0, 7.0]))
    some = Frontier(leaves=4, expand=1, children=2, depth=0.0)(tree, judged, [])
    assert some == ([1, 2], [1, 1], None)


def test_a_frontier_leaves_states_that_have_children_and_prefers_where_images_differ():
    tree = sampled(plans.tree(TIMES, KERNEL, [0, 1], 2), 1).tree
    assert Frontier(leaves=9)(tree, judged_as(tree, torch.arange(4.0)), []).row == []
    starts = sampled(plans.window(TIMES, KERNEL, 0, 2, 2), 2).tree
    judged = judged_as(starts, torch.tensor([0.5, 0.5, 0.0, 1.0]))  # the children of one start differ
    some = Frontier(leaves=9, expand=2, children=2, value=0.0, spread=1.0, depth=0.0)(starts, judged, [])
    assert some == ([2, 3], [1, 1], None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extend": "salvage"}, "extend: salvage needs the values of states, which credit: gain has completed"),
        ({"extend": "revise"}, "extend: revise draws a trajectory whose states no other has"),
        ({"extend": "frontier"}, "extend: frontier finds no state with a single child"),
        ({"extend": {"type": "frontier", "leaves": 2}, "plan": "sde", "credit": "terminal", "seeds": 3}, "leaves: 2"),
        ({"extend": {"type": "salvage", "drop": -1.0}}, "drop: Input should be greater than or equal to 0"),
        ({"extend": "frontier", "objective": "nft", "plan": "ode", "seeds": 4}, "extend adds stochastic steps"),
        ({"extend": "salvag"}, "no extension called 'salvag', did you mean 'salvage'"),
    ],
)
def test_what_an_extension_cannot_do_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Config(**change)
