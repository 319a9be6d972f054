"""Critiques aspect by aspect, read tolerantly: headings with a justification and a score, or JSON.

The form is RationalRewards' (numbered aspects, each with justification and score from 1 to 4 or N/A, then a refined
request). Models put scores in bold, out of 4, in another order, or stop short; all of that is read. Two different
scores for one aspect are not: one of them may be words of the picture or of the request, and a guess would train.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reward_models import replies
from reward_models.files import lines

LOW, HIGH = 1.0, 4.0
BEYOND = 0.5  # a score this far outside is meant on the scale and clamped; further out it is another scale
VALUE = r"[*_`\s]*(n\s*/?\s*a\b|not applicable|none|null|[-+]?\d+(?:[.,]\d+)?)\s*(?:(?:/|out of)\s*(\d+(?:\.\d+)?))?"
SCORE = re.compile(rf"^[\s#*_>`-]*(?:final |overall )?score\b[*_`\s]*[:=]{VALUE}(?!\s*[-–]\s*\d)", re.I | re.M)
INLINE = re.compile(rf"^{VALUE}[\s*_`]*(?:$|\(|\.(?!\d)|;|,)", re.I | re.M)
REASON = re.compile(r"^[\s#*_>`-]*(?:justification|reason(?:ing)?|explanation)\b[*_`\s]*:[*_ \t]*(.*)$", re.I | re.M)
START = re.compile(r"^[\s#*_>`\d.-]*detailed judge?ment\b.*$", re.I | re.M)
SUMMARY = re.compile(
    r"^[\s#*_>`\d.-]*(?:summary|user request refinement|refinement comments|refined request)\b", re.I | re.M
)
REQUEST = re.compile(r"^[\s#*_>`\d.-]*refined request\b[*_`\s]*:[*_ \t]*(.*(?:\n\s*\S.*)?)", re.I | re.M)
NOTHING = {"", "none", "n/a", "na", "no change", "no changes", "null", "same", "unchanged"}
REASONS, SCORES = ("justification", "reason", "explanation"), ("score", "rating")
REQUESTS = ("refined_request", "request", "refined_prompt", "revised_request")


@dataclass(frozen=True)
class Critique:
    """`scores` from 1 to 4 by aspect, of those that have one; `reasons` by aspect; the refined request, "" if none."""

    scores: dict[str, float]
    reasons: dict[str, str]
    request: str = ""

    @property
    def overall(self) -> float:
        """(mean - 1) / 3 in [0, 1] over the aspects that have a score (RationalRewards' reward)."""
        return (sum(self.scores.values()) / len(self.scores) - LOW) / (HIGH - LOW)

    def __str__(self) -> str:
        """One line: each aspect with its score and reason."""
        said = [f"{name} {score:g}/4 {self.reasons.get(name, '')}".strip() for name, score in self.scores.items()]
        return "; ".join(said)


def read(reply: str, aspects: Mapping[str, Sequence[str]]) -> Critique:
    """The critique in a reply. `aspects`: for each, the headings it goes by, in lower case. ValueError if no aspect has
    a score, one has two, or a score is not on the scale."""
    text = replies.answer(reply)
    found = _from_json(text, aspects) or _from_headings(text, aspects)
    if not found.scores:
        raise ValueError(f"no aspect has a score; looked for {', '.join(aspects)}")
    return found


def _from_json(text: str, aspects: Mapping[str, Sequence[str]]) -> Critique | None:
    for found in replies.values(text):
        if not isinstance(found, dict):
            continue
        own = replies.plain(found)
        listed = own.get("aspects", own.get("scores", own))
        rows = _rows(listed, aspects)
        if rows:
            request = replies.one_of(own, REQUESTS)
            scores = {name: _on_scale(name, str(score), None) for name, (score, _) in rows.items()}
            reasons = {name: reason for name, (_, reason) in rows.items() if reason}
            kept = {name: score for name, score in scores.items() if score is not None}
            return Critique(kept, reasons, _request(request if isinstance(request, str) else ""))
    return None


def _rows(listed: Any, aspects: Mapping[str, Sequence[str]]) -> dict[str, tuple[Any, str]]:
    """Score and reason by aspect, of a list of objects with a name, or of an object by name."""
    if isinstance(listed, list):
        named = [replies.plain(row) for row in listed if isinstance(row, dict)]
        pairs = [(replies.one_of(row, ("aspect", "name", "title")), row) for row in named]
    elif isinstance(listed, dict):
        pairs = [*listed.items()]
    else:
        return {}
    rows: dict[str, tuple[Any, str]] = {}
    for title, row in pairs:
        name = _named(str(title), aspects)
        if name is None:
            continue
        own = replies.plain(row) if isinstance(row, dict) else {"score": row}
        score = next((own[key] for key in SCORES if key in own), "none")
        if name in rows and rows[name][0] != score:
            raise ValueError(f"{name} has two scores, {rows[name][0]} and {score}")
        rows[name] = ("none" if score is None else score, str(replies.one_of(own, REASONS) or ""))
    return rows


def _named(title: str, aspects: Mapping[str, Sequence[str]]) -> str | None:
    title = re.sub(r"[\s_&-]+", " ", re.sub(r"^\W*\d*[.):]*", "", title).lower()).strip(" *:")
    return next((name for name, own in aspects.items() if title == name or title in own), None)


def _from_headings(text: str, aspects: Mapping[str, Sequence[str]]) -> Critique:
    begun = START.search(text)
    body = text[begun.end() :] if begun else text
    end = SUMMARY.search(body)
    judged = body[: end.start()] if end else body
    heads = sorted(
        (head.start(), head.end(), name)
        for name, titles in aspects.items()
        for head in _heading((name, *titles)).finditer(judged)
    )
    scores: dict[str, float | None] = {}
    reasons: dict[str, str] = {}
    for k, (_, after, name) in enumerate(heads):
        block = judged[after : heads[k + 1][0] if k + 1 < len(heads) else len(judged)]
        line = block.partition("\n")[0]
        for value, out_of in {own.groups() for own in (INLINE.match(line), *SCORE.finditer(block)) if own}:
            score = _on_scale(name, value, out_of)
            if name in scores and scores[name] != score:
                raise ValueError(f"{name} has two scores, {_shown(scores[name])} and {_shown(score)}")
            scores[name] = score
        reason = REASON.search(block)
        if reason and reason[1].strip(" *_"):
            reasons.setdefault(name, reason[1].strip(" *_"))
    request = REQUEST.search(text)
    kept = {name: scores[name] for name in aspects if scores.get(name) is not None}
    return Critique(kept, reasons, _request(request[1] if request else ""))


def _heading(titles: Sequence[str]) -> re.Pattern[str]:
    """A line that begins with one of the titles, numbered, in bold, or with a note in brackets, and a colon or nothing
    after it."""
    known = "|".join(re.escape(title).replace(r"\ ", r"[\s_&-]+") for title in sorted(titles, key=len, reverse=True))
    return re.compile(
        rf"^[\s#*_>`-]*(?:\d+\s*[.):]\s*)?[\s*_`]*(?:{known})[*_`]*[ \t]*(?:\([^)\n]*\))?[*_` \t]*(?::[*_` \t]*|$)",
        re.I | re.M,
    )


def _on_scale(name: str, value: str, out_of: str | None) -> float | None:
    """The score in [1, 4]; None where the judge says the aspect does not apply."""
    pair = re.fullmatch(rf"{VALUE}[\s*_`]*(?:\(.*\))?", value, re.I | re.S)
    if pair is None:
        raise ValueError(f"the score of {name} is {value!r:.40}; a number from 1 to 4 or N/A is needed")
    value, out_of = pair[1], pair[2] or out_of
    if not re.search(r"\d", value):
        return None
    score = float(value.replace(",", ".")[:20])
    if out_of is not None and float(out_of) != HIGH:
        raise ValueError(f"the score of {name} is {value} out of {out_of}; the scale is 1 to 4")
    if not LOW - BEYOND <= score <= HIGH + BEYOND:
        raise ValueError(f"the score of {name} is {value}; the scale is 1 to 4")
    return min(max(score, LOW), HIGH)


def _shown(score: float | None) -> str:
    return "N/A" if score is None else f"{score:g}"


def _request(text: str) -> str:
    """The refined request, in one line; "" for none, and for a form that was left as it was."""
    line = next((own for own in lines(text) if own.strip(" *_`")), "").strip(" *_`")
    line = line[1:-1].strip() if len(line) > 1 and (line[0], line[-1]) in {('"', '"'), ("'", "'"), ("“", "”")} else line
    return "" if line.lower().rstrip(".") in NOTHING or re.fullmatch(r"[<\[{].*[>\]}]", line) else line
