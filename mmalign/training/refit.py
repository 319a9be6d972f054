"""Fit a reward model again, by the method and settings of its first fit, to the pairs of a run."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmalign.config.checks import component
from mmalign.config.paths import locate
from mmalign.config.schema import Config
from mmalign.errors import BadInput
from reward_models import RewardModel, files, limits, load as load_scorer, pairs as preferences
from reward_models.cache import Cached
from reward_models.errors import first_problem
from reward_models.pairs import Pair
from reward_models.training import base as bases, data, fit, folder as folders
from reward_models.training.fitting import method_of


class Card(BaseModel):
    """What `card.json` of a fitted model says of how it was fitted."""

    model_config = ConfigDict(strict=True, frozen=True)

    fit: str
    settings: dict[str, Any]
    held_out: float = Field(gt=0, lt=1)
    seed: int = Field(ge=0)


@dataclass
class Refit:
    """The scorer of a run that is fitted again: its `name` and `settings`, the scorer that `judges` its new pairs, the
    `method`, `held_out` and `seed` of its first fit, the `pairs` that every refit learns from, and the file of the
    `cache` of scores, if any. `since`: the iterations after which the model in force was fitted, 0 for the first."""

    name: str
    settings: Mapping[str, Any]
    judge: RewardModel
    method: Any
    held_out: float
    seed: int
    pairs: Sequence[Pair]
    cache: str | None
    since: int = 0

    def fit(self, pairs: Sequence[Pair], out: Path) -> None:
        """Fit to these pairs and to those of every refit, into the folder `out`. What is finished there stays."""
        if not (out / folders.CARD).exists():
            device = self.settings.get("device", "cpu")
            every = [*self.pairs, *pairs]
            fit(every, out, self.method, held_out=self.held_out, seed=self.seed, device=device)

    def load(self, folder: Path) -> RewardModel:
        """The scorer with the model of a folder. ValueError."""
        scorer = load_scorer(self.name, **self.settings | {"folder": str(folder)})
        return Cached(scorer, self.cache) if self.cache else scorer

    def origin(self) -> str:
        """A hash of what refits are made of besides the judge and its pairs."""
        about = [repr(self.method), self.held_out, self.seed, data.digest(self.pairs)]
        return hashlib.sha256(repr(about).encode()).hexdigest()[:16]


def opened(c: Config, scorers: Mapping[str, RewardModel], warn: Callable[[str], None]) -> Refit:
    """What the refits of a config need, checked. ValueError, in one line, where the folder of its scorer does not say
    how it was fitted, or the CLIP model or the pairs are not there."""
    settings = c.scorers[c.refresh.scorer]
    folder, base, device = Path(files.home(settings["folder"])), settings.get("base"), settings.get("device", "cpu")
    try:
        card = Card.model_validate(files.parsed(files.text(folder / folders.CARD, limits.CONFIG)))
        method = method_of(card.fit, card.settings)
    except ValidationError as error:
        raise BadInput(f"refresh: {folder / folders.CARD}: {first_problem(error.errors())}") from None
    except ValueError as error:
        raise BadInput(f"refresh: how {c.refresh.scorer} was fitted is not known: {error}") from None
    source = folders.read(folder)["base"]
    bases.reopened(source, base, device, method.batch)
    method = replace(method, base=source["model"] if base is None else base, pretrained=source["pretrained"])
    pairs = preferences.read(locate(c.refresh.pairs), warn=warn) if c.refresh.pairs else []
    judge = scorers[component(c.refresh.by)[0]]
    return Refit(c.refresh.scorer, settings, judge, method, card.held_out, card.seed, pairs, c.cache)
