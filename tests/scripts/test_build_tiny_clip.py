"""The builder of the embedded CLIP models: open_clip reads what it writes, and its wrong captions are wrong."""

import build_tiny_clip as build
import numpy as np
import pytest
import tiny_worlds
import torch
from tiny_worlds import SHAPES, THINGS, WORLDS, build_pictures, new_tokenizer

from reward_models import load
from reward_models.scorers.clip import clip
from reward_models.types import Prompt
from reward_models.worlds import caption

KINDS = {
    "shapes": {"shape", "colour", "colours swapped", "count", "relation", "size", "letter"},
    "things": {"noun", "colour", "colours swapped", "count", "relation", "style"},
}


@pytest.fixture(autouse=True)
def _few_captions(monkeypatch):
    monkeypatch.setattr(tiny_worlds, "OF_A_TAG", 500)
    tiny_worlds.THINGS.training.cache_clear()
    yield
    tiny_worlds.THINGS.training.cache_clear()


@pytest.mark.parametrize("world", [SHAPES, pytest.param(THINGS, marks=pytest.mark.slow)], ids=["shapes", "things"])
def test_a_small_build_is_a_scorer(world, tmp_path):
    pictures, captions = build_pictures(world, tmp_path, 16)
    tokenizer = new_tokenizer(world)
    model, _ = build.build_clip(world, pictures, captions, tokenizer, tmp_path, 2, 8, "cpu")
    build.write_model(world, tmp_path / "clip", model, tokenizer)
    scorer, held_out = clip(str(tmp_path / "clip")), world.held_out("validation")[::40]
    image = torch.from_numpy(world.draw(held_out[0].wants, np.random.default_rng(0)))[None]
    assert scorer(image, held_out[:1]).values.isfinite().all()
    figures = build.measure(world, scorer, held_out, 1)
    assert figures["another held-out caption"][2] == len(held_out)
    assert all(0 <= area <= 1 and 0 <= order <= 1 for area, order, _ in figures.values())


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_a_wrong_caption_is_wrong(world):
    rng, verifier, kinds = np.random.default_rng(0), load(world.name), set()
    for prompt in world.held_out("validation")[::8]:
        picture = torch.from_numpy(world.draw(prompt.wants, rng))[None]
        wrong = build.changes(world, prompt.wants, rng)
        texts = [Prompt(caption(wants), wants) for wants in wrong.values()]
        assert verifier(picture, [prompt]).values[0, 0] == 1
        assert verifier(picture.expand(len(texts), -1, -1, -1), texts).values[:, 0].max() == 0
        kinds |= wrong.keys()
    assert kinds == KINDS[world.name]
