"""The commands `reward fit` and `reward eval`, and the fitted model as a scorer of the others."""

import json
from pathlib import Path

import pytest
from command_line import mmalign

PAIRS = "assets/pictures/pairs.jsonl"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward") / "taste"
    words = ["--out", str(folder), "--set", "epochs=3", "--set", "loss=davidson", "--html", str(folder) + ".html"]
    result = mmalign("reward", "fit", PAIRS, *words)
    assert result.returncode == 0, result.stderr
    assert "pair accuracy" in result.stdout
    return folder


def test_a_fitted_model_scores_and_is_measured(folder, tmp_path):
    setting = f"fitted.folder={folder}"
    result = mmalign("reward", "eval", PAIRS, "--rewards", "clip,fitted", "--set", setting, "--json")
    rewards = json.loads(result.stdout)["rewards"]
    assert rewards["clip.cosine"]["accuracy"]["mean"] == 0.875
    assert rewards["fitted.score"]["calibration"]["pairs"] == 8
    scored = ("score", PAIRS, "--rewards", "fitted", "--set", setting, "--out", str(tmp_path / "scores.jsonl"))
    assert mmalign(*scored).returncode == 0
    assert "<svg" in folder.with_suffix(".html").read_text()


def test_a_fitted_model_is_calibrated(folder, tmp_path):
    one, other = (str(Path("assets/pictures/00001-1-after.png").resolve()), "00203-0-after.png")
    other = str(Path("assets/pictures").resolve() / other)
    rows = [
        {"image_a": one, "image_b": other, "chosen": "ab"[k % 2], "prompt": f"a picture of {k} trees"} for k in range(3)
    ]
    table = tmp_path / "pairs.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = mmalign("reward", "calibrate", str(folder), str(table), "--images", "assets/pictures", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["pairs"] == 3
    setting = f"fitted.folder={folder}"
    result = mmalign("reward", "eval", PAIRS, "--rewards", "fitted", "--set", setting, "--swap", "--json")
    assert [*json.loads(result.stdout)["rewards"]] == ["fitted.score", "fitted.better"]


def test_a_mixture_is_fitted_to_pairs(tmp_path):
    words = ["--rewards", "clip,image_stats", "--aspect", "text=clip.cosine", "--aspect", "look=image_stats.brightness"]
    out = tmp_path / "experts.safetensors"
    result = mmalign("reward", "experts", PAIRS, *words, "--out", str(out), "--held-out", "0.5")
    assert result.returncode == 0, result.stderr
    assert "fixed ones" in result.stdout
    assert mmalign("reward", "experts", PAIRS, *words, "--out", str(out)).returncode == 0
    out.write_text("notes")
    result = mmalign("reward", "experts", PAIRS, *words, "--out", str(out))
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "it is not overwritten" in result.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["fit", PAIRS, "--fit", "trees", "--out", "x"], "no fit called 'trees'"),
        (["fit", PAIRS, "--set", "hidden", "--out", "x"], "must look like key=value"),
        (["fit", PAIRS, "--set", "hidden=1", "--set", "hidden=2", "--out", "x"], "hidden is there twice"),
        (["fit", "no.jsonl", "--out", "x"], "no.jsonl: No such file"),
        (["eval", PAIRS, "--rewards", "fitted", "--set", "fitted.folder=assets"], "fitted: assets could not be loaded"),
        (["experts", PAIRS, "--rewards", "clip", "--aspect", "x", "--out", "x"], "--aspect 'x' must look like"),
        (["experts", PAIRS, "--rewards", "clip", "--out", "x"], "at least 2 components"),
        (["gaming", "assets/pictures"], "the images have no scores"),
        (["eval", "assets/prompts/test.jsonl"], "no pairs; its columns are"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words, says):
    result = mmalign("reward", *words)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert says in result.stderr
