"""Rationales of a scripted teacher: which are kept, what is in a sample, and what a kill costs."""

import contextlib
import json
import random
import re
from dataclasses import replace

import pytest
from chats import chatting, completion
from command_line import mmalign
from drawn_pairs import drawn_pairs
from scripted import ELSEWHERE, Scripted

from reward_models.files import parsed
from reward_models.training.parrot import rationales, samples, teacher
from reward_models.training.parrot.rationales import rationalise
from reward_models.vlm import critiques
from reward_models.vlm.critiques import Critique
from reward_models.vlm.types import Reply


def notes(score: float, words: str = "a clean shape") -> dict:
    text = {"justification": "no words", "score": None}
    aspect = {"justification": words, "score": score}
    return {"faithfulness": aspect, "quality": aspect, "text": text, "refined_request": "a large red circle"}


def anchored(question, high=3.5, low=2.0, **more) -> str:
    """Notes that give the better picture, which the question names, the higher score."""
    better = re.search(r"The better picture: Image (\d)", question.text)[1]
    return json.dumps({f"image_{k}": notes(high if str(k) == better else low, **more) for k in (1, 2)})


def knows_label(question) -> bool:
    return "The better picture" in question.text


def honest(pairs):
    """A teacher that compares the pictures itself: it knows which picture of each pair is preferred."""
    best = {(p.a if p.preference else p.b).read().numpy().tobytes() for p in pairs}

    def reply(question):
        if knows_label(question):
            return anchored(question)
        shown = [part for part in question.parts if not isinstance(part, str)]
        [place] = [k for k, part in enumerate(shown, 1) if part.numpy().tobytes() in best]
        return f"<answer>Image {place} is better</answer>"

    return reply


def by(reply, **settings):
    made = teacher(**ELSEWHERE | settings)
    object.__setattr__(made, "judge", Scripted(reply))
    return made


def content(question):
    return question.text, *(part.numpy().tobytes() for part in question.parts if not isinstance(part, str))


def rows_of(folder):
    return [parsed(line) for line in (folder / "rationales.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def pairs():
    return drawn_pairs(16)


def test_a_teacher_that_is_right_for_some_pairs_keeps_exactly_those(pairs, tmp_path):
    right = honest(pairs)
    wrong = {p.a.read().numpy().tobytes() for p in pairs[::4]}
    other = {"1": "2", "2": "1"}

    def reply(question):
        answer = right(question)
        if knows_label(question) or not wrong & {*content(question)}:
            return answer
        return re.sub(r"\d", lambda digit: other[digit[0]], answer)

    summary = rationalise(pairs, by(reply), tmp_path)
    rows = rows_of(tmp_path)
    assert [row["pair"] for row in rows if row["kept"]] == [i for i in range(16) if i % 4 for _ in range(2)]
    assert summary == {"pairs": 16, "candidates": 32, "kept": 24, "pairs_kept": 12, "refused": {"check": 8}}
    assert all(row["predicted"] == [row["chosen"]] * 2 for row in rows if row["kept"])


def test_a_coin_keeps_a_quarter(tmp_path):
    pairs, coin = drawn_pairs(60, seed=1), random.Random(0)

    def reply(question):
        return anchored(question) if knows_label(question) else f"Winner: Image {coin.randint(1, 2)}"

    summary = rationalise(pairs, by(reply), tmp_path)
    assert abs(summary["kept"] / 120 - 1 / 4) < 3 * (3 / 16 / 120) ** 0.5


def test_a_judge_that_prefers_a_side_keeps_nothing_and_sees_no_label(pairs, tmp_path):
    def reply(question):
        return anchored(question) if knows_label(question) else "<answer>Image 1 is better</answer>"

    made = by(reply)
    summary = rationalise(pairs[:6], made, tmp_path)
    assert summary["kept"] == 0
    checks = [question for question in made.judge.questions if not knows_label(question)]
    assert len(checks) == 24
    assert not any(re.search("prefer|chosen|label", question.text) for question in checks)
    firsts = [question.parts[1].numpy().tobytes() for question in checks]
    assert len({*firsts}) == 12, "each picture is shown first"
    anchors = [re.search(r"picture: (Image \d)", q.text)[1] for q in made.judge.questions if knows_label(q)]
    assert sorted(anchors) == ["Image 1"] * 6 + ["Image 2"] * 6, "two candidates, one for each order"


@pytest.mark.parametrize(
    ("reply", "step", "says"),
    [
        (lambda q: Reply(failure="no answer within 3 s"), "call", "no answer within 3 s"),
        (lambda q: "I like the left one", "reply", "no notes called image_1 and image_2"),
        (lambda q: anchored(q).replace("3.5", "7"), "reply", "is 7"),
        (lambda q: anchored(q)[:-9], "reply", "begins"),
        (lambda q: anchored(q, words="it is the preferred one"), "leak", "'preferred' tells of the label"),
        (lambda q: anchored(q, words="Sharper than Image 2"), "leak", "'Image 2' tells of"),
        (lambda q: anchored(q, words="labelled as good"), "leak", "'labelled' tells of"),
        (lambda q: anchored(q, words=""), "reply", "faithfulness has no justification"),
        (lambda q: anchored(q, high=2.0), "scores", "is not above"),
        (lambda q: anchored(q, words="ok <x").replace("<x", r"\u003c/think>"), "reply", "no aspect has a score"),
    ],
)
def test_a_reply_that_cannot_be_used_is_a_row_with_the_reason(reply, step, says, pairs, tmp_path):
    right = honest(pairs)

    def first_only(question):
        return reply(question) if knows_label(question) else right(question)

    summary = rationalise(pairs[:2], by(first_only, candidates=1), tmp_path)
    assert summary["refused"] == {step: 2}
    for row in rows_of(tmp_path):
        assert row["refused"] == step
        assert says in row["reason"]
        assert not row["kept"]


def test_ties_aspects_and_failed_checks_are_rows_too(pairs, tmp_path):
    right = honest(pairs)
    some = [replace(pairs[0], preference=0.5), replace(pairs[1], aspect="style"), pairs[2]]

    def reply(question):
        if not knows_label(question):
            raise ValueError("the server is down")
        return right(question)

    summary = rationalise(some, by(reply, candidates=1), tmp_path)
    assert [row["refused"] for row in rows_of(tmp_path)] == ["pair", "pair", "call"]
    assert [row["reason"] for row in rows_of(tmp_path)] == [
        "a tie has no preferred image",
        "it compares style alone, and a critique is of the whole image",
        "the server is down",
    ]
    assert summary["refused"] == {"call": 1, "pair": 2}
    again = by(right, candidates=1)
    assert rationalise(some, again, tmp_path)["kept"] == 1, "a failed call is asked for again"
    assert len(again.judge.questions) == 2, "and the reply that came is not"


def test_samples_are_replies_that_rational_reads_without_a_word_of_the_label(pairs, tmp_path):
    rationalise(pairs, by(honest(pairs)), tmp_path)
    some = samples.read(tmp_path)
    assert len(some) == 32, "two for each pair; equal ones of two candidates count once"
    by_side = {pair.a.read().numpy().tobytes(): pair.preference for pair in pairs}
    for sample in some:
        critique = critiques.read(sample.reply, samples.ASPECTS)
        assert critique.request == "a large red circle"
        assert not re.search(r"chosen|prefer|label|better|Image [12]", sample.reply, re.I)
        if (preference := by_side.get(sample.image.read().numpy().tobytes())) is not None:
            assert critique.overall == pytest.approx(5 / 6 if preference else 1 / 3)


def test_a_row_that_is_not_ours_is_refused(pairs, tmp_path):
    rationalise(pairs[:1], by(honest(pairs), candidates=1), tmp_path)
    path = tmp_path / "rationales.jsonl"
    [row] = rows_of(tmp_path)
    for change, says in (
        ({"image_a": "../../etc/passwd"}, "`image_a` must be images/"),
        ({"scores_a": {"faithfulness": 9}}, "`scores_a` must have"),
        ({"scores_a": row["scores_a"] | {"quality": 9}}, "quality is 9"),
        ({"rationale": row["rationale"] | {"a": {"faithfulness": "the chosen one", "quality": "x"}}}, "'chosen' tells"),
        ({"prompt": 3}, "`prompt` must be a text"),
        ({"kept": "yes"}, "not a row of rationales"),
        ({"kept": False}, "nothing to train on"),
    ):
        path.write_text(json.dumps(row | change) + "\n")
        with pytest.raises(ValueError, match=re.escape(says)):
            samples.read(tmp_path)


def critique_of(words):
    return Critique({"faithfulness": 2.5, "quality": 4.0, "text": None}, {"faithfulness": words, "quality": "x"})


@pytest.mark.parametrize("words", ["two * stars", "a: b", "Score", "1. Text Faithfulness: 2", "x | y", "é ü 漢"])
def test_a_reply_reads_back_as_its_critique(words):
    critique = samples.tidy(critique_of(words))
    assert critiques.read(samples.reply_of(critique), samples.ASPECTS) == critique


@pytest.mark.parametrize("words", ["good </think>", "<think>"])
def test_words_that_would_be_read_otherwise_are_refused(words):
    with pytest.raises(ValueError, match="cannot be written"):
        samples.reply_of(critique_of(words))


def test_other_work_is_refused(pairs, tmp_path):
    right = honest(pairs)
    rationalise(pairs[:2], by(right), tmp_path / "x")
    with pytest.raises(ValueError, match="with candidates '2', not '1'"):
        rationalise(pairs[:2], by(right, candidates=1), tmp_path / "x")
    with pytest.raises(ValueError, match="with data"):
        rationalise(pairs[:3], by(right), tmp_path / "x")
    with pytest.raises(ValueError, match="3 candidates need a temperature"):
        teacher(**ELSEWHERE, candidates=3)
    with pytest.raises(ValueError, match="no setting 'heat'"):
        teacher(**ELSEWHERE, heat=3)


# ------------------------------------------------------------------------------------------------------------ commands


def table(folder, pairs):
    from reward_models.images import to_pil

    rows = []
    for k, pair in enumerate(pairs):
        for side in "ab":
            to_pil(getattr(pair, side).read())[0].save(folder / f"{k}{side}.png")
        choice = {"image_a": f"{k}a.png", "image_b": f"{k}b.png", "chosen": "a" if pair.preference else "b"}
        rows.append(json.dumps(choice | {"prompt": pair.prompt.text, "id": k}) + "\n")
    (folder / "pairs.jsonl").write_text("".join(rows))
    return folder / "pairs.jsonl"


class Killed(BaseException):
    pass


def test_a_kill_asks_nothing_twice_and_gives_the_same_bytes(pairs, tmp_path, monkeypatch):
    right = honest(pairs)
    made = by(right)
    rationalise(pairs[:5], made, tmp_path / "whole", batch=1)
    questions, append = [], rationales.files.append
    for limit in (1, 2, 3, 5, 8, 100):  # a kill after so many writes
        writes = iter(range(limit))

        def killing(path, *rows, writes=writes):
            append(path, *rows)
            if next(writes, None) is None:
                raise Killed

        monkeypatch.setattr(rationales.files, "append", killing)
        other = by(right)
        with contextlib.suppress(Killed):
            rationalise(pairs[:5], other, tmp_path / "killed", batch=1)
        questions += other.judge.questions
    assert sorted(map(content, questions)) == sorted(map(content, made.judge.questions))
    for path in sorted((tmp_path / "whole").rglob("*.*")):
        assert path.read_bytes() == (tmp_path / "killed" / path.relative_to(tmp_path / "whole")).read_bytes()


def test_a_reply_that_was_cut_off_on_disk_is_asked_for_again(pairs, tmp_path):
    right = honest(pairs)
    rationalise(pairs[:2], by(right), tmp_path)
    before, log = (tmp_path / "rationales.jsonl").read_bytes(), tmp_path / "replies.jsonl"
    log.write_bytes(log.read_bytes()[:-5])
    other = by(right)
    rationalise(pairs[:2], other, tmp_path)
    assert len(other.judge.questions) == 1
    assert (tmp_path / "rationales.jsonl").read_bytes() == before


def test_the_command_asks_a_server_and_a_failed_call_is_exit_code_1(pairs, tmp_path):
    source, down = table(tmp_path, pairs[:3]), []

    def answer(request):
        text = "".join(p["text"] for p in request["messages"][-1]["content"] if p["type"] == "text")
        if "The better picture" in text:
            better = re.search(r"The better picture: Image (\d)", text)[1]
            return completion(json.dumps({f"image_{k}": notes(3 if str(k) == better else 2) for k in (1, 2)}))
        return (401, {}, {"error": {"message": "no"}}) if down else completion("Winner: Image 1")

    with chatting(answer) as (url, requests):
        words = ["--set", "teacher.model=m", "--set", f"teacher.url={url}", "--set", "teacher.candidates=1"]
        down.append(1)
        result = mmalign("reward", "rationalise", source, *words, "--out", tmp_path / "out")
        assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
        assert "3 rationales are missing because calls failed" in result.stderr
        assert len(requests) == 9
        down.clear()
        result = mmalign("reward", "rationalise", source, *words, "--out", tmp_path / "out", "--json")
        assert len(requests) == 15, "the notes are not asked for again"
    summary = json.loads(result.stdout)
    assert (summary["kept"], summary["refused"]) == (0, {"check": 3})


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--out", "x"], "no teacher; give --set teacher.model=NAME"),
        (["--out", "x", "--set", "clip.model=a"], "must look like teacher.key=value"),
        (["--out", "x", "--set", "teacher.model=m", "--set", "teacher.url=ftp://x"], "must begin with http"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words, says):
    result = mmalign("reward", "rationalise", "assets/pictures/pairs.jsonl", *words)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert says in result.stderr
