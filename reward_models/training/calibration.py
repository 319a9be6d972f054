"""Calibration of a fitted reward model: how far its probabilities can be believed, and `better`, a score in [0, 1].

`calibration.json` in the model's folder has a temperature, a monotone map from log-odds to probabilities (isotonic
regression), and the scores of images of the base model. `better` is the probability that an image is preferred to one
of the base model's images of its prompt, drawn at random: the mean over these images of the calibrated probability of
the pair. Both maps are strictly increasing, so that neither changes which image of a pair is preferred.

Letters: `N` pairs or images; `O` numbers that the model gives for an image, its score and, with the loss `thurstone`,
the logarithm of its spread; `B` knots of the monotone map.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt, Le, Len, Lt
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from torch import Tensor

from reward_models import files, limits
from reward_models.errors import first_problem
from reward_models.meaning import meaning
from reward_models.types import Prompt

FILE = "calibration.json"
HOTTEST = 100.0  # bound of `statistics.temperature`

Column = Float[np.ndarray, "N"]
Outputs = Annotated[list[list[float]], Len(1)]
LogOdds = Callable[[Float[Tensor, "N O"], Float[Tensor, "N O"]], Float[Tensor, "N"]]


class Reference(BaseModel):
    """Outputs for images of the base model: by the meaning of the prompt, and some of all, by rising score."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    by_prompt: dict[str, Outputs]
    overall: Outputs


class Calibration(BaseModel):
    """The content of `calibration.json`. `weights` is the hash of the model's weights that it belongs to. `log_odds`
    and `probability` are the knots of the monotone map."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["calibration"] = "calibration"
    format: Literal[1] = 1
    weights: str
    temperature: Annotated[float, Ge(1 / HOTTEST), Le(HOTTEST)]
    log_odds: Annotated[list[float], Len(1)]
    probability: Annotated[list[Annotated[float, Gt(0), Lt(1)]], Len(1)]
    reference: Reference | None
    pairs: int
    prompts: int
    left_out: int
    data: str
    figures: dict[str, dict[str, list[float]]]

    @model_validator(mode="after")
    def _check(self):
        if len(self.log_odds) != len(self.probability):
            raise ValueError("log_odds and probability differ in length")
        for name, values in (("log_odds", self.log_odds), ("probability", self.probability)):
            if any(low >= high for low, high in pairwise(values)):
                raise ValueError(f"{name} does not rise")
        if self.reference is not None:
            rows = [row for some in (*self.reference.by_prompt.values(), self.reference.overall) for row in some]
            if len({len(row) for row in rows}) != 1:
                raise ValueError("the images of the reference have different numbers of outputs")
        return self

    @property
    def outputs(self) -> int | None:
        """O of the reference, None without one."""
        return None if self.reference is None else len(self.reference.overall[0])

    def probabilities(self, log_odds: Column) -> Column:
        """The monotone map of log-odds, in double precision."""
        return self.mapped(torch.from_numpy(np.asarray(log_odds, np.float64))).numpy()

    def mapped(self, log_odds: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
        """The monotone map: linear between the knots, and beyond them as steep as the temperature says."""
        knots, values = (torch.tensor(row, dtype=log_odds.dtype) for row in (self.log_odds, self.probability))
        within = log_odds.clamp(knots[0], knots[-1])
        # of a single knot, both ends are the same
        high = torch.searchsorted(knots, within.detach().contiguous()).clamp(min(1, len(knots) - 1), len(knots) - 1)
        low = (high - 1).clamp(min=0)
        share = (within - knots[low]) / (knots[high] - knots[low]).where(high > low, torch.ones(()).to(knots))
        inside = values[low].lerp(values[high], share)
        beyond = log_odds - within
        return torch.where(beyond == 0, inside, (torch.logit(inside) + beyond / self.temperature).sigmoid())

    def better(self, outputs: Float[Tensor, "N O"], prompts: Sequence[Prompt], log_odds: LogOdds) -> Float[Tensor, "N"]:
        """For each image the probability that it is preferred to an image of the base model for its prompt; where the
        reference has none for the prompt, to one of any prompt."""
        outputs, result = outputs.double().cpu(), torch.zeros(len(outputs), dtype=torch.float64)
        names = [meaning(prompt.text) for prompt in prompts]
        for name in dict.fromkeys(names):
            rows = [i for i, other in enumerate(names) if other == name]
            base = torch.tensor(self.reference.by_prompt.get(name, self.reference.overall), dtype=torch.float64)
            one = outputs[rows].repeat_interleave(len(base), 0)
            odds = log_odds(one, base.repeat(len(rows), 1))
            result[rows] = self.mapped(odds).view(len(rows), -1).mean(1)
        return result.float()


def read(folder: Path, weights: str, outputs: int) -> Calibration | None:
    """The calibration in a model's folder, None without one. ValueError, in one line, for one that `calibrate` did not
    write, or that belongs to other weights."""
    if not (folder / FILE).exists():
        return None
    try:
        calibration = Calibration.model_validate(files.parsed(files.text(folder / FILE, limits.CONFIG)))
    except ValidationError as error:
        raise ValueError(f"{FILE}: {first_problem(error.errors())}") from None
    if calibration.weights != weights:
        raise ValueError(f"{FILE} belongs to weights with the hash {calibration.weights[:12]}; calibrate again")
    if calibration.outputs not in (None, outputs):
        raise ValueError(f"{FILE}: images have {calibration.outputs} outputs, the model gives {outputs}")
    return calibration
