"""A judge whose answers take time, and one that fails after a while, for whole runs."""

from collections.abc import Callable

import torch

from reward_models import Card
from reward_models.scorers.shapes import Shapes


class Slow(Shapes):
    """`shapes`, which does `wait(number)` before it answers; keeps how often it answered."""

    def __init__(self):
        super().__init__()
        self.answered = 0
        self.wait: Callable[[int], None] = lambda number: None

    def __call__(self, images, prompts):
        self.wait(self.answered)
        scores = super().__call__(images, prompts)
        self.answered += 1
        return scores


class Full:
    """Every image of an even prompt id is as good as it gets, but for a hair."""

    names = ("good",)
    card = Card("full", licence="Apache-2.0", low=0, high=1)

    def __call__(self, images, prompts):
        from reward_models.scoring import each

        def look(some, whose):
            base = torch.tensor([0.98 if prompt.id % 2 == 0 else 0.5 for prompt in whose])
            return (base + 0.01 * some.mean((1, 2, 3)))[:, None]

        return each(images, prompts, self.names, look)
