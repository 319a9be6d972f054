"""`likeness`: how much an image is like a reference picture, by meaning and by pixels.

The reference is the file `Prompt.wants["reference"]`, or else `wants["source"]`. Components, higher is closer,
comparable across prompts:

- `cosine`: of the CLIP embeddings of both, in [-1, 1].
- `pixels`: minus the mean square difference of the pixels, in [-1, 0].
- `ssim`: structural similarity (Wang et al. 2004, doi:10.1109/TIP.2003.819861) with a Gaussian window of 11 pixels and
  deviation 1.5, mean over colours and positions, in [-1, 1].

A reference of another size is resized to the image's; one of another shape fails the image, because pixels would not
correspond. Watch it where copies of the reference must not be what scores well (Hummingbird's diversity). Licence: the
CLIP model's; the embedded one is Apache-2.0.
"""

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from reward_models.images import named_picture, resized, rounded
from reward_models.scorers.clip import clip
from reward_models.scoring import each
from reward_models.types import Card, Images, Prompt, Scores

KEYS = ("reference", "source")
SHAPE = 0.02  # the ratio by which two aspect ratios may differ
WINDOW, DEVIATION = 11, 1.5
C1, C2 = 0.01**2, 0.03**2  # for pixels in [0, 1]


def ssim(a: Images, b: Images) -> Float[Tensor, "N"]:
    """The structural similarity of each pair of images; only windows inside the image count. ValueError for images
    smaller than a window."""
    if min(a.shape[2:]) < WINDOW:
        raise ValueError(f"an image of {a.shape[3]} x {a.shape[2]} pixels is smaller than the window of {WINDOW}")
    offsets = torch.arange(WINDOW, device=a.device, dtype=torch.float64) - WINDOW // 2
    profile = torch.exp(-(offsets**2) / (2 * DEVIATION**2))
    profile = profile / profile.sum()
    kernel = torch.outer(profile, profile).expand(3, 1, -1, -1)
    blurred = partial(F.conv2d, weight=kernel, groups=3)
    a, b = a.double(), b.double()
    mean_a, mean_b = blurred(a), blurred(b)
    var_a, var_b = blurred(a * a) - mean_a**2, blurred(b * b) - mean_b**2
    both = blurred(a * b) - mean_a * mean_b
    light = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
    return (light * (2 * both + C2) / (var_a + var_b + C2)).mean((1, 2, 3)).float()


class Likeness:
    """The scorer. `model`, `pretrained`: those of the scorer `clip`. ValueError if the model cannot be loaded."""

    names = ("cosine", "pixels", "ssim")

    def __init__(self, model: str | None = None, pretrained: str | None = None, device: str = "cpu", batch: int = 64):
        self.clip = clip(model, pretrained, device, batch)
        self.card = Card(
            "likeness",
            model=self.clip.card.model,
            licence=self.clip.card.licence,
            low=-1,
            high=1,
            comparable_across_prompts=True,
            size=self.clip.card.size,
            checkpoint=self.clip.card.checkpoint,
            settings=self.clip.card.settings,
        )

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return each(images, prompts, self.names, self._score_batch, self.clip.batch)

    @torch.no_grad()
    def _score_batch(self, images: Images, prompts: Sequence[Prompt]) -> Float[Tensor, "N K"]:
        """ValueError, for all of them, if a reference cannot be used: `each` then scores them one by one."""
        size, scaled, embedded = tuple(images.shape[2:]), [], []
        for prompt in prompts:
            picture = named_picture(prompt, KEYS)
            high, wide = picture.shape[2:]
            if abs(wide * size[0] / (high * size[1]) - 1) > SHAPE:
                raise ValueError(f"the reference has {wide} x {high} pixels, another shape than {size[1]} x {size[0]}")
            embedded.append(self._embedded(picture))
            scaled.append(rounded(resized(picture, size, "squash", "bicubic")))
        reference = torch.cat(scaled).to(images.device)
        cosine = (self._embedded(images) * torch.cat(embedded)).sum(1)
        pixels = -((images - reference) ** 2).mean((1, 2, 3))
        return torch.stack([cosine.cpu(), pixels.cpu(), ssim(images, reference).cpu()], 1)

    def _embedded(self, images: Images) -> Float[Tensor, "N D"]:
        return self.clip.model.encode_image(self.clip.prepared(images), normalize=True)
