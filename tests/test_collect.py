"""`mmalign collect`: known orders give exactly known pairs, and an interruption leaves no trace."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from killed import KILLED
from typer.testing import CliRunner

import mmalign
from mmalign import policy as policies
from mmalign.cli.app import app
from mmalign.config.paths import locate
from mmalign.data import judged_images
from mmalign.errors import BadInput
from mmalign.evaluation import generate
from mmalign.evaluation.collect import Pairing, collect, paired
from reward_models import Card, Prompt, Scores, limits, pairs
from reward_models.images import from_file, rounded

TEXTS = ["a circle and a square", "a red circle above a blue square", "two yellow crosses"]
PROMPTS = [Prompt(text, {"tag": f"number {i}"}, i) for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def policy():
    return policies.load(locate("assets/tiny_sd3"), dtype="float32", device="cpu", guidance=1.0)


class Judge:
    """Gives each image the next of the values that a test has prepared; a text is a failure."""

    names = ("value",)
    card = Card("judge")

    def __init__(self, *values):
        self.left = list(values)

    def __call__(self, images, prompts):
        values, failures = torch.full((len(images), 1), torch.nan), {}
        for i in range(len(images)):
            value = self.left.pop(0)
            if isinstance(value, str):
                failures[i] = value
            else:
                values[i] = value
        return Scores(self.names, values, failures=failures)


def collected(policy, out, *values, seeds=(5, 6, 7), prompts=PROMPTS[:1], pairing=Pairing()):  # noqa: B008
    return collect(policy, prompts, {"judge": Judge(*values)}, seeds, "judge.value", 2, out, pairing)


def names(rows):
    """The seeds of the two images of each pair, its choice and its gap."""
    return [(seed(row["image_a"]), seed(row["image_b"]), row["chosen"], row["gap"]) for row in rows]


def seed(image):
    return int(image.rpartition("-")[2].removesuffix(".png"))


def row(seed, score):
    return {"image": f"0-{seed}.png", "score": score, "wants": {}, "id": 0, "prompt": "p"}


FOUR = [row(0, 0.5), row(1, 1.0), row(2, 0.0), row(3, 0.5)]


@pytest.mark.parametrize(
    ("rows", "pairing", "expected"),
    [
        (FOUR, Pairing(), [(1, 2, "a", 1.0)]),
        (FOUR, Pairing(margin=1.0), []),
        (FOUR, Pairing(margin=1.0, ties=True), [(1, 2, "tie", 1.0)]),
        (
            FOUR,
            Pairing("all"),
            [(1, 0, "a", 0.5), (0, 2, "a", 0.5), (1, 2, "a", 1.0), (1, 3, "a", 0.5), (3, 2, "a", 0.5)],
        ),
        (FOUR, Pairing("all", margin=0.5), [(1, 2, "a", 1.0)]),
        ([FOUR[0], FOUR[3]], Pairing("all", ties=True), [(0, 3, "tie", 0.0)]),
        ([FOUR[0], FOUR[3]], Pairing(ties=True), [(0, 3, "tie", 0.0)]),
        ([FOUR[0], FOUR[3]], Pairing(), []),
        ([FOUR[0], row(4, None), FOUR[1]], Pairing("all", ties=True), [(1, 0, "a", 0.5)]),
        ([FOUR[0], row(4, None)], Pairing("all", ties=True), []),
        ([FOUR[0]], Pairing(ties=True), []),
    ],
)
def test_scores_give_exactly_these_pairs(rows, pairing, expected):
    assert names(paired(rows, pairing)) == expected


def test_images_are_those_of_their_seeds_and_rows_say_everything(policy, tmp_path):
    result = collected(policy, tmp_path, 0.25, 0.75, 0.5)
    assert names(result.pairs) == [(6, 5, "a", 0.5)]
    (pair,) = pairs.read(tmp_path / "pairs.jsonl")
    assert (pair.prompt, pair.preference, pair.gap) == (PROMPTS[0], 1.0, 0.5)
    plain, _ = generate.generate(policy, PROMPTS[:1], [[5, 6, 7]], 2, 8)
    assert torch.equal(pair.a.read(), rounded(plain[1:2]))
    lines = [json.loads(line) for line in (tmp_path / "judged_images.jsonl").read_text().splitlines()]
    assert lines == result.rows
    assert [(one["seed"], one["score"], one["scores"]) for one in lines] == [
        (5, 0.25, {"judge.value": 0.25}),
        (6, 0.75, {"judge.value": 0.75}),
        (7, 0.5, {"judge.value": 0.5}),
    ]
    assert (lines[0]["id"], lines[0]["prompt"], lines[0]["wants"]) == (0, TEXTS[0], {"tag": "number 0"})
    assert result.summary == {
        "prompts": 1, "images": 3, "unscored": 0, "pairs": 1, "before": 0, "out": str(tmp_path)
    }  # fmt: skip


def test_a_failure_is_a_row_with_its_reason_and_in_no_pair(policy, tmp_path):
    result = collected(policy, tmp_path, "away", 0.5, 0.25)
    assert names(result.pairs) == [(6, 7, "a", 0.25)]
    assert (result.rows[0]["score"], result.rows[0]["failures"]) == (None, {"judge": "away"})
    assert from_file(tmp_path / result.rows[0]["image"]).shape == (1, 3, 32, 32)
    records = judged_images.read(tmp_path / "judged_images.jsonl", (32, 32))
    assert (len(records.records), len(records.refused)) == (2, 1)
    assert "a number is needed" in records.refused[0]


def test_an_image_that_is_not_finite_costs_no_other(policy, tmp_path, monkeypatch):
    decode = type(policy).decode

    def broken(self, x):
        images = decode(self, x)
        images[0] = torch.nan
        return images

    monkeypatch.setattr(type(policy), "decode", broken)
    result = collected(policy, tmp_path, 0.5, 0.25)
    assert (result.rows[0]["image"], result.rows[0]["failures"]) == (None, {"image": "a pixel is not finite"})
    assert names(result.pairs) == [(6, 7, "a", 0.25)]
    monkeypatch.undo()
    assert collected(policy, tmp_path).pairs == result.pairs


def test_what_is_done_is_not_done_again_and_pairs_follow_the_request(policy, tmp_path):
    values = [0.25, 0.75, 0.5, 0.5, 0.5, 0.5]
    first = collected(policy, tmp_path, *values, prompts=PROMPTS[:2])
    again = collected(policy, tmp_path, prompts=PROMPTS[:2], pairing=Pairing("all", ties=True))  # no value is left
    assert (again.rows, again.summary["before"]) == (first.rows, 2)
    assert [len(one.pairs) for one in (first, again)] == [1, 6]
    more = collected(policy, tmp_path, 0.0, 0.0, 1.0, prompts=PROMPTS)
    assert names(more.pairs) == [(6, 5, "a", 0.5), (7, 5, "a", 1.0)]


def test_a_row_that_was_cut_off_costs_its_prompt_alone(policy, tmp_path):
    values = [0.25, 0.75, 0.5, 0.1, 0.2, 0.3]
    collected(policy, tmp_path, *values, prompts=PROMPTS[:2])
    files = {name: (tmp_path / name).read_bytes() for name in ("judged_images.jsonl", "pairs.jsonl")}
    (tmp_path / "judged_images.jsonl").write_bytes(files["judged_images.jsonl"][:-9])
    (tmp_path / "pairs.jsonl").unlink()
    again = collected(policy, tmp_path, *values[3:], prompts=PROMPTS[:2])
    assert again.summary["before"] == 1
    assert {name: (tmp_path / name).read_bytes() for name in files} == files


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("judged_images.jsonl", "{}\n", "line 1: not a row of a collection"),
        ("judged_images.jsonl", None, "not among these prompts"),
        ("settings.json", "[1]", "no settings of a collection"),
    ],
)
def test_a_folder_of_something_else_is_refused(policy, tmp_path, name, content, says):
    collected(policy, tmp_path, 0.1, 0.2, 0.3)
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(BadInput, match=says):
        collected(policy, tmp_path, prompts=PROMPTS[:1] if content else PROMPTS[1:])


@pytest.mark.parametrize("change", [{"image": "../../other.png"}, {"score": "high"}, {"seed": 99}, {"wants": 3}])
def test_a_row_that_was_changed_is_refused(policy, tmp_path, change):
    collected(policy, tmp_path, 0.1, 0.2, 0.3)
    rows = [json.loads(line) for line in (tmp_path / "judged_images.jsonl").read_text().splitlines()]
    (tmp_path / "judged_images.jsonl").write_text("".join(json.dumps(one) + "\n" for one in [rows[0] | change]))
    with pytest.raises(BadInput, match="line 1: not a row of a collection"):
        collected(policy, tmp_path)


def invoke(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The command without its folder: four captions and six seeds, scored by the verifier and the embedded critic."""
    captions = Path(locate("assets/prompts/validation.jsonl")).read_text().splitlines(keepends=True)
    source = tmp_path_factory.mktemp("prompts") / "captions.jsonl"
    source.write_text("".join(captions[::50][:4]))
    scorers = ["--rewards", "shapes,shapes_critic", "--by", "shapes.partial"]
    return ["collect", "--prompts", str(source), "--seeds", "0,1,2,3,4,5", "--steps", "4", *scorers]


@pytest.fixture(scope="module")
def folder(command, tmp_path_factory):
    out = tmp_path_factory.mktemp("collected") / "out"
    result = invoke(*command, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["pairs"] > 0
    return out


def test_the_scorer_that_made_the_pairs_agrees_with_all_of_them(folder, tmp_path):
    result = invoke("score", folder / "pairs.jsonl", "--rewards", "shapes", "--out", tmp_path / "s.jsonl", "--json")
    assert result.exit_code == 0, result.output
    scores = json.loads(result.stdout.splitlines()[-1])["scores"]["shapes.partial"]
    assert scores["agrees"] == 1.0
    assert scores["choices"] == len(pairs.read(folder / "pairs.jsonl"))


CONFIG = """
model: assets/tiny_sd3
prompts: assets/prompts/train.jsonl
eval_seeds: 1
eval_steps: 2
rewards: {shapes.partial: 1}
iterations: 1
prompts_per_iteration: 4
eval_every: 0
checkpoint_every: 1
"""


@pytest.mark.parametrize("objective", ["dpo", "srum", "rgdpo"])
def test_the_judged_images_train_an_iteration(folder, tmp_path, objective):
    few = Path(locate("assets/prompts/test.jsonl")).read_text().splitlines(keepends=True)[:2]
    (tmp_path / "held_out.jsonl").write_text("".join(few))
    (tmp_path / "config.yaml").write_text(f"{CONFIG}held_out: {tmp_path / 'held_out.jsonl'}\n")
    options = [f"records={folder / 'judged_images.jsonl'}", f"objective={objective}", f"out={tmp_path / 'run'}"]
    result = invoke("train", tmp_path / "config.yaml", *options)
    assert result.exit_code == 0, (result.output, result.exception)
    (metrics,) = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert metrics["images"] > 4
    assert metrics["grad_norm"] > 0


def test_python_gives_what_the_command_gives(command, folder, tmp_path):
    result = mmalign.collect(
        "assets/tiny_sd3", command[2], ["shapes", "shapes_critic"], seeds=range(6), by="shapes.partial", steps=4,
        out=tmp_path, pairs="all", batch=7,
    )  # fmt: skip
    assert (tmp_path / "judged_images.jsonl").read_bytes() == (folder / "judged_images.jsonl").read_bytes()
    assert len(result.pairs) > 3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--by", "shapes.beauty"], "by 'shapes.beauty': the rewards give shapes."),
        (["--steps", "3"], "steps 4, not 3"),
        (["--by", "shapes.strict"], "by 'shapes.partial', not 'shapes.strict'"),
        (["--seeds", "0,1"], "not [0, 1]"),
    ],
)
def test_mistakes_are_one_line(command, folder, options, says):
    before = (folder / "judged_images.jsonl").read_bytes()
    result = invoke(*command, "--out", folder, *options)
    assert isinstance(result.exception, BadInput), result.output
    assert says in str(result.exception)
    assert (folder / "judged_images.jsonl").read_bytes() == before


@pytest.mark.parametrize("pairing", [Pairing(margin=float("nan")), Pairing(margin=-1.0)])
def test_a_pairing_that_means_nothing_is_refused(policy, tmp_path, pairing):
    with pytest.raises(BadInput, match=r"margin (nan|-1\.0): a number"):
        collected(policy, tmp_path / "out", pairing=pairing)
    assert not (tmp_path / "out").exists()


def test_more_pairs_than_can_be_read_are_refused_before_any_work(policy, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "PAIRS", 2)
    with pytest.raises(BadInput, match="pairs all: up to 3 pairs, more than 2"):
        collected(policy, tmp_path / "out", pairing=Pairing("all"))
    assert not (tmp_path / "out").exists()


def test_killed_in_the_middle_and_continued_the_files_are_the_same(command, folder, tmp_path):
    out = tmp_path / "out"
    command = [*command, "--out", str(out)]
    record = out / "judged_images.jsonl"
    killed = [sys.executable, "-c", KILLED, *command, str(record), "12"]
    assert subprocess.run(killed, capture_output=True, env=os.environ).returncode == -signal.SIGKILL
    record.write_bytes(record.read_bytes()[:-9])  # in the middle of a line
    assert not (out / "pairs.jsonl").exists()
    complete = record.read_text().splitlines()[:6]
    again = invoke(*command, "--json")
    assert json.loads(again.stdout.splitlines()[-1])["before"] == 1
    assert record.read_text().splitlines()[:6] == complete
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())
    for name in files:
        assert (out / name).read_bytes() == (folder / name).read_bytes(), name
