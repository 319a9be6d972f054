"""How much noise each step bears: DenseGRPO's exploration calibration (arXiv 2601.20218, algorithm 1).

Walks with more noise explore more, until a step adds more than the later ones can undo; then most of its gains are
negative. Round by round the noise of each step rises while its gains are balanced and falls when they are not:

- rule "paper": rises by `step` if |n+ - n-| < 2, else falls. With N walks the test passes only on a tie or nearly, so
  that for more than a few walks the noise falls even under perfect balance (a tie has probability 0.08 at N = 100), and
  it falls when gains are positive too.
- rule "z": rises while (n- - n+) / sqrt(n+ + n-) < 1, falls otherwise; never below `floor`; the answer is the mean of
  the second half of the rounds. Only an excess of losses counts, whatever N.

n+ and n- are a round's walks with a positive and a negative gain at the step; ties count on neither side. The result
belongs to the schedule, guidance, model and rewards it was found with, and is refused elsewhere.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.config import BadInput, Config, Rule


def next_levels(
    levels: Float[Tensor, "T"],
    better: Float[Tensor, "T"],
    worse: Float[Tensor, "T"],
    rule: Rule,
    step: float = 0.01,
    floor: float = 0.05,
) -> Float[Tensor, "T"]:
    """One round: the noise of each step raised or lowered by `step`, by its counts of gains above and below 0."""
    if rule == "paper":
        rises = (better - worse).abs() < 2
    else:
        rises = (worse - better) / (better + worse).clamp(min=1).sqrt() < 1
    return (levels + torch.where(rises, step, -step)).clamp(min=floor)


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
) -> Iterator[dict]:
    """`gained(levels, round)` are the gains of N walks with this noise, NaN where a step was deterministic or a score
    failed. Yields one row per round: `noise`, `better`, `worse`, each [T]. Steps with noise 0 keep it."""
    for number in range(rounds):
        gain = gained(levels, number)
        better, worse = (gain > 0).sum(0).float(), (gain < 0).sum(0).float()
        yield {"noise": levels.tolist(), "better": better.tolist(), "worse": worse.tolist()}
        levels = torch.where(levels > 0, next_levels(levels, better, worse, rule, step, floor), 0.0)


def settled(rows: list[dict], rule: Rule) -> list[float]:
    """The calibrated noise: the paper's rule ends with the last round's, the other with the mean of the second half."""
    noise = torch.tensor([row["noise"] for row in rows])
    return (noise[-1] if rule == "paper" else noise[len(rows) // 2 :].mean(0)).tolist()


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
    path.write_text(json.dumps(record, indent=1) + "\n")


def load(path: str, c: Config, times: Float[Tensor, "states"]) -> list[float]:
    """The calibrated noise of each step. Raises BadInput where it belongs to something else."""
    try:
        record = json.loads(Path(path).read_text())
        levels = [float(level) for level in record["noise"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise BadInput(f"noise: {path} is no file written by `mmalign calibrate`") from None
    for key, value in identity(c, times).items():
        if record.get(key) != value:
            raise BadInput(
                f"noise: {path} was calibrated with {key} {record.get(key)}, this run has {value}; calibrate again, or "
                "give the levels as a list to use them all the same"
            )
    if len(levels) != c.steps or not all(0 <= level < math.inf for level in levels):
        raise BadInput(f"noise: {path} has the levels {levels}; {c.steps} of at least 0 are needed")
    return levels


def plot(path: Path, record: Path) -> None:
    """The noise before and after, and the balance of signs of the first and the last quarter of the rounds, by step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = json.loads(record.read_text())
    rows, t = found["rounds"], found["times"][:-2]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    left.plot(t, rows[0]["noise"][:-1], "o--", color="#888", label="start")
    left.plot(t, found["noise"][:-1], "o-", color="#2a6fb0", label="calibrated")
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
    plt.close(figure)
