"""Heads and LoRA on a tiny random Qwen2-VL, fitted to pairs of drawings."""

import json
from dataclasses import replace

import pytest
import torch
from drawn_pairs import drawn_pairs
from safetensors.torch import load_file, save_file
from tiny_vlm import folder_of

from reward_models import load
from reward_models.files import parsed
from reward_models.training import data, fit, folder as folders, lora
from reward_models.training.curves import accuracy
from reward_models.training.data import Split
from reward_models.training.folder import Workplace
from reward_models.training.vlm import Vlm
from reward_models.training.vlm_base import Base, Reading
from reward_models.training.vlm_head import VlmHead, encode
from reward_models.types import Prompt

SMALL = {"epochs": 2, "rank": 2, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(folder_of(tmp_path_factory.mktemp("base") / "qwen"))


@pytest.fixture(scope="module")
def pairs():
    return drawn_pairs(10)


@pytest.fixture(scope="module")
def fitted(base, pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitted") / "vlm"
    return folder, fit(pairs, folder, "vlm", base=base, hidden=3, **SMALL)


def scored(scorer, pairs):
    """The values of both sides of each pair, [N, 2, K]."""
    rows = [[scorer(side.read(), [pair.prompt]).values[0] for side in (pair.a, pair.b)] for pair in pairs]
    return torch.stack([torch.stack(row) for row in rows])


def test_it_learns_eight_pairs_by_heart(base, tmp_path):
    pairs = drawn_pairs(8)
    method = Vlm(base=base, rank=4, learning_rate=1e-2, epochs=16, patience=16)
    model = method(Split(pairs, pairs, pairs), Workplace(tmp_path, ""), "cpu", 0, data.silent)
    folders.write(tmp_path, "vlm", model)
    values = scored(load("fitted", folder=str(tmp_path), base=base), pairs)
    assert accuracy(values[:, 0, 0] - values[:, 1, 0], data.preferences(pairs)) == 1


def test_it_scores_like_any_scorer(fitted, base, pairs):
    folder, card = fitted
    scorer = load("fitted", folder=str(folder), base=base)
    assert scorer.names == ("score", "sigma")
    assert scorer.card.settings["pool"] == "last"
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    assert sum(card["prompts"].values()) == 10
    assert not any("visual" in name for name in load_file(folder / "weights.safetensors"))
    values = scored(scorer, pairs[:2])
    one = scorer.preferred(values[:, 0], values[:, 1])
    mu, sigma = values[..., 0], values[..., 1]
    known = torch.special.ndtr((mu[:, 0] - mu[:, 1]) / sigma.square().sum(1).sqrt())
    torch.testing.assert_close(one, known)
    equal = torch.stack([mu, torch.ones_like(mu)], -1)
    assert ((scorer.preferred(equal[:, 0], equal[:, 1]) > 0.5) == (mu[:, 0] > mu[:, 1])).all()


def test_a_batch_scores_as_its_rows_do(fitted, base, pairs):
    """Rows of one batch are padded to the longest; what pads them changes no score."""
    scorer = load("fitted", folder=str(fitted[0]), base=base)
    images = torch.cat([pair.a.read() for pair in pairs[:3]])
    prompts = [Prompt("a"), Prompt("a long text " * 5), pairs[2].prompt]
    together = scorer(images, prompts).values
    apart = torch.cat([scorer(images[i : i + 1], [prompts[i]]).values for i in range(3)])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)
    means = Base(base, Reading(pool="mean"), "cpu")
    texts = [prompt.text for prompt in prompts]
    with torch.no_grad():
        apart = torch.cat([means.features([images[i]], [texts[i]]) for i in range(3)])
        torch.testing.assert_close(means.features([*images], texts), apart, atol=1e-5, rtol=1e-5)


class Interrupted(Exception):
    pass


def interrupting(start):
    def progress(rows, done, total, name, unit):
        if name.startswith(start):
            raise Interrupted
        return rows

    return progress


def test_a_training_that_is_interrupted_twice_continues_to_the_bit(base, pairs, tmp_path):
    settings = {"base": base, "members": 2, "average": 0.5, "loss": "davidson", **SMALL}
    fit(pairs, tmp_path / "whole", "vlm", **settings)
    for at in ("epoch 2 of at most 2 of member 1", "epoch 1 of at most 2 of member 2"):
        with pytest.raises(Interrupted):
            fit(pairs, tmp_path / "parts", "vlm", progress=interrupting(at), **settings)
    fit(pairs, tmp_path / "parts", "vlm", **settings)
    whole, parts = (
        {path.relative_to(tmp_path / n): path.read_bytes() for path in (tmp_path / n).rglob("*") if path.is_file()}
        for n in ("whole", "parts")
    )
    assert whole == parts
    one, other = (load_file(tmp_path / "whole" / n / "weights.safetensors") for n in "01")
    assert any(not torch.equal(one[name], other[name]) for name in one)
    scorer = load("fitted", folder=str(tmp_path / "whole"), base=base)
    outputs = scorer.model.outputs(pairs[0].a.read(), [pairs[0].prompt.text])[:, 0, 0]
    values = scorer(pairs[0].a.read(), [pairs[0].prompt])
    assert float(values.column("score")) == pytest.approx(float(outputs.mean()), abs=1e-6)
    assert float(values.column("spread")) == pytest.approx(float(outputs.std(correction=0)), abs=1e-6)


def test_a_rate_of_nearly_zero_leaves_the_hidden_states(base, pairs, tmp_path):
    fit(pairs, tmp_path / "same", "vlm", base=base, epochs=1, learning_rate=1e-12)
    adapted = load("fitted", folder=str(tmp_path / "same"), base=base).model.base
    picture, text = pairs[0].a.read(), [pairs[0].prompt.text]
    untouched = Base(base, Reading(), "cpu")
    with torch.no_grad():
        torch.testing.assert_close(adapted.features([*picture], text), untouched.features([*picture], text))


def test_the_vision_tower_is_trained_where_asked(base, pairs, tmp_path):
    fit(pairs, tmp_path / "vision", "vlm", base=base, vision=True, **SMALL)
    moved = {name for name, value in load_file(tmp_path / "vision/weights.safetensors").items() if value.any()}
    assert any(".visual.blocks." in name and name.endswith(".B") for name in moved)
    model = Base(base, Reading(), "cpu").model
    language, both = (lora.layers_of(model, ["q_proj"], vision) for vision in (False, True))
    assert language == [f"model.language_model.layers.{k}.self_attn.q_proj" for k in (0, 1)]
    assert all(".visual." in name for name in both[2:])
    assert len(both) > 2
    with pytest.raises(ValueError, match=r"'query' is not a linear layer .* down_proj, "):
        lora.layers_of(model, ["query"], False)


def test_a_linear_head_is_linear_in_features_that_are_read_once(base, tmp_path):
    pairs = drawn_pairs(8)
    method = VlmHead(base=base, weight_decay=1e-4, pool="mean", epochs=20)
    model = method(Split(pairs, pairs, pairs), Workplace(tmp_path, ""), "cpu", 0, data.silent)
    folders.write(tmp_path, "vlm_head", model)
    values = scored(load("fitted", folder=str(tmp_path), base=base), pairs)[..., 0]
    assert accuracy(values[:, 0] - values[:, 1], data.preferences(pairs)) == 1
    weights = load_file(tmp_path / "weights.safetensors")
    reader, rows = Base(base, Reading(pool="mean"), "cpu"), []
    features = reader.features
    reader.features = lambda pictures, texts: rows.append(len(texts)) or features(pictures, texts)
    both = [*pairs, *(replace(pair, a=pair.b, b=pair.a) for pair in pairs)]
    a, b = encode(reader, both, 7, data.silent)
    assert rows == [7, 7, 2]
    assert torch.equal(a[:8], b[8:])
    known = a @ weights["0.layers.0.weight"][0] + weights["0.layers.0.bias"]
    torch.testing.assert_close(values.T.flatten(), known, atol=1e-4, rtol=1e-4)


def test_an_ensemble_of_heads_has_a_spread(base, pairs, tmp_path):
    fit(pairs, tmp_path / "heads", "vlm_head", base=base, members=2, hidden=4, loss="thurstone", epochs=2)
    assert load("fitted", folder=str(tmp_path / "heads"), base=base).names == ("score", "sigma", "spread")


def test_the_base_is_given_by_the_user_and_has_the_hash(fitted, base, tmp_path):
    with pytest.raises(ValueError, match=r"the base is 'qwen'; give its folder or hub id as `base`"):
        load("fitted", folder=str(fitted[0]))
    other = folder_of(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"trained on a base with the hash .* other has"):
        load("fitted", folder=str(fitted[0]), base=str(other))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"reading": None}, "reading: .*Input should be"),
        ({"reading": {"pixels": -1}}, "reading: pixels"),
        ({"reading": {"instruction": "x"}}, "has no {prompt}"),
        ({"hidden": 0}, r"head.layers.0.weight must be \[2, 16\]"),
        ({"fit": "other"}, "fit 'other' is not one of clip_head"),
        ({"fit": "vlm_head"}, "0.layers.0.weight must be"),
        ({"members": 2}, "No such file|not found|does not exist"),
        ({"weights": "0" * 64}, "its weights have the hash"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_in_one_line(fitted, base, tmp_path, change, says):
    for path in fitted[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = parsed((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=says) as error:
        load("fitted", folder=str(tmp_path), base=base)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("adapter.lm_head.bias.A", torch.zeros(2, 16), "no linear layer 'lm_head.bias'"),
        ("adapter.model.language_model.layers.0.self_attn.q_proj.B", torch.zeros(16, 3), r"must be \[16, 2\]"),
        ("other", torch.zeros(2), "1 unknown tensors, e.g. other"),
        ("adapter.a.A", torch.zeros(2000, 1), "no adapter of a rank from 1 to 1024"),
    ],
)
def test_weights_that_do_not_fit_are_refused(fitted, base, tmp_path, name, value, says):
    for path in fitted[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "weights.safetensors") | {name: value}
    save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=says):
        load("fitted", folder=str(tmp_path), base=base)


def test_settings_that_cannot_be_used_are_refused(base, pairs, tmp_path):
    for settings, says in (
        ({}, "base is needed"),
        ({"base": base, "instruction": "good?"}, "instruction 'good"),
        ({"base": base, "targets": ["conv"]}, "targets: 'conv'"),
        ({"base": "assets/tiny_clip"}, "tiny_clip could not be loaded"),
        ({"base": base, "learning_rate": 1e30}, "not finite after epoch 1"),
    ):
        with pytest.raises(ValueError, match=says):
            fit(pairs, tmp_path / "out", "vlm", **settings)
