"""Tests of the pretrained scorers against the same networks run by their stock libraries."""

from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from tiny_scorers import blip, head, settings
from torch.nn import functional as F
from transformers import BertTokenizer, CLIPModel, CLIPProcessor

from reward_models import Prompt, load
from reward_models.images import to_pil
from reward_models.scorers.image_reward import MEAN, SHIFT, SPREAD, STD
from reward_models.weights import linear_chain, pretrained, read

TEXTS = ["a red fox", "two owls at noon", "a red fox", "x"]
PROMPTS = [Prompt(text) for text in TEXTS]


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(3)
    return F.interpolate(torch.rand(4, 3, 9, 7, generator=generator), (45, 35)).mul(255).round() / 255


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Settings by name, each built once."""
    return {
        name: settings(name, tmp_path_factory.mktemp(name))
        for name in ("hpsv2", "pickscore", "aesthetic", "image_reward")
    }


@torch.no_grad()
def test_pickscore_is_the_diagonal_of_the_stock_logits(images, made):
    model = CLIPModel.from_pretrained(made["pickscore"]["model"]).eval()
    processor = CLIPProcessor.from_pretrained(made["pickscore"]["processor"])
    inputs = processor(text=TEXTS, images=to_pil(images), padding=True, return_tensors="pt")
    expected = model(**inputs).logits_per_image.diagonal()
    torch.testing.assert_close(load("pickscore", **made["pickscore"])(images, PROMPTS).values[:, 0], expected)


@torch.no_grad()
def test_pickscore_cuts_prompts_that_are_too_long(images, made):
    long = [Prompt("a" * 39), Prompt("a" * 300)]
    one, two = load("pickscore", **made["pickscore"])(images[[0, 0]], long).values[:, 0]
    assert one == two


@torch.no_grad()
def test_hpsv2_is_the_cosine_of_padded_images(images, made):
    weights, architecture = made["hpsv2"]["weights"], made["hpsv2"]["model"]
    model = open_clip.create_model(architecture, f"{weights}/HPS_v2.1_compressed.pt").eval()
    config = PreprocessCfg(24, "RGB", open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD, "bicubic", "longest")
    transform = image_transform_v2(config, is_train=False)
    image = model.encode_image(torch.stack([transform(picture) for picture in to_pil(images)]), normalize=True)
    text = model.encode_text(open_clip.get_tokenizer(architecture)(TEXTS), normalize=True)
    scores = load("hpsv2", **made["hpsv2"])(images, PROMPTS).values[:, 0]
    torch.testing.assert_close(scores, (image * text).sum(1), rtol=0, atol=5e-3)
    square = load("hpsv2", **made["hpsv2"])(images[:, :, :35], PROMPTS).values[:, 0]
    assert not torch.allclose(scores, square, atol=5e-3)


@torch.no_grad()
def test_aesthetic_is_its_head_on_the_unit_embedding(images, made):
    folder = made["aesthetic"]["model"]
    pixels = CLIPProcessor.from_pretrained(folder)(images=to_pil(images), return_tensors="pt").pixel_values
    embedding = CLIPModel.from_pretrained(folder).eval().get_image_features(pixel_values=pixels).pooler_output
    weights = torch.load(f"{folder}/sac+logos+ava1-l14-linearMSE.pth", weights_only=True)
    x = embedding / embedding.norm(dim=-1, keepdim=True)
    for number in (0, 2, 4, 6, 7):
        x = x @ weights[f"layers.{number}.weight"].T + weights[f"layers.{number}.bias"]
    scorer = load("aesthetic", **made["aesthetic"])
    torch.testing.assert_close(scorer(images, PROMPTS).values, x)
    assert not scorer.card.sees_prompt


@torch.no_grad()
def test_image_reward_is_its_head_on_blip_under_the_original_names(images, made):
    vision, text, _ = blip()
    folder = made["image_reward"]["weights"]
    words = BertTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    square = F.interpolate(images[:, :, :35], (24, 24), mode="bicubic", antialias=True).clamp(0, 1)
    pixels = (square - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    features = vision(pixel_values=pixels).last_hidden_state
    features = text(
        input_ids=words.input_ids, attention_mask=words.attention_mask, encoder_hidden_states=features
    ).last_hidden_state[:, 0]
    chain = linear_chain(torch.load(f"{folder}/ImageReward.pt", weights_only=True), "mlp.layers.")
    expected = (chain(features) - SHIFT) / SPREAD
    scores = load("image_reward", **made["image_reward"])(images[:, :, :35], PROMPTS).values
    torch.testing.assert_close(scores, expected)
    assert expected.std() > 1e-2


def test_image_reward_reads_both_ways_and_cuts_at_35_tokens(images, made):
    scorer = load("image_reward", **made["image_reward"])
    same = images[[0, 0]]
    last_differs = scorer(same, [Prompt("a b c"), Prompt("a b d")]).values
    assert (last_differs[0] - last_differs[1]).abs() > 1e-4  # a causal mask would hide the end from the first token
    beyond = scorer(same, [Prompt("a " * 40), Prompt("a " * 40 + "b")]).values
    torch.testing.assert_close(beyond[0], beyond[1])


def test_image_reward_keeps_what_transformers_would_change(made):
    scorer = load("image_reward", **made["image_reward"])
    assert {layer.eps for layer in scorer.vision.modules() if isinstance(layer, torch.nn.LayerNorm)} == {1e-6}
    assert scorer.text.config.num_attention_heads == 4  # of its file, not the library's 8


@pytest.mark.parametrize(
    ("drop", "add", "says"),
    [
        ("blip.visual_encoder.norm.weight", None, "post_layernorm.weight"),
        ("blip.text_encoder.encoder.layer.1.crossattention.self.key.bias", None, "crossattention.self.key.bias"),
        ("mlp.layers.4.weight", None, "no chain of linear layers"),
        (None, "blip.text_encoder.encoder.layer.1.surplus", "surplus"),
    ],
)
def test_image_reward_refuses_weights_that_do_not_fit(made, tmp_path, drop, add, says):
    folder = Path(made["image_reward"]["weights"])
    weights = {name: value for name, value in read(folder / "ImageReward.pt").items() if name != drop}
    torch.save(weights | ({add: torch.zeros(1)} if add else {}), tmp_path / "ImageReward.pt")
    (tmp_path / "med_config.json").write_text((folder / "med_config.json").read_text())
    with pytest.raises(ValueError, match=f"image_reward: .*could not be loaded: .*{says}") as error:
        load("image_reward", **made["image_reward"] | {"weights": str(tmp_path)})
    assert "\n" not in str(error.value)


def test_a_checkpoint_that_lacks_weights_is_refused(made, tmp_path):
    model = CLIPModel.from_pretrained(made["pickscore"]["model"])
    weights = {name: value for name, value in model.state_dict().items() if name != "visual_projection.weight"}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(RuntimeError, match=r"lacks 1 weights of CLIPModel, e\.g\. visual_projection\.weight"):
        pretrained(CLIPModel, str(tmp_path))
    with pytest.raises(ValueError, match=r"pickscore: .*lacks 1 weights"):
        load("pickscore", model=str(tmp_path), processor=made["pickscore"]["processor"])


def test_a_head_for_another_model_is_refused(made, tmp_path):
    torch.save(head((13, 5, 1), (0, 2)), tmp_path / "head.pth")
    with pytest.raises(ValueError, match="the head takes 13 numbers, the model gives 12"):
        load("aesthetic", head=str(tmp_path / "head.pth"), model=made["aesthetic"]["model"])


def test_weights_that_run_code_are_refused(tmp_path, made):
    class Runs:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"state_dict": Runs()}, tmp_path / "head.pth")
    with pytest.raises(ValueError, match=r"could not be loaded: head\.pth contains objects other than tensors"):
        load("aesthetic", head=str(tmp_path / "head.pth"), model=made["aesthetic"]["model"])


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("pickscore", {"model": "nobody/nothing"}, "pickscore: nobody/nothing with"),
        ("hpsv2", {"weights": "nobody/nothing"}, "hpsv2: nobody/nothing on ViT-H-14"),
        ("aesthetic", {"head": "nobody/nothing"}, "aesthetic: nobody/nothing on"),
        ("image_reward", {"weights": "nobody/nothing"}, "image_reward: nobody/nothing with"),
    ],
)
def test_missing_weights_are_reported_in_one_line(name, given, says):
    with pytest.raises(ValueError, match=f"{says}.*could not be loaded") as error:
        load(name, **given)
    assert "\n" not in str(error.value)


def test_the_checkpoint_hash_tells_weights_apart_not_places(made, tmp_path):
    one, two = settings("pickscore", tmp_path / "one"), settings("pickscore", tmp_path / "two")
    assert load("pickscore", **one).card.checkpoint == load("pickscore", **two).card.checkpoint
    model = CLIPModel.from_pretrained(two["model"])
    with torch.no_grad():
        model.logit_scale += 1e-6
    model.save_pretrained(two["model"])
    assert load("pickscore", **one).card.checkpoint != load("pickscore", **two).card.checkpoint


# ----------------------------------------------------------------------------------------------------------- open_clip


@pytest.fixture
def tagged(tmp_path, monkeypatch):
    """A model of open_clip whose tags say how their weights were trained; its own config says nothing."""
    from open_clip import pretrained

    settings("hpsv2", tmp_path / "tiny")
    weights = {"file": str(tmp_path / "tiny/HPS_v2.1_compressed.pt")}
    tags = {"openai": weights | {"quick_gelu": True}, "plain": weights | {"quick_gelu": False}, "silent": weights}
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny-for-hpsv2", tags)
    return weights["file"]


@pytest.mark.parametrize(("tag", "quick"), [("openai", True), ("plain", False), ("silent", False)])
def test_clip_uses_the_activation_that_its_weights_were_trained_with(tagged, images, tag, quick):
    """A name without `quickgelu` is right for an OpenAI tag too; open_clip only warns."""
    scorer = load("clip", model="tiny-for-hpsv2", pretrained=tag)
    model = open_clip.create_model("tiny-for-hpsv2", tagged, force_quick_gelu=quick).eval()
    with torch.no_grad():
        text = model.encode_text(open_clip.get_tokenizer("tiny-for-hpsv2")(TEXTS), normalize=True)
        image = model.encode_image(scorer.prepared(images), normalize=True)
    expected = (image * text).sum(-1, keepdim=True)
    torch.testing.assert_close(scorer(images, [Prompt(text) for text in TEXTS]).values, expected, rtol=0, atol=1e-6)
    assert scorer.card.settings == ({"quick_gelu": True} if quick else {})


def test_activations_tell_scores_and_versions_apart(tagged, images):
    one, two = (load("clip", model="tiny-for-hpsv2", pretrained=tag) for tag in ("openai", "plain"))
    prompts = [Prompt(text) for text in TEXTS]
    assert (one(images, prompts).values - two(images, prompts).values).abs().max() > 1e-5
    assert one.card.version != two.card.version


def test_a_file_of_weights_has_the_activation_of_the_name(tagged):
    assert load("clip", model="tiny-for-hpsv2", pretrained=tagged).card.settings == {}


def test_aesthetic_says_where_its_weights_are():
    reason = (
        r"sac\+logos\+ava1-l14-linearMSE.pth of the GitHub repository christophschuhmann/improved-aesthetic-predictor"
    )
    with pytest.raises(ValueError, match=f"aesthetic: head: the predictor's weights are needed, {reason}"):
        load("aesthetic")
