"""Read the prompts and load the scorers that the options of a command name."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmalign.activity import doing
from mmalign.cli.options import Setting, Weighted
from mmalign.errors import BadInput, refusing
from reward_models import Prompt


def read_prompts(texts: Sequence[str] | None, source: str | None) -> list[Prompt]:
    """The prompts of a file or dataset, or those given in quotes, which get the ids 0, 1, ... BadInput unless one
    of the two is given."""
    from mmalign.config import paths
    from mmalign.data import prompts

    if bool(texts) == bool(source):
        raise BadInput("give prompts in quotes or --prompts SOURCE, one of the two")
    if source:
        return prompts.read(paths.locate(source))
    return [Prompt(text, {}, number) for number, text in enumerate(texts or ())]


def load_scorers(
    names: Sequence[str], settings: Sequence[Setting] | None = None, cache: Path | None = None
) -> dict[str, Any]:
    """The scorers by name, with their settings, and with a cache of their scores if a file is given. BadInput."""
    from reward_models import load
    from reward_models.cache import Cached

    of_scorer: dict[str, dict] = {name: {} for name in names}
    for setting in settings or []:
        if setting.scorer not in of_scorer:
            raise BadInput(f"--set {setting.text!r} must look like scorer.key=value, with one of {', '.join(names)}")
        of_scorer[setting.scorer][setting.key] = setting.value
    with refusing(), doing("loading scorers"):
        scorers = {name: load(name, **given) for name, given in of_scorer.items()}
        return {name: Cached(scorer, cache) for name, scorer in scorers.items()} if cache else scorers


def scorers_of(*rewards: str | None) -> list[str]:
    """The scorers of rewards like scorer.component, each once; a reward that is None has none."""
    from mmalign.config.checks import component

    return [*dict.fromkeys(component(reward)[0] for reward in rewards if reward is not None)]


def load_toward(
    rewards: Sequence[Weighted] | None, push: float | None, since: float | None, scorers: Mapping[str, Any]
) -> Any:
    """The guidance of --toward, None without it. Its scorers are those in `scorers`, or else loaded. BadInput."""
    from mmalign.config.checks import component
    from mmalign.evaluation.toward import Term, Toward

    chosen = {"push": push, "since": since}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if not rewards:
        if chosen:
            raise BadInput("--push and --from belong to --toward scorer.component")
        return None
    missing = [name for name in scorers_of(*(term.name for term in rewards)) if name not in scorers]
    known = {**scorers, **load_scorers(missing)}
    parts = [(*component(term.name), term.weight) for term in rewards]
    return Toward(tuple(Term(known[name], part, weight, name) for name, part, weight in parts), **chosen)
