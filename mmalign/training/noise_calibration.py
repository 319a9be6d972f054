"""How much noise each step can tolerate: DenseGRPO's exploration calibration (arXiv 2601.20218, algorithm 1).

Trajectories with more noise explore more, until a step adds more than the later ones can undo; then most of its gains
are negative. Round by round the noise of each step rises while its gains are balanced and falls when they are not:

- rule "paper": rises by `step` if |n+ - n-| < 2, else falls. With N trajectories the test passes only on a tie or
  nearly, so that for more than a few trajectories the noise falls even under perfect balance (a tie has probability
  0.08 at N = 100), and it falls when gains are positive too.
- rule "z": rises while (n- - n+) / sqrt(n+ + n-) < 1, falls otherwise; the answer is the mean of the second half of the
  rounds, what the last one led to included. Only an excess of losses counts, whatever N.

With both, noise never falls below `floor` nor rises above `ceiling`, and a step with no gain above or below 0 in a
round keeps its noise: nothing was learnt of it. The floor, the ceiling and that last rule are ours.

n+ and n- are a round's trajectories with a positive and a negative gain at the step; ties count on neither side. The
result belongs to the schedule, guidance, model and rewards it was found with, and is refused elsewhere.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from mmalign.config.schema import Config
from mmalign.errors import BadInput
from mmalign.training import Rule
from reward_models import files

CEILING = 3.0  # with it a step of 0.1 adds noise of 0.95: as much as pure noise has; more would explore no more


def next_levels(
    levels: Float[Tensor, "T"],
    better: Float[Tensor, "T"],
    worse: Float[Tensor, "T"],
    rule: Rule,
    step: float = 0.01,
    floor: float = 0.05,
    ceiling: float = CEILING,
) -> Float[Tensor, "T"]:
    """One round: the noise of each step raised or lowered by `step`, by its counts of gains above and below 0. Noise
    that is above the ceiling already does not rise."""
    if rule == "paper":
        rises = (better - worse).abs() < 2
    else:
        rises = (worse - better) / (better + worse).clamp(min=1).sqrt() < 1
    higher, lower = (levels + step).clamp(floor, ceiling).maximum(levels), (levels - step).clamp(min=floor)
    return torch.where(better + worse == 0, levels, torch.where(rises, higher, lower))


def start_levels(times: Float[Tensor, "states"], a: float = 0.7) -> Float[Tensor, "T"]:
    """Flow-GRPO's noise, `a sqrt(t / (1 - min(t, t_1)))`; 0 for the last step."""
    levels = a * (times[:-1] / (1 - times[:-1].clamp(max=float(times[1])))).sqrt()
    levels[-1] = 0
    return levels


def run(
    gained: Callable[[Float[Tensor, "T"], int], Float[Tensor, "N T"]],
    levels: Float[Tensor, "T"],
    rounds: int,
    rule: Rule,
    step: float,
    floor: float,
    ceiling: float = CEILING,
) -> Iterator[dict]:
    """`gained(levels, round)` are the gains of N trajectories with this noise, NaN where a step was deterministic or a
    score failed. Yields one row per round, each of [T]: `noise`, what was seen with it, `better` and `worse`, and the
    noise `after` it. Steps with noise 0 keep it."""
    for number in range(rounds):
        gain = gained(levels, number)
        better, worse = (gain > 0).sum(0).float(), (gain < 0).sum(0).float()
        after = torch.where(levels > 0, next_levels(levels, better, worse, rule, step, floor, ceiling), 0.0)
        columns = {"noise": levels, "better": better, "worse": worse, "after": after}
        yield {name: values.tolist() for name, values in columns.items()}
        levels = after


def settled(rows: list[dict], rule: Rule) -> list[float]:
    """The calibrated noise: the paper's rule ends with what the last round led to, the other with the mean of the
    second half and that."""
    noise = torch.tensor([row["noise"] for row in rows] + [row["after"] for row in rows[-1:] if "after" in row])
    return (noise[-1] if rule == "paper" else noise[len(rows) // 2 :].mean(0)).tolist()


class Calibration(BaseModel):
    """The fields of a calibration's file that a run reads."""

    model_config = ConfigDict(strict=True, frozen=True)

    times: list[float]
    guidance: float
    model: str
    rewards: dict[str, Any]
    noise: list[float]


def identity(c: Config, times: Float[Tensor, "states"]) -> dict:
    """What a calibration belongs to."""
    return {
        "times": [round(float(t), 6) for t in times],
        "guidance": max(1.0, c.guidance),
        "model": c.model,
        "rewards": c.model_dump()["rewards"],
    }


def save(path: Path, c: Config, times: Float[Tensor, "states"], rows: list[dict], rule: Rule) -> None:
    record = identity(c, times) | {"rule": rule, "noise": settled(rows, rule), "rounds": rows}
    files.write(path, json.dumps(record, indent=1) + "\n")


def ours(text: str) -> bool:
    """Whether a text is one that `save` wrote."""
    return files.is_record(text, "times", "rule", "noise", "rounds")


def load(path: str, c: Config, times: Float[Tensor, "states"]) -> list[float]:
    """The calibrated noise of each step. BadInput where it was calibrated for something else."""
    try:
        record = Calibration.model_validate(files.parsed(files.text(path)))
    except (OSError, ValueError):
        raise BadInput(f"noise: {path} is not a file written by `mmalign calibrate`") from None
    for key, value in identity(c, times).items():
        if getattr(record, key) != value:
            raise BadInput(
                f"noise: {path} was calibrated with {key} {getattr(record, key)}, this run has {value}; calibrate again"
                " or give the levels as a list to use them nevertheless"
            )
    levels = record.noise
    if len(levels) != c.steps or not all(0 <= level < math.inf for level in levels):
        raise BadInput(f"noise: {path} has the levels {levels}; {c.steps} of at least 0 are needed")
    return levels


def plot(path: Path, record: Path) -> None:
    """The noise before and after, and the balance of signs of the first and the last quarter of the rounds, by step."""
    from matplotlib.figure import Figure

    result = files.parsed(files.text(record))
    rows, t = result["rounds"], result["times"][:-2]
    figure = Figure(figsize=(9, 3.4))
    left, right = figure.subplots(1, 2)
    left.plot(t, rows[0]["noise"][:-1], "o--", color="#888", label="start")
    left.plot(t, result["noise"][:-1], "o-", color="#2a6fb0", label="calibrated")
    quarter = max(1, len(rows) // 4)
    for name, part, style in (("first", rows[:quarter], "o--"), ("last", rows[-quarter:], "o-")):
        better, worse = (torch.tensor([row[side] for row in part]).sum(0)[:-1] for side in ("better", "worse"))
        share = (better - worse) / (better + worse).clamp(min=1)
        right.plot(t, share, style, color="#888" if name == "first" else "#2a6fb0", label=f"{name} quarter of rounds")
    left.set_ylabel("noise level g")
    right.set_ylabel("(better - worse) / (better + worse)")
    right.axhline(0, color="#ccc", zorder=0)
    for axis in (left, right):
        axis.set_xlabel("t")
        axis.invert_xaxis()
        axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
