"""The records shared by all scorers, and their calling convention.

Letters: `N` images, `K` reward components, `H W` pixels, `a b` a grid laid over the image (row 0 at the top).

Images are `[N, 3, H, W]` float32, RGB, in [0, 1]; the public functions of this package take no other form.
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

from reward_models.prompt import Prompt
from reward_models.regions import Region, paint

Images = Float[Tensor, "N 3 H W"]


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
    size: str = "any size, not resized"
    checkpoint: str = ""
    groupwise: bool = False
    has_map: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def version(self) -> str:
        """16 hexadecimal digits that change with the weights, the settings and every other field."""
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
    """Scores that are infinite at `rows`."""

    def __init__(self, rows: Sequence[int]):
        super().__init__("a score is infinite; a scorer must return NaN with a reason instead")
        self.rows = rows


class Unusable(ValueError):
    """A resource of the scorer, such as its cache file, cannot be used. Retrying with fewer images would not help."""


@dataclass(frozen=True)
class ImageScores:
    """The scores of one image by one scorer: `values` by component, where a missing one is NaN. The other fields are
    those of `Scores`; `failure` is the reason for missing values, "" without any."""

    values: Mapping[str, int | float] = field(default_factory=dict)
    critique: str = ""
    request: str = ""
    reply: str = ""
    regions: tuple[Region, ...] = ()
    failure: str = ""


@dataclass(frozen=True)
class Scores:
    """The scores of `N` images by one scorer, in raw units; higher is better.

    A missing score is NaN, never 0, and `failures` has the reason (image index -> reason). NaN without a reason means
    "no opinion". `critiques` has a sentence per image, or is empty. `regions` is a score map in [-1, 1] with NaN for
    "no opinion here", or None; `boxes` has the regions of each image that its map was painted from, or is empty. A
    critic fills `requests`, for each image a revised request that might give a better one ("": none). A judge that
    writes fills `replies`, its raw text.
    """

    names: tuple[str, ...]
    values: Float[Tensor, "N K"]
    critiques: tuple[str, ...] = ()
    regions: Float[Tensor, "N a b"] | None = None
    failures: Mapping[int, str] = field(default_factory=dict)
    boxes: tuple[tuple[Region, ...], ...] = ()
    requests: tuple[str, ...] = ()
    replies: tuple[str, ...] = ()

    @classmethod
    def collect(
        cls,
        names: tuple[str, ...],
        rows: Sequence[ImageScores],
        size: tuple[int, int] = (1, 1),
        grid: int | None = None,
    ) -> "Scores":
        """The scores of images of `size` (height, width), from one row for each. With `grid`, the regions of each image
        are painted on a map of grid x grid cells."""
        values = torch.full((len(rows), len(names)), torch.nan)
        maps = torch.full((len(rows), grid, grid), torch.nan) if grid else None
        for i, row in enumerate(rows):
            values[i] = torch.tensor([float(row.values.get(name, torch.nan)) for name in names])
            if maps is not None:
                maps[i] = paint(row.regions, size, (grid, grid))
        return cls(
            names,
            values,
            critiques=tuple(row.critique for row in rows),
            regions=maps,
            failures={i: row.failure for i, row in enumerate(rows) if row.failure},
            boxes=tuple(row.regions for row in rows),
            requests=tuple(row.request for row in rows),
            replies=tuple(row.reply for row in rows),
        )

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
    """Anything that scores images, locally or remotely. `names` are its components, `card` describes their meaning.

    The images of one call have one size but may belong to several prompts. A scorer whose card is `groupwise` always
    gets all images of a prompt (equal `Prompt.id` and text) in one call.
    """

    names: tuple[str, ...]
    card: Card

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores: ...


@runtime_checkable
class Differentiable(RewardModel, Protocol):
    """A scorer with gradients. `in_graph` gives the scores [N, K] of images in a graph that reaches their pixels, by
    the arithmetic of `__call__` but without rounding the images to 256 levels. Its parameters are frozen. ValueError
    where `__call__` would report a failure: for a prompt or an image that it cannot score."""

    def in_graph(self, images: Images, prompts: Sequence[Prompt]) -> Float[Tensor, "N K"]: ...
