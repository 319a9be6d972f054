"""The estimate of a run, made without its weights, equals the metrics of the run."""

import json
import shutil
from collections import Counter

import pytest
from run_config import rows, run
from tiny_pipelines import FAMILIES
from typer.testing import CliRunner

from mmalign import policy as policies
from mmalign.checks import estimate, timing
from mmalign.cli.app import app
from mmalign.config import load as configs
from mmalign.errors import BadInput
from mmalign.runs import checkpoint

PLANS = {
    "branch": {},
    "sde": {"plan": "sde"},
    "tree": {"plan": {"type": "tree", "steps": (0, 1), "children": 2}, "credit": "branch"},
    "window": {"plan": {"type": "window", "steps": (1, 3), "children": 2}},
    "moving": {"plan": {"type": "window", "steps": (0, 1), "children": 3, "moves": "progressive"}},
    "random": {"plan": {"type": "window", "steps": (0, 1), "children": 2, "moves": "random"}, "steps": 8},
    "gain": {"plan": "sde", "credit": "gain"},
    "guided": {"guidance": 3.0, "epochs": 2, "minibatches": 2},
    "attended": {"mask": {"type": "prompt", "share": 0.25}},
    "budget": {"max_forwards": 70, "max_rewards": 12},
}  # fmt: skip


def estimated(settings, gpus=1, **changed):
    return estimate.estimate(configs.build(settings | changed, "test"), gpus)


@pytest.mark.parametrize("name", PLANS)
def test_counts_are_those_of_the_run(settings, name):
    """With beta > 0 every row is replayed, so that all counts are known before."""
    changed = PLANS[name] | {"objective": {"type": "grpo", "beta": 0.1}, "iterations": 3, "eval_every": 0}
    changed |= {"credit": "terminal"} if name not in ("branch", "tree", "gain", "guided", "attended", "budget") else {}
    figures, out = estimated(settings, **changed), run(settings, **changed)
    metrics = rows(out / "metrics.jsonl")
    shared = any("share a forward" in note for note in figures["bounds"])
    assert shared == (name == "guided")
    for count in estimate.COUNTS:
        total = sum(row[count] for row in metrics)
        if shared and count == "replay_forwards":
            assert figures["run"][count] > total > 0
        else:
            assert figures["run"][count] == total > 0
        if not figures["bounds"]:
            assert [row[count] for row in metrics] == [figures["iteration"][count]] * 3
        assert max(row[count] for row in metrics) <= figures["iteration"][count]
    evaluations = rows(out / "evaluations.jsonl")
    assert figures["evaluations"]["decodes"] == sum(row["images"] for row in evaluations)
    assert figures["evaluations"]["evaluations"] == len(evaluations)


def test_without_beta_replay_is_a_bound_and_says_so(settings):
    figures, metrics = estimated(settings), rows(run(settings) / "metrics.jsonl")
    assert any(note.startswith("replay_forwards") for note in figures["bounds"])
    assert all(row["replay_forwards"] <= figures["iteration"]["replay_forwards"] for row in metrics)
    assert all(row["forwards"] == figures["iteration"]["forwards"] for row in metrics)


@pytest.mark.parametrize(
    ("objective", "epochs"),
    [
        ("nft", 1),
        ({"type": "nft", "pull": 0.0}, 2),
        ({"type": "awm", "lag": {"most": 0.5}}, 1),
        ({"type": "outcome", "label": "reward"}, 2),
    ],
)
def test_velocities_to_compare_with_are_counted_once(settings, objective, epochs):
    """Every row is replayed, because the pull, or the policy that drew the images, moves those of advantage 0 too; a
    reward that is the outcome gives each image a row."""
    changed = {"plan": "ode", "seeds": 3, "objective": objective, "epochs": epochs, "iterations": 3, "eval_every": 0}
    figures, metrics = estimated(settings, **changed), rows(run(settings, **changed) / "metrics.jsonl")
    for count in estimate.COUNTS:
        assert [row[count] for row in metrics] == [figures["iteration"][count]] * 3


def test_evaluations_are_those_of_the_run(settings):
    changed = {"iterations": 5, "eval_every": 2, "eval_prompts": 1, "eval_seeds": 3, "watch": ["image_stats"]}
    changed |= {"eval_siblings": 2}
    figures, evaluations = estimated(settings, **changed), rows(run(settings, **changed) / "evaluations.jsonl")
    assert [row["iteration"] for row in evaluations] == [0, 2, 4, 5]
    assert figures["evaluations"] == {
        "evaluations": 4,
        "decodes": sum(row["images"] for row in evaluations),
        "forwards": 2 * sum(row["images"] for row in evaluations),
        "rewards": 2 * sum(row["images"] for row in evaluations),
    }


@pytest.mark.parametrize("gpus", [1, 2, 3, 4])
@pytest.mark.parametrize("plan", ["branch", "moving", "random"])
def test_ranks_share_whole_groups_and_add_up(settings, gpus, plan):
    changed = PLANS[plan] | {"prompts_per_iteration": 4, "credit": "terminal" if plan != "branch" else "branch"}
    figures = estimated(settings, gpus, **changed)
    shares = [rank["prompts"] for rank in figures["ranks"]]
    assert len(shares) == gpus
    assert sum(shares) == 4
    assert max(shares) - min(shares) <= 1
    for count in ("prompts", "trajectories", *estimate.COUNTS):
        assert sum(rank[count] for rank in figures["ranks"]) == figures["iteration"][count]
    summed = Counter()
    for rank in figures["run_ranks"]:
        summed.update(rank)
    assert {name: figures["run"][name] for name in estimate.COUNTS} == dict(summed)


def test_guidance_that_the_network_is_told_costs_one_forward(settings, tmp_path):
    FAMILIES["FLUX.1-dev"].build(tmp_path / "flux")
    changed = {"model": str(tmp_path / "flux"), "guidance": 3.5, "size": (32, 32), "held_out": None, "iterations": 1}
    figures, metrics = estimated(settings, **changed), rows(run(settings, **changed) / "metrics.jsonl")
    assert figures["iteration"]["forwards"] == metrics[0]["forwards"] == estimated(settings)["iteration"]["forwards"]


def test_no_weights_are_read(settings, random_model, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(random_model, bare, ignore=shutil.ignore_patterns("*.safetensors", "tokenizer*"))
    assert not list(bare.rglob("*.safetensors"))
    figures, whole = estimated(settings, model=str(bare)), estimated(settings)
    assert figures | {"model": ""} == whole | {"model": ""}


def test_disk_is_that_of_the_run(settings):
    changed = {"lora_rank": 16, "iterations": 4, "checkpoint_every": 2}
    figures, out = estimated(settings, **changed), run(settings, **changed)
    saved = [sum(file.stat().st_size for file in path.iterdir()) for path in sorted((out / "checkpoints").iterdir())]
    assert len(saved) == figures["disk"]["checkpoints"]
    assert all(size == pytest.approx(figures["disk"]["checkpoint"], rel=0.04) for size in saved)
    names = checkpoint.read(checkpoint.latest(out / "checkpoints"))[0]
    assert sum(item.numel() for item in names["adapter"].values()) == figures["parameters"]["adapter"]
    images = sum(file.stat().st_size for file in (out / "images").rglob("*.png"))
    assert 0 < images <= figures["disk"]["images"]


def test_memory_follows_the_settings(settings):
    device = estimated(settings)["memory"]["device"]
    half = estimated(settings, precision="bfloat16")["memory"]["device"]
    assert half["transformer"] * 2 == device["transformer"]
    assert half["adapter"] == device["adapter"]
    assert estimated(settings, micro_batch=1)["memory"]["device"]["replay"] < device["replay"]
    assert estimated(settings, gradient_checkpointing=True)["memory"]["device"]["replay"] < device["replay"]
    parts = {name: item for name, item in device.items() if name not in ("rollout", "replay", "total")}
    assert device["total"] == sum(parts.values()) + max(device["rollout"], device["replay"])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_weights_are_those_of_the_loaded_model(settings, random_model, precision):
    """With their buffers: SD3's table of positions is one."""
    pipe, device = policies.load(random_model, dtype=precision).pipe, estimated(settings, precision=precision)["memory"]
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        module = getattr(pipe, name)
        assert device["device"][name] == sum(value.nbytes for value in (*module.parameters(), *module.buffers()))
    assert any(name == "pos_embed.pos_embed" for name, _ in pipe.transformer.named_buffers())


@pytest.mark.parametrize(
    ("objective", "epochs", "rows", "each"),
    [
        ({"type": "nft", "draws": 2, "pull": 0.0}, 1, 8, 2),  # image, noise
        ({"type": "nft", "draws": 2, "pull": 0.0}, 2, 8, 3),  # the velocity before the first update too
        ({"type": "nft", "draws": 2, "pull": 0.1}, 1, 8, 3),  # that of the model without adapter
        ({"type": "awm", "draws": 2, "lag": {"most": 0.5}, "pull": 0.1}, 1, 8, 4),
        ({"type": "online_dpo", "lag": {"most": 0.5}}, 1, 4, 3),  # two images, one noise
        ("rft", 1, 2, 2),
    ],
)
def test_rows_of_images_are_counted(settings, objective, epochs, rows, each):
    """Two prompts with four images each, and two rows of an image, of a pair, or of the best image."""
    changed = {"plan": "ode", "seeds": 4, "objective": objective, "epochs": epochs}
    figures = estimated(settings, **changed)
    device, (channels, high, wide) = figures["memory"]["device"], figures["latent"]
    trajectories = 8  # the finished latent of each; nothing reads the others
    assert device["latents"] == 4 * channels * high * wide * (trajectories + 2 * rows * each)
    lags = isinstance(objective, dict) and "lag" in objective
    assert device.get("old") == (device["adapter"] if lags else None)


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
    figures = json.loads(result.output)
    taken = figures["seconds"]
    assert taken["iteration"] > 0
    assert taken["run"] == pytest.approx(4 * taken["iteration"] + taken["evaluations"])
    assert figures["iteration"] == estimated(settings)["iteration"]


def test_seconds_are_counts_times_speed(settings):
    c = configs.build(settings | {"objective": {"type": "grpo", "beta": 0.1}}, "test")
    figures = estimate.estimate(c, 2)
    speed = timing.Speed(forward=1.0, learn=3.0, decode=10.0, reward=100.0, judge=1000.0)
    rank, held = figures["ranks"][0], figures["evaluations"]
    iteration = rank["forwards"] + 2 * rank["replay_forwards"] + 110 * rank["decodes"]
    taken = timing.durations(c, figures, speed)
    assert taken["iteration"] == iteration
    assert taken["evaluations"] == (held["forwards"] + 1010 * held["decodes"]) / 2
