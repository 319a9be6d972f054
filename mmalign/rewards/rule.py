"""What a combination rule says of itself, and what it may ask of the prompts."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from reward_models import Prompt

Values = Float[Tensor, "N K"]
Groups = Int[Tensor, "N"]
Weights = Float[Tensor, "K"]


class Rule:
    """Defaults of what a rule says of itself.

    `scale`: the unit that advantages must be measured in, because the rule has normalised within groups already (None:
    any). `linear`: whether the reward is a weighted sum of the scores. `below_0`: whether it works with scores below 0,
    and so with constraints and a reference. `weightless`: whether it gives a reward while all weights are 0. `refuses`:
    settings that it does not go with, and the reason.
    """

    scale: ClassVar[str | None] = None
    linear: ClassVar[bool] = False
    below_0: ClassVar[bool] = True
    weightless: ClassVar[bool] = False
    refuses: ClassVar[Mapping[str, str]] = MappingProxyType({})

    def opened(self, names: Sequence[str], versions: Mapping[str, str]) -> "Rule":
        """The rule with the files that it names, for these components, of scorers of these versions by name. ValueError
        where they do not fit."""
        return self

    def origin(self) -> dict[str, str]:
        """Hashes of the files that it was opened from, which a resumed run must have too."""
        return {}

    def for_prompts(self, prompts: Sequence[Prompt], seed: int, iteration: int | None) -> "Rule":
        """The rule for images of these prompts, which `group` numbers, in an iteration of the run with this seed; None:
        in an evaluation."""
        return self

    def suffixes(self, prompts: Sequence[Prompt], seed: int, iteration: int) -> list[str]:
        """What the model reads after the text of each prompt in an iteration, and scorers do not."""
        return [""] * len(prompts)

    @property
    def fan(self) -> dict[str, str]:
        """The suffixes of an evaluation, one after the other, by name; the first is that of the main evaluation."""
        return {"": ""}

    def measured(self, rewards: int) -> int:
        """The size of the fan where there are so many rewards."""
        return 1

    def check(self, weights: Mapping[str, tuple[float, float]]) -> None:
        """ValueError where the components, with the ends of each weight over the run, do not suit the rule."""

    def factors(self, low: Mapping[str, float], weighted: Mapping[str, float]) -> dict[str, float]:
        """The smallest value of each factor that must not be below 0, by name, from the smallest score of each
        component and the smallest product of weight and score."""
        return {}
