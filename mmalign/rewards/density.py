"""A reward with its density: paid at every completed state, or at the finished image alone."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from reward_models.combine import Ramp


class Reward(BaseModel):
    """A reward with its weight. With `density` "end" it is that of finished images alone: its scorer is not shown the
    images of other states, unless another of its components is."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    weight: float | Ramp = 1.0
    density: Literal["step", "end"] = "step"
