"""Tests of `context` against the two heads of transformers' own BLIP-2 image-text model."""

import pytest
import torch
from tiny_scorers import settings
from transformers import AutoTokenizer, Blip2ForImageTextRetrieval, BlipImageProcessor

from reward_models import Prompt, load
from reward_models.images import to_pil
from reward_models.types import Differentiable

TEXTS = ["a red fox", "two owls at noon", "x"]
PROMPTS = [Prompt(TEXTS[0]), Prompt(TEXTS[1], {"context": TEXTS[1]}), Prompt("not this", {"context": TEXTS[2]})]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return settings("context", tmp_path_factory.mktemp("context"))


@pytest.fixture(scope="module")
def scorer(made):
    return load("context", **made)


def pictures(high=24, wide=24):
    return torch.rand(3, 3, high, wide, generator=torch.Generator().manual_seed(0)).mul(255).round() / 255


@torch.no_grad()
def test_it_is_the_two_heads_of_the_stock_model(scorer, made):
    model = Blip2ForImageTextRetrieval.from_pretrained(made["model"]).eval()
    processor, tokenizer = (kind.from_pretrained(made["model"]) for kind in (BlipImageProcessor, AutoTokenizer))
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False)
    pixels = processor(images=to_pil(pictures()), return_tensors="pt").pixel_values
    cosines, logits = (
        model(pixel_values=pixels, **inputs, use_image_text_matching_head=head).logits_per_image
        for head in (False, True)
    )
    scores = scorer(pictures(), PROMPTS)
    assert scores.names == ("global", "fine")
    torch.testing.assert_close(scores.column("global"), cosines.diagonal(), rtol=0, atol=1e-6)
    torch.testing.assert_close(scores.column("fine"), logits.softmax(1)[:, 1], rtol=0, atol=1e-6)
    assert cosines.diagonal().std() > 1e-3  # the pictures and texts are distinguished
    assert logits.std() > 1e-3


@torch.no_grad()
def test_other_sizes_are_squashed_like_by_the_processor(scorer, made):
    wide = torch.nn.functional.interpolate(pictures(6, 9), (40, 60)).clamp(0, 1)
    small = BlipImageProcessor.from_pretrained(made["model"])(images=to_pil(wide), do_normalize=False)
    small = torch.stack([torch.as_tensor(one) for one in small.pixel_values])
    assert small.shape == (3, 3, 24, 24)
    torch.testing.assert_close(scorer(wide, PROMPTS).values, scorer(small, PROMPTS).values, rtol=0, atol=5e-3)


def test_its_gradients_are_those_of_small_changes(scorer):
    assert isinstance(scorer, Differentiable)
    images = pictures().requires_grad_()
    scores = scorer.in_graph(images, PROMPTS)
    torch.testing.assert_close(scores.detach(), scorer(pictures(), PROMPTS).values)
    for column in range(2):
        [gradient] = torch.autograd.grad(scores[1, column], images, retain_graph=True)
        assert gradient[[0, 2]].eq(0).all()
        step = torch.zeros_like(gradient)
        step[1] = 1e-2 * gradient[1] / gradient[1].norm()
        with torch.no_grad():
            up, down = (scorer.in_graph(images + sign * step, PROMPTS)[1, column] for sign in (1, -1))
        assert float(up - down) == pytest.approx(2e-2 * float(gradient[1].norm()), rel=0.05)
    assert not any(p.requires_grad for p in scorer.model.parameters())


def test_a_context_that_is_no_text_fails_its_image_alone(scorer):
    bad = [PROMPTS[0], Prompt("a", {"context": ["a", "b"]}), Prompt("a", {"context": " "})]
    scores = scorer(pictures(), bad)
    assert scores.values.isnan().any(1).tolist() == [False, True, True]
    assert scores.failures[1].startswith("context \"['a', 'b']\": a description in words")
    with pytest.raises(ValueError, match="a description in words is needed"):
        scorer.in_graph(pictures(), bad)


def test_what_is_not_such_a_model_is_one_line(made, tmp_path):
    for given, line in (
        ({"model": str(tmp_path)}, "context: .*could not be loaded"),
        ({"tokens": 41}, "context: tokens 41: 2 to 40"),
        ({"tokens": 1}, "context: tokens 1: 2 to 40"),
    ):
        with pytest.raises(ValueError, match=line) as error:
            load("context", **made | given)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"context: .*could not be loaded"):
        load("context", model=settings("pickscore", tmp_path / "clip")["model"])


def test_a_long_prompt_is_truncated_and_a_long_context_fails(scorer):
    [reader] = scorer.readers()
    assert (reader.name, reader.tokens, reader.cuts("a " * 39), reader.cuts("a " * 38)) == ("context", 40, True, False)
    longest, more = "a " * 38, "a " * 60
    prompts = [Prompt(longest), Prompt(more), Prompt("x", {"context": longest}), Prompt("x", {"context": more})]
    scores = scorer(pictures()[[0, 0, 0, 0]], prompts)
    torch.testing.assert_close(scores.values[0], scores.values[1])
    torch.testing.assert_close(scores.values[0], scores.values[2])
    assert [*scores.failures] == [3]
    assert "longer than the 40 tokens" in scores.failures[3]
