"""The mixture of experts: closed forms, planted weights, the file and what is refused."""

import json
import math
from dataclasses import replace

import pytest
import torch
from drawn_pairs import drawn_pairs
from safetensors.torch import load, save

from reward_models import load as load_scorer
from reward_models.training.experts import check_scorers, flat, read
from reward_models.training.fitting_experts import (
    BY_PROMPT,
    FIXED,
    Examples,
    begun,
    both,
    fit_experts,
    gains,
    irrelevance,
    losses,
    lower,
)

NAMES = ["a.x", "b.x"]


def mixture(aspects, wide=3):
    count = len(aspects)
    return flat(torch.tensor(aspects), torch.zeros(wide), 1.0, torch.zeros(count), torch.ones(count))


def drawn(mixture, seed=0):
    """The same with random weights."""
    generator = torch.Generator().manual_seed(seed)
    random = {n: torch.randn(getattr(mixture, n).shape, generator=generator) for n in (*FIXED, *BY_PROMPT)}
    return replace(mixture, **random)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def all_present(values):
    return torch.ones(values.shape, dtype=torch.bool)


def test_weights_of_zero_are_equal_weights():
    values, embedding = normal(2, 5, 3)
    torch.testing.assert_close(mixture([0, 1, 2]).score(values, embedding, all_present(values)), values.mean(1))
    by_aspect = mixture([0, 0, 1]).score(values, embedding, all_present(values))
    torch.testing.assert_close(by_aspect, (values[:, :2].mean(1) + values[:, 2]) / 2)


def test_gates_and_weights_sum_to_1_and_a_missing_component_leaves_the_others_in_proportion():
    one, embedding = drawn(mixture([0, 0, 1, 2])), normal(6, 3)
    present = torch.ones(6, 4, dtype=torch.bool)
    full = one.weights(embedding, present)
    torch.testing.assert_close(one.gate(embedding).sum(1), torch.ones(6))
    torch.testing.assert_close(full.sum(1), torch.ones(6))
    present[:, 3] = False
    less = one.weights(embedding, present)
    torch.testing.assert_close(less, torch.where(present, full / full[:, :3].sum(1, keepdim=True), 0.0))
    present[:, 2:], present[:, 0] = True, False  # within an aspect the gate is unchanged
    less = one.weights(embedding, present)
    torch.testing.assert_close(less[:, 1], full[:, 0] + full[:, 1])
    torch.testing.assert_close(less[:, 2:], full[:, 2:])
    assert one.weights(embedding, ~all_present(full)).isnan().all()
    values = normal(6, 4, seed=1)
    values[:, 0] = torch.nan
    assert one.score(values, embedding, present).isfinite().all()
    assert one.score(values, embedding, all_present(values)).isnan().all()


def test_permuting_experts_permutes_gates():
    one, embedding, order = drawn(mixture([0, 1, 2])), normal(4, 3), [2, 0, 1]
    moved = replace(one, **{name: getattr(one, name)[order] for name in (*FIXED, *BY_PROMPT)})
    torch.testing.assert_close(moved.gate(embedding), one.gate(embedding)[:, order])
    values = normal(4, 3, seed=1)
    present = all_present(values)
    torch.testing.assert_close(moved.score(values[:, order], embedding, present), one.score(values, embedding, present))


def test_the_gradient_of_two_experts_is_the_closed_form():
    """With gates g and 1 - g and difference d, the gradient of the gate's logit is -(y - sigmoid(d)) g (1 - g) (z_1 -
    z_2), where z are the differences of the components."""
    one = drawn(mixture([0, 1]))
    a, b, embedding = normal(7, 2), normal(7, 2, seed=1), normal(7, 3, seed=2)
    preference = normal(7, seed=3).sigmoid()
    bias = one.gate_bias.clone().requires_grad_()
    losses(replace(one, gate_bias=bias), Examples(a, b, embedding, preference)).sum().backward()
    gate, lead = one.gate(embedding)[:, 0], a - b
    difference = gate * lead[:, 0] + (1 - gate) * lead[:, 1]
    expected = -(preference - difference.sigmoid()) * gate * (1 - gate) * (lead[:, 0] - lead[:, 1])
    torch.testing.assert_close(bias.grad, torch.stack([expected.sum(), -expected.sum()]))


def examples(count, logit, seed=0, wide=8):
    """Preferences by two experts whose gate has this logit, a function of the embedding of the prompt."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, count, 2, generator=generator)
    embedding = torch.nn.functional.normalize(torch.randn(count // 4, wide, generator=generator)).repeat(4, 1)
    gate = logit(embedding).sigmoid()
    lead = 4 * (gate * (a - b)[:, 0] + (1 - gate) * (a - b)[:, 1])
    return Examples(a, b, embedding, torch.bernoulli(lead.sigmoid(), generator=generator))


def test_planted_weights_by_prompt_are_recovered():
    def logit(embedding):
        return 12 * embedding[:, 0]

    train, new = examples(4000, logit), examples(400, logit, seed=1)
    start = begun(train, NAMES, NAMES)
    fixed, gated = both(start, train, 1e-3)
    prompts = new.embedding[:100]
    same = (gated.gate(prompts)[:, 0] > 0.5) == (logit(prompts) > 0)
    assert same.float().mean() >= 0.95
    assert losses(gated, new).mean() < losses(fixed, new).mean()
    prompt = torch.arange(1000).repeat(4).numpy()
    assert lower(gains(start, train, prompt, 1e-3, 0.0), prompt)


def test_preferences_that_do_not_depend_on_the_prompt_leave_the_gates_flat():
    def logit(embedding):
        return torch.full((len(embedding),), 0.8)

    train, new = examples(2000, logit), examples(400, logit, seed=1)
    start, prompt = begun(train, NAMES, NAMES), torch.arange(500).repeat(4).numpy()
    fixed, gated = both(start, train, 0.01)
    assert float(fixed.gate(new.embedding)[0, 0]) == pytest.approx(1 / (1 + math.exp(-0.8)), abs=0.04)
    assert gated.gate(new.embedding)[:, 0].std() < 0.05
    loose, tight = (both(start, train, decay)[1].gate(new.embedding)[:, 0].std() for decay in (1e-4, 1.0))
    assert tight < 0.1 * loose
    assert not lower(gains(start, train, prompt, 0.01, 0.0), prompt)


def test_the_scale_makes_log_odds():
    train = examples(4000, lambda embedding: torch.zeros(len(embedding)))
    fixed = both(begun(train, NAMES, NAMES), train, 0.01)[0]
    assert float(fixed.log_scale.exp()) == pytest.approx(4, rel=0.15)


def test_irrelevant_components_are_penalised_where_both_images_lack_them():
    one = drawn(mixture([0, 1]))
    a, embedding = normal(3, 2), normal(3, 3, seed=1)
    a[0, 1] = torch.nan
    gate = one.gate(embedding[:1])[0, 1]
    expected = -torch.log(1 - gate) / 3
    torch.testing.assert_close(irrelevance(one, Examples(a, a, embedding, torch.ones(3))), expected)


# ------------------------------------------------------------------------------------------------------------ the file


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("experts") / "experts.safetensors"
    scorers = {name: load_scorer(name) for name in ("clip", "image_stats")}
    aspects = {"text": ["clip.cosine"], "look": ["image_stats.brightness", "image_stats.contrast"]}
    return path, fit_experts(drawn_pairs(40), scorers, path, aspects), scorers


def test_a_file_is_read_as_it_was_written(written):
    path, about, scorers = written
    mixture, same = read(path)
    assert same.model_dump() == about
    assert about["components"] == ["clip.cosine", "image_stats.brightness", "image_stats.contrast"]
    assert mixture.aspect.tolist() == [0, 1, 1]
    assert sum(about["made"]["fixed_weights"].values()) == pytest.approx(1)
    if about["made"]["written"] == "fixed":
        assert not mixture.gates.any()
    check_scorers(path, same, {name: scorer.card.version for name, scorer in scorers.items()})
    with pytest.raises(ValueError, match=r"was fitted with clip .*, this run has 0; fit it again"):
        check_scorers(path, same, {"clip": "0", "image_stats": same.scorers["image_stats"]})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kind": "other"}, "kind: Input should be"),
        ({"aspects": ["x"]}, "each component needs one aspect"),
        ({"aspects": ["x", "y", "x"]}, "the numbers of the aspects"),
        ({"components": ["a", "a", "b"]}, "to be there once"),
        ({"base": {"model": 1}}, "base.model: Input should be a valid string"),
    ],
)
def test_a_header_that_does_not_fit_is_refused_in_one_line(written, tmp_path, change, says):
    path, about, _ = written
    tensors = load(path.read_bytes())
    (tmp_path / "bad").write_bytes(save(tensors, {"experts": json.dumps(about | change)}))
    with pytest.raises(ValueError, match=says) as error:
        read(tmp_path / "bad")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"std": torch.zeros(3)}, "must be above 0"),
        ({"gates": torch.zeros(2, 5)}, r"gates must be \[2, "),
        ({"mean": torch.full((3,), torch.nan)}, "mean must be .* finite"),
        ({"more": torch.zeros(1)}, "its tensors are"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_in_one_line(written, tmp_path, change, says):
    path, about, _ = written
    tensors = load(path.read_bytes()) | change
    (tmp_path / "bad").write_bytes(save(tensors, {"experts": json.dumps(about)}))
    with pytest.raises(ValueError, match=says):
        read(tmp_path / "bad")
    (tmp_path / "bad").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match="not safetensors"):
        read(tmp_path / "bad")


def test_what_cannot_be_fitted_is_refused(written, tmp_path):
    scorers = written[2]
    pairs = drawn_pairs(6)
    for aspects, says in (
        ({"x": ["clip.beauty", "clip.cosine"]}, r"no component 'clip\.beauty'; the scorers give clip\.cosine"),
        ({"x": ["clip.cosine"]}, "at least 2 components"),
        ({"x": ["clip.cosine"], "y": ["clip.cosine"]}, "each once"),
    ):
        with pytest.raises(ValueError, match=says):
            fit_experts(pairs, scorers, tmp_path / "x", aspects)
    same = [replace(pair, b=pairs[0].a, a=pairs[0].a) for pair in pairs]
    with pytest.raises(ValueError, match=r"image_stats\.\w+ is the same for all images"):
        fit_experts(same, {"image_stats": scorers["image_stats"]}, tmp_path / "x")
