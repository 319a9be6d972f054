"""A run told to experiment trackers, through accelerate: metrics, evaluations and pictures, each at its iteration.

`metrics.jsonl` and its neighbours are the record; trackers get a copy once that is written. One that fails on the way
is said so once and left out from then on; the run goes on.
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
from reward_models import overlay as heat
from reward_models.images import levels

PROJECT = "mmalign"
Pictures = Mapping[str, UInt8[np.ndarray, "n H W 3"]]


@dataclass(frozen=True)
class Trackers:
    """The trackers of a run that still work; none where the config names none."""

    working: list[GeneralTracker]
    console: Console

    def log(self, values: Mapping[str, int | float], step: int) -> None:
        self._each("log", dict(values), step)

    def show(self, pictures: Pictures, step: int) -> None:
        """Pictures by name, to the trackers that take any."""
        self._each("log_images", dict(pictures), step)

    def finish(self) -> None:
        self._each("finish")

    def _each(self, action: str, *args) -> None:
        for tracker in [own for own in self.working if hasattr(own, action)]:
            own = {"dataformats": "NHWC"} if (action, tracker.name) == ("log_images", "tensorboard") else {}
            try:
                getattr(tracker, action)(*args, **own)
            except Exception as error:  # whatever it is, the run matters more
                self.working.remove(tracker)
                self.console.print(f"trackers: {tracker.name} failed and gets no more: {_line(error)}")


def check(names: Sequence[str]) -> None:
    """BadInput for a tracker that is not installed."""
    missing = sorted({*names} - {str(name) for name in get_available_trackers()})
    if missing:
        raise BadInput(f"trackers: {missing[0]} is not installed; pip install {missing[0]}")


@contextmanager
def opened(c: Config, out: Path, done: int, console: Console) -> Iterator[Trackers]:
    """The config's trackers, begun and given the config, for a run in `out` that has `done` iterations behind it. Their
    files go below `out`. BadInput for one that does not begin."""
    begin = {
        "tensorboard": {"purge_step": done + 1 if done else 0},  # what a run cut off had logged past its checkpoint
        "wandb": {"dir": str(out), "name": out.name},
        "trackio": {"name": out.name},
    }
    accelerator = Accelerator(log_with=c.trackers or None, project_dir=out)
    try:
        if c.trackers:
            out.mkdir(parents=True, exist_ok=True)
        accelerator.init_trackers(PROJECT, _flat(c), begin)
    except Exception as error:
        raise BadInput(f"trackers: {', '.join(c.trackers)} did not begin: {_line(error)}") from error
    trackers = Trackers(accelerator.trackers, console)
    try:
        yield trackers
    finally:
        trackers.finish()


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _flat(c: Config) -> dict[str, Any]:
    """The config as trackers take it: numbers, words, and JSON of the rest, without what opens doors."""
    values = secrets.public(c.model_dump(mode="json"))
    return {key: json.dumps(own) if isinstance(own, list | dict) else own for key, own in values.items()}


def sheet(path: Path) -> dict[str, UInt8[np.ndarray, "n H W 3"]]:
    """The contact sheet of an evaluation."""
    return {"held_out": levels(path)[None]}


def credit(out: Path, iteration: int) -> dict[str, UInt8[np.ndarray, "n H W 3"]]:
    """Of the images that `exhibit` kept of an iteration: the images, the maps over them, and the credit of each step
    over them, as the report has them."""
    rows = [row for row in jsonl.rows(out / "credit.jsonl") if row["iteration"] == iteration]
    scale, pictures = credit_scale(rows), {}
    for row in rows:
        image = levels(out / row["image"])
        shown = {"image": image}
        if row["map"]:
            shown["map"] = heat.tinted(image, row["map"])
        shown |= {f"step {step}": heat.tinted(image, grid, scale) for step, grid in row["advantage"].items()}
        for name, picture in shown.items():
            pictures.setdefault(f"credit/{name}", []).append(picture)
    return {name: np.stack(own) for name, own in pictures.items()}
