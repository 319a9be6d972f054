"""Several rewards in one run: the rules of combination meet credits, metrics, checkpoints and the frozen reference."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from drawn_pairs import drawn_pairs
from run_config import cut_off, rows, run
from trajectories import sampled
from typer.testing import CliRunner

from mmalign.cli.app import app
from mmalign.config import load as configs
from mmalign.credit.gain import gains
from mmalign.credit.groups import Units
from mmalign.credit.terminal import Terminal
from mmalign.errors import BadInput, Failed
from mmalign.evaluation import reference as references
from mmalign.flow import plan as plans
from mmalign.rewards.combination import Combination, Experts, Gate, Gdpo, Mrn, Potential, Product
from mmalign.rewards.judge import judge, score
from mmalign.sampling.kernels import FlowSde
from mmalign.training import setup
from mmalign.types import Judgement
from reward_models import Prompt, Scores, combine, load
from reward_models.training import experts as mixtures
from reward_models.training.fitting_experts import fit_experts
from reward_models.types import Card


class Twice:
    """The mean of the latent, and its first cell in other units."""

    names, card = ("mean", "first"), Card("twice")

    def __call__(self, images, prompts):
        return Scores(self.names, torch.stack([images.mean((1, 2, 3)), 100 * images[:, 0, 0, 0]], 1))


def shown(combination, starts=12, prompts=3):
    paths = sampled(plans.sde(torch.linspace(1, 0, 5), FlowSde()), starts, prompts)
    observed = score(paths.finals, [Prompt("")] * len(paths.finals), {"twice": Twice()})
    return paths, judge(paths, observed, (8, 8), combination)


WEIGHTS = {"twice.mean": 1.0, "twice.first": 0.5}


@pytest.mark.parametrize(("rule", "scale", "whole"), [(Mrn(), "none", "normalised"), (Gdpo(), "batch", "whitened")])
def test_terminal_credit_of_normalised_rewards_is_the_papers_advantage(rule, scale, whole):
    paths, judged = shown(Combination(WEIGHTS, rule))
    advantage = Terminal()(paths.tree, judged, Units(scale, clip=100.0))[:, 0, 0, 0]
    values = torch.stack([*judged.parts.values()], 1)
    expected = getattr(combine, whole)(values, paths.tree.prompt, torch.tensor([1.0, 0.5]))
    torch.testing.assert_close(advantage, expected, atol=1e-5, rtol=1e-4)


def test_a_reference_changes_units_and_nothing_that_compares_siblings():
    """With one reward, group-scaled advantages are the same with and without a reference."""
    known = {"twice.mean": (0.3, 0.2)}
    paths, plain = shown(Combination({"twice.mean": 1.0}))
    _, moved = shown(Combination({"twice.mean": 1.0}, reference=known))
    torch.testing.assert_close(moved.reward[:, -1], (plain.reward[:, -1] - 0.3) / 0.2)
    torch.testing.assert_close(Terminal()(paths.tree, moved), Terminal()(paths.tree, plain), atol=1e-4, rtol=1e-4)


def test_product_and_gate_read_the_raw_parts():
    paths = sampled(plans.ode(torch.linspace(1, 0, 3)), 4, 2)
    parts = dict(zip(WEIGHTS, torch.rand(2, 4).unbind(), strict=True))
    product = Combination(WEIGHTS, Product())(parts, paths.tree.owner)
    torch.testing.assert_close(product, parts["twice.mean"] * parts["twice.first"].sqrt())
    gated = Combination(WEIGHTS, Gate("twice.first"))(parts, paths.tree.owner)
    torch.testing.assert_close(gated, parts["twice.first"] * (1 + parts["twice.mean"]))


@pytest.mark.parametrize("rule", [Gate("twice.first"), Product()])
def test_a_factor_below_0_stops_a_run_with_a_line(rule):
    with pytest.raises(Failed, match=rf"combine: {rule.type}: .* at least 0, got -"):
        shown(Combination(WEIGHTS, rule))


TWO = {"jpeg_size.kilobytes": 1.0, "image_stats.brightness": 2.0}


def test_every_part_is_in_the_metrics(settings):
    (row, *_) = rows(run(settings, rewards=TWO, iterations=1, held_out=None) / "metrics.jsonl")
    for name in TWO:
        assert row[f"spread/{name}"] > 0
        assert row[f"missing/{name}"] == 0
        assert row[f"dead/{name}"] == 0
    assert abs(row["correlation/jpeg_size.kilobytes~image_stats.brightness"]) <= 1


@pytest.mark.parametrize(("rule", "scale"), [("mrn", "none"), ("gdpo", "batch")])
def test_with_normalised_rewards_the_weighted_sum_of_the_raw_ones_is_logged(settings, rule, scale):
    out = run(settings, rewards=TWO, combine=rule, advantage={"scale": scale}, iterations=1, held_out=None)
    (row,) = rows(out / "metrics.jsonl")
    assert row["reward"] == pytest.approx(row["part/jpeg_size.kilobytes"] + 2 * row["part/image_stats.brightness"])
    assert abs(row["reward"]) > 0.1


def test_the_level_is_in_the_references_units_and_nan_without_a_part():
    parts = {"twice.mean": torch.tensor([0.5, 0.7, torch.nan]), "twice.first": torch.tensor([1.0, 3.0, 1.0])}
    known = {"twice.mean": (0.3, 0.2), "twice.first": (1.0, 4.0)}
    results = Combination(WEIGHTS, Mrn(), reference=known).level(parts, torch.zeros(3))
    assert results.tolist() == pytest.approx([1.0, 2.25, torch.nan], nan_ok=True)
    reward = torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(Combination(WEIGHTS).level(parts, reward), reward)


def test_a_second_run_with_the_same_cache_scores_nothing_twice(settings, tmp_path):
    changed = dict(cache=str(tmp_path / "scores.sqlite"), iterations=2)
    one = rows(run(settings, **changed) / "metrics.jsonl")
    two = rows(run(settings, **changed, out=str(tmp_path / "again")) / "metrics.jsonl")
    assert [row["cache_hits"] for row in two] == [1.0, 1.0]
    assert one[-1]["cache_hits"] < 1
    assert [row["reward"] for row in one] == [row["reward"] for row in two]


def test_two_settings_of_one_scorer_watch_each_other(settings):
    scorers = {"rough": {"scorer": "jpeg_size", "quality": 10}}
    out = run(settings, scorers=scorers, watch=["rough"], iterations=1)
    (before, *_) = rows(out / "evaluations.jsonl")
    assert before["rough.kilobytes"] > before["jpeg_size.kilobytes"]  # both below 0: fewer bytes at low quality


def test_groups_under_the_floor_are_dead_and_teach_nothing(settings):
    out = run(settings, dead_spread=1e6, iterations=1, held_out=None)
    (row,) = rows(out / "metrics.jsonl")
    assert row["dead_groups"] == row["dead/jpeg_size.kilobytes"] == 1
    assert row["replay_forwards"] == 0


def test_a_ramp_moves_a_weight_over_the_run(settings):
    """Brightness counts at first, file size at the end; the reward is the sum with the weights of its iteration."""
    rewards = {"jpeg_size.kilobytes": {"start": 0, "end": 1}, "image_stats.brightness": {"start": 1, "end": 0}}
    results = rows(run(settings, rewards=rewards, iterations=3, held_out=None) / "metrics.jsonl")
    for share, row in zip((0, 0.5, 1), results, strict=True):
        parts = row["part/jpeg_size.kilobytes"], row["part/image_stats.brightness"]
        assert row["reward"] == pytest.approx(share * parts[0] + (1 - share) * parts[1], rel=1e-4)


def test_a_constraint_holds_by_a_multiplier_that_survives_an_interruption(settings, tmp_path):
    limit = {"image_stats.brightness": {"bound": 2.0, "rate": 0.5}}  # brightness is at most 1: it can only rise
    changed = dict(at_least=limit, held_out=None, checkpoint_every=1)
    out = run(settings, iterations=3, **changed)
    results = rows(out / "metrics.jsonl")
    key = "image_stats.brightness"
    assert results[0][f"multiplier/{key}"] == pytest.approx(0.5 * (2 - results[0][f"part/{key}"]))
    for before, row in pairwise(results):
        assert row[f"multiplier/{key}"] == pytest.approx(before[f"multiplier/{key}"] + 0.5 * (2 - row[f"part/{key}"]))
        expected = row["part/jpeg_size.kilobytes"] + before[f"multiplier/{key}"] * row[f"part/{key}"]
        assert row["reward"] == pytest.approx(expected, rel=1e-4)
    state = json.loads((out / "checkpoints/000003/state.json").read_text())
    assert state["multipliers"] == {key: results[-1][f"multiplier/{key}"]}
    for later in ("000002", "000003"):
        for file in (out / "checkpoints" / later).iterdir():
            file.unlink()
    run(settings, resume=True, iterations=3, **changed)
    assert rows(out / "metrics.jsonl")[-1][f"multiplier/{key}"] == results[-1][f"multiplier/{key}"]


GATE = {"type": "gate", "by": "jpeg_size.kilobytes"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(combine="mrn"), "combine: mrn needs advantage: {scale: none}"),
        (dict(combine="gdpo"), "combine: gdpo needs advantage: {scale: batch}"),
        (dict(combine="gate"), "gate: by: one of the rewards is needed"),
        (dict(combine={"type": "sum", "by": "jpeg_size.kilobytes"}), "combine: sum has no setting 'by'"),
        (dict(combine=GATE | {"by": "clip.cosine"}), "gate: by: one of the rewards is needed"),
        (dict(combine=GATE, reference="ref.json"), "combine: gate needs scores of at least 0"),
        (dict(combine="product", reference="ref.json"), "combine: product needs scores of at least 0"),
        (dict(combine=GATE), "jpeg_size.kilobytes may be as low as -inf"),
        (dict(combine="product"), "jpeg_size.kilobytes may be as low as -inf"),
        (dict(combine="product", at_least={"image_stats.brightness": {"bound": 1}}), "with combine: product it cannot"),
        (dict(at_least={"image_stats.brightness": {"bound": 1, "rate": 0}}), "at_least.image_stats.brightness.rate"),
        (dict(at_least={"image_stats.beauty": {"bound": 1}}), "no component 'beauty'"),
        (dict(rewards={"jpeg_size.kilobytes": {"start": 1}}), "rewards.jpeg_size.kilobytes"),
        (dict(rewards={"jpeg_size.kilobytes": {"start": 1, "end": 2, "over": "steps"}}), "linear.*cosine"),
    ],
)
def test_bad_combinations_are_refused_in_one_line(settings, change, says):
    with pytest.raises(BadInput, match=says) as error:
        run(settings, **change)
    assert "\n" not in str(error.value)


@pytest.fixture
def measured(settings, random_model, prompt_files, tmp_path):
    path = tmp_path / "reference.json"
    arguments = ["--model", random_model, "--prompts", prompt_files["held_out"], "--rewards", "jpeg_size"]
    result = CliRunner().invoke(app, ["evaluate", *arguments, "--steps", "2", "--reference", str(path)])
    assert result.exit_code == 0, result.output
    return path


def test_a_reference_is_measured_trained_with_and_bound_to_its_weights(settings, measured):
    record = json.loads(measured.read_text())
    item = record["components"]["jpeg_size.kilobytes"]
    out = run(settings, reference=str(measured), iterations=1, held_out=None)
    (row,) = rows(out / "metrics.jsonl")
    assert row["reward"] == pytest.approx((row["part/jpeg_size.kilobytes"] - item["mean"]) / item["std"], rel=1e-4)
    for what, changed in (
        ("jpeg_size", dict(scorers={"jpeg_size": {"quality": 50}})),
        ("image_stats", dict(rewards={"image_stats.brightness": 1.0})),
    ):
        with pytest.raises(BadInput, match=f"was measured with {what} .*measure it again"):
            setup.open_session(configs.build(settings | {"reference": str(measured)} | changed, "test"))
    measured.write_text(json.dumps(record | {"model": "another"}))
    with pytest.raises(BadInput, match="was measured with model another, this run has"):
        setup.open_session(configs.build(settings | {"reference": str(measured)}, "test"))
    item["std"] = 0.0
    measured.write_text(json.dumps(record))
    with pytest.raises(BadInput, match="does not vary"):
        setup.open_session(configs.build(settings | {"reference": str(measured)}, "test"))
    measured.write_text("{}")
    with pytest.raises(BadInput, match="not a file written by"):
        setup.open_session(configs.build(settings | {"reference": str(measured)}, "test"))


def test_the_reference_is_of_the_base_model(tmp_path):
    result = CliRunner().invoke(app, ["evaluate", "--adapter", "runs/x", "--reference", str(tmp_path / "r.json")])
    assert isinstance(result.exception, BadInput)
    assert "of the base model" in str(result.exception)
    assert references.ENOUGH == 500


@pytest.fixture(scope="module")
def experts_file(tmp_path_factory):
    """A mixture of the scorers of `TWO`, with gates that depend on the prompt."""
    path = tmp_path_factory.mktemp("experts") / "experts.safetensors"
    scorers = {name: load(name) for name in ("jpeg_size", "image_stats")}
    fit_experts(drawn_pairs(30), scorers, path, {name: [name] for name in TWO})
    mixture, about = mixtures.read(path)
    gates = torch.randn(mixture.gates.shape, generator=torch.Generator().manual_seed(0))
    mixtures.save(path, replace(mixture, gates=gates), about)
    return path


EQUAL = dict.fromkeys(TWO, 1.0)


def test_experts_weigh_each_prompt_by_its_text(experts_file):
    mixture, about = mixtures.read(experts_file)
    rule = Experts(str(experts_file)).opened([*TWO], about.scorers)
    texts = ["a red circle", "two squares"]
    owner = torch.tensor([0, 0, 1, 1])
    raw = torch.tensor([[-1.0, 0.2], [-1.2, 0.7], [-0.9, 0.4], [-1.1, 0.5]])
    parts = dict(zip(TWO, raw.T, strict=True))
    rule = rule.for_prompts([Prompt(text) for text in texts], 0, None)
    reward = Combination(EQUAL, rule)(parts, owner)
    embedding = torch.stack([rule.embeddings[text] for text in texts])
    gates = mixture.gate(embedding)
    assert (gates[0] - gates[1]).abs().max() > 0.01
    z = (raw - mixture.mean) / mixture.std
    torch.testing.assert_close(reward, mixture.log_scale.exp() * (gates[owner] * z).sum(1))
    turned = Combination(dict(reversed(EQUAL.items())), rule)(parts, owner)
    torch.testing.assert_close(turned, reward)
    parts["image_stats.brightness"] = torch.tensor([torch.nan, torch.nan, torch.nan, 0.5])
    reward = Combination(EQUAL, rule)(parts, owner)
    torch.testing.assert_close(reward[:2], mixture.log_scale.exp() * z[:2, 0])  # missing in the group: irrelevant
    assert reward.isnan().tolist() == [False, False, True, False]


def test_a_run_with_experts_resumes_to_the_bit_and_is_bound_to_its_file(settings, experts_file, tmp_path):
    changed = dict(rewards=EQUAL, combine={"type": "experts", "file": str(experts_file)}, checkpoint_every=1)
    changed |= dict(iterations=3, held_out=None)
    complete = run(settings, **changed, out=str(tmp_path / "complete"))
    with cut_off(2):
        run(settings, **changed)
    out = run(settings, resume=True, **changed)
    names = ("adapter.safetensors", "optimizer.safetensors")
    last = [[(folder / "checkpoints/000003" / name).read_bytes() for name in names] for folder in (complete, out)]
    assert last[0] == last[1]
    (row, *_) = rows(out / "metrics.jsonl")
    assert row["reward"] != pytest.approx(sum(row[f"part/{name}"] for name in TWO), abs=1e-3)
    mixture, about = mixtures.read(experts_file)
    other = tmp_path / "other.safetensors"
    mixtures.save(other, mixture, about.model_copy(update={"scorers": about.scorers | {"jpeg_size": "0" * 16}}))
    with pytest.raises(BadInput, match=r"was fitted with jpeg_size 0{16}, this run has \w{16}; fit it again"):
        run(settings, **changed | {"combine": {"type": "experts", "file": str(other)}}, out=str(tmp_path / "x"))
    before = experts_file.read_bytes()
    mixtures.save(experts_file, replace(mixture, gates=-mixture.gates), about)
    with pytest.raises(BadInput, match="experts"):
        run(settings, resume=True, **changed)
    experts_file.write_bytes(before)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(combine="experts"), "combine: experts: file: a file of"),
        (
            dict(rewards={"jpeg_size.kilobytes": 1.0}),
            "is for jpeg_size.kilobytes, .*; the rewards are jpeg_size.kilobytes$",
        ),
        (dict(rewards=TWO), "image_stats.brightness: combine: experts has weights of its file; give 1, got 2"),
        (dict(reference="ref.json"), "reference: it does not go with combine: experts: the scores are in the units"),
        (dict(at_least={"jpeg_size.kilobytes": {"bound": 1}}), "at_least: it does not go with combine: experts"),
        (dict(combine={"type": "experts", "file": "no.safetensors"}), "no.safetensors: No such file"),
    ],
)
def test_settings_that_experts_do_not_go_with_are_refused(settings, experts_file, change, says):
    combined = {"rewards": EQUAL, "combine": {"type": "experts", "file": str(experts_file)}}
    with pytest.raises(BadInput, match=says) as error:
        run(settings, **combined | change)
    assert "\n" not in str(error.value)


PLACES = """
from torch.nn import functional as F

from reward_models import Card, Scores


class Places:
    names, card = ("mean",), Card("places", has_map=True)

    def __call__(self, images, prompts):
        light = 2 * images.mean(1) - 1
        return Scores(self.names, light.mean((1, 2))[:, None], regions=F.adaptive_avg_pool2d(light, (6, 5)))
"""


def test_a_run_with_credit_by_place(settings, tmp_path, monkeypatch):
    (tmp_path / "own_places.py").write_text(PLACES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MMALIGN_ALLOW", "own_places")
    name = "own_places:Places"
    changed = dict(rewards={f"{name}.mean": 1.0}, region=name, advantage={"regional": 0.5}, iterations=2, held_out=None)
    weights = {"whole": 0.0, "regional": 0.5}
    for more in ({}, {"region_grid": [2, 4]}, {"advantage": weights, "region_grid": [1, 1]}):
        out = run(settings, **changed | more, out=f"{settings['out']}{len(more)}")
        assert rows(out / "metrics.jsonl")[0]["ratio/1"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(region="jpeg_size"), "jpeg_size has no map"),
        (dict(region="shapes"), "region: 'shapes' is not among the scorers of rewards: jpeg_size"),
        (dict(advantage={"regional": 0.5}), "advantage: whole and regional act only with region"),
        (dict(region="jpeg_size", region_grid=[0, 1]), "region_grid"),
    ],
)
def test_credit_by_place_needs_a_scorer_that_says_where(settings, change, says):
    with pytest.raises(BadInput, match=says):
        run(settings, **change)


POTENTIAL = Potential("one", "two")


@pytest.mark.parametrize(
    ("correct", "yes", "potential"), [(0, 0.5, 0), (0, 1, -1), (1, 0.5, 0.5), (1, 1, 1), (1, 0, 1), (0.5, 0.75, 0.125)]
)
def test_the_corners_of_the_potential(correct, yes, potential):
    values = torch.tensor([[yes, correct]]).float()
    result = POTENTIAL(values, ["two", "one"], torch.zeros(1, dtype=torch.long), torch.ones(2), 0.0)
    assert result.tolist() == [potential]


def test_differences_of_the_potential_add_up_to_that_of_the_ends():
    """Of the end less the start, whatever lies between."""
    tree = sampled(plans.complete(plans.sde(torch.linspace(1, 0, 5), FlowSde(0.7)), range(4)), 3).tree
    one, two = torch.rand(2, len(tree.owner), generator=torch.Generator().manual_seed(0))
    parts = {"one": one, "two": two}
    reward = tree.at_states(Combination({"one": 1.0, "two": 1.0}, POTENTIAL)(parts, tree.owner))
    total = gains(tree, Judgement(reward, {})).sum(1)
    torch.testing.assert_close(total, reward[:, -1] - reward[:, 0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("value", [-0.1, 1.2])
def test_a_potential_of_scores_outside_the_unit_interval_is_refused(value):
    parts = {"one": torch.tensor([0.5, value]), "two": torch.tensor([torch.nan, 0.5])}
    with pytest.raises(Failed, match=f"potential.*got {value:.3g}"):
        Combination({"one": 1.0, "two": 1.0}, POTENTIAL)(parts, torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize(
    ("rewards", "correct", "says"),
    [
        ({"shapes.strict": 1.0, "clip.cosine": 1.0}, "clip.cosine", "two components are needed"),
        ({"shapes.strict": 1.0}, "shapes.strict", "two components are needed"),
        ({"shapes.strict": 0.5, "clip.cosine": 1.0}, "shapes.strict", "give 1, got 0.5"),
    ],
)
def test_a_potential_needs_two_rewards(rewards, correct, says):
    combine = {"type": "potential", "correct": correct, "confidence": "clip.cosine"}
    with pytest.raises(BadInput, match=says):
        configs.build({"rewards": rewards, "combine": combine}, "test")
