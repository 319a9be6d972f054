"""A scorer with a fault, for runs that must continue without the images it spoils."""

import torch

from reward_models import Card, Scores
from reward_models.regions import Region, paint


class Careless:
    """Says where by boxes, one of them outside the image."""

    names, card = ("value",), Card("careless", has_map=True)

    def __init__(self, every: int = 3):
        self.every = every

    def __call__(self, images, prompts):
        size = tuple(images.shape[2:])
        boxes = [
            (Region((0, 0, size[1] / 2, size[0] * (2 if i % self.every == 1 else 1)), -((-1.0) ** i), "it"),)
            for i in range(len(images))
        ]
        maps = torch.stack([paint(box, size, (4, 4)) for box in boxes])
        return Scores(self.names, torch.arange(len(images)).float()[:, None], regions=maps, boxes=tuple(boxes))
