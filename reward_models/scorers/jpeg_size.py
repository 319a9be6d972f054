"""`jpeg_size`: the size of an image as a JPEG file, the task "compressibility" of DDPO (arXiv 2305.13301, section 5.1).

One score per image in kilobytes (1 kB = 1000 bytes), higher is better: negative for `smaller`, positive for `larger`.
The prompt is not looked at. It measures detail and noise, not quality; its optimum is a flat image (or pure noise).
Licence: this project's own.
"""

from collections.abc import Sequence
from io import BytesIO

import torch

from reward_models.images import to_pil
from reward_models.types import Images, Prompt, Scores


class JpegSize:
    """The scorer. `quality` is JPEG's, 1 to 95; `direction` says which files are better, `smaller` or `larger` ones.
    ValueError for others."""

    names = ("kilobytes",)
    sees_prompt = False

    def __init__(self, quality: int = 95, direction: str = "smaller"):
        if direction not in ("smaller", "larger"):
            raise ValueError(f"jpeg_size: direction is 'smaller' or 'larger', not {direction!r}")
        if not 1 <= quality <= 95:
            raise ValueError(f"jpeg_size: quality is 1 to 95, not {quality!r}")
        self.quality = quality
        self.sign = {"smaller": -1, "larger": 1}[direction]
        side = {"smaller": "at most 0", "larger": "at least 0"}[direction]
        self.about = f"jpeg_size: JPEG file size at quality {quality} in kB, {side}, higher is better; Apache-2.0"

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
        values = torch.full((len(images), 1), torch.nan)
        failures = {}
        for i in range(len(images)):
            try:
                (picture,) = to_pil(images[i : i + 1])
            except ValueError as error:
                failures[i] = str(error)
                continue
            file = BytesIO()
            picture.save(file, "JPEG", quality=self.quality)
            values[i] = self.sign * file.tell() / 1000
        return Scores(self.names, values, failures=failures)
