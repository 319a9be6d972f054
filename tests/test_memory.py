"""The memory of a rollout: what the update keeps, and one batch."""

from dataclasses import replace

import pytest
import torch

from mmalign.config import load as configs
from mmalign.flow import plan as plans
from mmalign.flow.sample import sample
from mmalign.latents import Columns
from mmalign.policy.gaussian import GaussianFlow
from mmalign.policy.meta import Live
from mmalign.sampling.kernels import FlowSde
from mmalign.training import rollout, setup

SHAPE, WIDE = (3, 64, 64), 16  # of a latent; latents beside it that a row takes in a forward, and while it is decoded
LATENT = 4 * 3 * 64 * 64  # bytes
ROW = 1000  # bytes of an image's numbers: times, nodes, scores
STEPS, SEEDS, BATCH = 4, 4, 16


class Wide(GaussianFlow):
    def velocity(self, x, t, cond, index):
        return super().velocity(x.repeat(WIDE, 1, 1, 1)[: len(x)], t, cond, index)

    def decode(self, x):
        return super().decode(x.repeat(WIDE, 1, 1, 1)[: len(x)])


def peak(images, folder, **settings):
    """The most bytes of tensors that live while so many images are sampled and scored; the rollout."""
    (folder / "prompts.txt").write_text("".join(f"{i / 1000}\n" for i in range(images // SEEDS)))
    base = {
        "model": "mmalign.policy.gaussian:GaussianFlow", "prompts": str(folder / "prompts.txt"), "held_out": None,
        "prompts_per_iteration": images // SEEDS, "seeds": SEEDS, "steps": STEPS, "batch": BATCH,
        "decode_batch": BATCH, "rewards": {"smooth:Smooth.red": 1.0}, "out": str(folder / "run"), "iterations": 1,
    }  # fmt: skip
    run = replace(setup.open_session(configs.build(base | settings, "test")), policy=Wide(SHAPE))
    prompts = run.prompts(0)
    with Live([]) as live:
        drawn = rollout.sample_and_score(run, prompts, 0)
    return live.most, drawn


METHODS = {
    "finished images": ({"plan": "ode", "objective": "nft"}, 1),
    "steps of a window": (
        {"plan": {"type": "window", "steps": [1, 2]}, "credit": "terminal"},
        1 + 2 + 1,  # the finished latent, the states before and after one step, and its mean
    ),
    "steps of all": ({"plan": "sde", "credit": "terminal"}, 1 + STEPS + (STEPS - 1)),
}


@pytest.mark.parametrize("name", METHODS)
def test_memory_grows_with_the_batch_and_with_what_the_update_keeps(tmp_path, monkeypatch, name):
    """Ten times as many images take what is kept of them, and at most 5 % more beside it."""
    settings, latents = METHODS[name]
    monkeypatch.setattr(rollout, "DECODED", SEEDS * LATENT)
    beside = []
    for images in (40, 400):
        most, drawn = peak(images, tmp_path, **settings)
        paths = drawn.paths
        stay = sum(each.nbytes for each in (paths.x, paths.mean, paths.finals))
        assert stay == images * latents * LATENT
        assert drawn.images is None
        beside.append(most - stay)
    assert beside[1] <= 1.05 * beside[0]
    assert beside[0] > BATCH * WIDE * LATENT  # a batch is counted


def test_what_is_not_kept_is_not_there():
    flow = GaussianFlow()
    plan = plans.window(flow.times(STEPS), FlowSde(), 1, 2)
    start, index = torch.randn(2, *flow.latent_shape), torch.zeros(2, dtype=torch.long)

    def drawn(keep=None):
        draw = lambda *key: torch.full(flow.latent_shape, 0.5)  # noqa: E731
        return sample(flow.velocity, start, flow.encode(["0.5"]), index, plan, draw, keep=keep)

    whole, some = drawn(), drawn(Columns.around(plan.stochastic))
    rows = torch.arange(2)
    for k in (1, 2):
        assert torch.equal(some.state(rows, torch.full((2,), k)), whole.x[:, k])
    assert torch.equal(some.mean_of(rows, torch.ones_like(rows)), whole.mean[:, 1])
    assert torch.equal(some.finals, whole.x[:, -1])
    assert some.x.shape[1] == 2
    with pytest.raises(ValueError, match="state 3 of the trajectories was not kept"):
        some.state(rows, torch.full((2,), 3))
    with pytest.raises(ValueError, match="mean of step 0"):
        some.mean_of(rows, torch.zeros_like(rows))


def test_images_are_scored_a_few_prompts_at_a_time(monkeypatch):
    owner = torch.tensor([0, 0, 0, 1, 2, 2, 5, 5, 5, 5, 5])
    monkeypatch.setattr(rollout, "DECODED", 4 * 3 * 8 * 8 * 4)
    assert rollout.together(owner, (8, 8)) == [slice(0, 4), slice(4, 6), slice(6, 11)]
    monkeypatch.setattr(rollout, "DECODED", 0)
    assert rollout.together(owner, (8, 8)) == [slice(0, 3), slice(3, 4), slice(4, 6), slice(6, 11)]
