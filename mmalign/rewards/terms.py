"""What a config says of a component: its weight and density in the reward, or a bound for its mean."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveFloat

from reward_models.combine import Ramp


class Reward(BaseModel):
    """A reward with its weight. With `density` "end" it is that of finished images alone: its scorer is not shown the
    images of other states, unless another of its components is."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    weight: float | Ramp = 1.0
    density: Literal["step", "end"] = "step"


class AtLeast(BaseModel):
    """A constraint: mean score at least `bound`, in raw units; `rate` of the multiplier per iteration and unit."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    bound: float
    rate: PositiveFloat = 0.1
