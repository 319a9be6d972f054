"""Which prompts mean the same, judged from their text alone."""

import re
from collections.abc import Iterable

import torch
from jaxtyping import Int
from torch import Tensor

ARTICLES = ("a", "an", "the")
FRAME = re.compile(r"(?:photo|photograph|picture|image) of ")
RELATION = re.compile(r" (?:is |are )?(?:to |on )?(left of|right of|above|below) ")
MIRRORED = {"right of": "left of", "below": "above"}


def meaning(text: str) -> str:
    """A string that is the same for texts that differ only in articles, case, white space, the order around "and", or a
    mirrored relation: "A circle and the square" and "a square and a circle", "a cat right of a dog" and "a dog left of
    a cat".

    It is conservative: all other words are compared as they are written, text in double quotes to the letter, and where
    a text has several relations their order counts.
    """
    words = re.findall(r'"[^"]*"|[^\s"]+|"', text)
    plain = [word.replace(" ", "\0") if len(word) > 1 and word[0] == '"' else word.casefold() for word in words]
    rest = " ".join(word for word in plain if word not in ARTICLES)
    frame = match.group() if (match := FRAME.match(rest)) else ""
    parts = RELATION.split(rest[len(frame) :])
    if len(parts) == 3 and parts[1] in MIRRORED:
        parts = [parts[2], MIRRORED[parts[1]], parts[0]]
    return frame + " ".join(_sorted(part) for part in parts)


def _sorted(phrases: str) -> str:
    return " and ".join(sorted(phrases.split(" and ")))


def clusters(texts: Iterable[str]) -> Int[Tensor, "N"]:
    """The number of each text's meaning; texts with one meaning have one number."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(meaning(text), len(numbers)) for text in texts], dtype=torch.int64)
