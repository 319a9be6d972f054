"""Region-grouped preferences: known losses, equalities with plain DPO, and learning in one place."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from mmalign.learn.update import update
from mmalign.objectives import rgdpo
from mmalign.objectives.flow_matching import error
from mmalign.objectives.objective import Finished
from mmalign.objectives.rgdpo import Rgdpo
from mmalign.policy.gaussian import GaussianFlow
from mmalign.training.microbatch import AdaptiveBatch
from mmalign.types import Marks

nan = torch.nan
LOG2 = 0.6931472


def named(credit):
    return torch.ones_like(credit, dtype=torch.bool)


def whole(credit, size=(4, 4)):
    """One region, the whole image, for each of N images."""
    credit = torch.tensor(credit)[:, None]
    return Marks(torch.ones(*credit.shape, *size), credit, named(credit))


def finished(x, marks, reward=None, prompt=None):
    rows = torch.zeros(len(x), dtype=torch.long) if prompt is None else torch.tensor(prompt)
    reward = torch.arange(len(x)).float().flip(0) if reward is None else torch.tensor(reward)
    return Finished(x, rows, reward, torch.zeros(len(x), 1, 1), marks)


def test_a_region_compares_where_both_images_have_it_and_differ():
    credit = torch.tensor([[[1.0, -1.0, 1.0, nan, 0.2, 1.0], [-1.0, 1.0, 1.0, 1.0, 0.0, -1.0]]])
    same = named(credit)
    same[:, 1, 5] = False
    assert rgdpo.better(credit, same).tolist() == [[1, -1, 0, 0, 0, 0]]


def test_best_goes_with_worst_and_pairs_without_a_term_are_left_out():
    marks = whole([1.0, -1.0, 1.0, 1.0, 1.0])
    result = rgdpo.matched(torch.tensor([0, 0, 0, 0, 7]), torch.tensor([3.0, 0.0, 1.0, 2.0, 9.0]), marks)
    assert result.tolist() == [[0, 1]]  # 3 and 2 are right both; 4 is alone with its prompt


def test_an_image_with_right_and_wrong_regions_is_enough():
    credit = torch.tensor([[1.0, -1.0], [1.0, nan]])
    marks = Marks(torch.ones(2, 2, 1, 1), credit, torch.zeros(2, 2, dtype=torch.bool))
    assert rgdpo.matched(torch.zeros(2, dtype=torch.long), torch.tensor([1.0, 0.0]), marks).tolist() == [[0, 1]]


def test_at_the_reference_every_term_is_log_two():
    flow = GaussianFlow()
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    share = torch.zeros(2, 2, 4, 4)
    share[:, 0, :2], share[:, 1, 2:] = 1, 1
    for credit, expected in [
        ([[1.0, nan], [-1.0, nan]], LOG2),  # one region compared
        ([[1.0, 1.0], [-1.0, -1.0]], LOG2),  # two: their mean
        ([[1.0, -1.0], [1.0, nan]], 0.5 * LOG2),  # one image with right and wrong
        ([[1.0, -1.0], [-1.0, 1.0]], 1.5 * LOG2),  # all of it
    ]:
        marks = Marks(share, torch.tensor(credit), named(torch.tensor(credit)))
        batch = rgdpo.pairs(flow, finished(x, marks), 3, torch.Generator().manual_seed(0))
        assert len(batch) == 3
        result, _ = Rgdpo(3, 50.0, 0.5).replay(flow, flow.encode(["0.0"]), batch)
        torch.testing.assert_close(result, torch.full((3,), expected))


def test_one_region_that_is_the_whole_image_is_dpo_of_flow_errors():
    flow = moved(GaussianFlow())
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    batch = rgdpo.pairs(flow, finished(x, whole([1.0, -1.0])), 5, torch.Generator().manual_seed(1))
    result, statistics = Rgdpo(5, 7.0, 1.0).replay(flow, flow.encode(["0.0"]), batch)
    drop = []
    for side in (0, 1):
        shown = (batch.x[:, side], batch.noise, batch.t, flow.encode(["0.0"]), batch.index)
        with flow.reference():
            before = error(flow, *shown)
        drop.append((error(flow, *shown) - before).mean((1, 2)))
    torch.testing.assert_close(result, -F.logsigmoid(-7.0 * (drop[0] - drop[1])))
    assert torch.equal(statistics["agrees"], (drop[0] < drop[1]).float())


def moved(flow):
    with torch.no_grad():
        flow.shift.add_(0.3 * torch.randn(flow.shift.shape, generator=torch.Generator().manual_seed(5)))
    return flow


def test_changing_sides_changes_nothing():
    flow = moved(GaussianFlow())
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    share = torch.rand(2, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    credit = torch.tensor([[1.0, -1.0, nan], [-1.0, 0.6, 1.0]])
    batch = rgdpo.pairs(flow, finished(x, Marks(share, credit, named(credit))), 4, torch.Generator().manual_seed(2))
    turned = replace(
        batch, x=batch.x.flip(1), share=batch.share.flip(1), credit=batch.credit.flip(1), named=batch.named.flip(1)
    )
    replay = partial(Rgdpo(4, 7.0, 1.0).replay, flow, flow.encode(["0.0"]))
    torch.testing.assert_close(replay(batch)[0], replay(turned)[0])


def test_a_region_counts_the_same_whatever_its_size():
    err = torch.zeros(1, 2, 4, 4)
    err[:, :, 0, 0], err[:, :, 1:, :] = 2.0, 5.0
    share = torch.zeros(1, 2, 2, 4, 4)
    share[:, :, 0, 0, 0], share[:, :, 1, 1:, :] = 0.25, 1.0
    assert rgdpo.regional(err, share).tolist() == [[[2.0, 5.0], [2.0, 5.0]]]


def test_a_region_that_only_one_image_has_gives_no_gradient_outside_what_compares():
    moved_by = torch.zeros(1, 2, 2, requires_grad=True)
    credit = torch.tensor([[[1.0, nan], [-1.0, 1.0]]])
    value, _ = rgdpo.loss(moved_by, credit, named(credit), scale=1.0, intra=0.0)
    value.sum().backward()
    assert moved_by.grad.tolist() == [[[0.5, 0.0], [-0.5, 0.0]]]


def test_no_pairs_no_step():
    flow = GaussianFlow()
    batch = rgdpo.pairs(flow, finished(torch.randn(4, 3, 4, 4), whole([1.0] * 4)), 2, torch.Generator())
    assert len(batch) == 0
    assert learn(flow, torch.optim.SGD(flow.parameters(), 1.0), batch, 1.0) == {}


def learn(flow, optimizer, batch, scale):
    return update(
        flow.parameters(), optimizer, batch, partial(Rgdpo(2, scale).replay, flow, flow.encode(["0.0"])), epochs=1,
        minibatches=1, micro_batch=AdaptiveBatch(64), max_grad_norm=1e9, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip


def test_a_painted_square_grows_red_inside_and_nothing_changes_outside():
    """The redder of two squares is right, the other wrong: the square alone moves, and towards red."""
    flow, inside = GaussianFlow((3, 8, 8)), torch.zeros(8, 8)
    inside[2:5, 3:7] = 1
    optimizer, agrees = torch.optim.SGD(flow.parameters(), 1.0), []
    for i in range(40):
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(16, 3, 8, 8, generator=generator) + flow.shift.detach()
        red = (x[:, 0] * inside).sum((1, 2)) / inside.sum()
        credit = torch.where(red > red.median(), 1.0, -1.0)[:, None]
        marks = Marks(inside.expand(16, 1, 8, 8), credit, named(credit))
        batch = rgdpo.pairs(flow, finished(x, marks, red.tolist()), 2, generator)
        assert len(batch) == 16
        agrees.append(learn(flow, optimizer, batch, 5.0)["agrees"])
    shift = flow.shift.detach()
    assert shift[0, inside.bool()].mean() > 0.2
    assert shift[:, ~inside.bool()].abs().max() == 0
    assert torch.tensor(agrees[-10:]).mean() > 0.8


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_the_push_fades_once_the_policy_agrees(scale):
    ahead = torch.tensor([[[-1.0], [1.0]]], requires_grad=True)
    credit = torch.tensor([[[1.0], [-1.0]]])
    value, statistics = rgdpo.loss(ahead, credit, named(credit), scale)
    value.sum().backward()
    assert statistics["agrees"] == 1
    expected = scale * torch.sigmoid(torch.tensor(-2 * scale))
    torch.testing.assert_close(ahead.grad[0, :, 0], torch.stack([expected, -expected]))


SINGLE = 0.5


def test_regions_by_themselves_count_log_two_at_the_reference_and_pull_by_their_credit():
    moved = torch.zeros(1, 2, 3, requires_grad=True)
    credit = torch.tensor([[[1.0, -0.5, nan], [nan, nan, 0.0]]])
    value, _ = rgdpo.loss(moved, credit, named(credit), 10.0, 0.0, SINGLE)
    assert float(value.detach()) == pytest.approx(SINGLE * LOG2)
    value.sum().backward()
    # the derivative of -log sigmoid at 0 is -1/2; the error falls where the credit is positive; two regions count
    expected = torch.tensor([[[SINGLE * 10 / 2 / 2, -SINGLE * 0.5 * 10 / 2 / 2, 0.0], [0.0, 0.0, 0.0]]])
    torch.testing.assert_close(moved.grad, expected)


def test_without_a_weight_nothing_changes():
    moved = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0))
    credit = torch.tensor([[[1.0, -1.0, nan], [-1.0, 1.0, 1.0]]]).expand(4, -1, -1)
    plain, alone = (rgdpo.loss(moved, credit, named(credit), 2.0, 1.0, *single)[0] for single in ((), (0.0,)))
    assert torch.equal(plain, alone)
    weighed = rgdpo.loss(moved, credit, named(credit), 2.0, 1.0, 1.0)[0]
    assert (weighed > plain).all()


def test_a_region_whose_partner_stays_at_the_reference_is_one_by_itself():
    moved = torch.tensor([[[-0.3], [0.0]]])
    both = torch.tensor([[[1.0], [-1.0]]])
    alone = torch.tensor([[[1.0], [nan]]])
    inter, _ = rgdpo.loss(moved, both, named(both), 3.0, 0.0)
    single, _ = rgdpo.loss(moved, alone, named(alone), 3.0, 0.0, 1.0)
    torch.testing.assert_close(inter, single)


def test_images_without_two_regions_to_compare_are_taken():
    marks = whole([1.0, 1.0, nan, nan])
    prompt, reward = torch.tensor([0, 0, 1, 1]), torch.tensor([1.0, 0.0, 1.0, 0.0])
    assert rgdpo.matched(prompt, reward, marks).tolist() == []
    assert rgdpo.matched(prompt, reward, marks, single=True).tolist() == [[0, 1]]


# ------------------------------------------------------------------------------------------------------------ a guide


def guided(shift):
    """A moved flow with a guide at this shift, and rows with regions of all kinds."""
    flow = moved(GaussianFlow())
    flow.attach_lora(1, 1.0, None, 0, rgdpo.GUIDE)
    with torch.no_grad():
        flow.shifts[rgdpo.GUIDE].copy_(shift)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    share = torch.rand(2, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    credit = torch.tensor([[1.0, -1.0, nan], [-1.0, 0.6, 1.0]])
    marks = Marks(share, credit, named(credit))
    return flow, rgdpo.pairs(flow, finished(x, marks), 4, torch.Generator().manual_seed(2))


def gradient(flow, objective, batch):
    value, _ = objective.replay(flow, flow.encode(["0.0"]), batch)
    return value.detach(), *torch.autograd.grad(value.sum(), flow.parameters())


SETTINGS = {"draws": 4, "scale": 7.0, "intra": 0.7, "single": 0.3}


@pytest.mark.parametrize(("shift", "guidance"), [(torch.full((3, 4, 4), 0.5), 0.0), (torch.zeros(3, 4, 4), 3.0)])
def test_a_guide_without_strength_and_one_that_changes_nothing_are_none_to_the_bit(shift, guidance):
    flow, batch = guided(shift)
    loss, slope = gradient(flow, Rgdpo(**SETTINGS), batch)
    with_guide = gradient(flow, Rgdpo(**SETTINGS, guide="g", guidance=guidance), batch)
    assert torch.equal(with_guide[0], loss)
    torch.testing.assert_close(with_guide[1], slope, atol=1e-6, rtol=1e-5)  # summed in another order


def test_a_guide_changes_the_loss_at_one_forward_more_of_each_image():
    flow, batch = guided(torch.full((3, 4, 4), 0.5))
    forwards = []
    for objective in (Rgdpo(**SETTINGS), Rgdpo(**SETTINGS, guide="g")):
        before = flow.counts["forwards"]
        gradient(flow, objective, batch)
        forwards.append(flow.counts["forwards"] - before)
        assert forwards[-1] == objective.replayed(measured=True) * len(batch)
    assert forwards == [16, 24]
    plain, with_guide = (gradient(flow, each, batch) for each in (Rgdpo(**SETTINGS), Rgdpo(**SETTINGS, guide="g")))
    assert not torch.allclose(plain[0], with_guide[0])
    assert flow.shifts[rgdpo.GUIDE].grad is None


def test_cells_weigh_by_what_the_guide_likes_and_by_a_mean_of_one():
    liked = torch.tensor([[0.5, -0.5], [0.0, 3.0]]).expand(1, 2, 2, 2)
    share = torch.ones(1, 2, 2, 2, 2)
    share[:, :, 1, 1] = 0  # the second region is the upper half
    sign = torch.tensor([[[1.0, 1.0], [-1.0, 0.0]]])
    weight = rgdpo.weights(liked, sign, share, 1.0)
    better = torch.tensor([[1.5, 0.5], [1.0, 2.0]]) / 1.25  # the cell of 1 + 3 is clipped to 2
    worse = torch.tensor([[0.5, 1.5], [1.0, 0.0]]) / 0.75  # and that of 1 - 3 to 0
    torch.testing.assert_close(weight[0, 0, 0], better)
    torch.testing.assert_close(weight[0, 1, 0], worse)
    assert weight[0, 0, 1, 0].tolist() == [1.5, 0.5]  # their mean over the region is 1 already
    assert weight[0, 1, 1].eq(1).all()
    torch.testing.assert_close((weight * share).sum((-2, -1)), share.sum((-2, -1)))
    assert rgdpo.weights(torch.full((1, 2, 2, 2), -9.0), sign, share, 1.0)[0, 0, 0].eq(1).all()  # none is left


def test_the_strength_of_a_guide_needs_one():
    with pytest.raises(ValueError, match=r"guidance: 0\.5"):
        Rgdpo(guidance=0.5)
