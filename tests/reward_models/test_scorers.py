"""Tests of the contract that all scorers share, and of `clip` against open_clip."""

import json
import random
import re

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from tiny_scorers import OPEN_CLIP, open_clip_folder, settings

from reward_models import Prompt, Scores, load, shapes_world, things_world
from reward_models.images import from_pil, resized, to_pil
from reward_models.registry import SCORERS
from reward_models.scorers.clip import TINY, clip
from reward_models.shapes_world import requests
from reward_models.worlds import caption

ALONE = [name for name in SCORERS if name != "pairwise"]  # which needs siblings, and has a test of its own
PARTLY = ("shapes_critic", "things_critic", "checklist")  # have no opinion on what a prompt does not ask for


@pytest.fixture(scope="module")
def random_clip(tmp_path_factory):
    return open_clip_folder(tmp_path_factory.mktemp("random_clip"))


@pytest.fixture(scope="module", params=[*ALONE, "random clip"])
def scorer(request):
    if request.param == "random clip":
        return clip(str(request.getfixturevalue("random_clip")), batch=3)
    return load(request.param, **settings(request.param, request.getfixturevalue("tmp_path_factory").mktemp("tiny")))


def asked_of_shapes(rng):
    """Objects in colours GenEval knows."""
    some = [w for w in requests() if w["include"] and not any(item.get("color") == "cyan" for item in w["include"])]
    return [some[i] for i in rng.integers(len(some), size=10)]


def asked_of_things(rng):
    source = random.Random(0)
    return [things_world.request(things_world.TAGS[k], source) for k in rng.integers(len(things_world.TAGS), size=10)]


def drawn(world, wants, rng, folder):
    """Pictures, with prompts that also name letters, a picture to compare with and a criterion."""
    wants[4] = wants[3]
    images = torch.from_numpy(np.stack([world.draw(w, rng) for w in wants]))
    to_pil(images[:1])[0].save(folder / "reference.png")
    more = {"text": "H O", "reference": str(folder / "reference.png"), "criteria": [{"question": "Is it there?"}]}
    return images, [Prompt(caption(w), w | more, i) for i, w in enumerate(wants)]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    rng = np.random.default_rng(0)
    return drawn(shapes_world, asked_of_shapes(rng), rng, tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module")
def data(scorer, shapes, tmp_path_factory):
    """What the scorer can check."""
    if not scorer.card.scorer.startswith("things"):
        return shapes
    rng = np.random.default_rng(0)
    return drawn(things_world, asked_of_things(rng), rng, tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module")
def whole(scorer, data):
    """The scores of all of it; some scorers take seconds."""
    return scorer(*data)


def sure(scorer, scores):
    """The values of the components that have an opinion on every image."""
    return scores.values[:, :1] if scorer.card.scorer in PARTLY else scores.values


def noise(n: int, high: int, wide: int) -> torch.Tensor:
    return torch.rand(n, 3, high, wide, generator=torch.Generator().manual_seed(1)).mul(255).round() / 255


def test_contract(scorer, data, whole):
    images, prompts = data
    before = images.clone()
    scores = scorer(images, prompts)
    assert isinstance(scores, Scores)
    assert scores.values.dtype == torch.float32
    assert scores.values.shape == (len(images), len(scores.names))
    assert not scores.failures
    assert sure(scorer, scores).isfinite().all()
    assert not scores.values.requires_grad
    assert scores.values.device.type == "cpu"
    assert torch.equal(images, before)
    torch.testing.assert_close(whole.values, scores.values, rtol=0, atol=0, equal_nan=True)


def test_each_image_is_scored_alone_and_in_order(scorer, data, whole):
    images, prompts = data
    together = whole.values
    alone = torch.cat([scorer(images[i : i + 1], prompts[i : i + 1]).values for i in range(len(images))])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5, equal_nan=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    shuffled = scorer(images[order], [prompts[i] for i in order]).values
    torch.testing.assert_close(shuffled, together[order], rtol=0, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_constant_images_are_scored(scorer, data, level):
    scores = scorer(torch.full((2, 3, 32, 32), level), data[1][:2])
    assert sure(scorer, scores).isfinite().all()
    assert not scores.failures


def test_number_of_prompts_must_match(scorer, data):
    with pytest.raises(ValueError, match="10 images but 9 prompts"):
        scorer(data[0], data[1][:9])


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.nan, "a pixel is not finite"),
        (-torch.inf, "a pixel is not finite"),
        (-1.0, "pixels from -1 to .*; an image lies in"),
        (255.0, "pixels from .* to 255; an image lies in"),
    ],
)
def test_a_broken_image_fails_alone(scorer, value, reason, data, whole):
    images, prompts = data[0].clone(), data[1]
    images[2, 0, 5, 5] = value
    scores = scorer(images, prompts)
    assert list(scores.failures) == [2]
    assert re.match(reason, scores.failures[2])
    assert scores.values[2].isnan().all()
    rest = [i for i in range(len(images)) if i != 2]
    torch.testing.assert_close(scores.values[rest], whole.values[rest], rtol=0, atol=1e-5, equal_nan=True)


def test_an_image_scores_as_the_png_written_from_it(scorer, data, tmp_path):
    """Also where it lies between two of a PNG's levels."""
    images = (data[0] + 0.004 * torch.randn(data[0].shape, generator=torch.Generator().manual_seed(5))).clamp(0, 1)
    for i, picture in enumerate(to_pil(images)):
        picture.save(tmp_path / f"{i}.png")
    from_disk = from_pil([Image.open(tmp_path / f"{i}.png") for i in range(len(images))])
    assert not torch.equal(images, from_disk)
    one, two = scorer(images, data[1]), scorer(from_disk, data[1])
    torch.testing.assert_close(one.values, two.values, rtol=0, atol=0, equal_nan=True)
    assert one.critiques == two.critiques


def test_no_images_have_no_scores(scorer):
    assert scorer(torch.zeros(0, 3, 32, 32), []).values.shape == (0, len(scorer.names))


def test_the_card_says_what_the_scores_do(scorer, data, whole):
    images, prompts = data
    card, values = scorer.card, sure(scorer, whole)
    assert card.licence
    assert card.licence != "unknown"
    assert card.low <= values.min()
    assert values.max() <= card.high
    assert len(card.version) == 16
    other = scorer(images, [Prompt("something else", p.wants, p.id) for p in prompts]).values
    if not card.sees_prompt:
        assert torch.equal(other, whole.values)
    if card.model != "none" and card.scorer != "remote":  # its versions stand in the settings
        assert re.fullmatch("[0-9a-f]{64}", card.checkpoint)


def test_jpeg_size_is_the_length_of_the_file(tmp_path):
    images = torch.cat([torch.full((1, 3, 64, 64), 0.5), noise(1, 64, 64)])
    smaller, larger = (load("jpeg_size", direction=d)(images, [Prompt("")] * 2).values for d in ("smaller", "larger"))
    to_pil(images)[1].save(tmp_path / "noise.jpg", quality=95)
    assert smaller[1].item() == pytest.approx(-(tmp_path / "noise.jpg").stat().st_size / 1000)
    assert torch.equal(smaller, -larger)
    assert smaller[0] > smaller[1]
    rough = load("jpeg_size", quality=20)(images, [Prompt("")] * 2).values
    assert rough[1] > smaller[1]


def test_image_stats_of_known_pictures():
    grey, red = torch.full((1, 3, 8, 8), 0.4), torch.zeros(1, 3, 8, 8)
    red[:, 0] = 0.8
    checks = ((torch.arange(8)[:, None] + torch.arange(8)) % 2).float().expand(1, 3, 8, 8)
    scores = load("image_stats")(torch.cat([grey, red, checks]), [Prompt("")] * 3)
    torch.testing.assert_close(scores.values[0], torch.tensor([0.4, 0.0, 0.0, 0.0]))
    torch.testing.assert_close(scores.values[1], torch.tensor([0.8 * 0.299, 0.0, 1.0, 0.0]))
    torch.testing.assert_close(scores.values[2, :3], torch.tensor([0.5, 0.5, 0.0]))
    assert 3 < scores.column("sharpness")[2] <= 4  # 4 inside, less at the border


def test_quality_is_checked():
    with pytest.raises(ValueError, match="quality is 1 to 95, not 101"):
        load("jpeg_size", quality=101)


def test_embedded_clip_tells_right_captions_from_wrong_ones(shapes):
    images, prompts = shapes
    right = load("clip")(images, prompts).values
    wrong = load("clip")(images, prompts[5:] + prompts[:5]).values
    assert (right > wrong).float().mean() >= 0.8


@pytest.mark.parametrize("folder", ["random", "embedded"])
def test_clip_agrees_with_open_clip(folder, random_clip, shapes):
    scorer = clip(str(random_clip)) if folder == "random" else clip()
    name = f"local-dir:{random_clip if folder == 'random' else TINY}"
    images = shapes[0] if folder == "embedded" else noise(10, 40, 57)
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    texts = [p.text for p in shapes[1]]
    with torch.no_grad():
        pixels = torch.stack([preprocess(picture) for picture in to_pil(images)])
        image = model.eval().encode_image(pixels, normalize=True)
        text = model.encode_text(open_clip.get_tokenizer(name)(texts), normalize=True)
    torch.testing.assert_close(scorer(images, shapes[1]).values[:, 0], (image * text).sum(1), rtol=0, atol=5e-3)


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(24, 24), (24, 16)])
@pytest.mark.parametrize("source", [(40, 57), (61, 33), (10, 13), (24, 24)])
def test_resizing_agrees_with_open_clip(mode, interpolation, size, source):
    if mode == "shortest" and size[0] != size[1]:
        interpolation = "bicubic"  # open_clip looks at the setting only for square sizes
    images = 0.25 + 0.5 * noise(2, *source)  # PIL also clips between its two passes: leave room for the overshoot
    config = PreprocessCfg(size, "RGB", (0.0,) * 3, (1.0,) * 3, interpolation, mode, fill_color=51)
    transform = image_transform_v2(config, is_train=False)
    expected = torch.stack([transform(picture) for picture in to_pil(images)])
    actual = resized(images, size, mode, interpolation, fill=51 / 255)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2.5 / 255)  # PIL rounds after each of them


@pytest.mark.parametrize(
    ("model", "pretrained", "says"),
    [
        ("nowhere/at_all", None, "'nowhere/at_all' is neither a folder nor a model of open_clip"),
        ("ViT-B-33", None, "near names: .*ViT-B-32"),
        ("ViT-B-32", None, "`pretrained` is missing; tags of ViT-B-32: openai, "),
        ("ViT-B-32", "nonsense", "'nonsense' is neither a tag nor a file of weights; tags of ViT-B-32: openai, "),
        ("local-dir:nowhere", None, "could not be loaded"),
    ],
)
def test_a_model_that_is_not_there_is_explained_in_one_line(model, pretrained, says):
    with pytest.raises(ValueError, match=says) as error:
        clip(model, pretrained)
    assert "\n" not in str(error.value)


def test_a_folder_without_weights_or_configuration_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"could not be loaded.*config"):
        clip(str(tmp_path))
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP}))
    with pytest.raises(ValueError, match=r"could not be loaded.*weights"):
        clip(str(tmp_path))
