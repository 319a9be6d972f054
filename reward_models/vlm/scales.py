"""Parse a score in a judge's text: a single number on its scale, in any usual wrapping; anything else is rejected.

Bold, quotes, brackets, code, `\\boxed{}`, "about", "3.5/4", "3.5 out of 4", "3.5 points", a decimal comma, a number
word and a note after the number are accepted. A range, a choice, a percentage, another scale and a second number are
rejected, because a guess would be trained on. Every step takes time linear in the text.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
ONE_OF_WORDS = "|".join(WORDS)
NUMBER = rf"[+-]?(?:\d{{1,6}}(?:[.,]\d{{1,17}})?|[.,]\d{{1,17}})|(?:{ONE_OF_WORDS})\b"
ALONE = re.compile(rf"(?:(?:about|around|approximately|approx\.?|roughly)\s)?[~≈\s]*({NUMBER})", re.I)
OUT_OF = re.compile(rf"\s*[(\[]?\s*(?:/|out\s+of\b|of\b)\s*({NUMBER})\s*[)\]]?(?![\w%.,]*\d|%)", re.I)
UNIT = re.compile(r"\s*(?:points?|pts?|stars?)\b\.?", re.I)
NOTE = re.compile(r"\s*(?:$|[([;,:!✓★]|\.(?:\s|$)|\s[-–—]+\s)")
ANOTHER = re.compile(rf"%|\bpercent\b|\b(?:zero|{'|'.join(WORDS[2:])})\b|\b(?:or|to|and|than)\s+one\b", re.I)
NONE = re.compile(r"(?:n\s?/?\s?a|not applicable|none|null)\b", re.I)
WRAPPED = re.compile(
    r"\\(?:boxed|text|mathrm|mathbf)\s?\{([^{}\\]{0,99})\}|</?(?:score|answer|rating)>|\\[()\[\]]", re.I
)
WIDE = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " ", ord("−"): "-"}
QUOTES = str.maketrans(dict.fromkeys("*_`\"'“”‘’«»$", " "))
SHOWN = 40  # characters of a value in an error


@dataclass(frozen=True)
class Scale:
    """Scores from `low` to `high`. A score up to `beyond` outside is clamped, because some judges are asked to adjust
    the highest and the lowest level. `optional`: "N/A" is accepted."""

    low: int | float
    high: int | float
    beyond: int | float = 0.0
    optional: bool = False

    def read(self, value: Any, what: str = "the score", note: str = "") -> float | None:
        """The score in `value`, a text or a JSON value. None for N/A, if that is allowed. ValueError, naming `what`,
        for anything but one number on the scale, and for a `note` beside it that names another scale, such as `(1-10)`
        or `(%)`."""
        out_of = OUT_OF.fullmatch(note)
        if note and not (_value(out_of[1]) == self.high if out_of else self._is_note(f" {note}")):
            raise self._off(f"{str(value)[:SHOWN].strip()} {note[:SHOWN]}", what)
        if isinstance(value, str):
            text = unwrapped(value)
            if (none := NONE.match(text)) and self._is_note(text[none.end() :]):
                return self._nothing(value, what)
            number = self._number(text, value, what)
        elif value is None:
            return self._nothing(value, what)
        elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._unclear(value, what)
        else:
            number = float(value)
        if not self.low - self.beyond <= number <= self.high + self.beyond:
            raise self._off(f"{number:g}", what)
        return min(max(number, float(self.low)), float(self.high))

    def _number(self, text: str, value: str, what: str) -> float:
        first = ALONE.match(text)
        if first is None:
            raise self._unclear(value, what)
        number, rest = _value(first[1]), text[first.end() :]
        if number is None:
            raise self._unclear(value, what)
        out_of = None
        for _ in range(2):  # "3 points out of 4", "3 out of 4 points"
            if unit := UNIT.match(rest):
                rest = rest[unit.end() :]
            if out_of is None and (out_of := OUT_OF.match(rest)):
                rest = rest[out_of.end() :]
        if out_of is not None and _value(out_of[1]) != self.high:
            raise self._off(f"{first[1]} out of {out_of[1]}", what)
        if not self._is_note(rest):
            raise self._unclear(value, what)
        return number

    def _is_note(self, rest: str) -> bool:
        """Whether the text after a number is empty or a note without another number, except the ends of the scale."""
        scale = re.match(rf"\s*[(\[]\s*(?:scale\s*:?\s*)?{self.low:g}\s?(?:-|–|to)\s?{self.high:g}\s*[)\]]", rest)
        rest = rest[scale.end() :] if scale else rest
        return bool(NOTE.match(rest)) and not ANOTHER.search(rest) and not any(map(str.isnumeric, rest))

    def _nothing(self, value: Any, what: str) -> None:
        if not self.optional:
            raise self._unclear(value, what)

    def _unclear(self, value: Any, what: str) -> ValueError:
        if value is None:
            return ValueError(f"{what} is missing; a number from {self.low:g} to {self.high:g} is needed")
        excerpt = repr(" ".join(value.split()) if isinstance(value, str) else value)
        excerpt = excerpt if len(excerpt) <= SHOWN else f"{excerpt[:SHOWN]}..."
        or_none = " or N/A" if self.optional else ""
        return ValueError(f"{what} is {excerpt}; a number from {self.low:g} to {self.high:g}{or_none} is needed")

    def _off(self, given: str, what: str) -> ValueError:
        return ValueError(f"{what} is {given}; the scale is {self.low:g} to {self.high:g}")


def unwrapped(text: str) -> str:
    """The text without the marks that judges put around a value: emphasis, quotes, code, tags, one pair of brackets.
    Full-width letters, digits and signs become ASCII."""
    text = text.translate(WIDE)
    for _ in range(2):  # \boxed{\text{3}}
        text = WRAPPED.sub(lambda match: f" {match[1] or ''} ", text)
    text = text.translate(QUOTES).strip()
    if text[:1] in ("–", "—"):
        text = f"-{text[1:]}"
    if text[:1] and (close := {"(": ")", "[": "]", "{": "}"}.get(text[0])):
        inner, closed, rest = text[1:].partition(close)
        text = f"{inner.strip()} {rest}".strip() if closed else text
    return text


def _value(digits: str) -> float | None:
    """The number in digits or as a word; None for digits with a possible thousands separator."""
    if digits.lower() in WORDS:
        return float(WORDS.index(digits.lower()))
    if re.fullmatch(r"[+-]?\d+,\d{3}", digits):
        return None
    return float(digits.replace(",", "."))
