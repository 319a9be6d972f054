"""Whole runs on a random pipeline: reproducible, resumable, and recorded."""

import contextlib

import pytest
import torch
from run_config import cut_off, rows, run

from mmalign.config import load as configs, paths
from mmalign.data import prompts
from mmalign.errors import BadInput
from mmalign.reporting import report
from mmalign.runs import checkpoint
from mmalign.training import noise_calibration as calibrate, setup
from reward_models.weights import fingerprint


def adapter(out):
    return checkpoint.read(checkpoint.latest(out / "checkpoints"))[1]["adapter_hash"]


def test_same_seed_same_adapter(settings, tmp_path):
    first = run(settings)
    again = run(settings, out=str(tmp_path / "again"))
    other = run(settings, out=str(tmp_path / "other"), seed=1)
    assert adapter(first) == adapter(again) != adapter(other)


def test_batches_change_the_adapter_by_rounding_alone(settings, tmp_path):
    """With a smooth reward: one that jumps, like a file's size, makes a pixel's rounding a difference in reward."""
    smooth = settings | {"rewards": {"smooth:Smooth.red": 1.0, "smooth:Smooth.even": 1.0}}
    first = run(smooth)
    small = run(smooth, out=str(tmp_path / "small"), batch=3, micro_batch=5)
    for key in ("adapter", "ema"):
        one, two = (checkpoint.read(checkpoint.latest(o / "checkpoints"))[0][key] for o in (first, small))
        assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


LAGGING = {"plan": "ode", "seeds": 3, "objective": {"type": "nft", "lag": {"most": 0.5, "rate": 0.2}, "pull": 0.1}}


@pytest.mark.parametrize("changed", [{}, LAGGING], ids=["grpo", "nft"])
def test_interrupted_and_resumed_is_uninterrupted(settings, tmp_path, changed):
    settings = settings | changed
    whole = run(settings)
    with cut_off(after=3):
        run(settings, out=str(tmp_path / "cut"))
    assert len(rows(tmp_path / "cut" / "metrics.jsonl")) == 3  # one iteration past the checkpoint
    cut = run(settings, resume=True, out=str(tmp_path / "cut"))
    assert adapter(cut) == adapter(whole)
    timeless = [
        [{k: v for k, v in row.items() if "second" not in k} for row in rows(o / "metrics.jsonl")] for o in (whole, cut)
    ]
    assert timeless[0] == timeless[1]
    assert [row["iteration"] for row in rows(cut / "evaluations.jsonl")] == [0, 2, 4]


@pytest.mark.parametrize("finished", [False, True])
def test_resuming_early_or_after_the_end_repeats_no_row(settings, finished):
    """Cut off before the first checkpoint, or already finished: the record is that of one whole run."""
    with contextlib.nullcontext() if finished else cut_off(after=0):
        run(settings)
    out = run(settings, resume=True)
    assert [row["iteration"] for row in rows(out / "metrics.jsonl")] == [1, 2, 3, 4]
    assert [(row["iteration"], row["name"]) for row in rows(out / "evaluations.jsonl")] == [
        (0, "before"),
        (2, None),
        (4, "after"),
    ]


def test_the_record_of_a_run(settings):
    out = run(settings)
    metrics = rows(out / "metrics.jsonl")
    assert len(metrics) == 4
    for row in metrics:
        children = 2 * 2 * (2 * (3 + 2) + 2)  # prompts x seeds x (children x their remaining steps + trunk)
        assert row["forwards"] == children == 48
        assert row["decodes"] == row["rewards"] == 2 * 2 * 2 * 2
        assert row["replay_forwards"] <= row["transitions"] == 16
        assert {"reward", "ratio/0", "ratio/1", "grad_norm", "diversity", "seconds/rollout", "seconds/learn"} <= set(
            row
        )
        assert row["ratio"] == pytest.approx(1, abs=1e-6)
    assert len({row["reward"] for row in metrics}) == 4
    for side in ("before", "after"):
        assert len(list((out / "images" / side).glob("*.png"))) == 4
    assert {path.name for path in (out / "images").glob("*.png")} == {"before.png", "000002.png", "after.png"}
    assert (
        configs.load(out / "config.yaml").model_dump()
        == configs.build(configs.load(out / "config.yaml").model_dump(), "x").model_dump()
    )
    page = report.write(out).read_text()
    assert page.count("<img") == 8 + 2 * 3 + 2 * 6  # before and after; over training; six images, their credit
    assert "held-out jpeg_size.kilobytes" in page
    assert "children: 2" in page
    rise = report.summary(out)["rises"]["jpeg_size.kilobytes"]
    assert rise["rise"] == pytest.approx(rise["after"] - rise["before"], abs=1e-5)


DENSE = dict(plan="sde", credit={"type": "gain", "states": "all"}, seeds=3)


def test_the_record_of_a_dense_run(settings, capsys):
    """Counters equal the closed forms; everything is logged by step; the page shows it."""
    out = run(settings, **DENSE, objective={"type": "grpo", "beta": 0.01})
    assert "plan sde, kernel flow_sde (noise 0.7), credit gain (states all, " in " ".join(
        capsys.readouterr().out.split()
    )
    for row in rows(out / "metrics.jsonl"):
        assert row["forwards"] == 2 * 3 * (4 + 6)
        assert row["decodes"] == row["rewards"] == 2 * 3 * 4
        assert row["replay_forwards"] == 2 * row["transitions"] == 2 * 2 * 3 * 3
        for name in ("std", "gain", "gain_std", "balance", "ratio", "clipped_low", "clipped_high", "divergence", "kl"):
            assert all(f"{name}/{k}" in row for k in range(3))
            assert f"{name}/3" not in row
    page = report.write(out).read_text()
    assert "<h2>Metrics by step</h2>" in page
    assert "<th>gain std</th>" in page


def test_a_budget_is_kept_and_said(settings, capsys):
    out = run(settings, **DENSE, max_forwards=75, max_rewards=24)
    message = " ".join(capsys.readouterr().out.split())
    assert "credit gain (states all, completion 3, " in message
    assert "an iteration takes at most 54 + 18 forwards and 24 rewards" in message
    for row in rows(out / "metrics.jsonl"):
        assert row["forwards"] == 54
        assert row["forwards"] + row["replay_forwards"] <= 75
        assert row["rewards"] == 24


def test_groups_with_windows_of_their_own_learn_together(settings):
    changed = dict(plan=dict(type="window", steps=(0, 1), children=2, moves="random"), credit="terminal", steps=6)
    metrics = rows(run(settings, **changed) / "metrics.jsonl")
    observed = {key for row in metrics for key in row if key.startswith("std/")}
    assert observed == {"std/0", "std/1", "std/2"}
    assert any(sum(key.startswith("std/") for key in row) == 2 for row in metrics)


BRIGHTNESS = """
from reward_models import Card, Scores


class Brightness:
    card = Card("brightness", low=0, high=1)
    names = ("mean",)

    def __call__(self, images, prompts):
        return Scores(self.names, images.mean((1, 2, 3))[:, None])
"""


def test_a_scorer_of_ones_own_is_learnt(settings, tmp_path, monkeypatch):
    """Training raises the reward that it optimises, in rollouts and on held-out prompts."""
    (tmp_path / "own_brightness.py").write_text(BRIGHTNESS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MMALIGN_ALLOW", "own_brightness")
    changes = dict(rewards={"own_brightness:Brightness.mean": 1.0}, iterations=24, learning_rate=0.01, ema=0.5)
    out = run(settings, **changes, eval_every=0, prompts_per_iteration=4, plan=settings["plan"] | {"children": 4})
    rewards = torch.tensor([row["reward"] for row in rows(out / "metrics.jsonl")])
    assert rewards[-6:].mean() > rewards[:6].mean()
    assert report.summary(out)["rises"]["own_brightness:Brightness.mean"]["rise"] > 0


@pytest.mark.parametrize(
    "change",
    [
        dict(plan="sde", credit="terminal"),
        dict(
            plan={"type": "window", "steps": [1, 3]}, credit={"type": "branch", "baseline": "prompt"},
            kernel={"type": "cps", "noise": 0.8},
        ),
        dict(
            credit={"type": "branch", "baseline": "prompt"}, guidance=2.0,
            objective={"type": "grpo", "beta": 0.1, "weighting": "noise"}, epochs=2, minibatches=2,
            precision="bfloat16",
        ),
    ],
)  # fmt: skip
def test_other_methods_run(settings, change):
    out = run(settings, **(change | dict(iterations=2, held_out=None)))
    assert all(row["ratio/1"] == pytest.approx(1, abs=1e-2) for row in rows(out / "metrics.jsonl"))
    assert not (out / "images" / "after").exists()


def test_calibrated_noise_is_frozen_for_a_run(settings, tmp_path):
    """A calibration that changes under a run's feet is refused on resumption."""
    c = configs.build(settings, "test")
    times = setup.open_session(c).times
    path = tmp_path / "noise.json"
    rounds = [{"noise": [0.5, 0.4, 0.3, 0.0], "better": [1.0] * 4, "worse": [1.0] * 4}] * 2
    calibrate.save(path, c, times, rounds, "z")
    changed = dict(kernel={"type": "scheduled", "noise": str(path)}, iterations=2, held_out=None)
    out = run(settings, **changed)
    assert rows(out / "metrics.jsonl")[0]["std/0"] == pytest.approx(0.5 * float(times[0] - times[1]) ** 0.5, rel=1e-5)
    rounds[1] = rounds[0] | {"noise": [0.6, 0.4, 0.3, 0.0]}
    calibrate.save(path, c, times, rounds, "z")
    with pytest.raises(BadInput, match="a run keeps its kernel"):
        run(settings, resume=True, **changed)


def test_failing_rewards_stop_the_run(settings):
    with pytest.raises(RuntimeError, match=r"16 of 16 images could not be scored.*no ground truth"):
        run(settings, rewards={"shapes.strict": 1.0}, held_out=None)


def test_folders(settings):
    out = run(settings, iterations=1, held_out=None)
    with pytest.raises(BadInput, match="already holds a run"):
        run(settings)
    with pytest.raises(BadInput, match="lora_rank is 3 and was 2"):
        run(settings, resume=True, iterations=1, held_out=None, lora_rank=3)
    with pytest.raises(BadInput, match="holds no run"):
        run(settings, resume=True, out=str(out / "elsewhere"))
    assert not (out / "elsewhere").exists()


def test_training_and_held_out_prompts_must_differ(settings):
    with pytest.raises(BadInput, match=r"4 meanings are .* e\.g\. 'a blue square' and 'a blue square' in training"):
        run(settings, held_out=settings["prompts"])


def test_training_and_held_out_prompts_must_differ_in_meaning(settings, tmp_path):
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("a green cross\nThe square  below a circle\n")
    with pytest.raises(BadInput) as caught:
        run(settings, held_out=str(held_out))
    assert "1 meanings" in str(caught.value)
    assert "'The square  below a circle' and 'a circle above a square' in training" in str(caught.value)


def test_a_half_written_checkpoint_is_not_seen(tmp_path):
    checkpoint.save(tmp_path, 3, {"adapter": {"w": torch.ones(2)}}, {"note": 1})
    (tmp_path / ".000004.partial").mkdir()
    (tmp_path / "000005").mkdir()
    assert checkpoint.latest(tmp_path).name == "000003"
    tensors, state = checkpoint.read(tmp_path / "000003")
    assert torch.equal(tensors["adapter"]["w"], torch.ones(2))
    assert state == {"iteration": 3, "note": 1}


def test_fingerprints_tell_bits_apart():
    one = {"a": torch.tensor([1.0, 2.0]), "b": torch.zeros(1)}
    assert fingerprint(one) == fingerprint(dict(reversed(one.items())))
    assert fingerprint(one) != fingerprint(one | {"a": torch.tensor([1.0, 2.0000002])})


def test_prompt_order_is_a_function_of_the_iteration(prompt_files):
    batches = prompts.PromptBatches(prompts.read(paths.locate(prompt_files["train"])), 2, seed=0)
    first = [p.id for i in range(2) for p in batches(i)]
    assert sorted(first) == [0, 1, 2, 3]
    assert first == [p.id for i in range(2) for p in batches(i)]
    with pytest.raises(BadInput, match="5 requested, the file has 4"):
        prompts.PromptBatches(batches.all, 5, 0)(0)
