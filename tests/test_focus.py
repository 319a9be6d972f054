"""Update masks: what they keep, what they rescale, and that nothing else moves."""

import pytest
import torch
from trajectories import sampled

from mmalign.flow import plan as plans
from mmalign.learn.loss import Clipped
from mmalign.learn.update import update
from mmalign.objectives.masks import Prompt, top, within
from mmalign.objectives.replay import Surrogate, transitions
from mmalign.policy.gaussian import GaussianFlow
from mmalign.sampling.kernels import FlowSde
from mmalign.training.microbatch import AdaptiveBatch

PLAN = plans.sde(torch.linspace(1, 0, 5), FlowSde(0.7))


def learn(flow, batch, paths):
    replay = Surrogate(flow, flow.encode(["0.0"]), paths.kernel, paths.t_max, Clipped(1.0))
    update(
        flow.parameters(), torch.optim.SGD(flow.parameters(), 1.0), batch, replay, epochs=1, minibatches=1,
        micro_batch=AdaptiveBatch(64), max_grad_norm=1e9, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    return flow.shift.detach()


def test_a_mask_keeps_the_mean_and_one_of_ones_changes_nothing():
    advantage = torch.tensor([[[1.0, -2.0], [3.0, 4.0]]])
    assert torch.equal(within(advantage, torch.ones(1, 2, 2, dtype=torch.bool)), advantage)
    half = within(advantage, torch.tensor([[[True, False], [False, True]]]))
    assert half.tolist() == [[[2, 0], [0, 8]]]
    assert within(advantage, torch.zeros(1, 2, 2, dtype=torch.bool)).eq(0).all()
    whole = torch.full((1, 1, 1), 0.7)
    spread = within(whole, torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0)) > 0.6)
    assert spread.mean().item() == pytest.approx(0.7)


def test_top_takes_the_share_of_each_row():
    values = torch.arange(32.0).view(2, 4, 4)
    result = top(values, 0.25)
    assert result.sum((1, 2)).tolist() == [4, 4]
    assert result[:, 3].all()
    assert top(values, 1e-6).sum((1, 2)).tolist() == [1, 1]
    assert top(values, 1.0).all()


def test_masked_positions_get_no_gradient_and_the_rest_that_of_the_whole():
    shifts = []
    for masked in (False, True):
        flow = GaussianFlow()
        paths = sampled(PLAN, 6, flow=flow)
        advantage = torch.randn(6, 4, 1, 1, generator=torch.Generator().manual_seed(0))
        mask = torch.zeros(6, 4, 4, 4, dtype=torch.bool)
        mask[..., :2] = True
        shifts.append(learn(flow, transitions(paths, within(advantage, mask) if masked else advantage), paths))
    assert shifts[1][..., 2:].eq(0).all()
    torch.testing.assert_close(shifts[1][..., :2], 2 * shifts[0][..., :2], atol=1e-6, rtol=1e-4)


class Attentive(GaussianFlow):
    """The prompt acts in one corner, more at later steps."""

    def prompt_effect(self, x, t, cond, index):
        effect = torch.zeros(len(x), 4, 4)
        effect[:, 0, 0], effect[:, 0, 1] = 2 - t, 1 - t / 2
        return effect


def test_the_prompt_mask_is_where_the_prompt_acts():
    flow = Attentive()
    paths = sampled(PLAN, 6, flow=flow)
    batch = transitions(paths, torch.ones(6, 4, 1, 1))
    result = Prompt(2 / 16).masked(flow, flow.encode(["0.0"]), batch, 5)
    assert result.advantage.shape == (len(batch), 4, 4)
    assert result.advantage[:, 0, :2].eq(8).all()
    assert result.advantage.count_nonzero() == 2 * len(batch)
    assert learn(flow, result, paths)[:, 0, :2].ne(0).all()
    whole = Prompt(1.0).masked(flow, flow.encode(["0.0"]), batch, 64)
    torch.testing.assert_close(whole.advantage, torch.ones(len(batch), 4, 4))
