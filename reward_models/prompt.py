"""The request for an image. It imports nothing heavy, so that commands can name it before they do any work."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """A request for an image.

    `wants` is the ground truth for scorers that can check it, in the layout of GenEval's metadata
    (`tag`, `include`: a list of `class`, `count`, `color`, `position`); empty for free text.
    `id` identifies the prompt throughout a run: images with equal ids are siblings.
    """

    text: str
    wants: Mapping[str, Any] = field(default_factory=dict)
    id: int = 0
