"""Templates of the instructions for judges, and filling in prompts and pictures."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from reward_models import files
from reward_models.vlm.types import Part, Question

FOLDER = Path(__file__).parent / "instructions"
TURN = "\n---\n"  # separates the system message from the question


def quoted(text: str) -> str:
    """A user's text as a JSON string: in quotes, on one line, with the brackets of tags and special tokens escaped."""
    return re.sub(
        r"[<>\[\]\u2028\u2029\x85]", lambda match: f"\\u{ord(match[0]):04x}", json.dumps(text, ensure_ascii=False)
    )


@dataclass(frozen=True)
class Template:
    """A text with `{placeholders}`. `source` is the raw text."""

    source: str

    @classmethod
    def of(cls, scorer: str, name: str, needed: Sequence[str], file: str | None = None) -> "Template":
        """The template in `file`, or the built-in one called `name`. ValueError if it cannot be read or lacks a
        placeholder of `needed`."""
        path = Path(file) if file else FOLDER / f"{name}.txt"
        try:
            text = files.text(path)
        except ValueError as error:
            raise ValueError(f"{scorer}: {error}") from None
        for placeholder in needed:
            if f"{{{placeholder}}}" not in text:
                raise ValueError(f"{scorer}: {path} does not contain {{{placeholder}}}")
        return cls(text)

    def fill(self, **given: Part) -> Question:
        """The question with the placeholders replaced by pictures and text, in one pass: inserted text is not searched
        for placeholders. Words in braces that are not `given` are unchanged."""
        system, turn, body = self.source.rpartition(TURN)
        message = "".join(part for part in _filled(system, given) if isinstance(part, str)).strip() if turn else ""
        return Question(_filled(body.strip(), given), message)


def _filled(text: str, given: Mapping[str, Part]) -> tuple[Part, ...]:
    pieces = re.split(rf"\{{({'|'.join(given)})\}}", text) if given else [text]
    parts: list[Part] = []
    for k, piece in enumerate(pieces):
        part = given[piece] if k % 2 else piece
        if isinstance(part, str) and parts and isinstance(parts[-1], str):
            parts[-1] += part
        elif not isinstance(part, str) or part:
            parts.append(part)
    return tuple(parts)
