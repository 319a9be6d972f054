"""Regional credit, on the closed-form flow: what a map adds, where it adds nothing, and that learning stays there."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from trajectories import sampled

from mmalign.credit import CREDITS, Gain, Terminal
from mmalign.credit.groups import Units, normalise
from mmalign.credit.region import maps, regional
from mmalign.flow import plan as plans
from mmalign.flow.sample import sample
from mmalign.learn.loss import Clipped
from mmalign.learn.update import update
from mmalign.objectives.replay import Surrogate, transitions
from mmalign.policy.gaussian import GaussianFlow
from mmalign.sampling.kernels import FlowSde
from mmalign.seeds import gaussian, seed_of
from mmalign.training.microbatch import AdaptiveBatch
from mmalign.types import Judgement

TIMES = torch.linspace(1, 0, 6)
KERNEL = FlowSde(0.7)
CREDIT = {kind.type: kind() for kind in CREDITS if kind().learner is None}  # which has maps without regions
PLANS = {
    "terminal": plans.sde(TIMES, KERNEL),
    "value": plans.sde(TIMES, KERNEL),
    "gain": plans.complete(plans.sde(TIMES, KERNEL), range(5)),
    "branch": plans.branch(TIMES, KERNEL, [0, 2], 3),
    "renorm": plans.complete(plans.sde(TIMES, KERNEL), range(1, 5)),
    "prl": plans.sde(TIMES, KERNEL),
}


def judged(paths, grid=(2, 2), of=lambda x: x.mean((1, 2, 3))):
    """The same value for the whole image and for every position."""
    value = of(paths.finals)
    drawn = torch.arange(paths.tree.std.numel()).view_as(paths.tree.std).cos() * (paths.tree.std > 0)
    return Judgement(paths.tree.at_states(value), {}, value[:, None, None].repeat(1, *grid), log_ratio=drawn)


@pytest.mark.parametrize("name", CREDIT)
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_map_of_one_value_is_the_credit_of_the_whole(name, scale):
    paths = sampled(PLANS[name], 6, prompts=2)
    tree, report, credit = paths.tree, judged(paths), partial(CREDIT[name], units=Units(scale))
    whole = credit(tree, report)
    place = regional(tree, report, credit, whole=0.0, local=1.0)
    assert place.shape == (*tree.std.shape, 2, 2)
    torch.testing.assert_close(place, whole.expand_as(place), atol=1e-5, rtol=1e-4)
    both = regional(tree, report, credit, whole=1.0, local=0.5)
    torch.testing.assert_close(both, 1.5 * whole.expand_as(place), atol=1e-5, rtol=1e-4)
    assert torch.equal(regional(tree, report, credit), whole)


@pytest.mark.parametrize("name", CREDIT)
def test_the_gradient_of_a_map_of_one_value_is_the_scalars(name):
    shifts = []
    for local in (0.0, 1.0):
        flow = GaussianFlow()
        paths = sampled(PLANS[name], 6, prompts=1, flow=flow)
        report = judged(paths, (4, 4))
        advantage = regional(paths.tree, report, CREDIT[name], 1 - local, local)
        learn(flow, torch.optim.SGD(flow.parameters(), 1.0), paths, advantage)
        shifts.append(flow.shift.detach().clone())
    assert shifts[0].abs().max() > 1e-3
    torch.testing.assert_close(*shifts, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", CREDIT)
def test_a_place_without_an_opinion_has_the_whole_images_advantage(name):
    paths = sampled(PLANS[name], 6, prompts=2)
    report = judged(paths)
    report.regions[:, 0, 1] = torch.nan
    report.regions[1] = torch.nan
    tree, credit = paths.tree, CREDIT[name]
    result, whole = regional(tree, report, credit, 1.0, 1.0), credit(tree, report)
    torch.testing.assert_close(result[:, :, 0, 1], whole[:, :, 0, 0])
    assert not result.isnan().any()
    alone = regional(tree, report, credit, 0.0, 1.0)
    assert alone[:, :, 0, 1].eq(0).all()
    assert alone.ne(0).any()


def test_places_are_compared_over_the_whole_group_wherever_they_lie():
    values = torch.tensor([[[1.0, 3.0]], [[torch.nan, 5.0]], [[7.0, 7.0]]])
    group = torch.tensor([4, 4, 9])
    result = normalise(values, group, Units("none"))
    assert result.tolist() == [[[-2, 0]], [[0, 2]], [[0, 0]]]


def test_maps_gain_step_by_step_what_they_gain_in_all():
    paths = sampled(PLANS["gain"], 4, prompts=1)
    tree, value = paths.tree, torch.stack([paths.finals[:, 0], paths.finals[:, 1]]).mean(0)
    value[0, 0, 0] = torch.nan  # the completion of one state has no opinion there: 0 beside the others'
    report = Judgement(tree.at_states(value.mean((1, 2))), {}, value)
    result = maps(tree, report)
    assert not result.isnan().any()
    credit = Gain()(tree, replace(report, reward=result), Units("none", clip=1e9))
    gained = result[:, 1:] - result[:, :-1]
    stochastic = tree.std > 0
    for k in range(tree.steps):
        rows = stochastic[:, k]
        torch.testing.assert_close(credit[rows, k], gained[rows, k] - gained[rows, k].mean())


def test_a_failed_image_has_no_map_at_all():
    paths = sampled(PLANS["gain"], 4, prompts=1)
    report = judged(paths)
    report.regions[paths.tree.final[0, 2]] = torch.nan
    assert maps(paths.tree, report)[0, 2].isnan().all()


def test_a_scorer_without_a_map_is_refused():
    paths = sampled(PLANS["terminal"], 4)
    report = replace(judged(paths), regions=None)
    with pytest.raises(ValueError, match="regional credit needs a scorer with a map"):
        regional(paths.tree, report, Terminal(), 1.0, 1.0)


def learn(flow, optimizer, paths, advantage):
    replay = Surrogate(flow, flow.encode(["0.0"]), paths.kernel, paths.t_max, Clipped(1e-3))
    update(
        flow.parameters(), optimizer, transitions(paths, advantage), replay, epochs=1, minibatches=1,
        micro_batch=AdaptiveBatch(256), max_grad_norm=1e9, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip


def drawn(shape, *key):
    return gaussian(shape, seed_of("draw", *key))


def test_a_painted_square_grows_red_inside_and_nothing_changes_outside():
    """A judge that looks at the red of one square moves that square alone; a judge of the whole moves the rest too."""
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[2:5, 3:7] = True
    moved = {}
    for local in (1.0, 0.0):
        flow = GaussianFlow((3, 8, 8), spread=0.5)
        optimizer = torch.optim.SGD(flow.parameters(), 20.0)
        for iteration in range(12):
            start = torch.stack([gaussian(flow.latent_shape, seed_of(iteration, i)) for i in range(24)])
            draw = partial(drawn, flow.latent_shape, iteration)
            index = torch.zeros(24, dtype=torch.long)
            paths = sample(flow.velocity, start, flow.encode(["0.0"]), index, PLANS["terminal"], draw)
            red = paths.finals[:, 0]
            report = Judgement(paths.tree.at_states(red[:, inside].mean(1)), {}, torch.where(inside, red, torch.nan))
            learn(flow, optimizer, paths, regional(paths.tree, report, Terminal(), 1 - local, local))
        shift = flow.shift.detach()
        moved[local] = float(shift[0, inside].mean()), float(shift[:, ~inside].abs().mean())
    assert moved[1.0][0] > 0.05
    assert moved[1.0][1] < 0.05 * moved[1.0][0]
    assert moved[0.0][1] > 0.05 * moved[0.0][0]
