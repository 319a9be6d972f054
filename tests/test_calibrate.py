"""Noise calibration on counts of known signs."""

import json

import pytest
import torch

from mmalign.config import load as configs
from mmalign.errors import BadInput
from mmalign.training import noise_calibration as calibrate

TIMES = torch.linspace(1, 0, 6)
C = configs.build(dict(steps=5, plan={"type": "branch", "steps": [0], "children": 2}), "test")


def signs(shares, n=100):
    """Fake rollouts: gains of which the given share is positive at each step."""
    gain = torch.tensor([[1.0 if i < share * n else -1.0 for share in shares] for i in range(n)])
    return lambda levels, number: gain[:, : len(levels)]


def walk(shares, rule="z", rounds=10, step=0.1, floor=0.05, n=100):
    levels = torch.tensor([0.7, 0.7, 0.7, 0.7, 0.0])
    return list(calibrate.run(signs([*shares, 0.5], n), levels, rounds, rule, step, floor))


def test_balanced_gains_raise_the_noise_and_losses_lower_it_to_the_floor():
    rows = walk([0.5, 0.0, 1.0, 0.44])
    assert rows[0]["noise"] == pytest.approx([0.7, 0.7, 0.7, 0.7, 0.0])
    last = rows[-1]["noise"]
    assert last == pytest.approx([1.6, 0.05, 1.6, 0.05, 0.0])  # 44 to 56 is a z of 1.2
    assert rows[0]["better"][:4] == [50, 0, 100, 44]


def test_the_papers_rule_lowers_the_noise_under_perfect_balance():
    """Gains of fair coins: with N = 100 a tie, the only pass, has probability 0.08, and the noise drifts down. The
    robust rule raises it in five rounds of six."""
    levels = torch.full((5,), 0.7)
    ends = {}
    for rule in ("paper", "z"):
        g = torch.Generator().manual_seed(0)
        fair = lambda *_: torch.randn(100, 5, generator=g).sign()  # noqa: B023, E731
        rows = list(calibrate.run(fair, levels, 30, rule, 0.01, 0.05))
        ends[rule] = torch.tensor(rows[-1]["noise"]).mean()
    assert ends["paper"] < 0.7 - 0.15
    assert ends["z"] > 0.7 + 0.15


def test_the_papers_rule_lowers_it_where_gains_are_positive_too():
    assert walk([1.0, 1.0, 1.0, 1.0], "paper")[-1]["noise"][0] == pytest.approx(0.05)


def test_ties_and_failed_scores_count_on_neither_side():
    gain = torch.zeros(10, 2)
    gain[0], gain[1, 0], gain[2] = 1.0, torch.nan, -1.0
    row = next(calibrate.run(lambda *_: gain, torch.tensor([0.5, 0.5]), 1, "z", 0.1, 0.0))
    assert row["better"] == [1, 1]
    assert row["worse"] == [1, 1]


@pytest.mark.parametrize("rule", ["paper", "z"])
@pytest.mark.parametrize("gain", [0.0, torch.nan])
def test_a_step_nothing_was_seen_of_keeps_its_noise(rule, gain):
    levels = torch.tensor([0.7, 0.5, 0.02])
    rows = list(calibrate.run(lambda *_: torch.full((8, 3), gain), levels, 5, rule, 0.1, 0.05))
    assert calibrate.settled(rows, rule) == pytest.approx([0.7, 0.5, 0.02])


@pytest.mark.parametrize(("rule", "share"), [("paper", 0.5), ("z", 1.0)])
def test_the_last_round_counts(rule, share):
    """Two rounds, both of which raise the noise of 0.7 by 0.1; the second led to 0.9."""
    rows = walk([share] * 4, rule, rounds=2)
    assert [row["after"][0] for row in rows] == pytest.approx([0.8, 0.9])
    assert calibrate.settled(rows, rule)[0] == pytest.approx({"paper": 0.9, "z": 0.85}[rule])


def test_noise_rises_no_further_than_the_ceiling_and_what_is_above_it_may_fall():
    levels, better, worse = (
        torch.tensor([2.95, 4.0, 4.0, 0.5]),
        torch.tensor([9.0, 9, 0, 9]),
        torch.tensor([0.0, 0, 9, 0]),
    )
    result = calibrate.next_levels(levels, better, worse, "z", 0.1)
    assert result.tolist() == pytest.approx([3.0, 4.0, 3.9, 0.6])
    assert calibrate.next_levels(levels, better, worse, "z", 0.1, ceiling=0.55)[3] == pytest.approx(0.55)
    assert walk([1.0] * 4, rounds=40)[-1]["after"][:4] == [3.0] * 4


def test_the_answer_averages_the_second_half():
    rows = [{"noise": [float(k)]} for k in range(4)]
    assert calibrate.settled(rows, "z") == [2.5]
    assert calibrate.settled(rows, "paper") == [3.0]


def test_it_starts_from_flow_grpos_noise():
    levels = calibrate.start_levels(TIMES)
    assert levels.tolist() == pytest.approx([0.7 / 0.2**0.5, 0.7 * 2, 0.7 * 1.5**0.5, 0.7 * (2 / 3) ** 0.5, 0.0])


def test_a_calibration_round_trips_and_belongs_to_its_schedule(tmp_path):
    rows, path = walk([0.5, 0.0, 1.0, 0.44]), tmp_path / "noise.json"
    calibrate.save(path, C, TIMES, rows, "z")
    assert calibrate.load(str(path), C, TIMES) == calibrate.settled(rows, "z")
    assert json.loads(path.read_text())["rounds"] == rows
    with pytest.raises(BadInput, match=r"was calibrated with times \[1\.0, 0\.8"):
        calibrate.load(str(path), C, torch.linspace(1, 0, 5))
    with pytest.raises(BadInput, match=r"calibrated with guidance 1\.0, this run has 4\.5"):
        calibrate.load(str(path), C.model_copy(update={"guidance": 4.5}), TIMES)
    with pytest.raises(BadInput, match="is not a file written by"):
        calibrate.load(str(tmp_path / "absent.json"), C, TIMES)
    calibrate.plot(tmp_path / "noise.png", path)
    assert (tmp_path / "noise.png").stat().st_size > 5000
