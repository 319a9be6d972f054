"""The records every scorer speaks in, and the one calling convention.

Letters: `N` images, `K` reward components, `H W` pixels, `a b` a grid laid over the image (row 0 at the top).

Images are `[N, 3, H, W]` float32, RGB, in [0, 1]. No other form crosses a border of this package.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

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
class Scores:
    """What one scorer thinks of `N` images. Raw units, higher is better.

    A score that could not be had is NaN, never 0, and `failures` says why (image index -> reason).
    NaN without a reason is "no opinion". `critiques` holds a sentence per image, or is empty;
    `regions` says where, in [-1, 1] with NaN for "no opinion here", or is None.
    """

    names: tuple[str, ...]
    values: Float[Tensor, "N K"]
    critiques: tuple[str, ...] = ()
    regions: Float[Tensor, "N a b"] | None = None
    failures: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self):
        if self.values.ndim != 2 or self.values.shape[1] != len(self.names):
            raise ValueError(f"values must be [N, {len(self.names)}] for {self.names}, got {list(self.values.shape)}")
        if torch.isinf(self.values).any():
            raise ValueError("a score is infinite; a scorer must return NaN with a reason instead")

    def column(self, name: str) -> Float[Tensor, "N"]:
        if name not in self.names:
            raise ValueError(f"no score called {name!r}; this scorer gives {', '.join(self.names)}")
        return self.values[:, self.names.index(name)]


@runtime_checkable
class RewardModel(Protocol):
    """Anything that scores images. `names` are its components; `about` states model, licence, range and direction in
    one line."""

    about: str
    names: tuple[str, ...]

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores: ...
