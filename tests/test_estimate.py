"""What is told of a run before its weights are there is what the run then says of itself."""

import json
import shutil
from collections import Counter

import pytest
from run_config import rows, run
from tiny_pipelines import FAMILIES
from typer.testing import CliRunner

from mmalign.checks import estimate, timing
from mmalign.cli.app import app
from mmalign.config import load as configs
from mmalign.errors import BadInput
from mmalign.runs import checkpoint

PLANS = {
    "branch": {},
    "sde": {"plan": "sde"},
    "window": {"plan": {"type": "window", "steps": (1, 3), "children": 2}},
    "moving": {"plan": {"type": "window", "steps": (0, 1), "children": 3, "moves": "progressive"}},
    "random": {"plan": {"type": "window", "steps": (0, 1), "children": 2, "moves": "random"}, "steps": 8},
    "gain": {"plan": "sde", "credit": "gain"},
    "guided": {"guidance": 3.0, "epochs": 2, "minibatches": 2},
    "attended": {"mask": {"type": "prompt", "share": 0.25}},
    "budget": {"max_forwards": 70, "max_rewards": 12},
}  # fmt: skip


def told(settings, gpus=1, **changed):
    return estimate.estimate(configs.build(settings | changed, "test"), gpus)


@pytest.mark.parametrize("name", PLANS)
def test_counts_are_those_of_the_run(settings, name):
    """With beta > 0 every row is replayed, so that all counts are known before."""
    changed = PLANS[name] | {"objective": {"type": "grpo", "beta": 0.1}, "iterations": 3, "eval_every": 0}
    changed |= {"credit": "terminal"} if name not in ("branch", "gain", "guided", "attended", "budget") else {}
    found, out = told(settings, **changed), run(settings, **changed)
    metrics = rows(out / "metrics.jsonl")
    for count in estimate.COUNTS:
        assert found["run"][count] == sum(row[count] for row in metrics) > 0
        if not found["bounds"]:
            assert [row[count] for row in metrics] == [found["iteration"][count]] * 3
        assert max(row[count] for row in metrics) <= found["iteration"][count]
    seen = rows(out / "evaluations.jsonl")
    assert found["evaluations"]["decodes"] == sum(row["images"] for row in seen)
    assert found["evaluations"]["evaluations"] == len(seen)


def test_without_beta_replay_is_a_bound_and_says_so(settings):
    found, metrics = told(settings), rows(run(settings) / "metrics.jsonl")
    assert any(note.startswith("replay_forwards") for note in found["bounds"])
    assert all(row["replay_forwards"] <= found["iteration"]["replay_forwards"] for row in metrics)
    assert all(row["forwards"] == found["iteration"]["forwards"] for row in metrics)


def test_evaluations_are_those_of_the_run(settings):
    changed = {"iterations": 5, "eval_every": 2, "eval_prompts": 1, "eval_seeds": 3, "watch": ["image_stats"]}
    found, seen = told(settings, **changed), rows(run(settings, **changed) / "evaluations.jsonl")
    assert [row["iteration"] for row in seen] == [0, 2, 4, 5]
    assert found["evaluations"] == {
        "evaluations": 4,
        "decodes": sum(row["images"] for row in seen),
        "forwards": 2 * sum(row["images"] for row in seen),
        "rewards": 2 * sum(row["images"] for row in seen),
    }


@pytest.mark.parametrize("gpus", [1, 2, 3, 4])
@pytest.mark.parametrize("plan", ["branch", "moving", "random"])
def test_ranks_share_whole_groups_and_add_up(settings, gpus, plan):
    changed = PLANS[plan] | {"prompts_per_iteration": 4, "credit": "terminal" if plan != "branch" else "branch"}
    found = told(settings, gpus, **changed)
    shares = [rank["prompts"] for rank in found["ranks"]]
    assert len(shares) == gpus
    assert sum(shares) == 4
    assert max(shares) - min(shares) <= 1
    for count in ("prompts", "trajectories", *estimate.COUNTS):
        assert sum(rank[count] for rank in found["ranks"]) == found["iteration"][count]
    summed = Counter()
    for rank in found["run_ranks"]:
        summed.update(rank)
    assert {name: found["run"][name] for name in estimate.COUNTS} == dict(summed)


def test_guidance_that_the_network_is_told_costs_one_forward(settings, tmp_path):
    FAMILIES["FLUX.1-dev"].build(tmp_path / "flux")
    changed = {"model": str(tmp_path / "flux"), "guidance": 3.5, "size": (32, 32), "held_out": None, "iterations": 1}
    found, metrics = told(settings, **changed), rows(run(settings, **changed) / "metrics.jsonl")
    assert found["iteration"]["forwards"] == metrics[0]["forwards"] == told(settings)["iteration"]["forwards"]


def test_no_weights_are_read(settings, random_model, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(random_model, bare, ignore=shutil.ignore_patterns("*.safetensors", "tokenizer*"))
    assert not list(bare.rglob("*.safetensors"))
    found, whole = told(settings, model=str(bare)), told(settings)
    assert found | {"model": ""} == whole | {"model": ""}


def test_disk_is_that_of_the_run(settings):
    changed = {"lora_rank": 16, "iterations": 4, "checkpoint_every": 2}
    found, out = told(settings, **changed), run(settings, **changed)
    saved = [sum(file.stat().st_size for file in path.iterdir()) for path in sorted((out / "checkpoints").iterdir())]
    assert len(saved) == found["disk"]["checkpoints"]
    assert all(size == pytest.approx(found["disk"]["checkpoint"], rel=0.04) for size in saved)
    names = checkpoint.read(checkpoint.latest(out / "checkpoints"))[0]
    assert sum(own.numel() for own in names["adapter"].values()) == found["parameters"]["adapter"]
    images = sum(file.stat().st_size for file in (out / "images").rglob("*.png"))
    assert 0 < images <= found["disk"]["images"]


def test_memory_follows_the_settings(settings):
    device = told(settings)["memory"]["device"]
    half = told(settings, precision="bfloat16")["memory"]["device"]
    assert half["transformer"] * 2 == device["transformer"]
    assert half["adapter"] == device["adapter"]
    assert told(settings, micro_batch=1)["memory"]["device"]["replay"] < device["replay"]
    assert told(settings, gradient_checkpointing=True)["memory"]["device"]["replay"] < device["replay"]
    parts = {name: own for name, own in device.items() if name not in ("rollout", "replay", "total")}
    assert device["total"] == sum(parts.values()) + max(device["rollout"], device["replay"])


def test_records_are_refused(settings):
    c = configs.build(settings, "test").model_copy(update={"records": "judged.jsonl"})
    with pytest.raises(BadInput, match="with records nothing is"):
        estimate.estimate(c)


def test_the_command_tells_it(settings, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(settings))
    plain = CliRunner().invoke(app, ["estimate", str(file), "--gpus", "2"])
    assert plain.exit_code == 0
    assert "at most: replay_forwards" in plain.output
    assert "seconds" not in plain.output
    result = CliRunner().invoke(app, ["estimate", str(file), "--gpus", "2", "--calibrate", "--json"])
    found = json.loads(result.output)
    taken = found["seconds"]
    assert taken["iteration"] > 0
    assert taken["run"] == pytest.approx(4 * taken["iteration"] + taken["evaluations"])
    assert found["iteration"] == told(settings)["iteration"]


def test_seconds_are_counts_times_speed(settings):
    c = configs.build(settings | {"objective": {"type": "grpo", "beta": 0.1}}, "test")
    found = estimate.estimate(c, 2)
    speed = timing.Speed(forward=1.0, learn=3.0, decode=10.0, reward=100.0, judge=1000.0)
    rank, held = found["ranks"][0], found["evaluations"]
    iteration = rank["forwards"] + 2 * rank["replay_forwards"] + 110 * rank["decodes"]
    taken = timing.durations(c, found, speed)
    assert taken["iteration"] == iteration
    assert taken["evaluations"] == (held["forwards"] + 1010 * held["decodes"]) / 2
