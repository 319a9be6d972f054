"""Train the scorer `natural`: pictures against corruptions of them.

A reward that is hacked pays for what no picture looks like: noise, textures, over-sharpened edges. A head that tells
pictures from corruptions of them notices many such images, also some that it was not trained on; how many is measured
by leaving each corruption out. After the guard of CLIP rewards by self-supervised corruption; the list is ours.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import pi
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.functional import gaussian_blur

from reward_models import files
from reward_models.images import rounded
from reward_models.scorers.natural import BETWEEN, CONFIG, KIND, WEIGHTS, features
from reward_models.training import base as bases, folder as folders
from reward_models.training.data import Progress, silent
from reward_models.types import Images
from reward_models.weights import linear_chain

LEAST = 20  # pictures, so that some can be held out
BATCH = 128  # examples of a step
PICTURE, BAD = "picture", "bad"  # the kinds that the caller gives


def shuffled(image: Images, generator: torch.Generator, side: int = 4) -> Images:
    """`side` x `side` pieces in random order; rows and columns that do not divide are unchanged."""
    high, wide = image.shape[2] // side, image.shape[3] // side
    order = torch.randperm(side * side, generator=generator).tolist()
    result = image.clone()
    for to, piece in enumerate(order):
        (y, x), (v, u) = divmod(to, side), divmod(piece, side)
        result[:, :, y * high : (y + 1) * high, x * wide : (x + 1) * wide] = image[
            :, :, v * high : (v + 1) * high, u * wide : (u + 1) * wide
        ]
    return result


def noisy(image: Images, generator: torch.Generator, deviation: float = 0.15) -> Images:
    return image + deviation * torch.randn(image.shape, generator=generator)


def blurred(image: Images, generator: torch.Generator, share: float = 1 / 16) -> Images:
    sigma = share * min(image.shape[2:])
    return gaussian_blur(image, [2 * int(2 * sigma) + 1] * 2, [sigma, sigma])


def speckled(image: Images, generator: torch.Generator, share: float = 0.08) -> Images:
    """A share of the pixels in random colours."""
    colours = torch.rand(image.shape, generator=generator)
    return torch.where(torch.rand(image[:, :1].shape, generator=generator) < share, colours, image)


def sharpened(image: Images, generator: torch.Generator, by: float = 3.0) -> Images:
    return image + by * (image - gaussian_blur(image, [5, 5], [1.0, 1.0]))


def textured(image: Images, generator: torch.Generator, period: int = 8, strength: float = 0.2) -> Images:
    """A grid of waves, as upsampling layers leave it."""
    waves = [torch.sin(2 * pi * torch.arange(side) / period) for side in image.shape[2:]]
    return image + strength * torch.outer(*waves)


def blank(image: Images, generator: torch.Generator) -> Images:
    return image.mean((2, 3), keepdim=True).expand_as(image)


CORRUPTIONS: dict[str, Callable[[Images, torch.Generator], Images]] = {
    "shuffled": shuffled,
    "noisy": noisy,
    "blurred": blurred,
    "speckled": speckled,
    "sharpened": sharpened,
    "textured": textured,
    "blank": blank,
}


@dataclass(frozen=True)
class Settings:
    """`base`, `pretrained`: the CLIP model, as of `clip_head`. `hidden`: units of the hidden layer. `steps` of AdamW
    with `learning_rate` and `weight_decay`, on 128 examples each, half of them pictures."""

    base: str = ""
    pretrained: str = ""
    hidden: int = 64
    steps: int = 300
    learning_rate: float = 3e-3
    weight_decay: float = 1.0


def train(
    pictures: Sequence[Images],
    out: str | Path,
    bad: Sequence[Images] = (),
    settings: Settings = Settings(),
    held_out: float = 0.2,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Train a head on `pictures`, each [1, 3, H, W], and write it to the folder `out` for the scorer `natural`.

    `bad`: further images that are not pictures, such as those of a run that hacked its reward. Returns the card, which
    is also written: for each corruption the AUC on pictures that were not trained on, `auc`, and that of a head that
    was trained without it, `auc_if_new`. ValueError, in one line, for too few pictures or an occupied folder."""
    if len(pictures) < LEAST or (bad and len(bad) < LEAST):
        least = min(len(pictures), len(bad)) if bad else len(pictures)
        raise ValueError(f"{least} pictures; at least {LEAST} are needed")
    folder = Path(out)
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; choose another folder")
    base = bases.opened(settings.base, settings.pretrained, device, 64)
    of_kind = _encoded(base, pictures, bad, seed, progress)
    every = {kind: _parts(values, held_out, seed) for kind, values in of_kind.items()}
    kinds = [kind for kind in every if kind != PICTURE]
    left_out = [None, *kinds]
    fitted = {
        kind: _fit(every, kind, settings, seed) for kind in progress(left_out, 0, len(left_out), "fitting", "heads")
    }
    weights = fitted[None]
    card = {
        "pictures": len(pictures),
        "bad": len(bad),
        "seed": seed,
        "held_out": held_out,
        "base": {"model": settings.base, "pretrained": settings.pretrained, "checkpoint": base.card.checkpoint},
        "licence_of_base": base.card.licence,
        "auc": {kind: _auc(weights, every, kind) for kind in kinds},
        "auc_if_new": {kind: _auc(fitted[kind], every, kind) for kind in kinds},
    }
    files.make_folder(folder)
    files.replace(folder / WEIGHTS, save({name: value.cpu() for name, value in weights.items()}))
    folders.put(folder / CONFIG, {"kind": KIND, "base": base.card.checkpoint})
    folders.put(folder / folders.CARD, card)
    return card


def auc(above: Float[Tensor, "N"], below: Float[Tensor, "M"]) -> float:
    """The probability that a value of `above` is larger than one of `below`; equal ones count half."""
    from scipy.stats import mannwhitneyu

    return float(mannwhitneyu(above.numpy(), below.numpy()).statistic) / (len(above) * len(below))


Parts = tuple[Float[Tensor, "_ F"], Float[Tensor, "_ F"]]  # trained on, held out


def _encoded(
    base: Any, pictures: Sequence[Images], bad: Sequence[Images], seed: int, progress: Progress
) -> dict[str, Float[Tensor, "_ F"]]:
    """By kind, the features of the pictures, of their corruptions and of the bad images."""
    rows: dict[str, list[Tensor]] = {PICTURE: [], **{kind: [] for kind in CORRUPTIONS}}
    generator = torch.Generator().manual_seed(seed)
    for picture in progress(pictures, 0, len(pictures), "encoding", "pictures"):
        corrupted = [corrupt(picture, generator) for corrupt in CORRUPTIONS.values()]
        encoded = features(base, rounded(torch.cat([picture, *corrupted])))
        for kind, row in zip(rows, encoded.cpu(), strict=True):
            rows[kind].append(row)
    if bad:
        rows[BAD] = [features(base, rounded(image))[0].cpu() for image in bad]
    return {kind: torch.stack(values) for kind, values in rows.items()}


def _parts(values: Float[Tensor, "N F"], held_out: float, seed: int) -> Parts:
    """Corruptions of a held-out picture are held out too: the order depends on the number of images alone."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(values)))
    count = max(1, round(held_out * len(values)))
    return values[order[count:]], values[order[:count]]


def _fit(every: Mapping[str, Parts], left: str | None, settings: Settings, seed: int) -> dict[str, Tensor]:
    """The weights of a head trained on all kinds but one."""
    good = every[PICTURE][0]
    mean, std = good.mean(0), good.std(0) + 1e-6
    others = [part[0] for kind, part in every.items() if kind not in (PICTURE, left)]
    inputs = (torch.cat([good, *others]) - mean) / std
    labels = torch.cat([torch.ones(len(good)), torch.zeros(len(inputs) - len(good))])
    share = torch.cat([torch.full((len(part),), 1 / (len(part) * n)) for part, n in _shares(good, others)])
    generator = torch.Generator().manual_seed(seed)
    head = nn.Sequential(nn.Linear(inputs.shape[1], settings.hidden), BETWEEN(), nn.Linear(settings.hidden, 1))
    with torch.no_grad():
        for layer in (head[0], head[2]):
            bound = layer.in_features**-0.5
            layer.weight.uniform_(-bound, bound, generator=generator)
            layer.bias.zero_()
    optimiser = torch.optim.AdamW(head.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
    for _ in range(settings.steps):
        rows = torch.multinomial(share, BATCH, replacement=True, generator=generator)
        loss = F.binary_cross_entropy_with_logits(head(inputs[rows])[:, 0], labels[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    layers = {f"layers.{i}.{name}": value.detach() for i in (0, 2) for name, value in head[i].named_parameters()}
    return {"mean": mean, "std": std, **layers}


def _shares(good: Tensor, others: Sequence[Tensor]) -> list[tuple[Tensor, int]]:
    """The kinds, each with the inverse of its share of a batch: half are pictures, the rest equally of all others."""
    return [(good, 2), *((part, 2 * len(others)) for part in others)]


@torch.no_grad()
def _auc(weights: Mapping[str, Tensor], every: Mapping[str, Parts], kind: str) -> float:
    head = linear_chain(weights, "layers.", BETWEEN)
    good, others = (head((every[name][1] - weights["mean"]) / weights["std"])[:, 0] for name in (PICTURE, kind))
    return auc(good, others)
