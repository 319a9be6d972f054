"""What callers of the Python API hand over: prompts, rewards, scorers and models, as objects or by name."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmalign.config.checks import component
from mmalign.config.paths import locate
from mmalign.data import prompts as prompt_sources
from mmalign.errors import BadInput, refusing
from mmalign.policy.protocol import Policy
from mmalign.runs.inference import load_policy
from reward_models import Prompt, RewardModel, load as load_scorer
from reward_models.combine import Ramp
from reward_models.functions import FunctionScorer
from reward_models.lengths import cut

GIVEN = "given in Python"  # in a config, in place of a name
Adapter = str | Path | Mapping[str, float] | None  # a run or file, or several with their weights


def prompts_of(prompts: Any, what: str = "prompts") -> list[Prompt]:
    if isinstance(prompts, str | Path):
        return prompt_sources.read(locate(str(prompts)))
    if not isinstance(prompts, Iterable):
        raise BadInput(f"{what}: a list of texts, a dataset or the name of a file is needed, got {str(prompts)[:60]!r}")
    return prompt_sources.given(prompts, what)


def source_of(prompts: Any, what: str = "prompts") -> tuple[list[Prompt] | None, str]:
    """Prompts that are handed over, and the config's name of them."""
    if isinstance(prompts, str | Path):
        return None, str(prompts)
    return prompts_of(prompts, what), GIVEN


@dataclass(frozen=True)
class Named:
    """A scorer by its settings in a config, or as an object, or both where it is loaded already."""

    settings: dict[str, Any] = field(default_factory=dict)
    scorer: RewardModel | None = None

    def loaded(self, name: str) -> RewardModel:
        with refusing():
            return load_scorer(name, **self.settings) if self.scorer is None else self.scorer


def rewards_of(
    reward: Any, scorers: Mapping[str, Named]
) -> tuple[dict[str, float | Ramp | Mapping[str, Any]], dict[str, Named]]:
    """The weight of each component by name, and its scorers."""
    weighted = [*reward.items()] if isinstance(reward, Mapping) else [(one, 1.0) for one in _listed(reward)]
    if not weighted:
        raise BadInput("reward: at least one is needed")
    weights, used = {}, dict(scorers)
    for one, weight in weighted:
        if isinstance(one, str):
            name, part = component(one)
        else:
            [(name, scorer)], part = scorers_of([one]).items(), ""
            if name in used:
                raise BadInput(f"reward: two are called {name!r}; name them by scorers={{'a': ..., 'b': ...}}")
            used[name] = scorer
        scorer = used.setdefault(name, Named())
        if not part:
            loaded = scorer.loaded(name)
            used[name], part = replace(scorer, scorer=loaded), loaded.names[0]
            if len(loaded.names) > 1:
                raise BadInput(f"reward {name!r}: it gives {', '.join(loaded.names)}; name one, as '{name}.{part}'")
        if f"{name}.{part}" in weights:
            raise BadInput(f"reward: {name}.{part} is there twice; give a dict of rewards to weights")
        weights[f"{name}.{part}"] = weight
    return weights, used


def scorers_of(scorers: Any) -> dict[str, Named]:
    """Scorers by name: one, a list, or a dict by name, of names, functions and objects, and of settings in a dict."""
    if isinstance(scorers, Mapping):
        return {
            name: Named(settings=dict(one)) if isinstance(one, Mapping) else _named(one, name)
            for name, one in scorers.items()
        }
    named = {}
    for one in _listed(scorers):
        scorer = Named() if isinstance(one, str) else _named(one)
        name = one if isinstance(one, str) else scorer.scorer.card.scorer
        if name in named:
            raise BadInput(f"two scorers are called {name!r}; give a dict of names to scorers")
        named[name] = scorer
    return named


def _named(one: Any, name: str | None = None) -> Named:
    if isinstance(one, RewardModel):
        return Named(scorer=one)
    if isinstance(one, str):
        return Named(settings={"scorer": one})
    if not callable(one):
        raise BadInput(f"reward: a function, a scorer or its name is needed, got {str(one)[:60]!r}")
    with refusing():
        return Named(scorer=FunctionScorer(one, name))


def loaded(scorers: Mapping[str, Named]) -> dict[str, RewardModel]:
    return {name: one.loaded(name) for name, one in scorers.items()}


def check_columns(scorers: Iterable[RewardModel], prompts: Sequence[Prompt]) -> None:
    """BadInput for a function that needs a field which the prompts lack."""
    fields = {field for p in prompts for field in p.wants}
    with refusing():
        for scorer in scorers:
            if isinstance(scorer, FunctionScorer):
                scorer.check_columns(fields)


def _listed(items: Any) -> list[Any]:
    return [*items] if isinstance(items, list | tuple) else [items]


def label_of(model: Any) -> str:
    """The config's name of a model that is handed over: where it was loaded from, if it says so."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and name else f"{type(model).__name__} {GIVEN}"


@contextmanager
def lent(pipe: Any, settings: dict[str, Any]) -> Iterator[Policy]:
    """The policy of a loaded pipeline for a run with these settings, of which the precision is set here."""
    from mmalign.policy import loaded as pipelines

    for key in ("quantize", "offload", "precision"):
        if settings.get(key):
            raise BadInput(f"{key}: the pipeline is loaded already; load it so, or give its folder or hub id")
    with refusing():
        pipelines.check(pipe)
    with pipelines.restored(pipe):
        settings["precision"] = pipelines.precision(pipe)
        with refusing():
            policy = pipelines.as_policy(pipe, settings.get("guidance", 1.0), settings.get("size"))
        yield policy


def without_adapter(pipe: Any) -> None:
    """Remove the adapter of a run that did not begin."""
    if getattr(getattr(pipe, "transformer", None), "peft_config", None):
        pipe.transformer.unload_lora()


@contextmanager
def drawing(model: Any, guidance: float | None, adapter: Adapter) -> Iterator[Any]:
    """A policy to draw images with."""
    if isinstance(model, str | Path):
        yield load_policy(str(model), guidance, Path(adapter) if isinstance(adapter, str) else adapter)
        return
    if adapter is not None:
        raise BadInput("adapter: the model is loaded already; load the adapter into it")
    if isinstance(model, Policy):
        yield model
        return
    from mmalign.policy import loaded as pipelines

    with refusing():
        pipelines.check(model, adapters=True)
    with pipelines.restored(model):
        with refusing():
            policy = pipelines.as_policy(model, 1.0 if guidance is None else guidance)
        yield policy


def warn_cut(prompts: Sequence[Prompt], *models: Any) -> None:
    for line in cut(models, [p.text for p in prompts]):
        print(f"mmalign: {line}", file=sys.stderr)
