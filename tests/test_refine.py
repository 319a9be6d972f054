"""The critique-refine loop: what it may do, when it stops, what it never loses."""

import json
import os
import runpy
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from killed import KILLED
from PIL import Image
from typer.testing import CliRunner

from mmalign import policy as policies
from mmalign.cli.app import app
from mmalign.config.paths import locate
from mmalign.errors import BadInput
from mmalign.evaluation import generate
from mmalign.refinement import trace as on_disk
from mmalign.refinement.loop import Settings, refine
from mmalign.refinement.redraw import Attempt, Base, cost, draw, times_from
from mmalign.seeds import gaussian, seed_of
from reward_models import Card, Prompt, Scores, load
from reward_models.regions import Region
from reward_models.scorers.shapes import find_blobs

TEXTS = ["a circle and a square", "a red circle above a blue square", "two yellow crosses", "a green triangle"]
PROMPTS = [Prompt(text, {}, i) for i, text in enumerate(TEXTS)]
QUICK = Settings(steps=4)


@pytest.fixture(scope="module")
def policy():
    return policies.load(locate("assets/tiny_sd3"), dtype="float32", device="cpu", guidance=1.0)


@pytest.fixture(scope="module")
def adapted():
    results = policies.load(locate("assets/tiny_sd3"), dtype="float32", device="cpu", guidance=1.0)
    results.attach_lora(2, 4.0, None, 0)
    return results


class Critic:
    """Gives each image in turn what a test has prepared: a score, or a failure; a request, and regions."""

    names = ("overall",)
    card = Card("critic", low=0, high=1)

    def __init__(self, scores, request="", regions=()):
        self.left, self.request, self.regions, self.prompts = list(scores), request, regions, []

    def __call__(self, images, prompts):
        values, failures = torch.full((len(images), 1), torch.nan), {}
        for i in range(len(images)):
            message = self.left.pop(0)
            self.prompts.append(prompts[i].text)
            if isinstance(message, str):
                failures[i] = message
            else:
                values[i] = message
        count = len(images)
        return Scores(
            self.names,
            values,
            ("so so",) * count,
            None,
            failures,
            (tuple(self.regions),) * count,
            (self.request,) * count,
        )


def refined(policy, scores, settings=QUICK, **critic):
    entry = Critic(scores, **critic)
    (story,) = refine(policy, entry, PROMPTS[:1], settings)
    return story, entry


def test_the_first_image_is_the_plain_sample_of_its_seed(policy):
    (story,) = refine(policy, Critic([1.0]), PROMPTS[:1], QUICK)
    seed = seed_of("refine", 0, PROMPTS[0].id)
    plain, _ = generate.generate(policy, PROMPTS[:1], [[seed]], 4, 8)
    assert torch.equal(story.rounds[0].image, plain[0])
    assert (story.stopped, story.forwards, len(story.rounds)) == ("good", 4, 1)


def test_the_best_is_kept_and_never_one_below_the_first(policy):
    story, _ = refined(policy, [0.5, 0.2, 0.8, 0.6])
    assert (story.best, story.stopped, len(story.rounds)) == (2, "budget: 4 images", 4)
    assert refined(policy, [0.5, 0.2, 0.1, 0.3])[0].best == 0
    assert refined(policy, [0.5, 0.5, 0.5, 0.5])[0].best == 0


def test_an_image_without_a_score_is_no_reason_to_lose_one_that_has(policy):
    story, _ = refined(policy, ["the server is away", 0.1, "again", 0.05])
    assert story.best == 1
    assert [entry.failure for entry in story.rounds] == ["critic: the server is away", "", "critic: again", ""]
    assert story.rounds[0].scores["overall"] != story.rounds[0].scores["overall"]
    assert refined(policy, ["away"] * 4)[0].best == 0


def test_it_stops_for_each_reason(policy):
    assert refined(policy, [0.5, 0.7], replace(QUICK, good=0.67))[0].stopped == "good"
    assert refined(policy, [0.5] * 3, replace(QUICK, images=3))[0].stopped == "budget: 3 images"
    assert refined(policy, [0.5] * 2, replace(QUICK, forwards=11))[0].stopped == "budget: 11 forwards"
    assert refined(policy, [0.5] * 3, replace(QUICK, images=9, patience=2))[0].stopped == "no gain in 2 rounds"
    assert refined(policy, [0.5], replace(QUICK, moves=("request",)))[0].stopped.startswith("repeat")
    story, _ = refined(policy, [0.5, 0.4], replace(QUICK, moves=("request",)), request="a red circle")
    assert (len(story.rounds), story.stopped[:6]) == (2, "repeat")


@pytest.mark.parametrize(
    ("moves", "most", "spent"),
    [
        (("seed",), 11, [4, 4]),
        (("guidance",), 11, [4]),  # guided, the second would take 8
        (("guidance",), 12, [4, 8]),
        (("strength",), 11, [4]),  # with and without adapter
        (("strength",), 12, [4, 8]),
        (("guidance", "strength"), 19, [4]),
        (("guidance", "strength"), 20, [4, 16]),
        (("cut", "seed"), 7, [4]),
        (("cut", "seed"), 8, [4, 4]),
    ],
)
def test_forwards_are_bounded_whatever_the_moves(adapted, moves, most, spent):
    story, _ = refined(adapted, [0.5] * 4, replace(QUICK, moves=moves, forwards=most, images=2, strength=1.5))
    assert [entry.forwards for entry in story.rounds] == spent
    assert story.forwards <= most


@pytest.mark.parametrize(
    "attempt",
    [
        Attempt("a circle", 1, 1.0),
        Attempt("a circle", 1, 3.0),
        Attempt("a circle", 1, 1.0, strength=2.0),
        Attempt("a circle", 1, 3.0, strength=2.0),
        Attempt("a circle", 1, 3.0, strength=0.0),
        Attempt("a circle", 1, 3.0, start=0.5),
    ],
)
def test_what_an_attempt_will_take_is_what_it_takes(adapted, attempt):
    whole = Base(torch.zeros(adapted.latent_shape), torch.ones(adapted.latent_shape[1:]))
    assert draw(adapted, [attempt], [whole], 6, 8)[1] == [cost(adapted, attempt, 6)]


def test_a_bound_below_the_first_image_is_refused(policy):
    with pytest.raises(BadInput, match=r"--forwards 3: the first image of a prompt takes 4$"):
        refined(policy, [0.5], replace(QUICK, forwards=3))


def test_a_refined_request_is_drawn_but_the_first_is_judged(policy):
    story, critic = refined(policy, [0.1, 1.0], replace(QUICK, moves=("request",)), request="a red circle")
    assert set(critic.prompts) == {TEXTS[0]}
    first, second = (entry.attempt for entry in story.rounds)
    assert (second.request, second.seed) == ("a red circle", first.seed)
    plain, _ = generate.generate(policy, [Prompt("a red circle")], [[first.seed]], 4, 8)
    assert torch.equal(story.rounds[1].image, plain[0])


def test_every_move_does_what_it_says(policy):
    box = [Region((0, 0, 16, 32), -1.0), Region((16, 0, 32, 32), 1.0)]
    moves = ("guidance", "cut", "region", "seed")
    story, _ = refined(policy, [0.5, 0.4], replace(QUICK, moves=moves, images=2, cut=0.7), regions=box)
    new = story.rounds[1]
    assert new.moves == moves
    assert new.parent == 0
    assert (new.attempt.guidance, new.attempt.start) == (2.0, 0.7)
    assert new.attempt.seed != story.rounds[0].attempt.seed
    assert new.forwards < 2 * 4  # guided, and fewer steps
    remaining, _ = refined(policy, [0.5, 0.4], replace(QUICK, moves=("keep", "seed"), images=2), regions=box)
    for drawn in (story, remaining):
        before, after = (entry.latent for entry in drawn.rounds)
        torch.testing.assert_close(after[:, :, 4:], before[:, :, 4:], rtol=0, atol=1e-5)
        assert (after[:, :, :4] - before[:, :, :4]).abs().mean() > 0.05


def test_what_is_kept_is_kept_and_what_is_free_fits_it(policy):
    """With a mask of ones a part is the whole image, with one of noughts nothing."""
    known = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    attempts = [Attempt(text, seed, 1.0) for seed, text in enumerate(TEXTS[:2])]
    none = torch.zeros(policy.latent_shape[1:])
    remaining, forwards = draw(policy, attempts, [Base(entry, none) for entry in known], 6, 8)
    torch.testing.assert_close(remaining, known, rtol=0, atol=1e-5)
    assert forwards == [6, 6]
    whole, _ = draw(policy, attempts, [Base(entry, none + 1) for entry in known], 6, 8)
    plain, _ = draw(policy, attempts, [None, None], 6, 8)
    assert torch.equal(whole, plain)


def test_a_cut_begins_from_the_image_and_ends_on_it_at_time_nought(policy):
    known = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    one = torch.ones(policy.latent_shape[1:])
    far, near = (
        (draw(policy, [Attempt(TEXTS[0], 1, 1.0, start)], [Base(known[0], one)], 6, 8)[0] - known).abs().mean()
        for start in (0.9, 0.02)
    )
    assert near < 0.1 < far
    assert times_from(torch.tensor([1.0, 0.6, 0.3, 0.0]), 0.5).tolist() == pytest.approx([0.5, 0.3, 0.0])
    assert torch.equal(times_from(torch.tensor([1.0, 0.5, 0.0]), 1.0), torch.tensor([1.0, 0.5, 0.0]))


def test_batches_change_nothing(policy):
    critic = load("shapes_critic")
    settings = Settings(moves=("request", "seed", "keep"), steps=4)
    whole = refine(policy, critic, PROMPTS, settings, batch=64)
    parts = [refine(policy, critic, [entry], settings, batch=1)[0] for entry in PROMPTS]
    for one, two in zip(whole, parts, strict=True):
        assert (one.best, one.stopped, len(one.rounds)) == (two.best, two.stopped, len(two.rounds))
        assert [entry.attempt for entry in one.rounds] == [entry.attempt for entry in two.rounds]
        torch.testing.assert_close(one.rounds[-1].image, two.rounds[-1].image, atol=1e-4, rtol=0)


def test_images_that_are_there_are_begun_from(policy):
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    results = refine(policy, Critic([0.5, 0.5, 0.6, 0.4]), PROMPTS[:2], replace(QUICK, images=2), images=images)
    assert torch.equal(results[0].rounds[0].image, images[0])
    assert (results[0].rounds[0].forwards, results[0].rounds[0].attempt) == (0, None)
    assert [entry.best for entry in results] == [1, 0]


def test_the_embedded_critic_is_right_where_the_verifier_is():
    prompts = [Prompt(entry.text, json.loads(line), entry.id) for entry, line in zip(*held_out(), strict=True)]
    images = torch.rand(len(prompts), 3, 32, 32, generator=torch.Generator().manual_seed(1))
    pictures, wanted = drawings()
    for some, questions in ((images, prompts), (pictures, wanted)):
        critic, verifier = load("shapes_critic")(some, questions), load("shapes")(some, questions)
        assert torch.equal(critic.column("overall"), verifier.column("partial"))
        full = torch.tensor([min(v for v in row if v == v) == 1 for row in critic.values.tolist()])
        assert torch.equal(full, verifier.column("strict") == 1)
        right = (verifier.column("strict") == 1).tolist()
        requests = critic.requests or [""] * len(some)
        assert not any(text for text, strict in zip(requests, right, strict=True) if strict)


def held_out():
    lines = Path(locate("assets/prompts/validation.jsonl")).read_text().splitlines()[::20]
    return [Prompt(json.loads(line)["prompt"], {}, i) for i, line in enumerate(lines)], lines


def drawings():
    import numpy as np

    from reward_models.shapes_world import caption, draw as drawn, requests

    rng = np.random.default_rng(0)
    wants = [requests()[i] for i in rng.integers(len(requests()), size=24)]
    return torch.from_numpy(np.stack([drawn(entry, rng) for entry in wants])), [
        Prompt(caption(entry), entry, i) for i, entry in enumerate(wants)
    ]


def test_the_embedded_critic_reads_captions_and_asks_for_what_was_left_open():
    images, _ = drawings()
    critic = load("shapes_critic")
    blank = torch.full((1, 3, 32, 32), 0.85)
    results = critic(blank, [Prompt("a circle and a square")])
    assert results.requests == ("a red circle left of a green square",)
    assert results.critiques == ("no circle; no square",)
    assert critic(blank, [Prompt("a red circle above a blue square")]).requests == ()
    assert "no ground truth" in critic(blank, [Prompt("a cat")]).failures[0]
    assert find_blobs(images.numpy())


def invoke(*arguments):
    return CliRunner().invoke(app, ["refine", *map(str, arguments)])


def test_a_folder_of_refinements(tmp_path):
    out, page, pairs, requests = (tmp_path / name for name in ("out", "page.html", "pairs.jsonl", "requests.jsonl"))
    questions = [*TEXTS, "--out", out, "--html", page, "--pairs", pairs, "--requests", requests, "--steps", 4, "--json"]
    result = invoke(*questions)
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout.splitlines()[-1])
    rows = [json.loads(line) for line in (out / "trace.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == TEXTS
    assert summary["images"] == sum(len(row["rounds"]) for row in rows) == len(list((out / "images").iterdir()))
    assert summary["forwards"] == 4 * summary["images"]
    assert summary["best"] >= summary["first"]
    assert len(list((out / "best").iterdir())) == 4
    assert page.read_text().count("<figure") == summary["images"]
    for row in map(json.loads, pairs.read_text().splitlines()):
        assert (tmp_path / row["image_a"]).is_file()
        assert row["gap"] > 0
    assert all(json.loads(line)["first"] in TEXTS for line in requests.read_text().splitlines())
    again = json.loads(invoke(*questions).stdout.splitlines()[-1])
    assert again == summary | {"before": 4}
    other = invoke(*TEXTS, "--out", out, "--steps", 5)
    assert other.exit_code != 0
    assert isinstance(other.exception, BadInput)
    assert "steps 4, not 5" in str(other.exception)
    with pytest.raises(BadInput, match="not among these prompts"):
        on_disk.open_folder(out, json.loads((out / "settings.json").read_text()), PROMPTS[:2])


def test_the_script_is_a_door_to_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["critique_refine.py", "a red circle", "--out", str(tmp_path), "--steps", "2"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path("scripts/critique_refine.py", run_name="__main__")
    assert ended.value.code in (0, None)
    assert len((tmp_path / "trace.jsonl").read_text().splitlines()) == 1


def test_a_line_that_was_cut_off_is_done_again(tmp_path):
    questions = [*TEXTS, "--out", tmp_path, "--steps", 3]
    assert invoke(*questions).exit_code == 0
    whole = (tmp_path / "trace.jsonl").read_text()
    (tmp_path / "trace.jsonl").write_text(whole[: len(whole) - 200])
    assert invoke(*questions).exit_code == 0
    assert (tmp_path / "trace.jsonl").read_text() == whole


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "one of the three"),
        (["a circle", "--prompts", "x.txt"], "one of the three"),
        (["a circle", "--moves", "paint"], "moves: paint; known are request"),
        (["a circle", "--moves", "strength"], "strength makes more of an adapter; give one"),
        (["a circle", "--moves", "cut", "--cut", "1.5"], "cut 1.5: a time between 0"),
        (["a circle", "--moves", "region", "--steps", "2"], "takes at least 3"),
        (["a circle", "--critic", "shape_critic"], "near names: shapes_critic"),
        (["a circle", "--by", "beauty"], "by 'beauty': shapes_critic gives overall"),
        (["--images", "assets/figures"], "has no prompt for"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, says, tmp_path):
    result = invoke(*arguments, "--out", tmp_path / "out")
    assert isinstance(result.exception, BadInput)
    assert says in str(result.exception)
    assert "\n" not in str(result.exception)
    assert not (tmp_path / "out" / "trace.jsonl").exists()


def test_a_prompt_the_critic_cannot_judge_is_said_and_costs_no_other(tmp_path):
    result = invoke("a cat", "a red circle", "--out", tmp_path, "--steps", 3, "--rounds", 2, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout.splitlines()[-1])["unscored"] == 1
    rows = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert "no ground truth" in rows[0]["rounds"][0]["failure"]
    assert rows[0]["rounds"][0]["scores"]["overall"] is None


def test_pictures_on_disk_are_begun_from(tmp_path):
    result = invoke("--images", "assets/pictures", "--out", tmp_path, "--steps", 3, "--rounds", 2, "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout.splitlines()[-1])
    rows = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert summary["prompts"] == len(rows) == 16
    assert all(row["rounds"][0]["attempt"] is None for row in rows)
    assert summary["forwards"] == 3 * (summary["images"] - 16)
    assert {len(row["rounds"]) for row in rows if row["rounds"][0]["scores"]["overall"] == 1} == {1}
    names = [json.loads(line)["image"] for line in Path("assets/pictures/metadata.jsonl").read_text().splitlines()]
    before = Image.open(Path("assets/pictures") / names[0])
    assert list(before.convert("RGB").getdata()) == list(Image.open(tmp_path / rows[0]["rounds"][0]["image"]).getdata())


@pytest.mark.parametrize("count", [16, pytest.param(1000, marks=pytest.mark.slow)])
def test_killed_in_the_middle_no_prompt_is_done_twice_and_none_is_lost(tmp_path, count):
    every = [json.loads(line) for line in Path(locate("assets/prompts/train.jsonl")).read_text().splitlines()[:count]]
    file, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    file.write_text("".join(json.dumps(row) + "\n" for row in every))
    questions = ["--prompts", str(file), "--steps", "3", "--rounds", "3", "--batch", "5"]
    trace = out / "trace.jsonl"
    killed = [sys.executable, "-c", KILLED, "refine", *questions, "--out", str(out), str(trace), str(count // 3)]
    assert subprocess.run(killed, capture_output=True, env=os.environ).returncode == -signal.SIGKILL
    trace.write_bytes(trace.read_bytes()[:-9])  # in the middle of a line
    *before, half = trace.read_text().splitlines()
    before = [json.loads(line) for line in before]
    assert not half.endswith("}")
    assert count // 3 - 1 <= len(before) < count
    assert invoke(*questions, "--out", out).exit_code == 0
    rows = [json.loads(line) for line in trace.read_text().splitlines()]
    assert rows[: len(before)] == before
    assert [row["id"] for row in rows] == [row["id"] for row in every]
    whole = tmp_path / "whole"
    assert invoke(*questions, "--out", whole).exit_code == 0
    assert [json.loads(line) for line in (whole / "trace.jsonl").read_text().splitlines()] == rows


def test_a_seed_of_its_own_for_each_round():
    assert len({seed_of("refine", 0, p, k) for p in range(9) for k in range(9)}) == 81
    assert not torch.equal(gaussian((4,), seed_of("refine", 0, 1)), gaussian((4,), seed_of("refine", 0, 1, 1)))
