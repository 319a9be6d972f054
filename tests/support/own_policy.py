"""A user's own policy: the embedded model under another name."""

from mmalign.policy.sd3 import SD3Policy


class Mine(SD3Policy):
    @classmethod
    def load(cls, model, **settings):
        assert model == "own_policy:Mine"
        return super().load("assets/tiny_sd3", **settings)
