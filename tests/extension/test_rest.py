"""The rest of a trajectory, drawn once more from a stored state."""

import pytest
import torch
from trajectories import judged, sampled

from mmalign.credit import Terminal
from mmalign.extension.rest import grafted, rest, taken
from mmalign.flow import plan as plans
from mmalign.flow.sample import sample
from mmalign.learn.loss import Clipped
from mmalign.objectives.replay import Surrogate, transitions
from mmalign.policy.gaussian import GaussianFlow
from mmalign.sampling.kernels import FlowSde
from mmalign.seeds import gaussian, seed_of

FLOW = GaussianFlow()
TIMES, KERNEL = FLOW.times(5), FlowSde(0.7)


def again(paths, row, step, draw, states=(), text="0.0", requested=False):
    tree, prompts = paths.tree, torch.zeros(len(row), dtype=torch.long)
    each = [rest(tree.t[r], tree.noise[r], k, KERNEL, paths.t_max, states) for r, k in zip(row, step, strict=True)]
    rests = sample(FLOW.velocity, paths.x[row, step], FLOW.encode([text]), prompts, each, draw)
    return grafted(paths, rests, torch.tensor(row), torch.tensor(step), requested)


def fresh(*key):
    return gaussian(FLOW.latent_shape, seed_of("fresh", *key))


@pytest.mark.parametrize("states", [(), (0, 1, 2, 3)])
def test_the_same_noise_gives_the_same_rest_to_the_bit(states):
    """Where the rest begins at state k, its step j is the trajectory's step k + j."""
    plan = plans.complete(plans.sde(TIMES, KERNEL), states) if states else plans.sde(TIMES, KERNEL)
    paths, row, step = sampled(plan, 3), [2, 0, 1], [0, 2, 3]

    def noise(start, k, path):
        k += step[start]
        return gaussian(FLOW.latent_shape, seed_of(0, row[start], k, (0,) * (k + 1)))

    wider = again(paths, row, step, noise, states)
    assert torch.equal(wider.x[3:], paths.x[row])
    assert torch.equal(wider.mean[3:], paths.mean[row])
    for name in ("t", "noise", "std", "prompt", "member"):
        assert torch.equal(getattr(wider.tree, name)[3:], getattr(paths.tree, name)[row]), name
    images = wider.tree.final >= 0
    assert torch.equal(images[3:], images[row])
    for number, (r, k) in enumerate(zip(row, step, strict=True)):
        for state in images[r].nonzero()[:, 0].tolist():
            one, other = int(wider.tree.final[3 + number, state]), int(wider.tree.final[r, state])
            assert (one == other) == (state <= k)
            assert torch.equal(wider.finals[one], wider.finals[other])


def test_steps_before_the_cut_are_learnt_once_with_the_mean_of_both_advantages():
    """Three trajectories of four noisy steps; one is drawn again from its state 2, so that two steps are new."""
    paths = again(sampled(plans.sde(TIMES, KERNEL), 3), [1], [2], fresh)
    advantage = torch.tensor([0.0, -1.0, 0.5, 2.0])[:, None, None, None].expand(4, 5, 1, 1)
    batch = transitions(paths, advantage)
    assert len(batch) == 3 * 4 + 2
    assert batch.advantage.flatten().tolist() == [0] * 4 + [0.5, 0.5, -1, -1] + [0.5] * 4 + [2, 2]
    assert not torch.equal(paths.x[3, 3], paths.x[1, 3])
    assert torch.equal(paths.tree.node[3, :3], paths.tree.node[1, :3])
    assert len(paths.tree.node[:, 3].unique()) == 4


def test_a_rest_from_the_start_is_one_more_sibling_in_law():
    """Mean and variance of many rests from state 0 are those of as many trajectories from that noise."""
    plan = plans.sde(TIMES, KERNEL)
    one = sampled(plan, 1)
    wider = again(one, [0] * 2000, [0] * 2000, fresh)
    draw = lambda *key: gaussian(FLOW.latent_shape, seed_of("other", *key))  # noqa: E731
    same = sample(FLOW.velocity, one.x[:, 0].expand(2000, -1, -1, -1), FLOW.encode(["0.0"]),
                  torch.zeros(2000, dtype=torch.long), plan, draw)  # fmt: skip
    assert torch.allclose(wider.x[1:, -1].mean(0), same.x[:, -1].mean(0), atol=0.1)
    assert torch.allclose(wider.x[1:, -1].std(0), same.x[:, -1].std(0), rtol=0.1)


def test_importance_weights_of_another_text_average_one():
    """A ratio per element, to the power of their number, is that of densities; over these draws its mean is 1."""
    shape = FLOW.latent_shape
    paths = again(sampled(plans.window(TIMES, KERNEL, 0, 1), 1), [0] * 1000, [0] * 1000, fresh, (), "0.1", True)
    assert paths.off.tolist() == [False] + [True] * 1000
    batch = transitions(paths, torch.ones(1001, 5, 1, 1))[1:]
    replay = Surrogate(FLOW, FLOW.encode(["0.0"]), KERNEL, paths.t_max, Clipped(1e-4), off=Clipped(0.2))
    weight = (replay(batch)[1]["log_ratio"].double() * torch.tensor(shape).prod()).exp()
    assert weight.std() > 0.05
    assert float(weight.mean()) == pytest.approx(1, abs=4 * float(weight.std()) / 1000**0.5)


def test_a_row_drawn_under_the_prompt_itself_has_ratio_one_and_the_loss_of_today_to_the_bit():
    plan = plans.sde(TIMES, KERNEL)
    plain = again(sampled(plan, 3), [1], [0], fresh)
    other_text = again(sampled(plan, 3), [1], [0], fresh, (), "0.0", True)
    assert plain.off is None
    advantage = Terminal()(plain.tree, judged(plain, lambda x: x.mean((1, 2, 3))))
    replay = Surrogate(FLOW, FLOW.encode(["0.0"]), KERNEL, plain.t_max, Clipped(1e-4), off=Clipped(0.2))
    today, other = replay(transitions(plain, advantage)), replay(transitions(other_text, advantage))
    assert torch.equal(today[0], other[0])
    assert today[1]["ratio"].eq(1).all()
    for loss, _ in (today, other):
        FLOW.shift.grad = None
        loss.sum().backward()
        gradient = FLOW.shift.grad.clone() if loss is today[0] else gradient
        assert torch.equal(gradient, FLOW.shift.grad)
    FLOW.shift.grad = None


def test_only_rows_of_another_text_take_their_wider_bound():
    """Log-ratios far beyond 1e-4: under the prompt itself they would be clipped, under another text they learn."""
    other_text = again(sampled(plans.sde(TIMES, KERNEL), 1), [0], [0], fresh, (), "0.5", True)
    batch = transitions(other_text, torch.ones(2, 5, 1, 1))
    kinds = [Surrogate(FLOW, FLOW.encode(["0.0"]), KERNEL, other_text.t_max, Clipped(1e-4), off=off) for off in
             (None, Clipped(0.2))]  # fmt: skip
    narrow, wide = (kind(batch)[1] for kind in kinds)
    ratio = wide["ratio"]
    assert torch.equal(narrow["clipped_high"], (ratio > 1 + 1e-4).float())
    assert torch.equal(wide["clipped_high"], (ratio > 1.2).float())
    assert (ratio[:4] == 1).all()
    assert (ratio[4:] != 1).all()


def test_trajectories_are_taken_with_their_images():
    wider = again(sampled(plans.sde(TIMES, KERNEL), 3), [1], [2], fresh)
    some = taken(wider, torch.tensor([3, 0]))
    assert torch.equal(some.finals[some.tree.final[:, -1]], some.x[:, -1])
    assert torch.equal(some.x, wider.x[[3, 0]])
