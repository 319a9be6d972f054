"""Credit by place, on the closed-form flow: what a map adds, where it adds nothing, and that learning stays there."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from trajectories import walk

from mmalign.credit import CREDITS
from mmalign.credit.groups import Units, normalise
from mmalign.credit.region import by_place, maps
from mmalign.flow import plan as plans
from mmalign.flow.sample import sample
from mmalign.learn.update import surrogate, transitions, update
from mmalign.policy.gaussian import GaussianFlow
from mmalign.seeds import gaussian, seed_of
from mmalign.training.microbatch import Fit
from mmalign.types import Judgement

TIMES = torch.linspace(1, 0, 6)
PLANS = {
    "terminal": plans.sde(TIMES, "flow_sde", 0.7),
    "gain": plans.complete(plans.sde(TIMES, "flow_sde", 0.7), range(5)),
    "branch": plans.branch(TIMES, "flow_sde", 0.7, [0, 2], 3),
}


def judged(paths, grid=(2, 2), of=lambda x: x.mean((1, 2, 3))):
    """The same value for the whole and for every place."""
    value = of(paths.ends)
    return Judgement(paths.at_states(value), {}, value[:, None, None].repeat(1, *grid))


@pytest.mark.parametrize("name", CREDITS)
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_map_of_one_value_is_the_credit_of_the_whole(name, scale):
    paths = walk(PLANS[name], 6, prompts=2)
    report, credit = judged(paths), partial(CREDITS[name], units=Units(scale))
    whole = credit(paths, report)
    place = by_place(paths, report, credit, whole=0.0, local=1.0)
    assert place.shape == (*paths.std.shape, 2, 2)
    torch.testing.assert_close(place, whole.expand_as(place), atol=1e-5, rtol=1e-4)
    both = by_place(paths, report, credit, whole=1.0, local=0.5)
    torch.testing.assert_close(both, 1.5 * whole.expand_as(place), atol=1e-5, rtol=1e-4)
    assert torch.equal(by_place(paths, report, credit), whole)


@pytest.mark.parametrize("name", CREDITS)
def test_the_gradient_of_a_map_of_one_value_is_the_scalars(name):
    shifts = []
    for local in (0.0, 1.0):
        flow = GaussianFlow()
        paths = walk(PLANS[name], 6, prompts=1, flow=flow)
        report = judged(paths, (4, 4))
        advantage = by_place(paths, report, CREDITS[name], 1 - local, local)
        learn(flow, torch.optim.SGD(flow.parameters(), 1.0), paths, advantage)
        shifts.append(flow.shift.detach().clone())
    assert shifts[0].abs().max() > 1e-3
    torch.testing.assert_close(*shifts, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", CREDITS)
def test_a_place_without_an_opinion_has_the_whole_images_advantage(name):
    paths = walk(PLANS[name], 6, prompts=2)
    report = judged(paths)
    report.regions[:, 0, 1] = torch.nan
    report.regions[1] = torch.nan
    credit = CREDITS[name]
    found, whole = by_place(paths, report, credit, 1.0, 1.0), credit(paths, report)
    torch.testing.assert_close(found[:, :, 0, 1], whole[:, :, 0, 0])
    assert not found.isnan().any()
    alone = by_place(paths, report, credit, 0.0, 1.0)
    assert alone[:, :, 0, 1].eq(0).all()
    assert alone.ne(0).any()


def test_places_are_compared_over_the_whole_group_wherever_they_lie():
    values = torch.tensor([[[1.0, 3.0]], [[torch.nan, 5.0]], [[7.0, 7.0]]])
    group = torch.tensor([4, 4, 9])
    found = normalise(values, group, Units("none"))
    assert found.tolist() == [[[-2, 0]], [[0, 2]], [[0, 0]]]


def test_maps_gain_step_by_step_what_they_gain_in_all():
    paths = walk(PLANS["gain"], 4, prompts=1)
    value = torch.stack([paths.ends[:, 0], paths.ends[:, 1]]).mean(0)
    value[0, 0, 0] = torch.nan  # the completion of one state has no opinion there: 0 beside the others'
    report = Judgement(paths.at_states(value.mean((1, 2))), {}, value)
    found = maps(paths, report)
    assert not found.isnan().any()
    credit = CREDITS["gain"](paths, replace(report, reward=found), Units("none", limit=1e9))
    shown = found[:, 1:] - found[:, :-1]
    stochastic = paths.std > 0
    for k in range(paths.steps):
        own = stochastic[:, k]
        torch.testing.assert_close(credit[own, k], shown[own, k] - shown[own, k].mean())


def test_a_failed_image_has_no_map_at_all():
    paths = walk(PLANS["gain"], 4, prompts=1)
    report = judged(paths)
    report.regions[paths.shown[0, 2]] = torch.nan
    assert maps(paths, report)[0, 2].isnan().all()


def test_a_scorer_without_a_map_is_refused():
    paths = walk(PLANS["terminal"], 4)
    report = replace(judged(paths), regions=None)
    with pytest.raises(ValueError, match="needs a scorer that says where"):
        by_place(paths, report, CREDITS["terminal"], 1.0, 1.0)


def learn(flow, optimizer, paths, advantage):
    replay = surrogate(
        flow, flow.encode(["0.0"]), kernel=paths.kernel, t_max=paths.t_max, loss="clipped", clip=1e-3, beta=0.0
    )
    update(
        flow.parameters(), optimizer, transitions(paths, advantage), replay, epochs=1, minibatches=1,
        micro_batch=Fit(256), max_grad_norm=1e9, generator=torch.Generator().manual_seed(0),
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
            red = paths.ends[:, 0]
            report = Judgement(paths.at_states(red[:, inside].mean(1)), {}, torch.where(inside, red, torch.nan))
            learn(flow, optimizer, paths, by_place(paths, report, CREDITS["terminal"], 1 - local, local))
        shift = flow.shift.detach()
        moved[local] = float(shift[0, inside].mean()), float(shift[:, ~inside].abs().mean())
    assert moved[1.0][0] > 0.05
    assert moved[1.0][1] < 0.05 * moved[1.0][0]
    assert moved[0.0][1] > 0.05 * moved[0.0][0]
