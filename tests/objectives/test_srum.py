"""SRUM's weighted flow matching, on numbers and on the closed-form flow."""

from functools import partial

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from mmalign.learn.update import update
from mmalign.objectives import flow_matching as matching, srum
from mmalign.objectives.objective import Finished
from mmalign.objectives.srum import Srum
from mmalign.policy.gaussian import GaussianFlow
from mmalign.training.microbatch import AdaptiveBatch
from mmalign.types import Marks

nan = torch.nan
NOTHING = Marks(torch.zeros(1, 0, 8, 8), torch.zeros(1, 0), torch.zeros(1, 0, dtype=torch.bool))


def finished(x, reward, places):
    rows = torch.zeros(len(x), dtype=torch.long)
    return Finished(x, rows, reward, places, NOTHING[rows])


def learn(flow, optimizer, batch, replay):
    update(
        flow.parameters(), optimizer, batch, replay, epochs=1, minibatches=1, micro_batch=AdaptiveBatch(64),
        max_grad_norm=1e9, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip


def test_the_whole_images_score_gates_and_never_turns_a_place_round():
    places = torch.tensor([[[1.0, nan], [-1.0, 0.5]]]).expand(3, 2, 2)
    result = srum.weights(finished(torch.zeros(3, 1, 2, 2), torch.tensor([-1.0, 0.0, 3.0]), places), -1, 1)
    expected = torch.tensor([[1.0, 0.0], [-1.0, 0.5]])
    torch.testing.assert_close(result, torch.stack([0 * expected, 0.5 * expected, expected]))
    shaded = srum.weights(finished(torch.zeros(1, 1, 2, 2), torch.ones(1), places[:1]), 0, 1, background=0.5)
    assert shaded[0, 0, 1] == 0.5


def test_known_losses():
    err = torch.tensor([[[1.0, 3.0], [2.0, 2.0]]])
    for value, anchor, margin, expected in [
        (1.0, 0.5, 0.0, 3.0),  # reward 1 everywhere: flow matching, plus the anchor
        (0.0, 0.5, 0.0, 1.0),  # no opinion: the anchor alone
        (-1.0, 0.0, 0.0, 0.0),  # left out
        (-1.0, 0.0, 3.0, 1.0),  # 2, 0, 1, 1 short of the margin
        (-0.5, 1.0, 3.0, 2.5),
    ]:
        weight = torch.full((1, 2, 2), value)
        assert srum.loss(err, weight, anchor, margin).item() == pytest.approx(expected)


def test_a_map_of_one_value_is_the_whole_image():
    err = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0))
    for value in (1.0, 0.25):
        for grid in ((2, 2), (4, 4)):
            one = srum.loss(err, torch.full((3, 1, 1), value))
            torch.testing.assert_close(one, srum.loss(err, torch.full((3, *grid), value)))


SINGLE = {"width": 32, "allow_subnormal": False}  # what float32, in which the loss is taken, tells apart


@hypothesis.given(
    st.lists(st.floats(-1, 1), min_size=4, max_size=4), st.floats(0, 1e6, **SINGLE), st.floats(0, 10, **SINGLE)
)
@hypothesis.settings(max_examples=80, deadline=None, derandomize=True, database=None)
def test_nothing_is_gained_without_bound(weights, err, margin):
    """However bad a place is and however large its error, the loss is not below 0, and past the margin it is flat."""
    weight = torch.tensor(weights).view(1, 2, 2)
    result = torch.full((1, 2, 2), err, requires_grad=True)
    value = srum.loss(result, weight, 0.0, margin)
    assert value.item() >= 0
    (slope,) = torch.autograd.grad(value.sum(), result)
    bad = weight < 0
    if err > margin:
        assert slope[bad].eq(0).all()
    elif err < margin:
        torch.testing.assert_close(slope[bad], weight[bad] / 4)


def test_times_follow_the_schedule_one_in_each_stretch():
    result = matching.times(GaussianFlow(), 4, 500, torch.Generator().manual_seed(0))
    assert result.shape == (500, 4)
    stretch = ((1 - result) * 4).floor().clamp(max=3)
    assert torch.equal(stretch, torch.arange(4.0).expand(500, 4))
    torch.testing.assert_close(result.mean(0), torch.tensor([7, 5, 3, 1]) / 8, atol=0.02, rtol=0)


def test_the_error_is_least_at_the_flows_own_data():
    """Of flows whose data have different means, that whose mean the images have has the least flow-matching error."""
    x = torch.randn(400, 3, 4, 4, generator=torch.Generator().manual_seed(0)) + 0.7
    errors = {}
    for mean in ("0.2", "0.7", "1.2"):
        flow = GaussianFlow()
        generator, index = torch.Generator().manual_seed(1), torch.zeros(400, dtype=torch.long)
        noise, t = matching.noise_like(x, generator), matching.times(flow, 1, 400, generator)[:, 0]
        errors[mean] = matching.error(flow, x, noise, t, flow.encode([mean]), index).mean().item()
    assert errors["0.7"] < errors["0.2"]
    assert errors["0.7"] < errors["1.2"]


def test_a_painted_square_grows_red_inside_and_nothing_changes_outside():
    flow, inside = GaussianFlow((3, 8, 8)), torch.zeros(8, 8, dtype=torch.bool)
    inside[2:5, 3:7] = True
    optimizer = torch.optim.SGD(flow.parameters(), 30.0)
    for i in range(40):
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(24, 3, 8, 8, generator=generator) + flow.shift.detach()
        red = x[:, 0].clamp(-1, 1)
        images = finished(x, torch.ones(24), torch.where(inside, red, nan))
        objective = Srum(draws=2, anchor=0.0)
        batch = objective.examples(flow, images, generator)
        learn(flow, optimizer, batch, partial(objective.replay, flow, flow.encode(["0.0"])))
    shift = flow.shift.detach()
    assert shift[0, inside].mean() > 0.2
    assert shift[:, ~inside].abs().max() == 0  # a weight of 0 gives no gradient at all


def test_the_anchor_holds_the_model_where_nothing_is_said():
    """Images of the model itself, no opinion: flow matching on them leaves the model unchanged but for their sampling
    noise, and a displaced one comes back to where they are."""
    flow = GaussianFlow((3, 4, 4))
    optimizer = torch.optim.SGD(flow.parameters(), 5.0)
    with torch.no_grad():
        flow.shift.fill_(1.0)
    for i in range(60):
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(64, 3, 4, 4, generator=generator)
        images = finished(x, torch.ones(64), torch.full((64, 4, 4), nan))
        objective = Srum(draws=1, anchor=0.5)
        batch = objective.examples(flow, images, generator)
        learn(flow, optimizer, batch, partial(objective.replay, flow, flow.encode(["0.0"])))
    assert flow.shift.abs().max() < 0.35
