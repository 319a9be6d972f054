"""`jpeg_size`: the size of an image as a JPEG file, the task "compressibility" of DDPO (arXiv 2305.13301, section 5.1).

One score per image in kilobytes (1 kB = 1000 bytes), higher is better: negative for `smaller`, positive for `larger`.
It ignores the prompt. It measures detail and noise, not quality; the optimum is a flat image (or, for `larger`, pure
noise). Licence: this project's own.
"""

from collections.abc import Sequence
from io import BytesIO
from math import inf

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from reward_models.images import to_pil
from reward_models.scoring import each
from reward_models.types import Card, Images, Prompt, Scores


class JpegSize:
    """The scorer. `quality` is JPEG's, 1 to 95; `direction` is `smaller` or `larger`, the files that score higher.
    ValueError for other values."""

    names = ("kilobytes",)

    def __init__(self, quality: int = 95, direction: str = "smaller"):
        if direction not in ("smaller", "larger"):
            raise ValueError(f"jpeg_size: direction is 'smaller' or 'larger', not {direction!r}")
        if not 1 <= quality <= 95:
            raise ValueError(f"jpeg_size: quality is 1 to 95, not {quality!r}")
        self.quality = quality
        self.sign = {"smaller": -1, "larger": 1}[direction]
        self.card = Card(
            "jpeg_size",
            licence="Apache-2.0",
            low=0 if direction == "larger" else -inf,
            high=0 if direction == "smaller" else inf,
            comparable_across_prompts=True,
            sees_prompt=False,
            settings={"quality": quality, "direction": direction},
        )

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return each(images, prompts, self.names, self._score_batch)

    def _score_batch(self, images: Images, prompts: Sequence[Prompt]) -> Float[Tensor, "N K"]:
        return torch.tensor([[self.sign * self._kilobytes(picture)] for picture in to_pil(images)])

    def _kilobytes(self, picture: Image.Image) -> float:
        file = BytesIO()
        picture.save(file, "JPEG", quality=self.quality)
        return file.tell() / 1000
