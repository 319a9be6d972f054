"""The network of the embedded world, against the verifier that it has learnt from."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu

from reward_models import Prompt, load
from reward_models.classifier import Network, Parts, odds_of, parts_of, together
from reward_models.images import rounded
from reward_models.scorers.shapes_classifier import CLASSES
from reward_models.shapes_world import (
    COLOURS,
    KINDS as CHANGES,
    RELATIONS,
    caption,
    changed,
    draw,
    requests,
    understood,
)

KINDS, MOST, MIXED = CLASSES.kinds, CLASSES.most, CLASSES.mixed("color")


@pytest.fixture(scope="module")
def scorer():
    return load("shapes_classifier")


@pytest.fixture(scope="module")
def drawings():
    """Of 60 captions, and for each that has one, a caption in which one thing is wrong."""
    rng = np.random.default_rng(11)
    wants = [requests()[i] for i in rng.integers(len(requests()), size=60)]
    images = rounded(torch.from_numpy(np.stack([draw(request, rng) for request in wants])))
    wrong = [changed(request, CHANGES[rng.integers(4)], rng) for request in wants]
    return images, wants, wrong


def prompts(wants) -> list[Prompt]:
    return [Prompt(caption(request), request) for request in wants]


def test_the_odds_of_a_class_are_those_of_its_probability():
    logits = torch.tensor([[0.3, -1.0, 2.0]], dtype=torch.float64)
    chance = logits.softmax(1)[0, 2].item()
    assert odds_of(logits, torch.tensor([2])).item() == pytest.approx(math.log(chance / (1 - chance)), abs=1e-12)


def test_events_together_have_the_product_of_their_probabilities():
    odds = torch.tensor([0.5, -1.0, 3.0], dtype=torch.float64)
    assert together(odds).sigmoid().item() == pytest.approx(odds.sigmoid().prod().item(), abs=1e-12)
    assert together(odds[:1]).item() == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize("level", [-60.0, 60.0])
def test_the_log_odds_do_not_saturate(level):
    odds = torch.full((14,), level, requires_grad=True)
    value = together(odds)
    value.backward()
    assert value.item() == pytest.approx(-14 * 60 if level < 0 else 60 - math.log(14), rel=1e-4)
    assert odds.grad.min() > 0.05
    assert value.sigmoid().item() in (0, 1)  # as a probability it has


def test_each_part_of_a_caption_is_scored():
    """A network that sees two objects for certain."""
    network = Network(CLASSES)
    counts = torch.zeros(1, len(KINDS) + 1, MOST + 1)
    counts[..., 0] = 20
    colours, extents = torch.zeros(1, len(KINDS), MIXED + 1), torch.full((1, len(KINDS)), 12.0)
    centres = torch.full((1, len(KINDS), 2), 16.0)
    for name, colour, x in (("circle", "red", 6.0), ("square", "blue", 26.0)):
        kind = KINDS.index(name)
        counts[0, kind] = torch.tensor([0.0, 20, 0, 0, 0, 0])
        colours[0, kind, [*COLOURS].index(colour)] = 20
        centres[0, kind] = torch.tensor([x, 16.0])
    parts = Parts(counts, {"color": colours}, centres, extents)
    right = lambda text: together(parts_of(network, parts, 0, understood(text))).item() > 0  # noqa: E731
    assert right("a circle and a square")
    assert right("a red circle and a blue square")
    assert right("a red circle left of a blue square")
    assert right("a blue square right of a red circle")
    for wrong in (
        "a circle", "a circle and a cross", "two red circles", "a blue circle and a red square",
        "a red circle right of a blue square", "a red circle above a blue square", 'the text "O"',
    ):  # fmt: skip
        assert understood(wrong)
        assert not right(wrong)
    large = torch.full_like(extents, 17.0)
    assert network.large(large).min() > 0
    assert network.small(large).max() < 0


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_relation_is_the_verifiers(relation):
    network = Network(CLASSES)
    sign = torch.tensor(RELATIONS[relation], dtype=torch.float32)
    other = torch.tensor([16.0, 16.0])
    along = lambda far, aside=0.0: network.related(relation, other + far * sign + aside * sign.flip(0), other)  # noqa: E731
    assert along(9.0) > 0
    assert along(9.0, 4.0) > 0
    assert along(3.0) < 0  # too near
    assert along(9.0, 12.0) < 0  # rather beside
    assert along(-9.0) < 0


def test_the_embedded_weights_tell_right_from_wrong(scorer, drawings):
    images, wants, wrong = drawings
    some = [i for i, request in enumerate(wrong) if request is not None]
    good = scorer(images, prompts(wants))
    bad = scorer(images[some], prompts(wrong[i] for i in some))
    assert not good.failures
    assert mannwhitneyu(good.column("logit"), bad.column("logit")).statistic / len(images) / len(some) > 0.97
    assert (good.column("right") > 0.5).float().mean() > 0.9
    assert (bad.column("right") < 0.5).float().mean() > 0.9


def test_a_caption_without_ground_truth_is_understood(scorer, drawings):
    images, wants, _ = drawings
    texts = [Prompt(caption(request)) for request in wants[:8]]
    assert torch.equal(scorer(images[:8], texts).values, scorer(images[:8], prompts(wants[:8])).values)
    scores = scorer(images[:2], [texts[0], Prompt("a dog")])
    assert list(scores.failures) == [1]
    assert "needs captions of the embedded world" in scores.failures[1]
    with pytest.raises(ValueError, match="needs captions of the embedded world"):
        scorer.in_graph(images[:1], [Prompt("a dog")])


def test_its_gradient_leads_to_another_colour(scorer):
    """Steps along the gradient make of a red circle what the verifier calls a blue one."""
    rng, text = np.random.default_rng(1), "a blue circle"
    start = torch.from_numpy(draw(understood("a red circle"), rng))[None]
    image, prompt = start.clone(), [Prompt(text, understood(text))]
    for _ in range(60):
        image.requires_grad_()
        (gradient,) = torch.autograd.grad(scorer.in_graph(image, prompt)[0, 1], image)
        image = (image.detach() + 0.5 * gradient / gradient.norm()).clamp(0, 1)
    assert scorer(start, prompt).column("right") < 0.1
    assert scorer(image, prompt).column("right") > 0.9


def test_other_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match="shapes_classifier"):
        load("shapes_classifier", folder=str(tmp_path))
