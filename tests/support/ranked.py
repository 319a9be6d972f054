"""A scorer that compares the images of a prompt: the share of its siblings that an image is brighter than."""

import torch

from reward_models import Card, Scores


class Ranked:
    names = ("rank",)
    card = Card("ranked", groupwise=True)

    def __call__(self, images, prompts):
        level = images.mean((1, 2, 3))
        same = torch.tensor([[a.text == b.text for a in prompts] for b in prompts])
        return Scores(self.names, ((level[None] < level[:, None]) & same).sum(1)[:, None] / same.sum(1)[:, None])
