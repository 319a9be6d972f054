"""The network of the embedded world of things, against the verifier that it has learnt from."""

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu

from mmalign.config.paths import locate
from mmalign.data.prompts import read
from reward_models import Prompt, load
from reward_models.images import rounded
from reward_models.things_world import draw, understood
from reward_models.worlds import caption


@pytest.fixture(scope="module")
def scorer():
    return load("things_classifier")


def pictures(prompts: list[Prompt], seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return rounded(torch.from_numpy(np.stack([draw(prompt.wants, rng) for prompt in prompts])))


def test_the_embedded_weights_tell_right_from_wrong(scorer):
    """Pictures of held-out captions, with their captions and with those of other pictures."""
    prompts = read(locate("assets/prompts/things_validation.jsonl"))[::3]
    images = pictures(prompts)
    others = prompts[1:] + prompts[:1]
    wrong = load("things")(images, others).values[:, 0] == 0
    good, bad = scorer(images, prompts), scorer(images, others)
    assert not good.failures
    logits = good.column("logit"), bad.column("logit")[wrong]
    assert mannwhitneyu(*logits).statistic / len(logits[0]) / len(logits[1]) > 0.99
    assert (good.column("right") > 0.5).float().mean() > 0.8
    assert (bad.column("right")[wrong] < 0.5).float().mean() > 0.98


def test_a_caption_without_ground_truth_is_understood(scorer):
    prompts = [Prompt(text, understood(text)) for text in ("two red cats", "a shaded drawing of a camel")]
    images = pictures(prompts)
    assert all(caption(prompt.wants) == prompt.text for prompt in prompts)
    texts = [Prompt(prompt.text) for prompt in prompts]
    assert torch.equal(scorer(images, texts).values, scorer(images, prompts).values)
    assert "needs captions of the embedded world" in scorer(images[:1], [Prompt("a circle")]).failures[0]


def test_its_gradient_leads_to_another_tint(scorer):
    """Steps along the gradient make of a red boat what the classifier calls a blue one."""
    prompt = Prompt("a blue boat", understood("a blue boat"))
    start = pictures([Prompt("a red boat", understood("a red boat"))])
    image = start.clone()
    for _ in range(60):
        image.requires_grad_()
        (gradient,) = torch.autograd.grad(scorer.in_graph(image, [prompt])[0, 1], image)
        image = (image.detach() + gradient / gradient.norm()).clamp(0, 1)
    assert scorer(start, [prompt]).column("right") < 0.1
    assert scorer(image, [prompt]).column("right") > 0.9
