"""Tests of the head that tells pictures from corruptions of them, and of the scorer `natural`."""

import json

import numpy as np
import pytest
import torch
from command_line import mmalign
from scipy.stats import rankdata

from reward_models import Prompt, load
from reward_models.images import to_pil
from reward_models.shapes_world import draw, requests
from reward_models.training import natural


def pictures(count: int, seed: int = 0) -> list[torch.Tensor]:
    rng, every = np.random.default_rng(seed), requests()
    wants = [every[i] for i in rng.integers(len(every), size=count)]
    return [torch.from_numpy(draw(want, rng))[None] for want in wants]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("natural") / "head"
    bad = [1 - picture for picture in pictures(24, seed=7)]
    return folder, natural.train(pictures(160), folder, bad, natural.Settings(steps=150))


def test_noise_textures_and_blanks_are_told_from_new_pictures(trained):
    card = trained[1]
    assert card == json.loads((trained[0] / "card.json").read_text())
    assert list(card["auc"]) == [*natural.CORRUPTIONS, "bad"]
    for kind in ("noisy", "speckled", "textured", "blank", "bad"):
        assert card["auc"][kind] > 0.9, kind
    assert card["auc_if_new"]["noisy"] > 0.8
    assert all(0 <= value <= 1 for value in card["auc_if_new"].values())


def test_the_scorer_puts_pictures_above_blanks_and_noise(trained):
    scorer = load("natural", folder=str(trained[0]))
    fine = torch.cat(pictures(20, seed=1))
    noise = torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    scores = scorer(torch.cat([fine, noise, torch.full_like(fine, 0.5)]), [Prompt("any")] * 60).column("natural")
    assert scores[:20].mean() > 0.5
    assert scores[20:].max() < 0.1


def test_the_same_pictures_and_seed_give_the_same_bytes(tmp_path):
    settings = natural.Settings(steps=3)
    for name in ("one", "two"):
        natural.train(pictures(20), tmp_path / name, settings=settings)
    for file in ("weights.safetensors", "card.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_the_area_is_that_of_ranks():
    generator = torch.Generator().manual_seed(0)
    above, below = (torch.randint(0, 9, (n,), generator=generator).float() for n in (13, 21))
    ranks = rankdata(torch.cat([above, below]).numpy())[:13]
    assert natural.auc(above, below) == pytest.approx((ranks.sum() - 13 * 14 / 2) / (13 * 21))
    assert natural.auc(torch.tensor([2.0, 3.0]), torch.tensor([1.0])) == 1


@pytest.mark.parametrize("kind", natural.CORRUPTIONS)
def test_a_corruption_changes_every_picture_and_keeps_its_size(kind):
    for picture in (*pictures(3), torch.rand(1, 3, 37, 50)):
        corrupted = natural.CORRUPTIONS[kind](picture, torch.Generator().manual_seed(0))
        assert corrupted.shape == picture.shape
        assert not torch.equal(corrupted, picture)


def test_shuffling_keeps_the_pixels_of_the_pieces():
    picture = torch.rand(1, 3, 32, 32)
    shuffled = natural.shuffled(picture, torch.Generator().manual_seed(0))
    assert torch.equal(shuffled.flatten().sort().values, picture.flatten().sort().values)


def test_what_does_not_belong_together_is_refused(trained, tmp_path):
    with pytest.raises(ValueError, match="3 pictures; at least 20 are needed"):
        natural.train(pictures(3), tmp_path / "few")
    with pytest.raises(ValueError, match="is not empty"):
        natural.train(pictures(20), trained[0])
    config = json.loads((trained[0] / "config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "weights.safetensors").write_bytes((trained[0] / "weights.safetensors").read_bytes())
    (other / "config.json").write_text(json.dumps(config | {"base": "0" * 64}))
    with pytest.raises(ValueError, match="it was trained on a base with the hash 000000000000"):
        load("natural", folder=str(other))
    (other / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="does not describe a head"):
        load("natural", folder=str(other))


def test_the_command_trains_what_the_scorer_loads(tmp_path):
    for number, picture in enumerate(pictures(24)):
        to_pil(picture)[0].save(tmp_path / f"{number}.png")
    out = tmp_path / "head"
    result = mmalign("reward", "natural", str(tmp_path), "--also", str(tmp_path), "--out", str(out))
    assert result.returncode == 0, result.stderr
    assert "speckled" in result.stdout
    scored = mmalign("score", str(tmp_path), "--rewards", "natural", "--set", f"natural.folder={out}", "--json",
                     "--out", str(tmp_path / "scores.jsonl"))  # fmt: skip
    assert scored.returncode == 0, scored.stderr
