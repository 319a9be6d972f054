"""Rejection-sampling fine-tuning: which images give rows, their known loss, and learning towards the best."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from run_config import rows, run

from mmalign.config import load as configs
from mmalign.errors import BadInput
from mmalign.learn.update import update
from mmalign.objectives.flow_matching import error
from mmalign.objectives.objective import Finished
from mmalign.objectives.rft import Rft
from mmalign.policy.gaussian import GaussianFlow
from mmalign.training.microbatch import AdaptiveBatch


def finished(reward, prompt=None):
    """Images whose latents are their number."""
    number = torch.arange(len(reward)).float()
    prompt = torch.zeros(len(reward), dtype=torch.long) if prompt is None else torch.tensor(prompt)
    return Finished(number[:, None, None, None].expand(-1, 3, 4, 4), prompt, torch.tensor(reward))


def chosen(images, draws=2, prompts=1):
    """The numbers of the images that rows were made of, and each row's prompt."""
    context = SimpleNamespace(
        config=SimpleNamespace(seed=0), policy=GaussianFlow(), ranks=None, fits=None, rewards=None
    )
    texts = [SimpleNamespace(id=p) for p in range(prompts)]
    batch = Rft(draws).of_images(context, texts, torch.zeros(prompts), images, iteration=0).rows
    return batch.x[:, 0, 0, 0].int().tolist(), batch.index.tolist()


def test_the_best_image_of_each_prompt_gives_the_rows():
    images = finished([0.1, 0.9, 0.5, -3.0, -1.0, -2.0], [0, 0, 0, 1, 1, 1])
    assert chosen(images, draws=3, prompts=2) == ([1, 1, 1, 4, 4, 4], [0, 0, 0, 1, 1, 1])


def test_of_several_best_images_the_first_is_taken():
    assert chosen(finished([0.0, 1.0, 1.0])) == ([1, 1], [0, 0])


@pytest.mark.parametrize("reward", [[21.7, 21.7, 21.7], [0.3], []])
def test_a_prompt_whose_images_tie_gives_no_row(reward):
    assert chosen(finished(reward)) == ([], [])
    mixed = finished([*reward, 1.0, 2.0], [0] * len(reward) + [1, 1])
    assert chosen(mixed, prompts=2) == ([len(reward) + 1] * 2, [1, 1])


def test_rewards_that_differ_by_rounding_tie():
    one = torch.tensor(21.7)
    assert chosen(finished([float(one), float(torch.nextafter(one, torch.tensor(torch.inf)))])) == ([], [])


def test_the_loss_is_the_mean_error_of_flow_matching():
    flow, generator = GaussianFlow(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        flow.shift.fill_(0.3)
    cond = flow.encode(["0.5"])
    batch = Rft(5).examples(flow, finished([0.0, 1.0]), generator)
    loss, statistics = Rft(5).replay(flow, cond, batch)
    expected = error(flow, batch.x, batch.noise, batch.t, cond, batch.index).mean((1, 2))
    assert len(loss) == 5
    assert torch.equal(loss, expected)
    assert torch.equal(statistics["loss"], expected.detach())


def test_the_model_moves_to_its_best_images():
    """Of eight images of the model the brightest is taken: its mean rises, step by step."""
    flow, objective = GaussianFlow(), Rft(4)
    optimizer, means = torch.optim.SGD(flow.parameters(), 5.0), [0.0]
    for i in range(20):
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(8, 3, 4, 4, generator=generator) + flow.shift.detach()
        images = Finished(x, torch.zeros(8, dtype=torch.long), x.mean((1, 2, 3)))
        batch = objective.examples(flow, images, generator)
        update(
            flow.parameters(), optimizer, batch, partial(objective.replay, flow, flow.encode(["0.0"])), epochs=1,
            minibatches=1, micro_batch=AdaptiveBatch(64), max_grad_norm=1e9,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        means.append(flow.shift.detach().mean().item())
    quarters = torch.tensor(means[1:]).view(4, 5).mean(1)
    assert (quarters.diff() > 0).all()


def test_two_iterations_of_a_run(tmp_path):
    settings = {
        "plan": "ode", "objective": {"type": "rft", "draws": 3}, "rewards": {"image_stats.brightness": 1.0},
        "watch": [], "held_out": None, "iterations": 2, "prompts_per_iteration": 2, "seeds": 3, "steps": 2, "warmup": 0,
        "cooldown": 0, "learning_rate": 1e-3, "out": str(tmp_path / "run"),
    }  # fmt: skip
    run(settings)
    table = rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["iteration"] for row in table] == [1, 2]
    assert [row["transitions"] for row in table] == [6, 6]  # 2 prompts, the best image of each, 3 draws
    assert [row["replay_forwards"] for row in table] == [6, 6]
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 for row in table)
    assert table[0]["loss"] != table[1]["loss"]


@pytest.mark.parametrize("draws", [0, 10_001])
def test_a_number_of_draws_out_of_range_is_named(draws):
    with pytest.raises(BadInput, match=rf"objective: draws: .* got {draws}"):
        configs.build({"objective": Rft(draws), "seeds": 2}, "test")
