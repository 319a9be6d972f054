"""Trackers get what the record has, and nothing they do reaches it. Every second of an iteration is some part's."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate.tracking import GeneralTracker
from PIL import Image
from rich.console import Console
from run_config import cut_off, rows, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmalign import run as runs
from mmalign.config import load as configs, yaml12
from mmalign.errors import BadInput
from mmalign.evaluation import evaluate, layouts
from mmalign.objectives import Grpo
from mmalign.policy.pipeline import PipelinePolicy
from mmalign.reporting import trackers as tracking
from mmalign.runs import checkpoint
from mmalign.training import learner, rollout, setup, snapshots
from mmalign.training.clock import Clock
from reward_models import files, load, overlay as heat


def events(out) -> EventAccumulator:
    return EventAccumulator(str(out / "mmalign"), {"scalars": 0, "images": 0, "tensors": 0}).Reload()


def float32(values) -> np.ndarray:
    return np.array(list(values), np.float32)


def same_as_the_record(out) -> None:
    """Every number of every row, at its iteration, as TensorBoard keeps numbers."""
    loaded, metrics, evaluations = events(out), rows(out / "metrics.jsonl"), rows(out / "evaluations.jsonl")
    expected = {key: [(row["iteration"], row[key]) for row in metrics if key in row] for row in metrics for key in row}
    for key in {key for row in evaluations for key in row} - {"iteration", "name"}:
        expected[f"held_out/{key}"] = [(row["iteration"], row[key]) for row in evaluations if key in row]
    assert set(loaded.Tags()["scalars"]) == set(expected)
    for key, points in expected.items():
        logged = loaded.Scalars(key)
        assert [event.step for event in logged] == [step for step, _ in points]
        assert np.array_equal(float32(e.value for e in logged), float32(v for _, v in points), equal_nan=True)


def test_tensorboard_has_the_record(settings):
    out = run(settings, trackers=["tensorboard"], scorers={"jpeg_size": {"quality": 80}})
    same_as_the_record(out)
    images = events(out)
    assert [event.step for event in images.Images("held_out")] == [0, 2, 4]
    assert {"credit/image", "credit/step 0", "credit/step 1"} <= set(images.Tags()["images"])
    sheet = Image.open(io.BytesIO(images.Images("held_out")[-1].encoded_image_string))
    assert np.array_equal(np.asarray(sheet), np.asarray(Image.open(out / "images/after.png").convert("RGB")))
    (logged,) = (out / "mmalign").rglob("hparams.yml")
    assert json.loads(yaml12.parsed(logged.read_text())["scorers"]) == {"jpeg_size": {"quality": 80}}


def test_a_resumed_run_takes_back_what_it_logs_again(settings):
    with cut_off(after=3):
        run(settings, trackers=["tensorboard"])
    same_as_the_record(Path(settings["out"]))
    same_as_the_record(run(settings, trackers=["tensorboard"], resume=True))


def test_secrets_stay(settings):
    c = configs.build(settings | {"scorers": {"jpeg_size": {"quality": 80}}}, "test")
    logged = tracking._flat(c.model_copy(update={"scorers": {"jpeg_size": {"token": "abc", "quality": 80}}}))
    assert json.loads(logged["scorers"])["jpeg_size"]["quality"] == 80
    assert "abc" not in str(logged)
    assert all(value is None or isinstance(value, bool | int | float | str) for value in logged.values())


def test_a_tracker_that_is_not_there_is_refused_before_anything_is_written(settings, monkeypatch, tmp_path):
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(BadInput, match="trackers: wandb is not installed; pip install wandb"):
        run(settings, trackers=["tensorboard", "wandb"])
    assert not (tmp_path / "run").exists()


class Broken(GeneralTracker):
    """A tracker whose network goes down after two rows."""

    name = "broken"
    requires_logging_directory = False
    tracker = None

    def __init__(self):
        super().__init__()
        self.steps = []

    def log(self, values, step):
        if len(self.steps) == 2:
            raise OSError("the network\nis down")
        self.steps.append(step)

    def finish(self):
        raise AssertionError("it failed before")


def test_a_tracker_that_fails_is_said_once_and_costs_nothing(settings, monkeypatch):
    broken, output = Broken(), io.StringIO()
    accelerator = SimpleNamespace(init_trackers=lambda *_: None, trackers=[broken])
    monkeypatch.setattr(tracking, "Accelerator", lambda **_: accelerator)
    out = runs.train(configs.build(settings, "test"), console=Console(file=output, width=200))
    assert broken.steps == [0, 1]
    assert [row["iteration"] for row in rows(out / "metrics.jsonl")] == [1, 2, 3, 4]
    assert output.getvalue().count("broken failed and is disabled: OSError: the network is down") == 1


def test_a_tracker_that_does_not_begin_is_bad_input_and_leaves_no_run(settings, monkeypatch, tmp_path):
    def init_trackers(*_):
        raise RuntimeError("no key")

    monkeypatch.setattr(tracking, "Accelerator", lambda **_: SimpleNamespace(init_trackers=init_trackers))
    with pytest.raises(BadInput, match="trackers: tensorboard did not start: RuntimeError: no key"):
        run(settings, trackers=["tensorboard"])
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_tints_are_the_cells_of_the_page():
    image = np.full((4, 6, 3), 200, np.uint8)
    tinted = heat.tinted(image, [[1.0, None, 0.0], [None, -0.5, None]])
    right, wrong = ([int(code[i : i + 2], 16) for i in (1, 3, 5)] for code in (heat.RIGHT, heat.WRONG))
    expected = image.copy()
    expected[:2, :2] = [round(0.6 * 200 + 0.4 * value) for value in right]
    expected[2:, 2:4] = [round(0.8 * 200 + 0.2 * value) for value in wrong]
    assert np.array_equal(tinted, expected)


class Hands:
    """A clock that moves only where something slow is done."""

    def __init__(self):
        self.time = 0.0

    def __call__(self) -> float:
        return self.time

    def slow(self, function, seconds: float):
        def work(*args, **named):
            self.time += seconds
            return function(*args, **named)

        return work


def test_the_parts_of_an_iteration_are_all_its_time(settings, monkeypatch):
    """Everything slow takes a whole number of seconds, by which each part and the total are known exactly."""
    hands, scorer = Hands(), type(load("jpeg_size"))
    slow = {
        (rollout, "trajectories"): 2, (Grpo, "batch"): 3, (learner, "update"): 5, (snapshots, "write"): 7,
        (evaluate, "generate"): 100, (evaluate, "contact_sheet"): 11, (layouts, "write"): 13,
        (checkpoint, "save"): 17, (files, "append"): 1, (scorer, "__call__"): 23,
        (PipelinePolicy, "decode"): 19, (tracking.Trackers, "log"): 29,
    }  # fmt: skip
    for (place, name), seconds in slow.items():
        monkeypatch.setattr(place, name, hands.slow(getattr(place, name), seconds))

    monkeypatch.setattr(setup, "Clock", lambda: Clock(hands))
    metrics = rows(run(settings, checkpoint_every=3) / "metrics.jsonl")
    parts = [{k.removeprefix("seconds/"): v for k, v in row.items() if k.startswith("seconds/")} for row in metrics]
    wrote = 1 + 29  # a row, and the same to trackers
    first, second, third, fourth = (
        {"io": 11 + 13 + wrote, "evaluate": 100 + 19 + 23},  # before
        {"io": wrote + 19 + 7 + snapshots.COUNT},  # snapshots, decoded again, and a row for each
        {"io": wrote + 17 + 11 + 13 + wrote, "evaluate": 100 + 19 + 23},  # what is evaluated is saved first
        {"io": wrote + 17 + 19 + 7 + snapshots.COUNT},  # a checkpoint, and the snapshots of the last
    )
    for part, extra in zip(parts, (first, second, third, fourth), strict=True):
        expected = {"rollout": 2, "decode": 19, "reward": 23, "learn": 3 + 5} | extra
        assert part == expected | {"total": sum(expected.values())}
    assert [row["nfe_per_second"] for row in metrics] == [
        (row["forwards"] + row["replay_forwards"]) / (2 + 3 + 5) for row in metrics
    ]
