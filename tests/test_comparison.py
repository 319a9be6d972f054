"""Rises with their intervals, and the diversity of siblings."""

from math import isnan, nan

import pytest
import torch
from scipy import stats

from mmalign.evaluation import evaluate, layouts
from mmalign.evaluation.comparison import over_runs, paired, rises
from mmalign.reporting import report
from reward_models import Prompt


def test_paired_is_the_t_test_over_clusters():
    """Clusters of 1, 2 and 3 images with mean rises 0.1, 0.2 and 0.6; each counts once."""
    cluster = torch.tensor([7, 3, 3, 5, 5, 5])
    before = torch.tensor([0.5, 0.1, 0.3, 0.0, 0.1, 0.2])
    after = before + torch.tensor([0.1, 0.0, 0.4, 0.5, 0.6, 0.7])
    rise = paired(before, after, cluster)
    expected = stats.ttest_1samp([0.2, 0.6, 0.1], 0.0)
    assert (rise.rise, rise.p) == (pytest.approx(0.3, abs=1e-6), pytest.approx(expected.pvalue, abs=1e-6))
    assert (rise.low, rise.high) == pytest.approx(expected.confidence_interval(0.95), abs=1e-6)


def test_a_cluster_written_twice_changes_nothing():
    scores = torch.rand(2, 6, generator=torch.Generator().manual_seed(0))
    cluster = torch.arange(6)
    assert paired(*scores, cluster) == paired(*scores.repeat(1, 2), cluster.repeat(2))


def test_missing_scores_are_left_out():
    before, after = torch.tensor([0.0, 0.0, 0.0, nan, 0.3]), torch.tensor([0.1, 0.5, nan, 1.0, 0.6])
    cluster = torch.tensor([0, 0, 0, 1, 2])
    assert paired(before, after, cluster) == paired(before[[0, 1, 4]], after[[0, 1, 4]], cluster[[0, 1, 4]])
    assert isnan(paired(before * nan, after, cluster).rise)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([0.5], [0.7]),  # one cluster
        ([0.5, 0.1], [0.7, 0.3]),  # equal rises, up to the rounding of float32
        ([0.5, 0.1], [0.5, 0.1]),  # no rise at all
        ([21.7, 4.1, 9.3], [21.8, 4.2, 9.4]),
    ],
)
def test_without_a_spread_there_is_a_rise_but_no_p_value(before, after):
    rise = paired(torch.tensor(before), torch.tensor(after), torch.arange(len(before)))
    assert rise.rise == pytest.approx(after[0] - before[0], abs=1e-5)
    assert isnan(rise.low)
    assert isnan(rise.high)
    assert isnan(rise.p)


def test_a_small_spread_of_small_scores_counts():
    assert paired(torch.tensor([1e-8, 2e-8]), torch.tensor([3e-8, 5e-8]), torch.arange(2)).p < 0.2


def test_scores_rounded_to_six_decimals_that_rise_equally_have_no_p_value():
    before, after = torch.tensor([0.333333, 0.666667]).double(), torch.tensor([0.533333, 0.866666]).double()
    assert isnan(paired(before, after, torch.arange(2), rounding=0.5e-6).p)
    assert paired(before, after, torch.arange(2)).p < 1e-5


def test_the_rise_is_the_difference_of_the_means_shown():
    """In a report two wordings of one meaning count as one prompt."""
    texts = ["a cup and a fork", "a fork and a cup", "a kite", "a bus"]
    scores = {"before": [0.0, 0.0, 0.4, 0.2], "after": [1.0, 1.0, 0.5, 0.4]}
    rows = {
        side: [
            {"image": f"{i}.png", "prompt": text, "id": i, "scores": {"score": value}}
            for i, (text, value) in enumerate(zip(texts, values, strict=True))
        ]
        for side, values in scores.items()
    }
    images, compared = report.comparison(rows)
    row = compared["score"]
    assert images == 4
    assert (row["before"], row["after"]) == (pytest.approx(0.2), pytest.approx(1.9 / 3))
    assert row["rise"] == pytest.approx(row["after"] - row["before"]) == pytest.approx(1.3 / 3)
    assert row["p"] == pytest.approx(stats.ttest_1samp([1.0, 0.1, 0.2], 0.0).pvalue)


def test_rises_of_a_score_that_only_some_images_have():
    before = {"one": torch.tensor([0.0, 0.5]), "other": torch.tensor([nan, nan])}
    after = {"one": torch.tensor([0.25, 1.0]), "other": torch.tensor([1.0, nan])}
    rows = rises(before, after, torch.arange(2))
    assert (rows["one"]["before"], rows["one"]["after"], rows["one"]["rise"]) == (0.25, 0.625, 0.375)
    assert all(isnan(value) for value in rows["other"].values())


def drawn(runs: int, meanings: int, run: float, meaning: float, rest: float, seed: int):
    """Rises [R, M] around 0, with these standard deviations of their parts."""
    noise = torch.Generator().manual_seed(seed)
    parts = ((runs, 1, run), (1, meanings, meaning), (runs, meanings, rest))
    return sum(std * torch.randn(r, m, generator=noise, dtype=torch.float64) for r, m, std in parts)


def test_over_runs_by_hand():
    """Row means 1 and 3, column means 1, 2 and 3, residuals 0: the variance is 2 / 2 + 1 / 3."""
    rise = over_runs(torch.tensor([[0.0, 1.0, 2.0], [2.0, 3.0, 4.0]]))
    variance = 2 / 2 + 1 / 3
    freedom = variance**2 / (1**2 / 1 + (1 / 3) ** 2 / 2)
    assert rise.rise == 2
    assert rise.high - rise.rise == pytest.approx(stats.t.ppf(0.975, freedom) * variance**0.5)
    assert rise.rise - rise.low == pytest.approx(rise.high - rise.rise)
    assert rise.p == pytest.approx(2 * stats.t.sf(2 / variance**0.5, freedom))


def test_over_runs_without_a_spread_of_either_kind():
    for rises_ in (torch.rand(1, 5), torch.rand(5, 1), torch.full((3, 4), 0.2)):
        rise = over_runs(rises_)
        assert rise.rise == pytest.approx(float(rises_.mean()))
        assert isnan(rise.low)
        assert isnan(rise.p)


def test_a_meaning_without_a_rise_in_a_run_is_left_out():
    rises_ = drawn(3, 6, 0.1, 0.1, 0.1, 0)
    lacking = rises_.clone()
    lacking[1, 2] = nan
    assert over_runs(lacking) == over_runs(rises_[:, [0, 1, 3, 4, 5]])


def test_runs_that_agree_leave_the_error_of_the_evaluation():
    """Equal runs say nothing more about other meanings: the interval is about that of one of them."""
    one = drawn(1, 200, 0.0, 0.4, 0.0, 1)
    rise = over_runs(one.repeat(3, 1))
    alone = paired(torch.zeros(200), one[0], torch.arange(200))
    assert (rise.low, rise.high) == pytest.approx((alone.low, alone.high), abs=1e-6)


@pytest.mark.parametrize(
    ("run", "meaning", "rest"), [(0.02, 0.3, 0.4), (0.1, 0.3, 0.4), (0.3, 0.1, 0.3), (0.0, 0.3, 0.4), (0.0, 0.0, 0.4)]
)
@pytest.mark.parametrize("runs", [3, 5])
def test_the_interval_over_runs_covers_the_true_rise(runs, run, meaning, rest):
    """It covers 0 in about 95 % of 2000 draws: from 92 to 98.5 %, for runs that hardly differ and for ones that do."""
    intervals = [over_runs(drawn(runs, 100, run, meaning, rest, seed)) for seed in range(2000)]
    covered = sum(rise.low < 0 < rise.high for rise in intervals) / len(intervals)
    assert 0.92 <= covered <= 0.985


def test_the_interval_of_one_evaluation_covers_the_true_rise():
    pairs = (drawn(1, 60, 0.0, 0.3, 0.4, seed)[0] for seed in range(2000))
    intervals = [paired(torch.zeros(60).double(), pair, torch.arange(60) // 2) for pair in pairs]
    assert sum(rise.low < 0 < rise.high for rise in intervals) / 2000 == pytest.approx(0.95, abs=0.015)


def test_diversity_of_two_images():
    """Black and white deviate by a half from their mean: 2 x (1 / 4) / (2 - 1) = 1 / 2."""
    images = torch.zeros(4, 3, 2, 2)
    images[1] = 1.0
    group = torch.tensor([0, 0, 1, 2])
    assert evaluate.diversity(images, group) == pytest.approx(0.5**0.5)
    assert evaluate.deviation(images, group).tolist() == pytest.approx([0.5, 0.5, nan, nan], nan_ok=True)
    assert isnan(evaluate.diversity(images[2:], group[2:]))  # no siblings


@pytest.mark.parametrize("siblings", [2, 3, 12])
def test_diversity_does_not_depend_on_the_number_of_siblings(siblings):
    """Gaussian pixels with standard deviation 0.3, around another mean image in each group."""
    noise = torch.Generator().manual_seed(siblings)
    means = torch.rand(200, 1, 3, 4, 4, generator=noise)
    images = means + 0.3 * torch.randn(200, siblings, 3, 4, 4, generator=noise)
    group = torch.arange(200).repeat_interleave(siblings)
    assert evaluate.diversity(images.flatten(0, 1), group) == pytest.approx(0.3, rel=0.02)


def test_agreement_counts_the_pairs_of_a_prompt_that_both_decide():
    """Of prompt 0 the pairs (0, 1), (0, 2), (1, 2); of prompt 1 one pair that the other scorer does not decide."""
    parts = {
        "clip.cosine": torch.tensor([0.1, 0.2, 0.3, 0.5, 0.4, 0.9]),
        "shapes.strict": torch.tensor([0.0, 1.0, 0.5, 1.0, 1.0, 0.0]),
        "my.module:Own.part": torch.tensor([3.0, 2.0, nan, 1.0, 2.0, 0.0]),
    }
    images, prompt = torch.zeros(6, 3, 2, 2), torch.tensor([0, 0, 0, 1, 1, 2])
    result = evaluate.Evaluation(images, parts, prompt, torch.zeros_like(prompt), {})
    row = evaluate.agreements(result, ["clip.cosine"], ["shapes", "my.module:Own", "clip"])
    assert row == {
        "agrees/clip.cosine~shapes.strict": pytest.approx(2 / 3),
        "pairs/clip.cosine~shapes.strict": 3,
        "agrees/clip.cosine~my.module:Own.part": 0,
        "pairs/clip.cosine~my.module:Own.part": 2,
    }
    alone = evaluate.Evaluation(images, parts, torch.arange(6), torch.zeros_like(prompt), {})
    assert evaluate.agreements(alone, ["clip.cosine"], ["shapes"]) == {}


def test_an_evaluation_is_compared_with_the_images_of_the_same_noises_in_a_folder(tmp_path):
    """The folder has two images of three prompts; the later evaluation one image of the last two."""
    prompts = [Prompt(text, id=k) for k, text in enumerate(("a cat", "a dog", "a red car"))]
    prompt, member = torch.arange(3).repeat_interleave(2), torch.arange(2).repeat(3)
    score = torch.tensor([9.0, 9.0, 1.0, 9.0, nan, 9.0])
    before = {"a.b": score, "a.c": torch.tensor([9.0, 9.0, 2.0, 9.0, 5.0, 9.0])}
    layouts.write(evaluate.Evaluation(torch.zeros(6, 3, 2, 2), before, prompt, member, {}), prompts, tmp_path)
    parts = {"a.b": torch.tensor([3.0, 4.0]), "a.c": torch.tensor([3.0, 8.0]), "a.d": torch.tensor([1.0, 2.0])}
    later = evaluate.Evaluation(torch.zeros(2, 3, 2, 2), parts, torch.arange(2), torch.zeros(2, dtype=torch.long), {})
    row = layouts.changes(tmp_path, later, prompts[1:])
    assert row == {
        "rise/a.c": pytest.approx(2.0),
        "p/a.c": pytest.approx(stats.ttest_1samp([1.0, 3.0], 0).pvalue),
        "size/a.c": pytest.approx(2.0 / 1.5 / 2**0.5),  # of 2 and 5
    }  # a.b rises in one image alone, which gives no p; a.d was not measured
