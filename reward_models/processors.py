"""Images in a graph through an image processor of transformers."""

import copy
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from reward_models.types import Images


def pixels(processor: Any, images: Images | Sequence[Float[Tensor, "3 _ _"]]) -> Tensor:
    """The `pixel_values` of images in [0, 1] by the steps of the processor on tensors, in a graph. A resized image
    is bounded by [0, 1], as 8-bit pixels are, but not rounded: it differs from that of 8-bit pixels by their rounding,
    and where a bicubic kernel overshoots between its passes. ValueError for a processor without steps on tensors."""
    if getattr(processor, "backend", "") != "torchvision":
        raise ValueError(
            f"no gradients: {type(processor).__name__} takes no tensors; a processor of torchvision is needed"
        )
    bounded = copy.copy(processor)
    # a bicubic kernel overshoots; the attribute hides the method of the copy alone
    bounded.resize = lambda *args, **settings: processor.resize(*args, **settings).clamp(0, 1)
    return bounded(images=[*images], do_rescale=False, return_tensors="pt").pixel_values
