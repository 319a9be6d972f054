"""The instructions that judges read, and how prompts are filled into them."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from reward_models import files
from reward_models.vlm.types import Part, Question

FOLDER = Path(__file__).parent / "instructions"


TURN = "\n---\n"  # before it stands what the model is told once, after it what it is asked


def quoted(text: str) -> str:
    """A user's words as a JSON string: in quotes, on one line, without the brackets of tags and special tokens."""
    return re.sub(
        r"[<>\[\]\u2028\u2029\x85]", lambda own: f"\\u{ord(own[0]):04x}", json.dumps(text, ensure_ascii=False)
    )


@dataclass(frozen=True)
class Template:
    """A text with `{placeholders}`, cut at them. `source` is the text as it is."""

    source: str

    @classmethod
    def of(cls, scorer: str, name: str, needed: Sequence[str], file: str | None = None) -> "Template":
        """Of `file`, or our own called `name`. ValueError if it cannot be read or lacks a placeholder of `needed`."""
        path = Path(file) if file else FOLDER / f"{name}.txt"
        try:
            text = files.text(path)
        except ValueError as error:
            raise ValueError(f"{scorer}: {error}") from None
        for name in needed:
            if f"{{{name}}}" not in text:
                raise ValueError(f"{scorer}: {path} does not hold {{{name}}}")
        return cls(text)

    def fill(self, **given: Part) -> Question:
        """The question, with pictures and text in their places; what is put in is not looked at again. Words in braces
        that are not `given` stay as they are."""
        system, turn, body = self.source.rpartition(TURN)
        told = "".join(part for part in _filled(system, given) if isinstance(part, str)).strip() if turn else ""
        return Question(_filled(body.strip(), given), told)


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
