"""Read a run's folder for the report, tolerating partial and damaged files.

A file may be read while it is written, or after it was damaged. An incomplete line, or a row with a text instead of a
number, is left out and named; the other rows are read.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from mmalign.config import load as configs
from mmalign.config.schema import Config
from mmalign.errors import BadInput
from mmalign.runs import checkpoint, jsonl
from reward_models import files, limits
from reward_models.errors import first_problem

SIDES = ("before", "after")

Row = dict[str, Any]
Count = Annotated[int, Field(ge=0, le=10**12)]  # larger values are not counts of a run, and cannot be plotted


def _plottable(value: float) -> float:
    if math.isfinite(value) and abs(value) > 1e100:
        raise ValueError(f"{value:g} is too large to be plotted")
    return value


Number = Annotated[float, AfterValidator(_plottable)]
Grid = Annotated[list[Annotated[list[float | None], Field(min_length=1)]], Field(min_length=1)]


class _Shape(BaseModel):
    """The fields that a row must have; an integer is accepted as a number, a text is not."""

    model_config = ConfigDict(strict=True, extra="allow")


class _Numbers(_Shape):
    __pydantic_extra__: dict[str, Number]

    iteration: Count


class _Iteration(_Numbers):
    reward: Number
    forwards: Count
    replay_forwards: Count
    decodes: Count
    rewards: Count


class _Evaluation(_Numbers):
    name: str | None
    images: Count
    seconds: Number


class _Alarm(_Shape):
    iteration: Count
    alarm: str
    text: str


class _Credit(_Shape):
    iteration: Count
    image: str
    prompt: str
    reward: float | None
    map: Grid | None
    advantage: dict[str, Grid]


class _Box(_Shape):
    box: Annotated[list[float], Field(min_length=4, max_length=4)]
    credit: float
    label: str
    reason: str


class _Places(_Shape):
    size: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]
    map: Grid | None
    boxes: list[_Box]


class _Scored(_Shape):
    image: str
    prompt: str
    id: Annotated[int, Field(ge=-(2**63), lt=2**63)]
    scores: Annotated[dict[str, float | None], Field(min_length=1)]
    noise_seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    places: dict[str, _Places] = {}


@dataclass(frozen=True)
class RunRecord:
    """The rows of a run's files, `scores` by side, and its `config` (None where it cannot be read) with its `text`.
    `lacking` has a line for each file that is missing or of which something was left out."""

    config: Config | None
    text: str
    metrics: list[Row]
    evaluations: list[Row]
    alarms: list[Row]
    credit: list[Row]
    scores: dict[str, list[Row]]
    lacking: list[str]


def read(run: Path) -> RunRecord:
    """The record of the run in a folder. Never fails on the content of its files."""
    lacking: list[str] = []

    def rows(name: str, shape: type[_Shape], needed: bool = False) -> list[Row]:
        valid, problems = _rows(run / name, shape, needed)
        lacking.extend(f"{name}: {problem}" for problem in problems)
        return valid

    text, c = "", None
    try:
        text = files.content(run / "config.yaml", configs.LONGEST).decode(errors="replace")
        c = configs.load(run / "config.yaml")
    except OSError as error:
        lacking.append(f"config.yaml: {error.strerror}")
    except BadInput as error:
        lacking.append(str(error).removeprefix(f"{run}/"))
    begun = bool(checkpoint.numbered(run / "checkpoints"))  # rows are flushed to the disk before the checkpoint
    metrics = rows("metrics.jsonl", _Iteration, begun)
    evaluations = rows("evaluations.jsonl", _Evaluation, begun and c is not None and c.held_out is not None)
    made = {row["name"] for row in evaluations}
    return RunRecord(
        c,
        text,
        metrics,
        evaluations,
        rows("alarms.jsonl", _Alarm),
        rows("credit.jsonl", _Credit),
        {side: rows(scores_of(side), _Scored, side in made) for side in SIDES},
        lacking,
    )


def scores_of(evaluation: str) -> str:
    """The file, below a run's folder, with the images of an evaluation and their scores."""
    return f"images/{evaluation}/scores.jsonl"


def scored(run: Path, evaluation: str) -> tuple[list[Row], list[str]]:
    """The rows of the images of an evaluation between start and end, and a line for what was left out."""
    name = scores_of(evaluation)
    valid, problems = _rows(run / name, _Scored, True)
    return valid, [f"{name}: {problem}" for problem in problems]


def _rows(path: Path, shape: type[_Shape], needed: bool) -> tuple[list[Row], list[str]]:
    """The rows of a file that have the shape, and its problem, in one line, if there is one."""
    try:
        lines = jsonl.objects(files.content(path, limits.TEXT))
    except FileNotFoundError:
        return [], ["missing"] if needed else []
    except OSError as error:
        return [], [f"cannot be read: {error.strerror}"]
    except ValueError as error:
        return [], [str(error)]
    if needed and not lines:
        return [], ["empty"]
    rows, wrong = [], []
    for number, row in enumerate(lines, 1):
        try:
            if row is None:
                raise BadInput("incomplete, or not a JSON object")
            shape.model_validate(row)
            rows.append(row)
        except ValidationError as error:
            wrong.append(f"line {number}: {first_problem(error.errors())}")
        except BadInput as error:
            wrong.append(f"line {number}: {error}")
    more = f"; {len(wrong) - 1} more lines" if wrong[1:] else ""
    return rows, [f"{wrong[0]}{more}; left out"] if wrong else []
