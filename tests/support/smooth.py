"""A scorer that a rounding error moves no more than itself: how red an image is, how even, and where."""

import os
import signal

import torch
from torch.nn import functional as F

from reward_models import Card, Scores


class Smooth:
    """Images brighter than `limit` are not scored. When it is shown the prompt `fatal` it fails, or kills its
    process."""

    card = Card("smooth", places=True, sees_prompt=False)
    names = ("red", "even")

    def __init__(self, limit: float = 2.0, fatal: int = -1, kill: bool = False):
        self.limit, self.fatal, self.kill = limit, fatal, kill

    def __call__(self, images, prompts):
        if any(prompt.id == self.fatal for prompt in prompts):
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise ArithmeticError("the scorer broke")
        red = (images[:, 0, ::2, :3] - images[:, 1, ::2, :3]).mean((1, 2))
        values = torch.stack([red, -images.std((1, 2, 3))], 1)
        broken = images.mean((1, 2, 3)) > self.limit
        values[broken] = torch.nan
        places = F.adaptive_avg_pool2d(20 * (images[:, 0] - images[:, 2]), 2).clamp(-1, 1)
        places[places.abs() < 0.05] = torch.nan
        failures = dict.fromkeys(broken.nonzero()[:, 0].tolist(), "too bright")
        return Scores(self.names, values, regions=places, failures=failures)
