"""`fitted`: a reward model that `mmalign reward fit` has trained from preferences, from its folder.

Components: `score`, unbounded, higher is better, whose differences between images of one prompt are log-odds (with the
loss `thurstone`, in units of its `sigma`, the spread of an image); scores of different prompts are not comparable,
because only images of one prompt were compared. One component for each aspect of typed models. `spread`, with several
members, the standard deviation of their scores: doubt, not a reward. `better`, after `mmalign reward calibrate` with
images of a base model, in [0, 1]: the probability that the image is preferred to one of that model's images of its
prompt. It is comparable across prompts. Licence: that of the base model and of the pairs.
"""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reward_models.lengths import Reader
from reward_models.limits import LAYERS
from reward_models.model_folders import loading
from reward_models.scoring import check, each
from reward_models.training import FITS, calibration as calibrations, folder as folders
from reward_models.training.base import SOURCE
from reward_models.training.losses import LOSSES
from reward_models.types import Card, Images, Prompt, Scores
from reward_models.weights import check_on_grey_image, named


class Fitted:
    """The scorer. `folder` is what was written. `base`: the model that heads or adapters were trained on, unless it is
    the embedded CLIP or a model of open_clip, because a file may not choose what is opened; its weights must have the
    hash that they were trained with. `better`: give that component alone, whose range lets `combine: product` take it.
    ValueError, in one line, for anything that does not fit."""

    def __init__(
        self, folder: str, base: str | None = None, device: str = "cpu", batch: int = 64, better: bool = False
    ):
        with loading("fitted", folder):
            config = folders.read(Path(folder))
            self.loss, components, fit = _checked(config)
            self.model = fit.opened(Path(folder), config, len(components) * self.loss.outputs, base, device, batch)
            trained = self.model.trained
            if trained != config["weights"]:
                raise ValueError(f"its weights have the hash {trained[:12]}, not that of config.json")
            self.calibration = calibrations.read(Path(folder), trained, self.loss.outputs)
            relative = self.calibration is not None and self.calibration.reference is not None
            if better and not relative:
                raise ValueError("no component better; `mmalign reward calibrate` with --images makes it")
            if relative and "better" in components:
                raise ValueError("an aspect is called better, as the calibrated score is")
        self.weights, self.components = trained, components
        self.sigma = self.loss.outputs == 2
        doubt = self.model.members > 1
        others = {"sigma": self.sigma, "spread": doubt, "better": relative}
        every = (*components, *(name for name, given in others.items() if given))
        self.columns = slice(-1, None) if better else slice(None)
        self.names = ("better",) if better else every
        self.batch = batch
        self.card = Card(
            "fitted",
            model=named(folder),
            licence=str(config["licence"]),
            size=self.model.size,
            checkpoint=self.model.checkpoint,
            low=0.0 if better else -math.inf,
            high=1.0 if better else math.inf,
            comparable_across_prompts=better,
            settings={"fit": config["fit"], "loss": config["loss"], **self.model.settings, **self._calibrated()},
        )
        with loading("fitted", folder):
            check_on_grey_image(self._score_batch)

    def readers(self) -> list[Reader]:
        return self.model.readers()

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return each(images, prompts, self.names, self._score_batch, self.batch)

    def _calibrated(self) -> dict[str, str]:
        """What the card says of the calibration: a hash of it."""
        if self.calibration is None:
            return {}
        return {"calibration": hashlib.sha256(self.calibration.model_dump_json().encode()).hexdigest()[:16]}

    def outputs(self, values: Float[Tensor, "N K"]) -> Float[Tensor, "N O"]:
        """Of the scores, what probabilities are computed from: `score`, and the logarithm of `sigma`."""
        columns = [values[:, self.names.index("score")]]
        if self.sigma:
            columns.append(values[:, self.names.index("sigma")].log())
        return torch.stack(columns, 1)

    def preferred(self, a: Float[Tensor, "N K"], b: Float[Tensor, "N K"]) -> Float[Tensor, "N"]:
        """The probability that images with scores `a` are preferred to those with `b`, if either is; calibrated by the
        temperature, if the model has one. NaN where the scores are `better` alone."""
        if "score" not in self.names:
            return torch.full((len(a),), torch.nan)
        temperature = 1.0 if self.calibration is None else self.calibration.temperature
        return (self.loss.log_odds(self.outputs(a), self.outputs(b)) / temperature).sigmoid()

    @torch.no_grad()
    def _score_batch(self, images: Images, prompts: Sequence[Prompt]) -> Float[Tensor, "N K"]:
        return self._scores(images, prompts, exact=False)

    def in_graph(self, images: Images, prompts: Sequence[Prompt]) -> Float[Tensor, "N K"]:
        check(images, prompts)
        return self._scores(images, prompts, exact=True)

    def _scores(self, images: Images, prompts: Sequence[Prompt], exact: bool) -> Float[Tensor, "N K"]:
        outputs = self.model.outputs(images, [prompt.text for prompt in prompts], exact)
        outputs = outputs.unflatten(2, (len(self.components), self.loss.outputs))
        columns = [outputs[..., 0].mean(0)]
        if self.sigma:
            columns.append(outputs[:, :, :1, 1].exp().mean(0))
        if self.model.members > 1:
            columns.append(outputs[:, :, :1, 0].std(0, correction=0))
        return self._with_better(columns, prompts)

    def _with_better(self, columns: list[Float[Tensor, "N _"]], prompts: Sequence[Prompt]) -> Float[Tensor, "N K"]:
        """The columns, and `better` if there is such a component."""
        if self.calibration is not None and self.calibration.reference is not None:
            outputs = [columns[0][:, :1], *([columns[1].log()] if self.sigma else [])]
            better = self.calibration.better(torch.cat(outputs, 1), prompts, self.loss.log_odds)
            columns = [*columns, better.to(columns[0].device)[:, None]]
        return torch.cat(columns, 1)[:, self.columns]


def _checked(config: dict[str, Any]) -> tuple[Any, list[str], Any]:
    """The loss, the components and the method of a config. ValueError for values that `fit` does not write."""
    for key in ("fit", "licence", "weights"):
        if not isinstance(config.get(key), str):
            raise ValueError(f"config.json: {key} is not a text")
    if config["fit"] not in FITS:
        raise ValueError(f"config.json: fit {config['fit'][:40]!r} is not one of {', '.join(FITS)}")
    members, hidden = config.get("members"), config.get("hidden")
    if type(members) is not int or not 0 <= members <= LAYERS or type(hidden) is not int or hidden < 0:
        raise ValueError(f"config.json: members must be from 0 to {LAYERS}, hidden a whole number of at least 0")
    if not isinstance(config.get("loss"), str) or config["loss"] not in LOSSES:
        raise ValueError(f"config.json: loss {str(config.get('loss'))[:40]!r} is not one of {', '.join(LOSSES)}")
    components, base = config.get("components"), config.get("base")
    if not isinstance(components, list) or not all(isinstance(name, str) and name for name in components):
        raise ValueError("config.json: components is not a list of names")
    if components[:1] != ["score"] or len({*components, "spread", "sigma"}) != len(components) + 2:
        raise ValueError("config.json: components must begin with score, be distinct, and not be spread or sigma")
    if not isinstance(base, dict) or not all(isinstance(base.get(k), str) for k in SOURCE):
        raise ValueError("config.json: base must have model, pretrained and checkpoint")
    return LOSSES[config["loss"]], components, FITS[config["fit"]]
