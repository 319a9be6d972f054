"""A tolerant parser of critiques by aspect: headings with a justification and a score, or JSON.

The form is that of RationalRewards (numbered aspects, each with a justification and a score from 1 to 4 or N/A, then a
refined request). Models write scores in bold, as "3/4", in another order, or stop early. Every requested aspect needs
one readable score, or N/A, because the mean over the others would be a different quantity. Two different scores for one
aspect are rejected: one of them may come from words in the picture or the request, and a guess would be trained on.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reward_models.files import lines
from reward_models.vlm import replies
from reward_models.vlm.scales import Scale

# values up to half a point outside are clamped, as in the paper: judges adjust whole levels by tenths
SCALE = Scale(1, 4, beyond=0.5, optional=True)
START = ("detailed judgement", "detailed judgment")
SUMMARY = ("summary", "user request refinement", "refinement comments", "refined request")
NOTHING = {"", "none", "n/a", "na", "no change", "no changes", "null", "same", "unchanged"}
REASONS, SCORES = ("justification", "reason", "reasoning", "explanation"), ("score", "rating")
REQUESTS = ("refined_request", "request", "refined_prompt", "revised_request")


@dataclass(frozen=True)
class Critique:
    """`scores` from 1 to 4 by aspect, None where the judge answers N/A; `reasons` by aspect; the refined request, "" if
    none."""

    scores: dict[str, float | None]
    reasons: dict[str, str]
    request: str = ""

    @property
    def overall(self) -> float:
        """(mean - 1) / 3 in [0, 1] over the aspects that apply (RationalRewards' reward)."""
        given = [score for score in self.scores.values() if score is not None]
        return (sum(given) / len(given) - SCALE.low) / (SCALE.high - SCALE.low)

    def __str__(self) -> str:
        """One line: each aspect that applies with its score and reason."""
        given = {name: score for name, score in self.scores.items() if score is not None}
        return "; ".join(f"{name} {score:g}/4 {self.reasons.get(name, '')}".strip() for name, score in given.items())


def read(reply: str, aspects: Mapping[str, Sequence[str]], cut: bool = False) -> Critique:
    """The critique in a reply, which may be `cut` off. `aspects`: the possible headings of each, in lower case.
    ValueError if an aspect has neither a readable score nor N/A, one has two, or none applies."""
    text = replies.answer(reply, cut)
    critique = _from_json(text, aspects) or _from_headings(text, aspects)
    missing = [name for name in aspects if name not in critique.scores]
    if len(missing) == len(aspects) or all(score is None for score in critique.scores.values()):
        raise ValueError(f"no aspect has a score; looked for {', '.join(aspects)}")
    if missing:
        raise ValueError(f"{'the reply ends before' if cut else 'there is no score for'} {', '.join(missing)}")
    return critique


def _from_json(text: str, aspects: Mapping[str, Sequence[str]]) -> Critique | None:
    return replies.unanimous(filter(None, (_of_value(value, aspects) for value in replies.values(text))))


def _of_value(value: Any, aspects: Mapping[str, Sequence[str]]) -> Critique | None:
    """The critique in a JSON value; None if the value is not a critique."""
    critique = replies.plain(value) if isinstance(value, dict) else {}
    rows = _rows(critique.get("aspects", critique.get("scores", critique)), aspects)
    if not rows:
        return None
    request = replies.one_of(critique, REQUESTS)
    scores = {name: SCALE.read(score, f"the score of {name}") for name, (score, _) in rows.items()}
    reasons = {name: reason for name, (_, reason) in rows.items() if reason}
    ordered = {name: scores[name] for name in aspects if name in scores}
    return Critique(ordered, reasons, _request(request if isinstance(request, str) else ""))


def _rows(listed: Any, aspects: Mapping[str, Sequence[str]]) -> dict[str, tuple[Any, str]]:
    """Score and reason by aspect, from a list of named objects or an object with the names as keys."""
    if isinstance(listed, list):
        rows = [replies.plain(row) for row in listed if isinstance(row, dict)]
        pairs = [(replies.one_of(row, ("aspect", "name", "title")), row) for row in rows]
    elif isinstance(listed, dict):
        pairs = [*listed.items()]
    else:
        return {}
    scores: dict[str, tuple[Any, str]] = {}
    for title, row in pairs:
        name = _named(replies.heading(str(title))[0], aspects)
        if name is None:
            continue
        row = replies.plain(row) if isinstance(row, dict) else {"score": row}
        score = next((row[key] for key in SCORES if key in row), "")
        if name in scores and scores[name][0] != score:
            raise ValueError(f"{name} has two scores, {scores[name][0]} and {score}")
        scores[name] = (score, str(replies.one_of(row, REASONS) or ""))
    return scores


def _named(title: str, aspects: Mapping[str, Sequence[str]]) -> str | None:
    title = title.removesuffix(" score")
    return next((name for name, titles in aspects.items() if title == name or title in titles), None)


def _from_headings(text: str, aspects: Mapping[str, Sequence[str]]) -> Critique:
    lines = text.split("\n")
    heads = [replies.heading(line) for line in lines]
    begin = next((number + 1 for number, (title, *_) in enumerate(heads) if title.startswith(START)), 0)
    ends = (number for number in range(begin, len(lines)) if heads[number][0].startswith(SUMMARY))
    scores: dict[str, float | None] = {}
    reasons: dict[str, str] = {}
    aspect = None
    for number in range(begin, next(ends, len(lines))):
        title, note, rest = heads[number]
        given: list[float | None] = []
        if (name := _named(title, aspects)) is not None:
            aspect, given = name, _inline(rest, note)
        elif aspect is not None and title in replies.TITLES:
            given = [SCALE.read(replies.after(lines, number, rest), f"the score of {aspect}", note)]
        elif aspect is not None and title in REASONS and (reason := rest.strip(" *_")):
            reasons.setdefault(aspect, reason)
        for score in given:
            if scores.setdefault(aspect, score) != score:
                raise ValueError(f"{aspect} has two scores, {_shown(scores[aspect])} and {_shown(score)}")
    ordered = {name: scores[name] for name in aspects if name in scores}
    return Critique(
        ordered, reasons, _request(next((line for line, _ in replies.titled(text, ("refined request",))), ""))
    )


def _inline(rest: str, note: str) -> list[float | None]:
    """The score on the line of the aspect itself; empty if words follow instead."""
    try:
        return [SCALE.read(rest, note=note)] if rest.strip(replies.MARKS) else []
    except ValueError:
        return []


def _shown(score: float | None) -> str:
    return "N/A" if score is None else f"{score:g}"


def _request(text: str) -> str:
    """The refined request, in one line; "" for none, and for a placeholder that was not filled in."""
    line = next((part for part in lines(text) if part.strip(" *_`")), "").strip(" *_`")
    line = line[1:-1].strip() if len(line) > 1 and (line[0], line[-1]) in {('"', '"'), ("'", "'"), ("“", "”")} else line
    return "" if line.lower().rstrip(".") in NOTHING or re.fullmatch(r"[<\[{].*[>\]}]", line) else line
