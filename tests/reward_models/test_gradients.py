"""Scorers with gradients: `in_graph` against `__call__`, and its derivatives at the pixels."""

import pytest
import tiny_vlm
import torch
from chats import chatting, completion
from drawn_pairs import drawn_pairs
from tiny_scorers import settings, transformers_clip
from torch import nn
from transformers import AutoImageProcessor

from reward_models import Prompt, load, processors, shapes_world, things_world
from reward_models.cache import Cached
from reward_models.images import rounded, to_uint8
from reward_models.registry import GRADIENTS, SCORERS, differentiable
from reward_models.training import fit
from reward_models.types import Differentiable

SIDES = {
    "pickscore": 24,
    "aesthetic": 24,
    "hpsv3": 56,
    "vqa": 56,
    "vlm_yes_no": 56,
}  # where a processor resizes nothing
TEXTS = ("a red circle", "a blue square left of a yellow circle", "a red circle")
PROMPTS = [Prompt(text, shapes_world.understood(text)) for text in TEXTS]
OF_THINGS = ("a red boat", "a cat left of a camel", "a red boat")
PROMPTS_OF_THINGS = [Prompt(text, things_world.understood(text)) for text in OF_THINGS]


def pictures(side: int, seed: int = 0) -> torch.Tensor:
    """Between the levels of 8 bits, and away from the bounds."""
    return 0.1 + 0.8 * torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(seed))


def parameters(scorer) -> list[torch.Tensor]:
    """All tensors of the networks in the attributes of a scorer, and in those of its parts."""
    parts, known, tensors = [scorer], set(), []
    while parts:
        part = parts.pop()
        if id(part) in known:
            continue
        known.add(id(part))
        if isinstance(part, nn.Module):
            tensors += [*part.parameters(), *part.buffers()]
        elif isinstance(part, list | tuple):
            parts += part
        elif type(part).__module__.startswith("reward_models"):
            parts += vars(part).values()
    return tensors


@pytest.fixture(scope="module", params=GRADIENTS)
def scorer(request, tmp_path_factory):
    return load(request.param, **settings(request.param, tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def images(scorer):
    return pictures(SIDES.get(scorer.card.scorer, 32))


@pytest.fixture
def prompts(scorer):
    return PROMPTS_OF_THINGS if scorer.card.scorer.startswith("things") else PROMPTS


def test_rounded_images_score_as_in_a_call(scorer, images, prompts):
    called = scorer(rounded(images), prompts)
    assert not called.failures
    with torch.no_grad():
        values = scorer.in_graph(rounded(images), prompts)
    assert values.shape == (3, len(scorer.names))
    cropped = scorer.card.scorer == "zoomed"  # whose crops a call rounds
    torch.testing.assert_close(values, called.values, rtol=1e-5, atol=2e-3 if cropped else 2e-6)


def test_images_are_not_rounded(scorer, images, prompts):
    with torch.no_grad():
        exact, coarse = scorer.in_graph(images, prompts), scorer.in_graph(rounded(images), prompts)
    assert (exact != coarse).any()


def test_gradients_reach_the_pixels_and_no_parameter(scorer, images, prompts):
    images.requires_grad_()
    values = scorer.in_graph(images, prompts)
    for column in values.unbind(1):
        (gradient,) = torch.autograd.grad(column[0], images, retain_graph=True)
        assert gradient.isfinite().all()
        assert gradient[0].abs().max() > 0
        assert gradient[1:].eq(0).all()  # the other images
    tensors = parameters(scorer)
    assert not any(tensor.requires_grad for tensor in tensors)
    assert len(tensors) > 3 or scorer.card.scorer == "image_stats"


def test_gradients_are_finite_differences(scorer, images, prompts):
    compare_differences(scorer, images, prompts, len(scorer.names) - 1)


def compare_differences(scorer, images: torch.Tensor, prompts: list[Prompt], column: int) -> None:
    """Along the gradient, where the change is greatest and float32 rounds least."""
    images = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(scorer.in_graph(images, prompts)[0, column], images)
    images = images.detach()
    unit = gradient / gradient.norm()
    ends = []
    for step in (-0.02, 0.02):
        with torch.no_grad():
            ends.append(scorer.in_graph(images + step * unit, prompts)[0, column].item())
    assert (ends[1] - ends[0]) / 0.04 == pytest.approx(gradient.norm().item(), rel=0.05)


def test_plain_images_have_finite_gradients(scorer, prompts):
    """Also where a deviation is 0."""
    images = torch.full((1, 3, 32, 32), 0.5, requires_grad=True)
    scorer.in_graph(images, prompts[:1]).sum().backward()
    assert images.grad.isfinite().all()


def test_what_a_call_reports_is_an_error(scorer, images, prompts):
    images[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="image 1: a pixel is not finite"):
        scorer.in_graph(images, prompts)
    with pytest.raises(ValueError, match="1 images but 3 prompts"):
        scorer.in_graph(images[:1], prompts)


@pytest.mark.parametrize("name", ["pickscore", "vqa"])
def test_a_resized_image_differs_by_its_rounding(name, tmp_path):
    """The processor of a call rounds after resizing; a bicubic kernel overshoots at the edges of drawings."""
    scorer = load(name, **settings(name, tmp_path))
    images = torch.cat([side.read() for pair in drawn_pairs(4) for side in (pair.a, pair.b)])
    prompts = [Prompt("a red circle")] * len(images)
    values = scorer.in_graph(images, prompts)
    called = scorer(images, prompts).values
    assert (values - called).abs().max() < 0.05 * called.std()


def test_a_processor_prepares_tensors_as_pictures(tmp_path):
    processor = AutoImageProcessor.from_pretrained(transformers_clip(tmp_path))
    images = rounded(pictures(40))
    eight_bits = processor(images=[*to_uint8(images)], return_tensors="pt").pixel_values
    least = torch.tensor(processor.image_std).min()
    difference = processors.pixels(processor, images) - eight_bits
    assert 0 < difference.abs().max() <= 1.5 / 255 / least  # it rounds after each of two passes
    assert "resize" not in vars(processor)


def test_a_processor_without_tensors_is_refused():
    class Slow:
        backend = "pil"

    with pytest.raises(ValueError, match="no gradients: Slow takes no tensors"):
        processors.pixels(Slow(), pictures(8))


def test_the_brightness_of_an_image_has_a_known_gradient():
    images = pictures(8).requires_grad_()
    load("image_stats").in_graph(images, PROMPTS)[:, 0].sum().backward()
    luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None] / 64
    torch.testing.assert_close(images.grad, luma.expand(3, 3, 8, 8))


def test_zoomed_is_the_mean_of_its_parts():
    images = pictures(32).requires_grad_()
    zoomed, whole = load("zoomed", of="image_stats", span=[0, 1], margin=0.0), load("image_stats")
    parts = zoomed.in_graph(images, PROMPTS)[:, 0] * 5 - whole.in_graph(images, PROMPTS)[:, 0]
    torch.testing.assert_close(parts / 4, whole.in_graph(images, PROMPTS)[:, 0], rtol=0, atol=5e-3)


def test_those_without_gradients_are_refused(tmp_path):
    assert set(GRADIENTS) <= set(SCORERS)
    others = [load("shapes"), load("jpeg_size"), load("shapes_critic"), load("zoomed", of="jpeg_size", span=[-1, 0])]
    for other in (*others, load("zoomed", of="clip", at="wants")):
        assert not isinstance(other, Differentiable)
        with pytest.raises(ValueError, match=f"{other.card.scorer} has no gradients here; those that have: clip, "):
            differentiable(other)
    clip = load("clip")
    assert differentiable(clip) is clip
    assert differentiable(Cached(clip, tmp_path / "scores.sqlite")) is clip


def test_a_judge_on_a_server_has_none():
    with chatting(lambda request: completion("Yes")) as (url, _):
        judge = load("vlm_yes_no", model="m", url=url)
    with pytest.raises(ValueError, match="vlm_yes_no has no gradients here"):
        differentiable(judge)


@pytest.mark.parametrize("method", ["vlm", "vlm_head", "clip"])
def test_a_fitted_model_has_gradients(method, tmp_path):
    """Also with several members on one base, whose adapters are exchanged while the graph is built."""
    base = {} if method == "clip" else {"base": str(tiny_vlm.folder_of(tmp_path / "qwen"))}
    small = {"epochs": 1, "members": 2} | {
        "vlm": {"rank": 2, "learning_rate": 1e-2},
        "clip": {"learning_rate": 1e-2},
    }.get(method, {})
    fit(drawn_pairs(6), tmp_path / "fitted", method, **base, **small)
    scorer = load("fitted", folder=str(tmp_path / "fitted"), **base)
    images = pictures(56)
    with torch.no_grad():
        values = scorer.in_graph(rounded(images), PROMPTS)
    torch.testing.assert_close(values, scorer(rounded(images), PROMPTS).values, rtol=1e-5, atol=1e-5)
    compare_differences(scorer, images, PROMPTS, 0)
    assert not any(tensor.requires_grad for tensor in parameters(scorer))
