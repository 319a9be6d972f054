"""Texts of which a model reads only the beginning. A model or scorer that cuts texts has a method `readers`."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Reader:
    """What reads a text, the tokens that it takes of one at most, and whether a text has more."""

    name: str
    tokens: int
    cuts: Callable[[str], bool]


def reader(name: str, tokenizer: Any, most: int, worded: Callable[[str], str] = str) -> Reader:
    """The reader behind a tokenizer of transformers; `worded` is what it is given of a text."""
    return Reader(name, most, lambda text: len(tokenizer(worded(text), verbose=False).input_ids) > most)


def cut(models: Iterable[Any], texts: Sequence[str]) -> list[str]:
    """A line for each reader of `models`, policies and scorers, that does not see all of some texts. Models that say
    nothing of what they read are left out."""
    lines, whole = [], [*dict.fromkeys(texts)]
    for model in models:
        ask = getattr(getattr(model, "scorer", model), "readers", list)  # a memory of scores holds the scorer
        for own in ask():
            if count := sum(map(own.cuts, whole)):
                lines.append(
                    f"{count} of {len(whole)} prompts are longer than the {own.tokens} tokens that {own.name} reads; "
                    "what is beyond is not seen"
                )
    return lines
