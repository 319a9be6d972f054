"""`fitted`: a reward model that `mmalign reward fit` has trained from preferences, from its folder.

Components: `score`, unbounded, higher is better, whose differences between images of one prompt are log-odds (with the
loss `thurstone`, in units of its `sigma`, the spread of an image); scores of different prompts are not comparable,
because only images of one prompt were compared. One component for each aspect of typed models. `spread`, with several
members, the standard deviation of their scores: doubt, not a reward. Licence: that of the base model and of the pairs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reward_models.lengths import Reader
from reward_models.limits import LAYERS
from reward_models.model_folders import loading
from reward_models.scoring import each
from reward_models.training import FITS, folder as folders
from reward_models.training.losses import LOSSES
from reward_models.types import Card, Images, Prompt, Scores
from reward_models.weights import check_on_grey_image, named

BASE = ("model", "pretrained", "checkpoint")  # what a config says of the base model: where it is, and its hash


class Fitted:
    """The scorer. `folder` is what was written. `base`: the model that heads or adapters were trained on, unless it is
    the embedded CLIP or a model of open_clip, because a file may not choose what is opened; its weights must have the
    hash that they were trained with. ValueError, in one line, for anything that does not fit."""

    def __init__(self, folder: str, base: str | None = None, device: str = "cpu", batch: int = 64):
        with loading("fitted", folder):
            config = folders.read(Path(folder))
            self.loss, components, fit = _checked(config)
            self.model = fit.opened(Path(folder), config, len(components) * self.loss.outputs, base, device, batch)
            if self.model.trained != config["weights"]:
                raise ValueError(f"its weights have the hash {self.model.trained[:12]}, not that of config.json")
        self.components = len(components)
        self.sigma = self.loss.outputs == 2
        doubt = ["spread"] if self.model.members > 1 else []
        self.names = (*components, *(["sigma"] if self.sigma else []), *doubt)
        self.batch = batch
        self.card = Card(
            "fitted",
            model=named(folder),
            licence=str(config["licence"]),
            size=self.model.size,
            checkpoint=self.model.checkpoint,
            settings={"fit": config["fit"], "loss": config["loss"], **self.model.settings},
        )
        with loading("fitted", folder):
            check_on_grey_image(self._score_batch)

    def readers(self) -> list[Reader]:
        return self.model.readers()

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return each(images, prompts, self.names, self._score_batch, self.batch)

    def preferred(self, a: Float[Tensor, "N K"], b: Float[Tensor, "N K"]) -> Float[Tensor, "N"]:
        """The probability that images with scores `a` are preferred to those with `b`, if either is."""
        if self.sigma:
            sigma = self.names.index("sigma")
            a, b = (torch.stack([side[:, 0], side[:, sigma].log()], 1) for side in (a, b))
        return self.loss.preferred(a, b)

    @torch.no_grad()
    def _score_batch(self, images: Images, prompts: Sequence[Prompt]) -> Float[Tensor, "N K"]:
        outputs = self.model.outputs(images, [prompt.text for prompt in prompts])
        outputs = outputs.unflatten(2, (self.components, self.loss.outputs))
        columns = [outputs[..., 0].mean(0)]
        if self.sigma:
            columns.append(outputs[:, :, :1, 1].exp().mean(0))
        if self.model.members > 1:
            columns.append(outputs[:, :, :1, 0].std(0, correction=0))
        return torch.cat(columns, 1)


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
    if not isinstance(base, dict) or not all(isinstance(base.get(k), str) for k in BASE):
        raise ValueError("config.json: base must have model, pretrained and checkpoint")
    return LOSSES[config["loss"]], components, FITS[config["fit"]]
