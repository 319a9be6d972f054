"""Calibration of fitted models: known distributions, order, what is written and what is refused."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_pairs import drawn_pairs

from reward_models import load
from reward_models.files import parsed
from reward_models.tools.picture_files import Item
from reward_models.training import calibrate, evaluate, fit
from reward_models.training.calibrating import cross_fitted, figures, fit_maps
from reward_models.training.calibration import Calibration, Reference
from reward_models.types import Prompt


def labelled(count, factor, seed=0):
    """Log-odds `factor` times as large as those that the labels follow."""
    rng = np.random.default_rng(seed)
    odds = rng.normal(0, 2, count)
    return factor * odds, (rng.random(count) < 1 / (1 + np.exp(-odds))).astype(float)


def record(maps, **rest):
    knots = {"log_odds": maps.log_odds.tolist(), "probability": maps.probability.tolist()}
    empty = {"weights": "", "reference": None, "pairs": 0, "prompts": 0, "left_out": 0, "data": "", "figures": {}}
    return Calibration(temperature=maps.temperature, **knots, **empty | rest)


def test_calibrated_labels_have_temperature_one_and_the_identity():
    maps = fit_maps(*labelled(20_000, 1.0))
    assert maps.temperature == pytest.approx(1, abs=0.05)
    grid = np.linspace(-4, 4, 41)
    np.testing.assert_allclose(record(maps).probabilities(grid), 1 / (1 + np.exp(-grid)), atol=0.04)


def test_both_maps_undo_a_factor_of_three_and_the_figures_show_it():
    odds, truth = labelled(3000, 3.0)
    cluster = np.arange(3000) // 3
    table = figures(cross_fitted(odds, truth, cluster), truth, cluster)
    for method in ("temperature", "isotonic"):
        assert table[method]["ece"][0] < 0.03 < 0.05 < table["raw"]["ece"][0]
        assert table[method]["change in brier"][2] < 0  # the interval is below 0
    assert all(row[key][1] <= row[key][0] <= row[key][2] for row in table.values() for key in row)


def test_isotonic_by_hand():
    """Log-odds 1, 2, 3 with labels 1, 0, 1: the blocks {1, 2} and {3}; and the same with the sides exchanged."""
    maps = fit_maps(np.array([1.0, 2.0, 3.0]), np.array([1.0, 0.0, 1.0]))
    np.testing.assert_allclose(maps.log_odds, [-3, 0, 3])  # -2 to 2 have 2 of 4 right
    np.testing.assert_allclose(maps.probability, [1 / 8, 0.5, 7 / 8])
    chance = record(maps).probabilities(np.array([-1.5, 0.0, 1.5]))
    np.testing.assert_allclose(chance, [5 / 16, 0.5, 11 / 16])
    beyond = record(maps).probabilities(np.array([5.0]))
    np.testing.assert_allclose(np.log(beyond / (1 - beyond)), [math.log(7) + 2 / maps.temperature])


def test_the_map_is_antisymmetric_and_strictly_rising():
    chance = record(fit_maps(*labelled(200, 2.0)))
    grid = np.linspace(-30, 30, 2001)
    values = chance.probabilities(grid)
    assert (np.diff(values[900:1101]) > 0).all()
    assert (np.diff(values) >= 0).all()
    np.testing.assert_allclose(values + values[::-1], 1, atol=1e-12)


def test_better_is_the_mean_chance_against_the_images_of_the_prompt():
    maps = fit_maps(np.array([1.0, 2.0, 3.0]), np.array([1.0, 0.0, 1.0]))
    reference = Reference(by_prompt={"circle": [[0.0], [3.0]]}, overall=[[1.5]])
    one = record(maps, reference=reference)
    outputs, difference = torch.tensor([[3.0], [3.0]]), lambda a, b: a[:, 0] - b[:, 0]
    values = one.better(outputs, [Prompt("A circle"), Prompt("a cross")], difference)
    assert values.tolist() == pytest.approx([(7 / 8 + 1 / 2) / 2, 11 / 16])


def test_better_has_the_slope_of_the_map():
    maps = fit_maps(np.array([1.0, 2.0, 3.0]), np.array([1.0, 0.0, 1.0]))
    one = record(maps, reference=Reference(by_prompt={}, overall=[[1.5]]))
    outputs = torch.tensor([[1.0], [3.2], [9.0]], dtype=torch.float64, requires_grad=True)  # below, between and beyond
    better = lambda outputs: one.better(outputs, [Prompt("a")] * 3, lambda a, b: a[:, 0] - b[:, 0])  # noqa: E731
    (slope,) = torch.autograd.grad(better(outputs).sum(), outputs)
    with torch.no_grad():
        rise = one.mapped(outputs[:, 0] - 1.5 + 1e-6) - one.mapped(outputs[:, 0] - 1.5 - 1e-6)
    torch.testing.assert_close(slope[:, 0], rise / 2e-6, rtol=1e-5, atol=1e-9)
    assert slope.min() > 0


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A head, pairs of other prompts, and images of a base model: two prompts with four images each."""
    folder = tmp_path_factory.mktemp("calibrated") / "head"
    pairs = drawn_pairs(60)
    fit(pairs, folder, loss="thurstone", epochs=4)
    other = drawn_pairs(40, seed=1)
    images = [item(pair.a, prompt.prompt) for prompt in other[:2] for pair in other[:4]]
    calibrate(folder, other, [*images, item(other[5].a, other[5].prompt)])
    return folder, pairs, other


def item(picture, prompt):
    return Item(picture.name, Path("drawn"), prompt, picture.data)


def test_pairs_of_prompts_that_were_trained_on_are_left_out(model, tmp_path):
    folder, pairs, other = model
    content = parsed((folder / "calibration.json").read_text())
    mixed = calibrate(copied(folder, tmp_path), [*pairs, *other])
    trained = {pair.prompt.text for pair in pairs}
    assert content["pairs"] >= sum(pair.prompt.text not in trained for pair in other)
    assert content["pairs"] + content["left_out"] == len(other)
    card = parsed((folder / "card.json").read_text())
    assert mixed.prompts <= content["prompts"] + card["prompts"]["test"]
    assert mixed.left_out > len(pairs) / 2
    with pytest.raises(ValueError, match="at least 2 are needed"):
        calibrate(folder, [replace(pair, preference=0.5) for pair in other])


def test_the_order_is_unchanged_and_better_is_a_probability(model, tmp_path):
    folder, _, other = model
    scorer = load("fitted", folder=str(folder))
    assert scorer.names == ("score", "sigma", "better")
    rows = evaluate(other, {"fitted": scorer})["rewards"]
    raw = copied(folder, tmp_path)
    (raw / "calibration.json").unlink()
    before = evaluate(other, {"fitted": load("fitted", folder=str(raw))})["rewards"]["fitted.score"]
    assert rows["fitted.score"]["accuracy"] == before["accuracy"]
    assert rows["fitted.score"]["calibration"]["temperature"] == pytest.approx(1, rel=0.35)
    alone = load("fitted", folder=str(folder), better=True)
    picture, prompt = other[0].a.read(), [other[0].prompt]
    value = float(alone(picture, prompt).values)
    assert 0 < value < 1
    assert value == pytest.approx(float(scorer(picture, prompt).column("better")))
    assert (alone.names, alone.card.low, alone.card.high) == (("better",), 0, 1)
    assert alone.card.version != scorer.card.version != load("fitted", folder=str(raw)).card.version


def test_prompts_with_few_images_use_all_of_them(model):
    reference = parsed((model[0] / "calibration.json").read_text())["reference"]
    assert len(reference["by_prompt"]) == 2
    assert all(len(rows) == 4 for rows in reference["by_prompt"].values())
    assert len(reference["overall"]) == 9


def copied(folder, target):
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"temperature": 0.0}, "temperature: Input should be greater"),
        ({"weights": "0" * 64}, "belongs to weights with the hash 000000000000"),
        ({"log_odds": [1.0, 1.0], "probability": [0.2, 0.3]}, "log_odds does not rise"),
        ({"probability": [0.5]}, "differ in length"),
        ({"kind": "x"}, "kind: Input should be 'calibration'"),
        ({"more": 1}, "more: Extra inputs"),
        ({"reference": {"by_prompt": {}, "overall": [[1.0]]}}, "images have 1 outputs, the model gives 2"),
        ({"reference": {"by_prompt": {"x": [[1.0, 2.0, 3.0]]}, "overall": [[1.0, 2.0]]}}, "different numbers"),
    ],
)
def test_a_calibration_that_does_not_fit_is_refused_in_one_line(model, tmp_path, change, says):
    folder = copied(model[0], tmp_path)
    content = parsed((folder / "calibration.json").read_text())
    (folder / "calibration.json").write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match=says) as error:
        load("fitted", folder=str(folder))
    assert "\n" not in str(error.value)


def test_better_alone_needs_a_calibration_and_images_need_to_be_readable(model, tmp_path):
    folder, _, other = model
    folder = copied(folder, tmp_path)
    with pytest.raises(ValueError, match="has no score"):
        calibrate(folder, other, [Item("x", Path("x"), other[0].prompt, b"no picture")])
    (folder / "calibration.json").unlink()
    with pytest.raises(ValueError, match="no component better"):
        load("fitted", folder=str(folder), better=True)
    (folder / "prompts.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="not a list of prompts"):
        calibrate(folder, other)
    (folder / "prompts.json").unlink()
    with pytest.raises(ValueError, match=r"no prompts\.json.*fit the model again"):
        calibrate(folder, other)
