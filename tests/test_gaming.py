"""How gameable a reward is: the best of n against closed forms, and the page of a run."""

import json
from itertools import combinations
from math import comb, log

import pytest
import torch
from command_line import mmalign
from run_config import run

from mmalign.errors import BadInput
from mmalign.evaluation import gaming as best_of
from mmalign.evaluation.best_of_n import expected_best
from mmalign.evaluation.gaming import divergence, expected_of_best, gaming
from mmalign.reporting import gaming as report
from reward_models.tools import judged
from reward_models.training import page

SIZES = [1, 2, 4, 8, 16, 32, 64]


def test_the_expectation_is_that_over_all_choices():
    generator = torch.Generator().manual_seed(0)
    reward, score = torch.randn(2, 7, generator=generator)
    reward[3] = reward[5]  # equally good: either is taken half of the time
    for n in range(1, 8):
        taken = []
        for some in combinations(range(7), n):
            best = max(reward[i] for i in some)
            equal = [i for i in some if reward[i] == best]
            taken.append(sum(float(score[i]) for i in equal) / len(equal))
        [mean] = expected_of_best(reward, score, [n])
        assert mean == pytest.approx(sum(taken) / len(taken))


def test_the_expectation_of_many_images_is_exact():
    """The best of n of the ranks 1 to N has the mean n (N + 1) / (n + 1)."""
    ranks = torch.arange(1.0, 5001.0)
    values = expected_of_best(ranks, ranks, [1, 64, 4096])
    assert values == pytest.approx([n * 5001 / (n + 1) for n in (1, 64, 4096)], rel=1e-8)


def test_a_verifier_judged_by_itself_is_monotone_and_the_expected_best():
    scores = torch.rand(5, 64, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    result = gaming([f"{p}" for p in range(5) for _ in range(64)], {"v.x": scores.flatten()})
    means = result.curves["v.x"].means
    assert means == sorted(means)
    expected = [sum(expected_best(row)[n - 1] for row in scores) / 5 for n in SIZES]
    assert means == pytest.approx(expected)
    assert result.curves["v.x"].verdict.startswith("rises: highest at n = 64, +")


def hacked(prompts, images, honest, generator):
    """The reward is the rank of an image, from 1; the watched score is the rank up to `honest`, and 0 above."""
    rank = torch.stack([torch.randperm(images, generator=generator) + 1 for _ in range(prompts)]).double()
    return rank.flatten(), torch.where(rank <= honest, rank, 0.0).flatten()


@pytest.mark.parametrize("honest", [40, 58, 63])
def test_a_planted_hackable_reward_turns_where_the_closed_form_does(honest):
    """The sum of i C(i - 1, n - 1) over i up to m is n C(m + 1, n + 1)."""
    reward, watched = hacked(6, 64, honest, torch.Generator().manual_seed(0))
    names = [f"prompt {p}" for p in range(6) for _ in range(64)]
    one = gaming(names, {"r.x": reward, "w.x": watched}).curves["w.x"]
    closed = [n * comb(honest + 1, n + 1) / comb(64, n) for n in SIZES]
    assert one.means == pytest.approx(closed)
    assert one.peak == SIZES[closed.index(max(closed))]
    assert one.shape == ("turns" if one.peak > 1 else "falls")


def test_a_fall_by_chance_is_not_called_a_turn():
    generator = torch.Generator().manual_seed(1)
    reward, watched = torch.randn(2, 12, 16, generator=generator)
    one = gaming([f"{p}" for p in range(12) for _ in range(16)], {"r.x": reward.flatten(), "w.x": watched.flatten()})
    assert one.curves["w.x"].shape in ("levels off", "is flat")
    assert divergence(4) == pytest.approx(log(4) - 0.75)


def test_prompts_with_fewer_images_are_left_out_and_bad_names_are_refused():
    scores = {"r.x": torch.arange(12.0), "w.x": torch.arange(12.0)}
    scores["w.x"][0] = torch.nan
    names = ["a"] * 4 + ["b"] * 8
    result = gaming(names, scores, most=8)
    assert (result.prompts, result.left_out, result.curves["w.x"].sizes) == (1, 1, [1, 2, 4, 8])
    assert gaming(names, scores).curves["w.x"].sizes == [1, 2]
    with pytest.raises(BadInput, match=r"no score called 'x'; there are r\.x, w\.x"):
        gaming(names, scores, by="x")
    with pytest.raises(BadInput, match="at least 2 scored images"):
        gaming(["a", "b", "c"], {"r.x": torch.arange(3.0)})


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    out = tmp_path_factory.mktemp("gaming") / "collected"
    words = ["a circle", "two squares", "--seeds", "0,1,2,3", "--steps", "2", "--rewards", "image_stats,clip"]
    result = mmalign("collect", *words, "--out", str(out))
    assert result.returncode == 0, result.stderr
    return out


def test_the_command_judges_a_collection(collected, tmp_path):
    words = ("--by", "clip.cosine", "--watch", "jpeg_size.kilobytes,clip.cosine", "--rewards", "jpeg_size", "--json")
    result = mmalign("reward", "gaming", str(collected), *words, "--html", str(tmp_path / "page.html"))
    assert result.returncode == 0, result.stderr
    best = json.loads(result.stdout)["best_of_n"]
    assert [*best["curves"]] == ["clip.cosine", "jpeg_size.kilobytes"]
    assert best["curves"]["clip.cosine"]["sizes"] == [1, 2, 4]
    rows = [json.loads(line) for line in (collected / "judged_images.jsonl").read_text().splitlines()]
    highest = [max(row["scores"]["clip.cosine"] for row in rows if row["id"] == k) for k in (0, 1)]
    assert best["curves"]["clip.cosine"]["means"][-1] == pytest.approx(sum(highest) / 2)
    assert page.ours((tmp_path / "page.html").read_text())
    result = mmalign("reward", "gaming")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)


def test_ground_truth_of_a_collection_reaches_the_scorers(collected, tmp_path):
    rows = [json.loads(line) for line in (collected / "judged_images.jsonl").read_text().splitlines()]
    rows[0]["wants"] = {"include": [{"class": "circle", "count": 1}], "tag": "one"}
    rows[1]["image"] = None
    (collected / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = []
    images = judged.read(collected / "some.jsonl", warn=lines.append)
    assert images[0].item.prompt.wants == rows[0]["wants"]
    assert (len(images), len(lines)) == (7, 1)
    values = best_of.scored(images, {}, 64, lambda rows, done, total: rows)
    assert float(values["clip.cosine"][0]) == rows[0]["scores"]["clip.cosine"]
    del rows[2]["id"]  # as in tables of prompts
    (collected / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert judged.read(collected / "some.jsonl")[1].item.prompt.id == 0
    rows[2]["scores"] = {"clip.cosine": "high"}
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="`scores` must be an object of numbers"):
        judged.read(tmp_path / "bad.jsonl")


def test_the_course_of_a_run(settings, tmp_path):
    out = run(settings, watch=["image_stats"], iterations=2, eval_every=1)
    course = report.course(out)
    name = "jpeg_size.kilobytes"
    assert course.trained == [name]
    assert [x for x, _ in course.points[name]] == [0, 1, 2]
    assert "image_stats.brightness" in course.points
    rows = [json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()]
    assert course.points[name][-1][1] == rows[-1][name]
    tables, charts = report.of_course(course)
    page.write(tmp_path / "page.html", "run", tables, charts)
    assert "image_stats.brightness, watched" in (tmp_path / "page.html").read_text()
    with pytest.raises(BadInput, match="not the folder of a run"):
        report.course(tmp_path)
