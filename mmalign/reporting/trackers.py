"""Experiment trackers, through accelerate: they log metrics, evaluations and images, each at its iteration.

The files of the run are the record; trackers get a copy once these are written. A tracker that fails is reported once
and disabled; the run continues.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, get_available_trackers
from jaxtyping import UInt8
from rich.console import Console

from mmalign.config import secrets
from mmalign.config.schema import Config
from mmalign.errors import BadInput
from mmalign.reporting.report import credit_scale
from mmalign.runs import jsonl
from reward_models import overlay
from reward_models.images import levels

PROJECT = "mmalign"
Images = Mapping[str, UInt8[np.ndarray, "n H W 3"]]


@dataclass(frozen=True)
class Trackers:
    """The trackers of a run that still work; none if the config names none."""

    working: list[GeneralTracker]
    console: Console

    def log(self, values: Mapping[str, int | float], step: int) -> None:
        self._each("log", dict(values), step)

    def show(self, images: Images, step: int) -> None:
        """Log images by name, to the trackers that support images."""
        self._each("log_images", dict(images), step)

    def finish(self) -> None:
        self._each("finish")

    def _each(self, action: str, *args: Any) -> None:
        for tracker in [tracker for tracker in self.working if hasattr(tracker, action)]:
            more = {"dataformats": "NHWC"} if (action, tracker.name) == ("log_images", "tensorboard") else {}
            try:
                getattr(tracker, action)(*args, **more)
            except Exception as error:  # of any kind: a tracker must not end the run
                self.working.remove(tracker)
                self.console.print(f"trackers: {tracker.name} failed and is disabled: {_line(error)}")


def check(names: Sequence[str]) -> None:
    """BadInput for a tracker that is not installed."""
    missing = sorted({*names} - {str(name) for name in get_available_trackers()})
    if missing:
        raise BadInput(f"trackers: {missing[0]} is not installed; pip install {missing[0]}")


@contextmanager
def opened(c: Config, out: Path, done: int, console: Console) -> Iterator[Trackers]:
    """The config's trackers, started with the config, for a run in `out` that has finished `done` iterations. Their
    files go below `out`. BadInput for a tracker that does not start."""
    options = {
        "tensorboard": {"purge_step": done + 1 if done else 0},  # drops what was logged after the checkpoint
        "wandb": {"dir": str(out), "name": out.name},
        "trackio": {"name": out.name},
    }
    accelerator = Accelerator(log_with=c.trackers or None, project_dir=out)
    try:
        if c.trackers:
            out.mkdir(parents=True, exist_ok=True)
        accelerator.init_trackers(PROJECT, _flat(c), options)
    except Exception as error:
        raise BadInput(f"trackers: {', '.join(c.trackers)} did not start: {_line(error)}") from error
    trackers = Trackers(accelerator.trackers, console)
    try:
        yield trackers
    finally:
        trackers.finish()


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _flat(c: Config) -> dict[str, Any]:
    """The config in a form that trackers accept: numbers, strings, and JSON of the rest, without secrets."""
    values = secrets.public(c.model_dump(mode="json"))
    return {key: json.dumps(value) if isinstance(value, list | dict) else value for key, value in values.items()}


def sheet(path: Path) -> dict[str, UInt8[np.ndarray, "n H W 3"]]:
    """The contact sheet of an evaluation."""
    return {"held_out": levels(path)[None]}


def credit(out: Path, iteration: int) -> dict[str, UInt8[np.ndarray, "n H W 3"]]:
    """The saved images of an iteration: plain, with the map over them, and with the credit of each step over them, the
    same as in the report."""
    rows = [row for row in jsonl.rows(out / "credit.jsonl") if row["iteration"] == iteration]
    scale, images = credit_scale(rows), {}
    for row in rows:
        image = levels(out / row["image"])
        shown = {"image": image}
        if row["map"]:
            shown["map"] = overlay.tinted(image, row["map"])
        shown |= {f"step {step}": overlay.tinted(image, grid, scale) for step, grid in row["advantage"].items()}
        for name, pixels in shown.items():
            images.setdefault(f"credit/{name}", []).append(pixels)
    return {name: np.stack(group) for name, group in images.items()}
