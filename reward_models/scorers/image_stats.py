"""`image_stats`: brightness, contrast, saturation and sharpness of a picture. Alarms for reward hacking, not rewards.

- `brightness`: mean luma (Rec. 601), in [0, 1].
- `contrast`: standard deviation of luma, in [0, 0.5].
- `saturation`: mean over pixels of (max - min) / max of the channels (HSV), in [0, 1].
- `sharpness`: standard deviation of the 4-neighbour Laplacian of luma, in [0, 4]; rises with detail and with noise.

Higher is more, not better. The prompt is ignored. Comparable across prompts, `sharpness` only between images of one
size. Licence: this project's own.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from reward_models.scoring import check, each
from reward_models.types import Card, Images, Prompt, Scores

LUMA = (0.299, 0.587, 0.114)
LAPLACE = ((0.0, 1.0, 0.0), (1.0, -4.0, 1.0), (0.0, 1.0, 0.0))


class ImageStats:
    """The scorer; it takes no settings."""

    names = ("brightness", "contrast", "saturation", "sharpness")
    card = Card(
        "image_stats",
        licence="Apache-2.0",
        low=0,
        high=4,
        higher="more",
        comparable_across_prompts=True,
        sees_prompt=False,
    )

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return each(images, prompts, self.names, self._score_batch)

    @torch.no_grad()
    def _score_batch(self, images: Images, prompts: Sequence[Prompt]) -> Float[Tensor, "N K"]:
        return self.in_graph(images, prompts)

    def in_graph(self, images: Images, prompts: Sequence[Prompt]) -> Float[Tensor, "N K"]:
        check(images, prompts)
        luma = (images * torch.tensor(LUMA, device=images.device)[:, None, None]).sum(1, keepdim=True)
        high, low = images.amax(1), images.amin(1)
        laplace = torch.tensor(LAPLACE, device=images.device)
        edges = F.conv2d(F.pad(luma, (1, 1, 1, 1), "replicate"), laplace[None, None])
        return torch.stack(
            [
                luma.mean((1, 2, 3)),
                luma.std((1, 2, 3), correction=0),
                ((high - low) / high.clamp(min=1e-6)).mean((1, 2)),
                edges.std((1, 2, 3), correction=0),
            ],
            1,
        )
