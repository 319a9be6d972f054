"""Scorers of a user's own that fail in their own ways, on the images whose prompt has the word `bad`, or on all."""

import errno
import sys

import torch

from reward_models import Card, Scores

FAULTS = {
    "exit": lambda: sys.exit(0),
    "exit with words": lambda: sys.exit("the licence has run out"),
    "disk": lambda: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device", "/tmp/of-the-scorer")),
    "bug": lambda: {}["absent"],
    "memory": lambda: (_ for _ in ()).throw(MemoryError()),
    "no scores": lambda: None,
    "one score": lambda: Scores(("value",), torch.ones(1, 1)),
    "another name": lambda: Scores(("other",), torch.ones(1, 1)),
}


class Faulty:
    """The mean of an image; `silent` is NaN without a reason, the other faults are those of `FAULTS`."""

    names = ("value",)

    def __init__(self, fault: str, everywhere: bool = True, groupwise: bool = False):
        self.fault, self.everywhere = fault, everywhere
        self.card = Card("faulty", groupwise=groupwise)

    def __call__(self, images, prompts):
        values = images.mean((1, 2, 3))[:, None]
        bad = [self.everywhere or "bad" in prompt.text for prompt in prompts]
        if self.fault == "silent":
            values[bad] = torch.nan
        elif any(bad):
            return FAULTS[self.fault]()
        return Scores(self.names, values)
