"""`natural`: how likely an image is a picture, and not a corruption or a trick that a reward fell for.

A two-class head on features of a frozen CLIP, trained by `mmalign reward natural` on your pictures (those of the base
model, or photographs) against corruptions of them and, if you have them, images of a run that hacked its reward. One
component:

- `natural`: the probability that an image is one of the pictures and not one of the others, if both are equally
  frequent, in [0, 1]; comparable across prompts, and independent of the prompt.

It notices what resembles the corruptions that it was trained on; the card of the folder has the share of new ones that
it notices. Use it as `at_least: {natural.natural: {bound: 0.5}}`, as a factor of `combine: product`, or under `watch`.
Licence: the CLIP model's, and the pictures'.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reward_models import files, limits
from reward_models.model_folders import loading
from reward_models.scorers.clip import Clip, clip
from reward_models.scoring import check, each
from reward_models.types import Card, Images, Prompt, Scores
from reward_models.weights import check_on_grey_image, fingerprint, linear_chain, named, read

WEIGHTS, CONFIG = "weights.safetensors", "config.json"
KIND = "natural"
BETWEEN = nn.GELU


def features(base: Clip, images: Images) -> Float[Tensor, "N F"]:
    """The image embedding, and the mean and deviation over places of the output of each layer: textures and noise show
    in early layers, which the embedding has learnt to ignore."""
    result = base.model.visual.forward_intermediates(base.prepared(images), normalize_intermediates=True)
    layers = [layer.flatten(2) for layer in result["image_intermediates"]]
    columns = [result["image_features"], *(layer.mean(2) for layer in layers), *(layer.std(2) for layer in layers)]
    return torch.cat(columns, 1)


class Natural:
    """The scorer. `folder`: what `mmalign reward natural` wrote. `base`: the folder or name of the CLIP model that it
    was trained on, by default the embedded one. ValueError if they cannot be loaded or do not belong together."""

    names = ("natural",)

    def __init__(
        self, folder: str, base: str | None = None, pretrained: str | None = None, device: str = "cpu", batch: int = 64
    ):
        self.base, self.batch = clip(base, pretrained, device, batch), batch
        with loading("natural", folder):
            config = files.parsed(files.text(Path(folder) / CONFIG, limits.CONFIG))
            if not isinstance(config, dict) or config.get("kind") != KIND:
                raise ValueError(f"{CONFIG} does not describe a head of `natural`")
            if config.get("base") != self.base.card.checkpoint:
                given = f"{base or 'the embedded CLIP'} has {self.base.card.checkpoint[:12]}"
                raise ValueError(f"it was trained on a base with the hash {str(config.get('base'))[:12]}, {given}")
            weights = read(Path(folder) / WEIGHTS)
            self.mean, self.std, self.head = _head(weights, device)
            self.card = Card(
                "natural",
                model=named(folder),
                licence=self.base.card.licence,
                low=0,
                high=1,
                comparable_across_prompts=True,
                sees_prompt=False,
                size=self.base.card.size,
                checkpoint=fingerprint(self.base.model, weights),
            )
            check_on_grey_image(self._score_batch)

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return each(images, prompts, self.names, self._score_batch, self.batch)

    @torch.no_grad()
    def _score_batch(self, images: Images, prompts: Sequence[Prompt]) -> Float[Tensor, "N 1"]:
        return self.in_graph(images, prompts)

    def in_graph(self, images: Images, prompts: Sequence[Prompt]) -> Float[Tensor, "N 1"]:
        check(images, prompts)
        return self.head((features(self.base, images) - self.mean) / self.std).sigmoid()


def _head(weights: dict[str, Tensor], device: str) -> tuple[Tensor, Tensor, nn.Sequential]:
    """Mean and deviation of the features, and the layers. ValueError for other weights."""
    chain: Any = linear_chain(weights, "layers.", BETWEEN).to(device)
    wide = chain[0].in_features
    shapes = {name: tuple(weights[name].shape) for name in ("mean", "std") if name in weights}
    if shapes != {"mean": (wide,), "std": (wide,)} or chain[-1].out_features != 1:
        raise ValueError(f"{WEIGHTS}: mean and std of {wide} features and one output are needed")
    if not bool((weights["std"] > 0).all()):
        raise ValueError(f"{WEIGHTS}: a deviation is not above 0")
    return weights["mean"].to(device), weights["std"].to(device), chain
