"""Reward models fitted to pairs of drawings: what is learnt, what is written, what is refused."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_pairs import drawn_pairs
from safetensors.torch import load_file
from tiny_scorers import open_clip_folder

from reward_models import files, load
from reward_models.files import parsed
from reward_models.training import FITS, base as bases, data, evaluate, finetuning, fit, heads
from reward_models.training.clip_head import ClipHead
from reward_models.training.clip_towers import ClipTowers, Towers
from reward_models.training.finetuning import Training, Weighed
from reward_models.training.folder import Workplace
from reward_models.training.heads import Examples
from reward_models.training.losses import LOSSES
from reward_models.types import Prompt


@pytest.fixture(scope="module")
def pairs():
    return drawn_pairs(60)


@pytest.fixture(scope="module")
def fitted(pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitted") / "head"
    return folder, fit(pairs, folder, epochs=8)


def differences(folder, pairs, **settings):
    scorer = load("fitted", folder=str(folder), **settings)
    sides = [
        torch.cat([scorer(side.read(), [pair.prompt]).values for side, pair in zip(sides, pairs, strict=True)])
        for sides in zip(*((pair.a, pair.b) for pair in pairs), strict=True)
    ]
    return sides[0] - sides[1]


# ------------------------------------------------------------------------------------------------------ known answers


def test_two_features_have_the_logistic_solution():
    """With features (1, 0) and (0, 1) for the images of a pair, and a preferred in 3 of 4 pairs, log-odds are log 3."""
    eye = torch.eye(2)
    one = torch.ones(4)
    examples = Examples(eye[:1].repeat(4, 1), eye[1:].repeat(4, 1), torch.tensor([1.0, 1, 1, 0]), 0 * one, one[None])
    training = heads.Training(ClipHead(weight_decay=0.0), examples, examples, 1, torch.Generator())
    training.run(0, data.silent)
    weights = training.weights()
    scores = eye @ weights["layers.0.weight"][0] + weights["layers.0.bias"]
    assert float(scores[0] - scores[1]) == pytest.approx(math.log(3), abs=1e-3)
    assert float(scores.sum()) == pytest.approx(0, abs=1e-5)


def test_a_tie_width_is_learnt():
    """Half of the pairs of equal images are ties: Davidson's width is 2, Rao and Kupper's log 3."""
    features, one = torch.zeros(4, 2), torch.ones(4)
    examples = Examples(features, features, torch.tensor([1.0, 0, 0.5, 0.5]), 0 * one, one[None])
    for loss, width in (("davidson", 2.0), ("rao_kupper", math.log(3))):
        training = heads.Training(ClipHead(loss=loss, weight_decay=0.0), examples, examples, 1, torch.Generator())
        training.run(0, data.silent)
        assert training.log_width.exp().item() == pytest.approx(width, rel=1e-2)


def test_typed_heads_learn_from_the_pairs_of_their_aspect_alone():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 40, 3, generator=generator)
    by_aspect = torch.arange(40) < 20
    preference = torch.where(by_aspect, (a - b)[:, 0] > 0, (a - b)[:, 1] > 0).float()
    weights = torch.stack([torch.ones(40), by_aspect.float(), (~by_aspect).float()])

    def trained(preference):
        examples = Examples(a, b, preference, torch.zeros(40), weights)
        training = heads.Training(ClipHead(), examples, examples, 3, torch.Generator())
        training.run(0, data.silent)
        return training.weights()["layers.0.weight"]

    one = trained(preference)
    assert one[1].abs().argmax() == 0
    assert one[2].abs().argmax() == 1
    other = trained(torch.where(by_aspect, preference, 1 - preference))  # pairs of the second aspect, turned round
    torch.testing.assert_close(other[1].sign(), one[1].sign())
    torch.testing.assert_close(other[2], -one[2], rtol=0.1, atol=0.05)


# ----------------------------------------------------------------------------------------------------------- the data


def test_no_meaning_of_a_prompt_is_in_two_parts():
    texts = ["a circle and a square", "A square and a circle", "a cross", "the cross", "x", "y", "z", "x"]
    pairs = [replace(pair, prompt=Prompt(text)) for pair, text in zip(drawn_pairs(8), texts, strict=True)]
    number = dict(zip(texts, data.cluster(pairs).tolist(), strict=True))
    for seed in range(5):
        parts = data.split(pairs, 0.5, seed)
        sets = [{number[pair.prompt.text] for pair in part} for part in vars(parts).values()]
        assert all(sets)
        assert sum(map(len, sets)) == len(set.union(*sets)) == 5
        assert data.split(pairs[::-1], 0.5, seed).test == parts.test[::-1]
    assert len({tuple(p.prompt.text for p in data.split(pairs, 0.5, seed).test) for seed in range(5)}) > 1


def test_a_bootstrap_draws_prompts():
    prompts = np.repeat(np.arange(50), 3)
    times = data.bootstrap(prompts, 0, 1).view(50, 3)
    assert times[:, 0].sum() == 50
    assert (times == times[:, :1]).all()
    assert not torch.equal(times.flatten(), data.bootstrap(prompts, 0, 2))


def test_the_digest_is_that_of_the_content(pairs):
    digest = data.digest(pairs)
    assert data.digest(pairs[::-1]) == digest
    assert data.digest([replace(pairs[0], preference=0.5), *pairs[1:]]) != digest
    assert data.digest([replace(pairs[0], a=pairs[1].a), *pairs[1:]]) != digest


# ------------------------------------------------------------------------------------------------ what is written, read


def test_a_head_learns_and_scores_like_any_scorer(fitted, pairs):
    folder, card = fitted
    assert card["accuracy"]["train"]["accuracy"]["mean"] > 0.9
    assert sum(card["prompts"].values()) == len(set(data.cluster(pairs).tolist()))
    assert card == parsed((folder / "card.json").read_text())
    new = evaluate(drawn_pairs(60, seed=1), {"fitted": load("fitted", folder=str(folder))})
    assert new["rewards"]["fitted.score"]["accuracy"]["low"] > 0.8
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}


def test_the_same_pairs_give_the_same_weights(fitted, pairs, tmp_path):
    fit(pairs, tmp_path / "again", epochs=8)
    names = ("weights.safetensors", "config.json", "card.json", "curves.json")
    assert all((tmp_path / "again" / name).read_bytes() == (fitted[0] / name).read_bytes() for name in names)


def test_scores_differ_in_sign_when_the_sides_are_exchanged(fitted, pairs):
    turned = [replace(pair, a=pair.b, b=pair.a) for pair in pairs[:4]]
    torch.testing.assert_close(differences(fitted[0], turned), -differences(fitted[0], pairs[:4]))


def test_an_ensemble_has_the_spread_of_its_members(pairs, tmp_path):
    fit(pairs, tmp_path / "m", members=3, hidden=4, loss="thurstone", epochs=2)
    scorer = load("fitted", folder=str(tmp_path / "m"))
    assert scorer.names == ("score", "sigma", "spread")
    values = scorer(pairs[0].a.read(), [pairs[0].prompt])
    each = []
    heads = scorer.model.heads
    for head in heads:
        scorer.model.heads, scorer.model.members, scorer.names = [head], 1, ("score", "sigma")
        each.append(scorer(pairs[0].a.read(), [pairs[0].prompt]).values[0, 0])
    assert float(values.column("score")) == pytest.approx(float(torch.stack(each).mean()), abs=1e-5)
    assert float(values.column("spread")) == pytest.approx(float(torch.stack(each).std(correction=0)), abs=1e-5)
    assert values.column("sigma") > 0


def test_typed_pairs_give_a_component_for_each_aspect(tmp_path):
    pairs = drawn_pairs(30) + drawn_pairs(30, 2, "object") + drawn_pairs(30, 3, "count")
    fit(pairs, tmp_path / "typed", typed=True, epochs=2)
    assert load("fitted", folder=str(tmp_path / "typed")).names == ("score", "object", "count")


def test_a_base_in_a_folder_is_named_by_the_user(pairs, tmp_path):
    base = str(open_clip_folder(tmp_path / "base"))
    fit(pairs[:20], tmp_path / "head", base=base, epochs=1)
    assert load("fitted", folder=str(tmp_path / "head"), base=base).names == ("score",)
    with pytest.raises(ValueError, match=r"'base'.*give its folder as `base`"):
        load("fitted", folder=str(tmp_path / "head"))
    with pytest.raises(ValueError, match=r"the hash .* the embedded CLIP"):
        load("fitted", folder=str(tmp_path / "head"), base="")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kind": "other"}, "does not describe"),
        ({"format": 2}, "format 2; 1 is read"),
        ({"loss": ["x"]}, "loss .* is not one of"),
        ({"members": 10**9}, "members must be from 0"),
        ({"members": 2}, "1.layers.0.weight must be .* is missing"),
        ({"hidden": 7}, r"0.layers.0.weight must be \[7, 193\].* is \[1, 193\]"),
        ({"components": ["score", "spread"]}, "components must begin"),
        ({"base": {"model": "~/x", "pretrained": "", "checkpoint": ""}}, "give its folder as `base`"),
        ({"base": {"model": "", "pretrained": "", "checkpoint": "0" * 64}}, "a base with the hash 000000000000"),
        ({"weights": "0" * 64}, "its weights have the hash"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_in_one_line(fitted, tmp_path, change, says):
    for path in fitted[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = parsed((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=says) as error:
        load("fitted", folder=str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"method": "boosting"}, "no fit called 'boosting'; there are clip_head, clip, vlm_head, vlm"),
        ({"hiden": 3}, "no setting 'hiden'; it takes base"),
        ({"hidden": -1}, "hidden: Input should be greater than or equal to 0"),
        ({"loss": "hinge"}, "loss: Input should be 'bradley_terry'"),
        ({"held_out": 1.0}, "held_out 1.0"),
        ({"base": "hf-hub:a/b"}, "the name of a folder"),
        ({"method": "clip", "learning_rate": 1e30}, "not finite after epoch 1"),
    ],
)
def test_a_setting_that_cannot_be_used_is_refused_in_one_line(pairs, tmp_path, settings, says):
    with pytest.raises(ValueError, match=says):
        fit(pairs[:10], tmp_path / "out", **settings)


def test_pairs_that_cannot_be_used_are_refused(pairs, fitted, tmp_path):
    for change, says in (
        ({"preference": 1.5}, "pair 1: the preference 1.5"),
        ({"prompt": None}, "pair 1 has no prompt"),
        ({"gap": -1.0}, "pair 1: the gap -1.0"),
        ({"a": replace(pairs[0].a, data=b"no picture")}, "0 right: "),
    ):
        with pytest.raises(ValueError, match=says):
            fit([replace(pairs[0], **change), *pairs[1:]], tmp_path / "bad")
    with pytest.raises(ValueError, match="pairs of 1 prompts; 3 are needed"):
        fit(pairs[:1], tmp_path / "few")
    with pytest.raises(ValueError, match="a fitted model is there already"):
        fit(pairs, fitted[0])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"notes\.txt is there"):
        fit(pairs, tmp_path / "mine")
    (tmp_path / "numbers/0").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"0 is there, which is not a fitted model's"):
        fit(pairs, tmp_path / "numbers")


def test_a_fit_that_is_cut_off_in_any_of_its_writes_can_be_repeated(pairs, tmp_path, monkeypatch):
    whole = fit(pairs[:12], tmp_path / "whole", epochs=2)
    writes = []

    def cut_off(path, data):
        path.write_bytes(data[: len(data) // 2])
        if path.name not in writes:
            writes.append(path.name)
            raise KeyboardInterrupt
        path.write_bytes(data)

    with monkeypatch.context() as patch:
        patch.setattr(files, "put", cut_off)
        for _ in range(5):
            with pytest.raises(KeyboardInterrupt):
                fit(pairs[:12], tmp_path / "parts", epochs=2)
    assert ".card.json.partial" in writes
    assert fit(pairs[:12], tmp_path / "parts", epochs=2) == whole


# --------------------------------------------------------------------------------------------------------- fine-tuning


class Interrupted(Exception):
    pass


def test_fine_tuned_towers_resume_to_the_bit_and_open_in_open_clip(pairs, tmp_path):
    settings = {"method": "clip", "epochs": 3, "learning_rate": 3e-4, "patience": 3}
    fit(pairs[:24], tmp_path / "whole", **settings)

    def interrupting(rows, done, total, name, unit):
        if name.startswith("epoch 3"):
            raise Interrupted
        return rows

    with pytest.raises(Interrupted):
        fit(pairs[:24], tmp_path / "parts", progress=interrupting, **settings)
    with pytest.raises(ValueError, match=r"does not|No such file"):
        load("fitted", folder=str(tmp_path / "parts"))
    with pytest.raises(ValueError, match="an interrupted training with other pairs or settings"):
        fit(pairs[:24], tmp_path / "parts", **settings | {"epochs": 4})
    fit(pairs[:24], tmp_path / "parts", **settings)
    whole, parts = ({path.name: path.read_bytes() for path in (tmp_path / n).iterdir()} for n in ("whole", "parts"))
    assert whole == parts
    cosine, logit = load("clip", model=str(tmp_path / "whole")), load("fitted", folder=str(tmp_path / "whole"))
    picture, prompts = pairs[0].a.read(), [pairs[0].prompt]
    scale = cosine.model.logit_scale.exp().item()
    torch.testing.assert_close(logit(picture, prompts).values, scale * cosine(picture, prompts).values)


def test_members_are_models_whose_mean_is_the_score(pairs, tmp_path):
    settings = {"method": "clip", "epochs": 1, "members": 3, "bootstrap": True, "average": 0.5, "learning_rate": 1e-3}
    fit(pairs[:24], tmp_path / "whole", **settings)

    def interrupting(rows, done, total, name, unit):
        if name.endswith("member 3 of 3"):
            raise Interrupted
        return rows

    with pytest.raises(Interrupted):
        fit(pairs[:24], tmp_path / "parts", progress=interrupting, **settings)
    fit(pairs[:24], tmp_path / "parts", **settings)
    whole, parts = (
        {path.relative_to(tmp_path / n): path.read_bytes() for path in (tmp_path / n).rglob("*") if path.is_file()}
        for n in ("whole", "parts")
    )
    assert whole == parts
    scorer = load("fitted", folder=str(tmp_path / "whole"))
    assert scorer.names == ("score", "spread")
    picture, prompts = pairs[0].a.read(), [pairs[0].prompt]
    members = [load("clip", model=str(tmp_path / "whole" / str(member))) for member in range(3)]
    scores = [clip.model.logit_scale.exp() * clip(picture, prompts).values[0, 0] for clip in members]
    each = torch.stack(scores).detach()
    assert len({*each.tolist()}) == 3
    values = scorer(picture, prompts)
    assert float(values.column("score")) == pytest.approx(each.mean().item(), abs=1e-4)
    assert float(values.column("spread")) == pytest.approx(each.std(correction=0).item(), abs=1e-4)
    (tmp_path / "whole/2/open_clip_model.safetensors").write_bytes(whole[Path("1/open_clip_model.safetensors")])
    with pytest.raises(ValueError, match="its weights have the hash"):
        load("fitted", folder=str(tmp_path / "whole"))


def test_the_average_is_that_of_the_steps(pairs, tmp_path):
    """With a share of 0.5, and two steps after the start: start / 4 + first / 4 + second / 2."""
    base = bases.opened("", "", "cpu", 8)
    network = Towers(ClipTowers(rescale=False), base, 0)
    training = Training(ClipTowers(average=0.5, batch=4), network, ["score"], Workplace(tmp_path, ""))
    training.begin(pairs[:8], 0)
    weighed = Weighed(pairs[:4], torch.ones(1, 4))
    states = [training.state()]
    for _ in range(2):
        training.step(weighed)
        states.append(training.state())
    for name in ("logit_scale", "text_projection"):
        start, first, second = (state[name] for state in states)
        assert not torch.equal(first, second)
        torch.testing.assert_close(training.average[name], start / 4 + first / 4 + second / 2)


def test_typed_towers_have_a_weighted_cosine_for_each_aspect(tmp_path):
    pairs = drawn_pairs(24) + drawn_pairs(12, 2, "count")
    fit(pairs, tmp_path / "typed", "clip", typed=True, epochs=1, learning_rate=1e-3)
    scorer = load("fitted", folder=str(tmp_path / "typed"))
    assert scorer.names == ("score", "count")
    clip, picture, prompts = load("clip", model=str(tmp_path / "typed")), pairs[0].a.read(), [pairs[0].prompt]
    weights = 1 + 30 * load_file(tmp_path / "typed/weights.safetensors")["aspects"][0]
    assert not torch.equal(weights, torch.ones_like(weights))
    image = clip.model.encode_image(clip.prepared(picture), normalize=True)[0]
    text = clip.model.encode_text(clip.tokenizer([prompts[0].text]), normalize=True)[0]
    scale = clip.model.logit_scale.exp()
    known = torch.stack([scale * image @ text, scale * (weights * image) @ text])
    torch.testing.assert_close(scorer(picture, prompts).values[0], known)


def test_aspects_train_nothing_but_their_component(tmp_path):
    """In a batch whose pairs all have an aspect, the overall score has no pairs, since others have none."""
    pairs = drawn_pairs(8) + drawn_pairs(8, 2, "count")
    weighed = finetuning._weighed(pairs, ["score", "count"])
    batches = [*weighed.shuffled(4, 0)]
    assert sum(len(some.pairs) for some in batches) == 16
    for some in batches:
        aspects = torch.tensor([pair.aspect == "count" for pair in some.pairs]).float()
        assert torch.equal(some.weights, torch.stack([1 - aspects, aspects]))


def test_a_rate_of_nearly_zero_leaves_the_cosines(pairs, tmp_path):
    fit(pairs[:12], tmp_path / "same", "clip", epochs=1, learning_rate=1e-12)
    picture, prompts = pairs[0].a.read(), [pairs[0].prompt]
    torch.testing.assert_close(
        load("clip", model=str(tmp_path / "same"))(picture, prompts).values, load("clip")(picture, prompts).values
    )


def test_the_image_tower_can_be_trained_alone(pairs, tmp_path):
    fit(pairs[:12], tmp_path / "image", "clip", epochs=1, towers="image")
    before, after = (load("clip", **settings).model for settings in ({}, {"model": str(tmp_path / "image")}))
    first, last = before.state_dict(), after.state_dict()
    changed = {name.partition(".")[0] for name in first if not torch.equal(first[name], last[name])}
    assert changed == {"visual", "logit_scale"}


def test_every_fit_and_loss_is_listed_under_its_name():
    assert all(FITS[name].type == name for name in FITS)
    assert {*LOSSES} == {"bradley_terry", "rao_kupper", "davidson", "thurstone"}
