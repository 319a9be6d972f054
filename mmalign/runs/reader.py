"""What a run has written so far, read back for its page: rows as they should be, and a line for what is amiss.

A file may be read while it is written, or long after a disk or a hand has damaged it. A line that is cut or a row with
a text where a number belongs is left out and named; nothing that is left whole is lost with it.
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

SIDES = ("before", "after")

Row = dict[str, Any]
Count = Annotated[int, Field(ge=0, le=10**12)]  # more is no count of a run, and cannot be drawn


def _drawable(value: float) -> float:
    if math.isfinite(value) and abs(value) > 1e100:
        raise ValueError(f"{value:g} is too large to be drawn")
    return value


Number = Annotated[float, AfterValidator(_drawable)]
Grid = Annotated[list[Annotated[list[float | None], Field(min_length=1)]], Field(min_length=1)]


class _Shape(BaseModel):
    """What a row must have; a whole number is a number, a text is none."""

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
    places: dict[str, _Places] = {}


@dataclass(frozen=True)
class Written:
    """The rows of a run's files, `scores` by side, and its `config` with the `text` of that, None where it is not one.
    `lacking` has a line for each file that should be there and is not, or that something was left out of."""

    config: Config | None
    text: str
    metrics: list[Row]
    evaluations: list[Row]
    alarms: list[Row]
    credit: list[Row]
    scores: dict[str, list[Row]]
    lacking: list[str]


def read(run: Path) -> Written:
    """What lies in a run's folder. Never fails on what is in its files."""
    lacking: list[str] = []

    def rows(name: str, shape: type[_Shape], needed: bool = False) -> list[Row]:
        found, said = _rows(run / name, shape, needed)
        lacking.extend(f"{name}: {own}" for own in said)
        return found

    text, c = "", None
    try:
        text = files.content(run / "config.yaml", configs.LONGEST).decode(errors="replace")
        c = configs.load(run / "config.yaml")
    except OSError as error:
        lacking.append(f"config.yaml: {error.strerror}")
    except BadInput as error:
        lacking.append(str(error).removeprefix(f"{run}/"))
    begun = bool(checkpoint.numbered(run / "checkpoints"))  # rows are on the disk before the checkpoint is
    metrics = rows("metrics.jsonl", _Iteration, begun)
    evaluations = rows("evaluations.jsonl", _Evaluation, begun and c is not None and c.held_out is not None)
    made = {row["name"] for row in evaluations}
    return Written(
        c,
        text,
        metrics,
        evaluations,
        rows("alarms.jsonl", _Alarm),
        rows("credit.jsonl", _Credit),
        {side: rows(f"images/{side}/scores.jsonl", _Scored, side in made) for side in SIDES},
        lacking,
    )


def _rows(path: Path, shape: type[_Shape], needed: bool) -> tuple[list[Row], list[str]]:
    """The rows of a file that have the shape, and what there is to say of it, in a line at most."""
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
    found, wrong = [], []
    for number, row in enumerate(lines, 1):
        try:
            if row is None:
                raise BadInput("not whole, or no JSON object")
            shape.model_validate(row)
            found.append(row)
        except ValidationError as error:
            first = error.errors()[0]
            wrong.append(f"line {number}: {'.'.join(map(str, first['loc']))}: {first['msg']}")
        except BadInput as error:
            wrong.append(f"line {number}: {error}")
    more = f"; {len(wrong) - 1} more lines" if wrong[1:] else ""
    return found, [f"{wrong[0]}{more}; left out"] if wrong else []
