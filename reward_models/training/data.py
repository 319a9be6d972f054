"""Pairs for training: their prompts by meaning, split, bootstraps, and the digest of all that is learnt from."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from reward_models.images import to_uint8
from reward_models.meaning import clusters, meaning
from reward_models.pairs import Pair
from reward_models.pictures import Stored
from reward_models.types import Images

OVERALL = "score"
RESERVED = {OVERALL, "spread", "sigma"}  # components that are not aspects of pairs
PARTS = ("train", "stop", "test")  # of a split
LEAST = 3  # prompts: one to train on, one to stop by, one to measure

Progress = Callable[[Iterable[Any], int, int, str, str], Iterable[Any]]  # rows, done, total, name, unit


def silent(rows: Iterable[Any], done: int, total: int, name: str, unit: str) -> Iterable[Any]:
    """Shows nothing."""
    return rows


@dataclass(frozen=True)
class Split:
    """Pairs by their use; no meaning of a prompt is in two of them. `train`: the weights; `stop`: when to stop, and
    which weights to keep; `test`: neither, so that their accuracy is that on new prompts."""

    train: list[Pair]
    stop: list[Pair]
    test: list[Pair]


def split(pairs: Sequence[Pair], held_out: float, seed: int) -> Split:
    """Half of the share `held_out` of the prompts is `stop`, the other half `test`, at least one prompt each. The
    prompts are ordered by a hash of the seed and their meaning, so that a prompt stays where it is when the pairs come
    in another order. ValueError for too few prompts."""
    parts: dict[str, list[Pair]] = {part: [] for part in PARTS}
    for pair, part in zip(pairs, part_of([pair.prompt.text for pair in pairs], held_out, seed), strict=True):
        parts[part].append(pair)
    return Split(**parts)


def part_of(texts: Sequence[str], held_out: float, seed: int) -> list[str]:
    """The part of the split, one of `PARTS`, of each prompt. ValueError for too few prompts."""
    by_meaning = [meaning(text) for text in texts]
    ranked = sorted({*by_meaning}, key=lambda text: hashlib.sha256(f"{seed} {text}".encode()).digest())
    if len(ranked) < LEAST:
        raise ValueError(f"pairs of {len(ranked)} prompts; {LEAST} are needed: to train, to stop by and to measure")
    count = min(max(1, round(held_out * len(ranked) / 2)), (len(ranked) - 1) // 2)
    test, stop = {*ranked[:count]}, {*ranked[count : 2 * count]}
    return ["test" if text in test else "stop" if text in stop else "train" for text in by_meaning]


def cluster(pairs: Sequence[Pair]) -> Int[np.ndarray, "N"]:
    """The number of each pair's prompt; prompts of one meaning have one number."""
    return clusters(pair.prompt.text for pair in pairs).numpy()


def bootstrap(prompts: Int[np.ndarray, "N"], seed: int, member: int) -> Float[Tensor, "N"]:
    """How often each pair's prompt is in a sample, with replacement, of as many prompts as there are."""
    names, number = np.unique(prompts, return_inverse=True)
    drawn = np.random.default_rng([seed, member]).integers(len(names), size=len(names))
    return torch.from_numpy(np.bincount(drawn, minlength=len(names))[number]).float()


def preferences(pairs: Sequence[Pair]) -> Float[Tensor, "N"]:
    return torch.tensor([pair.preference for pair in pairs], dtype=torch.float32)


def margins(pairs: Sequence[Pair], factor: float) -> Float[Tensor, "N"]:
    """`factor` times the gap of each pair, 0 where it is not known."""
    return torch.tensor([factor * (pair.gap or 0.0) for pair in pairs], dtype=torch.float32)


def overall(pairs: Sequence[Pair]) -> Float[Tensor, "N"]:
    """1 for the pairs that train the overall score: those without an aspect, or all where each has one."""
    of_whole = torch.tensor([not pair.aspect for pair in pairs], dtype=torch.float32)
    return of_whole if of_whole.any() else torch.ones(len(pairs))


def components(pairs: Sequence[Pair], typed: bool) -> list[str]:
    """`score`, and if `typed` each aspect of the pairs. ValueError for an aspect with the name of another component."""
    aspects = [*dict.fromkeys(pair.aspect for pair in pairs if pair.aspect)] if typed else []
    if RESERVED & {*aspects}:
        raise ValueError("an aspect of the pairs is called score, spread or sigma, as another component is")
    return [OVERALL, *aspects]


def weights(pairs: Sequence[Pair], names: Sequence[str]) -> Float[Tensor, "K N"]:
    """For each of the `components` 1 for the pairs that train it, else 0."""
    aspects = [[float(pair.aspect == name) for pair in pairs] for name in names[1:]]
    return torch.stack([overall(pairs), *map(torch.tensor, aspects)])


def check(pairs: Sequence[Pair]) -> None:
    """ValueError, in one line, for a pair without a prompt, or with a preference or gap out of its range."""
    for number, pair in enumerate(pairs, 1):
        if pair.prompt is None:
            raise ValueError(f"pair {number} has no prompt; give the prompt of all pairs that have none")
        if not 0 <= pair.preference <= 1:
            raise ValueError(f"pair {number}: the preference {pair.preference!r} is not in [0, 1]")
        if not 0 <= (pair.gap or 0.0) < float("inf"):
            raise ValueError(f"pair {number}: the gap {pair.gap!r} is not a number of at least 0")


def digest(pairs: Sequence[Pair], progress: Progress = silent) -> str:
    """The SHA-256 of all pairs, in whatever order: prompts, preferences, gaps, aspects and 8-bit pixels. It reads
    each picture once; ValueError, with its name, for one that cannot be read."""
    by_picture: dict[Stored, str] = {}
    lines = []
    for pair in progress(pairs, 0, len(pairs), "reading", "pairs"):
        for picture in (pair.a, pair.b):
            if picture not in by_picture:
                by_picture[picture] = picture_hash(read(picture))
        values = pair.prompt.text, by_picture[pair.a], by_picture[pair.b], pair.preference, pair.gap, pair.aspect
        lines.append(json.dumps(values))
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def read(picture: Stored) -> Images:
    try:
        return picture.read()
    except ValueError as error:
        raise ValueError(f"{picture.name}: {error}") from None


def picture_hash(image: Images) -> str:
    """The SHA-256 of a picture's size and 8-bit pixels, in hexadecimal."""
    return hashlib.sha256(str([*image.shape]).encode() + to_uint8(image).cpu().numpy().tobytes()).hexdigest()
