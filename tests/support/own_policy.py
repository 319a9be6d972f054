"""A user's own policies: the embedded model under another name, and two that break."""

import os

import torch

from mmalign.policy.sd3 import SD3Policy


class Mine(SD3Policy):
    @classmethod
    def load(cls, model, **settings):
        assert model == "own_policy:Mine"
        return super().load("assets/tiny_sd3", **settings)


class Spoilt(Mine):
    """Not finite in the second forward that is learnt from, where of many processes this is number 1."""

    learnt = 0

    @classmethod
    def load(cls, model, **settings):
        return SD3Policy.load.__func__(cls, os.environ["MODEL"], **settings)

    def velocity(self, x, t, cond, index):
        velocity = super().velocity(x, t, cond, index)
        self.learnt += torch.is_grad_enabled()
        here = torch.is_grad_enabled() and self.learnt == 2 and os.environ.get("RANK", "1") == "1"
        return self.spoil(velocity) if here else velocity

    def spoil(self, velocity):
        return velocity * torch.nan


class Broken(Spoilt):
    def spoil(self, velocity):
        raise ArithmeticError("the replay broke")
