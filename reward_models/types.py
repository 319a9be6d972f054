"""The records every scorer speaks in, and the one calling convention.

Letters: `N` images, `K` reward components, `H W` pixels, `a b` a grid laid over the image (row 0 at the top).

Images are `[N, 3, H, W]` float32, RGB, in [0, 1]. No other form crosses a border of this package.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from reward_models.regions import Region

Images = Float[Tensor, "N 3 H W"]


@dataclass(frozen=True)
class Prompt:
    """A request for an image.

    `wants` is the ground truth for scorers that can check one, in the layout of GenEval's metadata
    (`tag`, `include`: a list of `class`, `count`, `color`, `position`); empty for free text.
    `id` names the prompt through a whole run: siblings are found by this integer, never by their text.
    """

    text: str
    wants: Mapping[str, Any] = field(default_factory=dict)
    id: int = 0


@dataclass(frozen=True)
class Card:
    """What a score means and where it comes from.

    `model`: hub id or folder name, "none" without weights. `checkpoint`: SHA-256 of the loaded weights, "" without any.
    `low`, `high`: the range of every component, infinite where unbounded. `higher`: what a higher score means:
    "better", or "more" for a statistic that is not a reward. `comparable_across_prompts`: whether scores of different
    prompts may be compared. `sees_prompt`: whether the score depends on the text. `size`: how the image is resized.
    `groupwise`: the images of one prompt must be scored in one call. `has_map`: whether it also scores regions of the
    image. `settings`: everything else that changes a score.
    """

    scorer: str
    model: str = "none"
    licence: str = "unknown"
    low: int | float = -math.inf
    high: int | float = math.inf
    higher: str = "better"
    comparable_across_prompts: bool = False
    sees_prompt: bool = True
    size: str = "any size, as it is"
    checkpoint: str = ""
    groupwise: bool = False
    has_map: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def version(self) -> str:
        """16 hexadecimal digits that change whenever a score might: with the weights, the settings, the meaning."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True, default=str).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        bounds = [f"{bound:g}" if math.isfinite(bound) else None for bound in (self.low, self.high)]
        spread = f"in [{bounds[0]}, {bounds[1]}]" if all(bounds) else "unbounded"
        if any(bounds) and not all(bounds):
            spread = f"at least {bounds[0]}" if bounds[0] else f"at most {bounds[1]}"
        weights = f"{self.model} {self.checkpoint[:12]}".strip() if self.model != "none" else "no weights"
        scope = "across prompts" if self.comparable_across_prompts else "within a prompt"
        return f"{self.scorer}: {spread}, higher is {self.higher}, comparable {scope}; {weights}; {self.licence}"


class Infinite(ValueError):
    """Scores of which the `rows` are infinite."""

    def __init__(self, rows: Sequence[int]):
        super().__init__("a score is infinite; a scorer must return NaN with a reason instead")
        self.rows = rows


class Unusable(ValueError):
    """What a scorer works with, such as the file of a cache, cannot be used, whatever the image: asking again for fewer
    images would not help."""


@dataclass(frozen=True)
class Scores:
    """What one scorer thinks of `N` images. Raw units, higher is better.

    A score that could not be had is NaN, never 0, and `failures` says why (image index -> reason).
    NaN without a reason is "no opinion". `critiques` holds a sentence per image, or is empty;
    `regions` says where, in [-1, 1] with NaN for "no opinion here", or is None; `boxes` holds the regions of each image
    that the map was painted from, or is empty. A critic has `requests`, for each image a request that might bring a
    better one ("": none); a judge that writes has `replies`, what it wrote.
    """

    names: tuple[str, ...]
    values: Float[Tensor, "N K"]
    critiques: tuple[str, ...] = ()
    regions: Float[Tensor, "N a b"] | None = None
    failures: Mapping[int, str] = field(default_factory=dict)
    boxes: tuple[tuple[Region, ...], ...] = ()
    requests: tuple[str, ...] = ()
    replies: tuple[str, ...] = ()

    def __post_init__(self):
        if self.values.ndim != 2 or self.values.shape[1] != len(self.names):
            raise ValueError(f"values must be [N, {len(self.names)}] for {self.names}, got {list(self.values.shape)}")
        if torch.isinf(self.values).any():
            raise Infinite(self.values.isinf().any(1).nonzero()[:, 0].tolist())

    def column(self, name: str) -> Float[Tensor, "N"]:
        if name not in self.names:
            raise ValueError(f"no score called {name!r}; this scorer gives {', '.join(self.names)}")
        return self.values[:, self.names.index(name)]


@runtime_checkable
class RewardModel(Protocol):
    """Anything that scores images, in this process or far away. `names` are its components, `card` says what they mean.

    The images of one call need not belong to one prompt, but are of one size. A scorer whose card says `groupwise`
    gets all images of a prompt (equal `Prompt.id` and text) in one call, whoever calls it.
    """

    names: tuple[str, ...]
    card: Card

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores: ...
