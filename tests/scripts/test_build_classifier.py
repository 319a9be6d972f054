"""The builder of the classifiers of the embedded worlds: its labels are what the verifier sees, and it learns."""

import build_classifier as build
import numpy as np
import pytest
import tiny_worlds
import torch
from tiny_worlds import SHAPES, THINGS

from reward_models.scorers.shapes_classifier import ShapesClassifier
from reward_models.scorers.things_classifier import ThingsClassifier
from reward_models.things_world import NOUNS, understood
from reward_models.types import Prompt

SCORERS = {"shapes": ShapesClassifier, "things": ThingsClassifier}


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    monkeypatch.setattr(tiny_worlds, "OF_A_TAG", 200)
    monkeypatch.setattr(build, "draw_chunk", lambda name, chunk: tiny_worlds.draw_chunk(name, chunk, 24))
    THINGS.training.cache_clear()
    yield
    THINGS.training.cache_clear()


def test_the_labels_are_what_is_there():
    texts = ["two red cats", "a blue boat left of a green owl", "a shaded drawing of a camel"]
    rng = np.random.default_rng(0)
    images = np.stack([THINGS.draw(understood(text), rng) for text in texts])
    counts, attributes, places = build.labels_of(THINGS.classes, THINGS.find(images))
    cat, boat, owl, camel = (NOUNS.index(noun) for noun in ("cat", "boat", "owl", "camel"))
    assert counts.nonzero().tolist() == sorted([[0, cat], [1, boat], [1, owl], [2, camel]])
    assert counts[0, cat] == 2
    colours = [
        ["natural", "red", "orange", "yellow", "green", "blue", "purple"].index(c) for c in ("red", "blue", "green")
    ]
    assert [attributes["color"][row, kind] for row, kind in ((0, cat), (1, boat), (1, owl))] == colours
    assert attributes["color"][0, boat] == -1
    assert attributes["style"][2, camel] == 1
    assert places[0, cat].isnan().all()  # there are two
    assert places[1, boat, 0] < places[1, owl, 0]


@pytest.mark.parametrize("world", [SHAPES, pytest.param(THINGS, marks=pytest.mark.slow)], ids=["shapes", "things"])
def test_a_small_build_is_a_scorer_that_has_learnt(world, tmp_path):
    drawings = build.drawn(world, 24)
    torch.manual_seed(0)
    start = build.Network(world.classes)
    network = build.trained(world, drawings, torch.zeros(0, 3, world.side, world.side), 60, 8)
    labels = build.labels_of(world.classes, world.find(drawings.numpy().astype(np.float32) / 255))
    with torch.no_grad():
        before, after = (build.loss_of(n, n(drawings / 255), *labels).item() for n in (start, network))
    assert after < 0.7 * before
    (tmp_path / build.WEIGHTS).write_bytes(build.save(network.state_dict()))
    scorer, held_out = SCORERS[world.name](str(tmp_path)), world.held_out("validation")[::60]
    images = torch.from_numpy(np.stack([world.draw(p.wants, np.random.default_rng(0)) for p in held_out]))
    scores = scorer(images, held_out)
    assert not scores.failures
    assert torch.equal(scores.values, scorer(images, [Prompt(p.text) for p in held_out]).values)
    x = images.clone().requires_grad_()
    scorer.in_graph(x, held_out)[:, 1].sum().backward()
    assert x.grad.abs().sum() > 0
    assert build.on_drawings(world, scorer, held_out)
