"""Find prompts that models truncate. A model or scorer that truncates texts has a method `readers`."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Reader:
    """A text encoder: its name, its maximum number of tokens, and whether a text exceeds it."""

    name: str
    tokens: int
    cuts: Callable[[str], bool]


def reader(name: str, tokenizer: Any, most: int, worded: Callable[[str], str] = str) -> Reader:
    """The reader with a tokenizer of transformers; `worded` maps a prompt to the text that is tokenized."""
    return Reader(name, most, lambda text: len(tokenizer(worded(text), verbose=False).input_ids) > most)


def cut(models: Iterable[Any], texts: Sequence[str]) -> list[str]:
    """A line for each reader of `models` (policies and scorers) that truncates some of the texts. Models without
    `readers` are skipped."""
    lines, distinct = [], [*dict.fromkeys(texts)]
    for model in models:
        readers = getattr(getattr(model, "scorer", model), "readers", list)  # a `Cached` scorer wraps another
        for text_reader in readers():
            if count := sum(map(text_reader.cuts, distinct)):
                lines.append(
                    f"{count} of {len(distinct)} prompts are longer than the {text_reader.tokens} tokens that "
                    f"{text_reader.name} reads; they are truncated"
                )
    return lines
