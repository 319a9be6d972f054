"""Scorers of a user's own, sound and not."""

from reward_models import Scores
from reward_models.types import Card


class Bright:
    """The mean of an image; a picture of noise is the least bright of all."""

    names, card = ("mean",), Card("bright", sees_prompt=False)

    def __call__(self, images, prompts):
        return Scores(self.names, images.mean((1, 2, 3))[:, None])


class Constant(Bright):
    def __call__(self, images, prompts):
        return Scores(self.names, images.mean((1, 2, 3))[:, None] * 0 + 0.5)


class Careless(Bright):
    def __call__(self, images, prompts):
        return Scores(self.names, images.mean((1, 2, 3))[:, None].nan_to_num(0.0))
