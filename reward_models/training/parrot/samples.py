"""Training samples of a critic: a picture, its prompt, and the reply in the form that the scorer `rational` reads."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reward_models import files, limits, tables
from reward_models.pictures import Stored
from reward_models.prompt import Prompt
from reward_models.scorers.rational import ASPECTS as HEADINGS, OPTIONAL, TASKS
from reward_models.vlm import critiques
from reward_models.vlm.critiques import Critique

ASPECTS = {name: HEADINGS[name] for name in TASKS["image"]}
TITLES = {
    "faithfulness": "Text Faithfulness", "quality": "Physical and Visual Quality", "text": "Text Rendering",
}  # fmt: skip
SIDES = ("a", "b")
RATIONALES, IMAGES = "rationales.jsonl", "images"
LEAK = re.compile(  # words by which a critique of one picture tells of the label, or of the other picture
    r"\b(labell?ed|chosen|prefer(s|red|ence|ences|able)?|rejected|winner|annotat\w*|ground[ -]truth|(better|worse) than"
    r"|the other one|(image|picture) ?([12]|one|two|[ab](?! \w))|(first|second|other|both) (image|picture)s?)\b",
    re.I,
)


@dataclass(frozen=True)
class Sample:
    """A picture of a prompt, and the reply that the student learns to give."""

    image: Stored
    prompt: Prompt
    reply: str


def leak(critique: Critique) -> str:
    """The words of a critique that tell of the label or of the other picture, "" without any."""
    match = LEAK.search("\n".join((*critique.reasons.values(), critique.request)))
    return match[0] if match else ""


def reply_of(critique: Critique) -> str:
    """The reply that `critiques.read` reads as this critique. ValueError for words that would be read otherwise."""
    lines = ["# Detailed Judgement"]
    for number, (name, title) in enumerate(TITLES.items(), 1):
        score, reason = critique.scores[name], critique.reasons.get(name, "")
        lines += [f"{number}. {title}:", *([f"## Justification: {reason}"] if reason else [])]
        lines.append(f"## Score: {'N/A' if score is None else f'{score:.2g}'}")
    if critique.request:
        lines += ["# User Request Refinement:", f"## Refined Request: {critique.request}"]
    reply = "\n".join(lines)
    try:
        same = critiques.read(reply, ASPECTS) == critique
    except ValueError:
        same = False
    if not same:
        raise ValueError("its words cannot be written in the form of a reply")
    return reply


def tidy(critique: Critique) -> Critique:
    """The critique with scores in tenths, and each text on one line. ValueError for an aspect that applies and has no
    justification, or must apply and does not."""
    reasons = {name: " ".join(reason.split()).strip(" *_") for name, reason in critique.reasons.items()}
    for name, score in critique.scores.items():
        if score is None and name not in OPTIONAL:
            raise ValueError(f"the score of {name} is N/A, but it applies to every image")
        if score is not None and not reasons.get(name):
            raise ValueError(f"{name} has no justification")
    scores = {name: None if score is None else round(score, 1) for name, score in critique.scores.items()}
    given = {name: reason for name, reason in reasons.items() if reason and scores[name] is not None}
    return Critique(scores, given, " ".join(critique.request.split()))


def read(source: str | Path) -> list[Sample]:
    """The samples of the pairs that passed: two for each row of a folder of rationales, without repetitions, in the
    order of its rows. ValueError, in one line that names the row, for a row that is invalid; ValueError without any
    row that passed."""
    folder = Path(source)
    path = folder / RATIONALES if folder.is_dir() else folder
    samples: dict[tuple[str, str, str], Sample] = {}
    for number, line in enumerate(files.lines(files.text(path)), 1):
        try:
            row = files.parsed(line)
            if not isinstance(row, dict) or not isinstance(row.get("kept"), bool):
                raise ValueError("not a row of rationales")
            for sample in of_row(row, path.parent) if row["kept"] else ():
                samples.setdefault((sample.image.name, sample.prompt.text, sample.reply), sample)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    if not samples:
        raise ValueError(f"{path}: no rationale in it passed the checks, and there is nothing to train on")
    return [*samples.values()]


def of_row(row: Mapping[str, Any], folder: Path) -> Iterator[Sample]:
    """The two samples of a row that passed."""
    text, number = row.get("prompt"), tables.whole(row.get("id"))
    if not isinstance(text, str) or len(text) > limits.PROMPT or number is None:
        raise ValueError("`prompt` must be a text and `id` a whole number")
    for side in SIDES:
        name = row.get(f"image_{side}")
        if not isinstance(name, str) or not re.fullmatch(rf"{IMAGES}/[0-9a-f]{{64}}\.png", name):
            raise ValueError(f"`image_{side}` must be {IMAGES}/ and the hash of a picture, got {str(name)[:80]!r}")
        critique = _critique(row, side)
        if words := leak(critique):
            raise ValueError(f"{words!r} tells of the label or of the other picture")
        yield Sample(Stored(name, folder / name), Prompt(tables.wording(text), {}, number), reply_of(critique))


def _critique(row: Mapping[str, Any], side: str) -> Critique:
    scores, reasons, request = row.get(f"scores_{side}"), _at(row, "rationale", side), _at(row, "refined_request", side)
    if not isinstance(scores, dict) or scores.keys() != ASPECTS.keys() or not isinstance(request, str):
        raise ValueError(f"`scores_{side}` must have {', '.join(ASPECTS)}, and `refined_request` a text for {side}")
    if not isinstance(reasons, dict) or not all(name in ASPECTS and isinstance(r, str) for name, r in reasons.items()):
        raise ValueError(f"`rationale` must have a text for each aspect of {side}")
    if sum(map(len, (*reasons.values(), request))) > limits.REPLY:
        raise ValueError(f"the texts of {side} are longer than {limits.REPLY} characters")
    return tidy(Critique({name: critiques.SCALE.read(scores[name], name) for name in ASPECTS}, reasons, request))


def _at(row: Mapping[str, Any], key: str, side: str) -> Any:
    value = row.get(key)
    return value.get(side) if isinstance(value, dict) else None
