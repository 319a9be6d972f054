"""Rationales of preferences, written by a teacher that knows the label and checked without it, after PARROT of
RationalRewards.

For each pair a teacher judge, shown which image is preferred, writes notes and scores of both images. The notes of a
candidate are kept if they do not tell of the label, if the scores prefer the labelled image, and if the judge, given
the pair and the notes without the scores and without the label, names the labelled image in both orders of the images.

OUT/settings.json       what the rationales depend on; another command into the folder must have the same
OUT/replies.jsonl       each reply, written before the next questions are asked: none of them is asked for twice
OUT/rationales.jsonl    a row for each candidate, made of the pairs and replies, with the reason where it is not kept
OUT/images/             the images of the pairs that are kept
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from reward_models import files, limits
from reward_models.images import rounded, to_pil
from reward_models.pairs import Pair
from reward_models.scorers import pairwise, rational
from reward_models.training import data
from reward_models.training.data import Progress, silent
from reward_models.training.parrot.samples import ASPECTS, IMAGES, RATIONALES, SIDES, leak, reply_of, tidy
from reward_models.types import Images
from reward_models.vlm import ask, critiques, replies
from reward_models.vlm.critiques import Critique
from reward_models.vlm.templates import Template, quoted
from reward_models.vlm.types import Judge, Question, Reply

SETTINGS, REPLIES = "settings.json", "replies.jsonl"
KEYS = ("image_1", "image_2")  # of the teacher's reply
NAMES = ("Image 1", "Image 2")
ORDERS = ("ab", "ba")  # in which the images are shown
SHOWN = 200  # characters of a reason
Key = tuple[int, int, str]  # of a reply: pair, candidate, and the order of the images, in a check or `anchor`
Row = dict[str, Any]


@dataclass(frozen=True)
class Teacher:
    """The judge, the rationales that it writes of a pair, the longest reply, and the instructions: `anchor` with the
    label, `check` without it."""

    judge: Judge
    candidates: int
    tokens: int
    anchor: Template
    check: Template


def teacher(
    model: str,
    url: str | None = None,
    candidates: int = 2,
    tokens: int = 2048,
    anchor: str | None = None,
    check: str | None = None,
    **asking: Any,
) -> Teacher:
    """A teacher: `model` is a folder or hub id, or with `url` its name on the server. `anchor` and `check`: files that
    replace our instructions. `asking`: see `ask.judge`. ValueError, in one line, for a model or setting that cannot be
    used, and for more candidates than there can be different replies."""
    if type(candidates) is not int or candidates < 1 or type(tokens) is not int or tokens < 1:
        raise ValueError(f"teacher: candidates and tokens must be at least 1, got {candidates!r}, {tokens!r}")
    anchor_template = Template.of("teacher", "parrot_anchor", ("first", "second", "prompt", "chosen"), anchor)
    check_template = Template.of("teacher", "parrot_check", ("first", "second", "prompt", "notes"), check)
    if "{chosen}" in check_template.source:
        raise ValueError(f"teacher: {check} contains {{chosen}}; the check must not know the label")
    judge = ask.judge("teacher", model, url, asking)
    if candidates > len(ORDERS) and not judge.about.get("temperature"):
        raise ValueError(
            f"teacher: {candidates} candidates need a temperature above 0; without one there are two, one for each "
            "order of the images"
        )
    return Teacher(judge, candidates, tokens, anchor_template, check_template)


def schema() -> dict[str, Any]:
    """The JSON schema of a teacher's reply: the notes of each image, as those of `rational`."""
    notes = rational.schema([*ASPECTS])
    parts = {name: part for name, part in notes["properties"].items() if name != "analysis"}
    notes = notes | {"properties": parts, "required": [*parts]}
    return {"type": "object", "properties": dict.fromkeys(KEYS, notes), "required": [*KEYS],
            "additionalProperties": False}  # fmt: skip


def rationalise(
    pairs: Sequence[Pair],
    by: Teacher,
    out: str | Path,
    *,
    batch: int = 16,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write the rationales of all pairs into the folder `out`, and return how many there are: `pairs`, `candidates`,
    `kept`, `pairs_kept`, and `refused`, those that are not kept by the step that refused them. A pair that cannot be
    asked about, such as a tie, is a row with the reason. `batch`: candidates in progress at once.

    The same call continues after an interruption and gives the same files to the byte. A question that failed is asked
    again by the next call, because it has no reply. ValueError, in one line, for pairs without a prompt, a picture
    that cannot be read, or a folder with other work.
    """
    out = Path(out)
    data.check(pairs)
    if not pairs:
        raise ValueError("no pairs to write rationales of")
    files.make_folder(out)
    known = _continued(out, {
        "data": data.digest(pairs, progress), "order": _order(pairs), "judge": dict(by.judge.about),
        "candidates": by.candidates, "tokens": by.tokens, "anchor": by.anchor.source, "check": by.check.source,
    })  # fmt: skip
    files.make_folder(out / IMAGES)
    (out / RATIONALES).unlink(missing_ok=True)  # made again from the replies
    cases = [(i, k) for i, pair in enumerate(pairs) for k in range(1 if _unasked(pair) else by.candidates)]
    counts, passed = Counter(), set()
    parts = [cases[start : start + batch] for start in range(0, len(cases), batch)]
    for some in progress(parts, 0, len(parts), "rationales", "batches"):
        rows = _judged([Case.of(i, k, pairs[i]) for i, k in some], by, known, out)
        files.append(out / RATIONALES, *rows)
        counts.update(row["refused"] for row in rows)
        passed |= {row["pair"] for row in rows if row["kept"]}
    files.sync(out / RATIONALES)
    refused = {step: count for step, count in sorted(counts.items()) if step}
    numbers = {"pairs": len(pairs), "candidates": len(cases), "kept": counts[""], "pairs_kept": len(passed)}
    return numbers | {"refused": refused}


# --------------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """Candidate `number` for pair `index`. `shown`: the order in which the teacher gets the images."""

    index: int
    number: int
    pair: Pair
    images: Mapping[str, Images]
    names: Mapping[str, str]
    shown: str

    @classmethod
    def of(cls, index: int, number: int, pair: Pair) -> "Case":
        images = {side: rounded(data.read(getattr(pair, side))) for side in SIDES}
        names = {side: data.picture_hash(image) for side, image in images.items()}
        low, high = sorted(names.values())
        coin = hashlib.sha256(f"{low} {high} {pair.prompt.text}".encode()).digest()[0] & 1
        smaller_first = "ab" if names["a"] <= names["b"] else "ba"
        shown = smaller_first if (coin + number) % 2 == 0 else smaller_first[::-1]
        return cls(index, number, pair, images, names, shown)

    @property
    def label(self) -> str:
        return "a" if self.pair.preference > 0.5 else "b"

    def question(self, template: Template, order: str, **more: str) -> Question:
        first, second = (self.images[side][0] for side in order)
        return template.fill(first=first, second=second, prompt=quoted(self.pair.prompt.text), **more)

    @property
    def anchor(self) -> str:
        """The step of the teacher's notes, with the order in which it gets the images."""
        return f"anchor {self.shown}"

    def key(self, step: str) -> Key:
        return self.index, self.number, step


def _unasked(pair: Pair) -> str:
    """The reason why a pair has no rationale, "" if it may have one."""
    if pair.preference == 0.5:
        return "a tie has no preferred image"
    return f"it compares {pair.aspect} alone, and a critique is of the whole image" if pair.aspect else ""


class Refused(ValueError):
    """A candidate that is not kept, and the step that refused it."""

    def __init__(self, step: str, reason: str):
        super().__init__(reason)
        self.step = step


def _judged(cases: Sequence[Case], by: Teacher, known: dict[Key, Reply], out: Path) -> list[Row]:
    """The rows of these cases: their rationales are written, then those that may be kept are checked."""
    labelled = [case for case in cases if not _unasked(case.pair)]
    answers = _ask([(case.key(case.anchor), _anchored(case, by)) for case in labelled], by, known, out, schema())
    notes: dict[Key, dict[str, Critique] | Refused] = {}
    for case in labelled:
        try:
            notes[case.key("")] = _notes(case, answers[case.key(case.anchor)])
        except Refused as refused:
            notes[case.key("")] = refused
    checks = []
    for case in labelled:
        if not isinstance(written := notes[case.key("")], Refused):
            checks += [(case.key(o), case.question(by.check, o, notes=_shown(written, o))) for o in ORDERS]
    answers |= _ask(checks, by, known, out, None)
    return [_row(case, notes.get(case.key("")), answers, out) for case in cases]


def _anchored(case: Case, by: Teacher) -> Question:
    return case.question(by.anchor, case.shown, chosen=NAMES[case.shown.index(case.label)])


def _ask(
    questions: Sequence[tuple[Key, Question]],
    by: Teacher,
    known: dict[Key, Reply],
    out: Path,
    form: Mapping[str, Any] | None,
) -> dict[Key, Reply]:
    """A reply for each question: one that is known, or a new one, which is on disk before this returns."""
    new = [(key, question) for key, question in questions if key not in known]
    answers = {key: known[key] for key, _ in questions if key in known}
    rows = []
    for (key, _), reply in zip(new, by.judge.ask([one for _, one in new], by.tokens, form) if new else [], strict=True):
        if len(reply.text) > limits.REPLY:
            reply = Reply(failure=f"the reply has {len(reply.text)} characters; at most {limits.REPLY} are read")
        answers[key] = reply
        if not reply.failure:
            known[key] = reply
            text = replies.printable(reply.text)
            rows.append({"pair": key[0], "candidate": key[1], "step": key[2], "cut": reply.cut, "text": text})
    if rows:
        files.append(out / REPLIES, *rows)
        files.sync(out / REPLIES)
    return answers


def _notes(case: Case, reply: Reply) -> dict[str, Critique]:
    """The critique of each side in a teacher's reply. Refused, with the step."""
    if reply.failure:
        raise Refused("call", reply.failure)
    try:
        text = replies.answer(reply.text, reply.cut)
        values = [replies.plain(value) for value in replies.values(text) if isinstance(value, dict)]
        value = replies.unanimous(value for value in values if value.keys() & {*KEYS})
        if value is None or not value.keys() >= {*KEYS}:
            raise ValueError(f"the reply has no notes called {' and '.join(KEYS)}")
        each = {side: json.dumps(value[key]) for side, key in zip(case.shown, KEYS, strict=True)}
        written = {side: tidy(critiques.read(each[side], ASPECTS)) for side in SIDES}
        for critique in written.values():
            reply_of(critique)
    except ValueError as error:
        raise Refused("reply", f"{error}; the reply begins {replies.excerpt(reply.text)}") from None
    for critique in written.values():
        if words := leak(critique):
            raise Refused("leak", f"{words!r} tells of the label or of the other picture")
    other = "b" if case.label == "a" else "a"
    if not written[case.label].overall > written[other].overall:
        raise Refused(
            "scores",
            f"the score of {case.label}, {written[case.label].overall:.3g}, is not above that of {other}, "
            f"{written[other].overall:.3g}",
        )
    return written


def _shown(written: Mapping[str, Critique], order: str) -> str:
    """The notes of both images without scores, for the order in which the images are shown."""
    lines = (
        f"{name}, {aspect}: {quoted(reason)}"
        for name, side in zip(NAMES, order, strict=True)
        for aspect, reason in written[side].reasons.items()
    )
    return "\n".join(lines)


def _row(case: Case, written: dict[str, Critique] | Refused | None, answers: Mapping[Key, Reply], out: Path) -> Row:
    pair = case.pair
    row: Row = {
        "pair": case.index, "candidate": case.number, "prompt": pair.prompt.text, "id": pair.prompt.id,
        "sources": [pair.a.name, pair.b.name], "chosen": "tie" if pair.preference == 0.5 else case.label,
        "predicted": [], "kept": False, "refused": "", "reason": "",
    }  # fmt: skip
    try:
        if written is None:
            raise Refused("pair", _unasked(pair))
        if isinstance(written, Refused):
            raise written
        row |= {
            "rationale": {side: written[side].reasons for side in SIDES},
            **{f"scores_{side}": written[side].scores for side in SIDES},
            "refined_request": {side: written[side].request for side in SIDES},
        }
        for order in ORDERS:
            row["predicted"].append(_predicted(answers[case.key(order)], order))
        if row["predicted"] != [case.label] * len(ORDERS):
            raise Refused("check", f"without the label the answers are {' and '.join(row['predicted'])}")
    except Refused as refused:
        reason = replies.printable(" ".join(str(refused).split()))
        return row | {"refused": refused.step, "reason": reason[:SHOWN]}
    for side in SIDES:
        _write(out / IMAGES / f"{case.names[side]}.png", case.images[side])
    return row | {"kept": True, **{f"image_{side}": f"{IMAGES}/{case.names[side]}.png" for side in SIDES}}


def _predicted(reply: Reply, order: str) -> str:
    """The side that a check's reply names, or `tie`. Refused without one."""
    if reply.failure:
        raise Refused("call", reply.failure)
    try:
        place = pairwise.read(reply.text, reply.cut)
    except ValueError as error:
        raise Refused("reply", f"{error}; the reply begins {replies.excerpt(reply.text)}") from None
    return "tie" if place is None else order[place]


def _write(path: Path, image: Images) -> None:
    if not path.exists():
        file = BytesIO()
        to_pil(image)[0].save(file, "PNG")
        files.replace(path, file.getvalue())


# ---------------------------------------------------------------------------------------------------------- resumption


def _order(pairs: Sequence[Pair]) -> str:
    """A hash of the pairs in their order, because replies are known by the number of their pair."""
    lines = (json.dumps([pair.a.name, pair.b.name, pair.prompt.text, pair.preference, pair.aspect]) for pair in pairs)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _continued(out: Path, settings: Mapping[str, Any]) -> dict[Key, Reply]:
    """The replies in a folder with these settings; none in a new one. ValueError for other work."""
    wanted = json.loads(json.dumps(settings, default=str))
    path, log = out / SETTINGS, out / REPLIES
    if not path.exists():
        if others := sorted(one.name for one in out.iterdir()):
            raise ValueError(f"{out}: {others[0]} is there, which is not a rationale; choose an empty folder")
        files.replace(path, (json.dumps(wanted, indent=1) + "\n").encode())
        return {}
    before = files.parsed(files.text(path, limits.CONFIG))
    if not isinstance(before, dict):
        raise ValueError(f"{path}: no settings of rationales; choose another folder")
    if other := sorted(key for key in {*before, *wanted} if before.get(key) != wanted.get(key)):
        raise ValueError(
            f"{out} holds rationales with {other[0]} {str(before.get(other[0]))[:60]!r}, not "
            f"{str(wanted.get(other[0]))[:60]!r}; choose another folder, or the same settings to continue"
        )
    return _logged(log) if log.exists() else {}


def _logged(log: Path) -> dict[Key, Reply]:
    """The replies in a log. A last line that was cut off is removed from it."""
    text = files.text(log)
    complete, _, rest = text.rpartition("\n")
    if rest:
        files.replace(log, f"{complete}\n".encode() if complete else b"")
    known = {}
    for number, line in enumerate(files.lines(complete), 1):
        try:
            row = files.parsed(line)
            key = row["pair"], row["candidate"], row["step"]
            known[key] = Reply(row["text"], cut=row["cut"])
            if not isinstance(row["text"], str) or not isinstance(row["cut"], bool) or row["step"] is None:
                raise ValueError("not a reply")
        except (ValueError, TypeError, LookupError) as error:
            raise ValueError(f"{log}, line {number}: {error}; choose another folder") from None
    return known
