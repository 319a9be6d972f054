"""A scorer that a rounding error moves no more than itself: how red an image is, how even, and where."""

import os
import signal

import torch
from torch.nn import functional as F

from reward_models import Card, Scores
from reward_models.types import Unusable


class Smooth:
    """Images brighter than `limit` are not scored. When it is shown the prompt `fatal` it ends the run, or kills
    its process."""

    card = Card("smooth", has_map=True, sees_prompt=False)
    names = ("red", "even")

    def __init__(self, limit: float = 2.0, fatal: int = -1, kill: bool = False):
        self.limit, self.fatal, self.kill = limit, fatal, kill

    def __call__(self, images, prompts):
        if any(prompt.id == self.fatal for prompt in prompts):
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise Unusable("the scorer broke")
        values = self._values(images)
        broken = images.mean((1, 2, 3)) > self.limit
        values[broken] = torch.nan
        places = F.adaptive_avg_pool2d(20 * (images[:, 0] - images[:, 2]), 2).clamp(-1, 1)
        places[places.abs() < 0.05] = torch.nan
        failures = dict.fromkeys(broken.nonzero()[:, 0].tolist(), "too bright")
        return Scores(self.names, values, regions=places, failures=failures)

    def in_graph(self, images, prompts):
        if bool((images.mean((1, 2, 3)) > self.limit).any()):
            raise ValueError("too bright")
        return self._values(images)

    def _values(self, images):
        # one by one, for a sum over a batch rounds by the images it has
        red = torch.stack([(image[0, ::2, :3] - image[1, ::2, :3]).mean() for image in images])
        return torch.stack([red, torch.stack([-image.std() for image in images])], 1)


class Positive(Smooth):
    """The same, one higher: a product has a root of it."""

    card = Card("positive", has_map=True, sees_prompt=False, low=0.0, high=3.0)

    def __call__(self, images, prompts):
        scores = super().__call__(images, prompts)
        return Scores(self.names, scores.values + 1, regions=scores.regions)

    def in_graph(self, images, prompts):
        return super().in_graph(images, prompts) + 1


class Again(Smooth):
    """The same scores by another scorer. Those of `Positive` are near 1, and spread by thousandths within a prompt:
    their last digit is 3e-5 of that, which as an advantage is more than processes may differ by."""
