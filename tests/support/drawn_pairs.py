"""Preference pairs of drawings of the embedded world: the picture of a caption against that of another one."""

from io import BytesIO
from pathlib import Path

import numpy as np
import torch

from reward_models.images import to_pil
from reward_models.pairs import Pair
from reward_models.pictures import Stored
from reward_models.shapes_world import caption, draw, requests
from reward_models.types import Prompt


def drawn_pairs(count: int, seed: int = 0, aspect: str = "") -> list[Pair]:
    """So many pairs, in every second of which `a` is the picture of the caption."""
    rng, wants = np.random.default_rng(seed), [w for w in requests() if w["include"]]
    pairs = []
    for k in range(count):
        right, wrong = (wants[i] for i in rng.integers(len(wants), size=2))
        sides = [stored(draw(right, rng), f"{k} right"), stored(draw(wrong, rng), f"{k} wrong")]
        a, b = sides[:: -1 if k % 2 else 1]
        pairs.append(Pair(a, b, Prompt(caption(right), right, k), float(k % 2 == 0), None, aspect))
    return pairs


def stored(picture: np.ndarray, name: str) -> Stored:
    file = BytesIO()
    to_pil(torch.from_numpy(picture)[None])[0].save(file, "png")
    return Stored(name, Path("drawn"), file.getvalue())
