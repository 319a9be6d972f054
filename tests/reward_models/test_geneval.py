"""Tests of `geneval`: its verdicts against known answers, and tiny random models of each supported detector class."""

from dataclasses import replace
from math import cos, radians, sin
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_scorers import LAYERS, LETTERS, detr_config, open_clip_folder, owlv2
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor,
    BertTokenizer,
    DetrForObjectDetection,
    DetrImageProcessor,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    MaskFormerImageProcessor,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrImageProcessor,
    RTDetrResNetConfig,
    SwinConfig,
    ViTConfig,
)
from transformers.modeling_outputs import ModelOutput

from reward_models import Card, Prompt
from reward_models.detect import Detection, detector, known_as, masked
from reward_models.scorers.clip import clip
from reward_models.scorers.geneval import (
    GREY,
    PALETTE,
    SENTENCES,
    ClipColours,
    GenEval,
    checked,
    count_score,
    cut_out,
    geneval,
    judge,
    related,
    strongest,
)
from reward_models.scorers.shapes import find_blobs
from reward_models.shapes_world import COLOURS, SHAPES, draw, requests
from reward_models.worlds import OPPOSITE, RELATIONS, thing as shaped

# ---------------------------------------------------------------------------------------------- pure functions


def detected(label: str, x: float = 0, y: float = 0, score: float = 0.95, side: float = 10) -> Detection:
    return Detection(label, score, (x - side / 2, y - side / 2, x + side / 2, y + side / 2))


def dogs(n: int) -> list[Detection]:
    return [detected("dog", 20 * k) for k in range(n)]


def wants(*include: dict, **extra) -> dict:
    return {"include": list(include), **extra}


def verdict(request: dict, things: list[Detection], colours: list[str] | None = None, **settings):
    return judge(request, things, colours or [None] * len(things), **settings)


@pytest.mark.parametrize(
    ("angle", "expected"),
    [
        (0, {"right of"}),
        (45, {"right of", "below"}),  # y points down
        (90, {"below"}),
        (180, {"left of"}),
        (225, {"left of", "above"}),
        (270, {"above"}),
        (20, {"right of"}),
        (70, {"below"}),
    ],
)
def test_relations_around_a_circle(angle, expected):
    x, y = 100 * cos(radians(angle)), 100 * sin(radians(angle))
    assert related(detected("a", x, y, side=2).box, detected("b", side=2).box) == expected


def test_relations_of_known_boxes():
    reference = detected("b").box
    assert related(reference, reference) == set()
    assert related(detected("a", 1.9).box, reference) == set()  # within a tenth of the widths' sum
    assert related(detected("a", 3.9).box, reference) == set()  # 1.9 of 3.9 is below the cosine of 60 degrees
    assert related(detected("a", 4.1).box, reference) == {"right of"}
    assert related(detected("a", -4.1).box, reference) == {"left of"}
    assert related((0, 0, 100, 2), (45, 50, 55, 52)) == {"above"}


def test_relations_are_the_opposite_the_other_way_round():
    rng = np.random.default_rng(0)
    for _ in range(200):
        one, two = (detected("a", *rng.uniform(-30, 30, 2), side=rng.uniform(1, 20)).box for _ in range(2))
        assert related(one, two) == {OPPOSITE[relation] for relation in related(two, one)}


@pytest.mark.parametrize(
    ("requested", "present", "surplus", "expected"),
    [(1, 1, 1, 1), (3, 2, 1, 2 / 3), (3, 0, 1, 0), (3, 4, 1, 2 / 3), (3, 4, 0.5, 5 / 6), (3, 4, 0, 1), (1, 5, 1, 0)],
)
def test_count_term(requested, present, surplus, expected):
    assert count_score(requested, present, surplus) == pytest.approx(expected)


def test_single_object():
    dog = wants({"class": "dog", "count": 1})
    assert verdict(dog, dogs(1)).strict == verdict(dog, dogs(1)).soft == 1
    assert verdict(dog, dogs(1)).critique == "right"
    missing = verdict(dog, [detected("cat")])
    assert (missing.strict, missing.soft, missing.critique, missing.regions) == (0, 0, "0 dog instead of 1", ())


def test_five_for_one_is_not_below_nothing():
    crowd = verdict(wants({"class": "dog", "count": 1}), dogs(5))
    assert crowd.soft == 0
    assert crowd.strict == 1  # at least one is there, and no exclusion forbids the others
    assert [region.credit for region in crowd.regions] == [1, -1, -1, -1, -1]
    lenient = verdict(wants({"class": "dog", "count": 1}), dogs(5), surplus=0)
    assert (lenient.soft, lenient.critique, len(lenient.regions)) == (1, "right", 1)


@pytest.mark.parametrize(("count", "strict", "soft"), [(2, 0, 2 / 3), (3, 1, 1), (4, 0, 2 / 3), (6, 0, 0), (16, 0, 0)])
def test_counting_is_exact_by_its_exclusion(count, strict, soft):
    request = wants({"class": "dog", "count": 3}, tag="counting", exclude=[{"class": "dog", "count": 4}])
    judged = verdict(request, dogs(count))
    assert (judged.strict, judged.soft) == (strict, pytest.approx(soft))


def test_an_exclusion_of_something_else_is_a_term():
    request = wants({"class": "dog", "count": 1}, exclude=[{"class": "cat", "count": 1}])
    assert verdict(request, dogs(1)).soft == 1
    judged = verdict(request, [*dogs(1), detected("Cat", 50)])
    assert (judged.strict, judged.soft) == (0, 0.5)
    assert [(region.reason, region.credit) for region in judged.regions] == [("dog", 1), ("Cat", -1)]


@pytest.mark.parametrize(
    ("colours", "strict", "soft"),
    [(["red", "red"], 1, 1), (["red", "blue"], 0, 0.75), (["blue", "blue"], 0, 0.5)],
)
def test_colours_are_a_share(colours, strict, soft):
    judged = verdict(wants({"class": "dog", "count": 2, "color": "red"}), dogs(2), colours)
    assert (judged.strict, judged.soft) == (strict, soft)
    assert [region.credit for region in judged.regions] == [1 if colour == "red" else 0 for colour in colours]


def test_missing_objects_have_the_wrong_colour():
    judged = verdict(wants({"class": "dog", "count": 2, "color": "red"}), dogs(1), ["red"])
    assert (judged.strict, judged.soft) == (0, 0.5)


def test_the_surest_objects_are_looked_at():
    judged = verdict(wants({"class": "dog", "count": 1, "color": "red"}), dogs(2), ["blue", "red"])
    assert judged.strict == 0
    assert judged.critique == "2 dog instead of 1; dog is blue, not red"


CAT_AND_DOG = wants({"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]})


def test_a_wrong_relation_is_one_term_of_three():
    right = verdict(CAT_AND_DOG, [detected("dog", 0), detected("cat", 50)])
    assert (right.strict, right.soft) == (1, 1)
    wrong = verdict(CAT_AND_DOG, [detected("dog", 50), detected("cat", 0)])
    assert (wrong.strict, wrong.soft) == (0, pytest.approx(2 / 3))
    assert wrong.critique == "dog is not left of cat"
    assert {region.reason: region.credit for region in wrong.regions} == {"cat": 1, "dog": 0}


def test_a_relation_to_something_missing_is_wrong():
    judged = verdict(CAT_AND_DOG, [detected("dog", 0)])
    assert (judged.strict, judged.soft) == (0, pytest.approx(1 / 3))
    assert verdict(CAT_AND_DOG, []).soft == 0
    assert verdict(CAT_AND_DOG, [detected("cat")]).soft == pytest.approx(1 / 3)


def test_a_relation_may_point_to_a_later_entry():
    request = wants({"class": "dog", "count": 1, "position": ["above", 1]}, {"class": "cat", "count": 1})
    assert verdict(request, [detected("dog", 0, 0), detected("cat", 0, 50)]).strict == 1
    assert verdict(request, [detected("dog", 0, 50), detected("cat", 0, 0)]).strict == 0


def test_every_pair_must_stand_in_the_relation():
    request = wants({"class": "cat", "count": 1}, {"class": "dog", "count": 2, "position": ["left of", 0]})
    assert verdict(request, [detected("dog", 0), detected("dog", 20), detected("cat", 50)]).strict == 1
    judged = verdict(request, [detected("dog", 0), detected("dog", 90), detected("cat", 50)])
    assert (judged.strict, judged.soft) == (0, pytest.approx(2 / 3))
    assert [region.credit for region in judged.regions] == [1, 1, 0]


@pytest.mark.parametrize(("x", "soft"), [(0, 0.75), (90, 0.5)])
def test_the_position_is_judged_after_a_failed_colour(x, soft):
    request = wants(
        {"class": "cat", "count": 1}, {"class": "dog", "count": 1, "color": "red", "position": ["left of", 0]}
    )
    judged = verdict(request, [detected("dog", x), detected("cat", 50)], ["blue", None])
    assert (judged.strict, judged.soft) == (0, soft)


def test_scores_stay_in_range_and_strict_implies_soft_without_surplus():
    rng = np.random.default_rng(0)
    for _ in range(300):
        number = rng.integers(0, 6)
        things = [detected(rng.choice(["dog", "cat", "cow"]), *rng.uniform(0, 50, 2)) for _ in range(number)]
        colours = [str(colour) for colour in rng.choice(["red", "blue"], len(things))]
        request = wants(
            {"class": "dog", "count": int(rng.integers(1, 3)), "color": "red"},
            {"class": "cat", "count": int(rng.integers(1, 3)), "position": [str(rng.choice([*RELATIONS])), 0]},
            exclude=[{"class": "cow", "count": 1}],
        )
        judged = verdict(request, things, colours, surplus=float(rng.choice([0, 0.5, 1, 3])))
        assert 0 <= judged.soft <= 1
        assert judged.strict in (0, 1)
        if judged.strict:
            assert verdict(request, things, colours, surplus=0).soft == 1
        elif judged.soft == 1:
            pytest.fail(f"soft is full where strict is not: {request}, {things}")


def test_labels_have_one_spelling():
    same = [("Cell-Phone", "cell phone"), ("computer mouse", "mouse"), ("TV remote", "remote"), ("tvmonitor", "TV")]
    assert all(known_as(one) == known_as(two) for one, two in same)
    assert verdict(wants({"class": "computer keyboard", "count": 1}), [detected("Keyboard")]).strict == 1


def test_only_the_strongest_objects_count():
    things = [detected("dog", k, score=0.01 * (k + 1)) for k in range(40)] + [detected("cat", score=0.35)]
    strong = strongest(things, 0.3)
    scores = [thing.score for thing in strong if thing.label == "dog"]
    assert scores == pytest.approx([0.4 - 0.01 * k for k in range(10)])
    assert [thing.label for thing in strong].count("cat") == 1
    assert len(strongest(things, 0)) == 17
    assert strongest([detected("dog", score=0.3)], 0.3) == []


@pytest.mark.parametrize(
    ("requested", "says"),
    [
        ({}, "wants has no `include`"),
        ({"tag": "text", "text": "H O"}, "wants has no `include`"),
        (wants({"class": "Unicorn"}), "does not know the class 'Unicorn'"),
        (wants({"class": "dog"}, exclude=[{"class": "unicorn"}]), "does not know the class 'unicorn'"),
        (wants({"class": "dog", "color": "cyan"}), "the colour 'cyan' is not recognised; known: red, "),
        (wants({"class": "dog"}, {"class": "Dog"}), "'Dog' is requested twice"),
        (wants({"class": "dog", "count": 0}), "a count of at least 1"),
        (wants({"class": "dog", "count": "two"}), "a count of at least 1"),
        (wants({"count": 1}), "needs a class"),
        (wants({"class": "dog", "position": ["left of", 0]}), "is not a relation to another entry"),
        (wants({"class": "dog", "position": ["behind", 1]}, {"class": "cat"}), "is not a relation to another entry"),
        (wants({"class": "dog", "position": ["above", 2]}, {"class": "cat"}), "is not a relation to another entry"),
        (wants({"class": "dog", "position": None}, {"class": "cat"}), "is not a relation to another entry"),
    ],
)
def test_requests_that_cannot_be_judged_are_refused(requested, says):
    with pytest.raises(ValueError, match=says):
        checked(requested, {"dog", "cat"}, PALETTE)


def test_each_class_is_requested_once():
    request = wants({"class": "Dog"}, {"class": "cat", "position": ("left of", 0)}, exclude=[{"class": "Dog"}])
    assert checked(request, {"dog", "cat"}, PALETTE) == ["Dog", "cat"]
    assert checked(wants({"class": "unicorn"}), None, PALETTE) == ["unicorn"]


# ------------------------------------------------------------------------------- the embedded world, end to end


class WorldDetector:
    """The exact verifier of the embedded world as a detector."""

    classes = frozenset(SHAPES)

    def detect(self, images, labels):
        return [
            [Detection(blob.name, 1.0, blob.box) for blob in blobs if blob.name in requested]
            for blobs, requested in zip(find_blobs(images.numpy()), labels, strict=True)
        ]


class WorldEye:
    palette = tuple(COLOURS)

    def name(self, image, detections):
        by_box = {blob.box: blob.colour for blob in find_blobs(image[None].numpy())[0]}
        return [by_box[detection.box] for detection in detections]


@pytest.fixture(scope="module")
def world():
    return GenEval(WorldDetector(), WorldEye(), Card("geneval"))


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(0)
    by_tag = {}
    for request in requests():
        if request["tag"] != "text" and not any("size" in item for item in request["include"]):
            by_tag.setdefault(request["tag"], []).append(request)
    chosen = [tagged[i] for tagged in by_tag.values() for i in rng.choice(len(tagged), 12)]
    return torch.from_numpy(np.stack([draw(request, rng) for request in chosen])), chosen


def test_right_drawings_are_right(world, drawn):
    images, drawn_requests = drawn
    tags = {request["tag"] for request in drawn_requests}
    assert tags == {"one_object", "two_objects", "counting", "colors", "color_attr", "position"}
    scores = world(images, [Prompt("", w) for w in drawn_requests])
    assert not scores.failures
    assert scores.values.min() == 1
    assert set(scores.critiques) == {"right"}
    assert scores.regions[scores.regions.isfinite()].min() == 1


def changed(request: dict) -> tuple[dict, float] | None:
    """A request that a drawing of `request` fails by one thing, and the soft score it should get."""
    (first, *rest) = request["include"]
    if request["tag"] == "position":
        relation, other = first["position"]
        terms = 3 + 2 * ("color" in first)
        return request | {"include": [first | {"position": [OPPOSITE[relation], other]}, *rest]}, 1 - 1 / terms
    if request["tag"] == "counting":
        terms = 1 + ("color" in first)
        missing = 1 / (first["count"] + 1)
        return wants(first | {"count": first["count"] + 1}), 1 - missing * (2 if terms == 2 else 1) / terms
    if request["tag"] in ("colors", "color_attr"):
        other = next(colour for colour in COLOURS if colour != first["color"])
        return wants(first | {"color": other}, *rest), 1 - 1 / (2 * len(request["include"]))
    if request["tag"] == "one_object":
        return wants(shaped(next(shape for shape in SHAPES if shape != first["class"]))), 0.0
    return None


def test_drawings_of_something_else_are_wrong_by_as_much(world, drawn):
    cases = [(image, changed(request)) for image, request in zip(*drawn, strict=True)]
    cases = [(image, *case) for image, case in cases if case]
    assert len(cases) == 60
    scores = world(torch.stack([image for image, *_ in cases]), [Prompt("", request) for _, request, _ in cases])
    assert scores.column("strict").max() == 0
    torch.testing.assert_close(scores.column("soft"), torch.tensor([soft for *_, soft in cases]))


def test_surplus_shapes_are_credited_where_they_lie(world):
    image = torch.from_numpy(draw(wants(shaped("circle", "red", 2), tag="counting"), np.random.default_rng(1)))
    scores = world(image[None], [Prompt("", wants(shaped("circle")))])
    assert scores.column("strict").item() == 1
    assert scores.column("soft").item() == 0
    credits = scores.regions[scores.regions.isfinite()]
    assert credits.max() == 1
    assert credits.min() == -1
    assert scores.critiques == ("2 circle instead of 1",)


def test_images_that_cannot_be_judged_fail_alone(world, drawn):
    images, prompts = drawn[0][:5].clone(), [Prompt("", w) for w in drawn[1][:5]]
    images[0, 0, 3, 3] = torch.nan
    prompts[2] = Prompt("a dog", wants({"class": "dog"}))
    prompts[3] = Prompt('the text "H O"', {"tag": "text", "text": "H O"})
    scores = world(images, prompts)
    assert scores.column("strict").nan_to_num(-1).tolist() == [-1, 1, -1, -1, 1]
    assert list(scores.failures) == [0, 2, 3]
    assert "'dog'" in scores.failures[2]
    assert scores.regions[2].isnan().all()


def test_without_an_eye_colours_are_not_scored(drawn):
    blind = GenEval(WorldDetector(), None, Card("geneval"))
    scores = blind(drawn[0], [Prompt("", w) for w in drawn[1]])
    coloured = [i for i, w in enumerate(drawn[1]) if any("color" in item for item in w["include"])]
    assert list(scores.failures) == coloured
    assert "is not recognised; known" in scores.failures[coloured[0]]
    assert scores.values.isnan().all(1).sum() == len(coloured)


def test_counting_wants_surer_detections(world, drawn):
    class Unsure(WorldDetector):
        def detect(self, images, labels):
            return [[replace(thing, score=0.8) for thing in things] for things in super().detect(images, labels)]

    request = wants(shaped("circle", count=2), tag="counting")
    image = torch.from_numpy(draw(request, np.random.default_rng(0)))[None]
    unsure = GenEval(Unsure(), None, Card("geneval"))
    assert unsure(image, [Prompt("", request)]).column("soft").item() == 0
    assert unsure(image, [Prompt("", request | {"tag": "two_object"})]).column("soft").item() == 1


# --------------------------------------------------------------------------------------------------- detectors

NAMES = {0: "cat", 1: "Dog", 2: "tvmonitor"}
LABELS = {"id2label": NAMES, "label2id": {name: number for number, name in NAMES.items()}}
SIZE = {"shortest_edge": 40, "longest_edge": 64}


def swin(first: int = 1) -> SwinConfig:
    return SwinConfig(
        image_size=32, embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=2,
        out_features=[f"stage{k}" for k in range(first, 5)],
    )  # fmt: skip


def mask2former(folder: Path) -> None:
    config = Mask2FormerConfig(
        backbone_config=swin(), feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        dim_feedforward=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=6, **LABELS,
    )  # fmt: skip
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    Mask2FormerImageProcessor(size=SIZE).save_pretrained(folder)


def maskformer(folder: Path) -> None:
    config = MaskFormerConfig(
        backbone_config=swin(), decoder_config=detr_config(), fpn_feature_size=32, mask_feature_size=32, **LABELS
    )
    MaskFormerForInstanceSegmentation(config).save_pretrained(folder)
    MaskFormerImageProcessor(size=SIZE).save_pretrained(folder)


def detr(folder: Path) -> None:
    DetrForObjectDetection(detr_config(**LABELS)).save_pretrained(folder)
    DetrImageProcessor(size=SIZE).save_pretrained(folder)


def rt_detr(folder: Path) -> None:
    backbone = RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = RTDetrConfig(
        **LAYERS, **LABELS, backbone_config=backbone, encoder_hidden_dim=16, encoder_in_channels=[8, 16, 16],
        d_model=16, decoder_in_channels=[16] * 3, decoder_layers=1, num_denoising=0, hidden_expansion=0.5,
    )  # fmt: skip
    RTDetrForObjectDetection(config).save_pretrained(folder)
    RTDetrImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)


def grounding_dino(folder: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *("##" + letter for letter in LETTERS), "."]
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = GroundingDinoConfig(
        **LAYERS, backbone_config=swin(2), text_config=text | {"model_type": "bert", "vocab_size": len(words)},
        d_model=32, decoder_layers=2, num_feature_levels=4,
    )  # fmt: skip
    GroundingDinoForObjectDetection(config).save_pretrained(folder)
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    images = GroundingDinoImageProcessor(size={"height": 72, "width": 96})
    GroundingDinoProcessor(images, tokenizer).save_pretrained(folder)


BUILDERS = (mask2former, maskformer, detr, rt_detr, owlv2, grounding_dino)
MASKED, OPEN = {"mask2former", "maskformer"}, {"owlv2", "grounding_dino"}
FLOOR = 0.02  # so low that random models find something


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for build in BUILDERS:
        torch.manual_seed(0)
        made[build.__name__] = tmp_path_factory.mktemp(build.__name__)
        build(made[build.__name__])
    made["clip"] = open_clip_folder(tmp_path_factory.mktemp("clip"))
    return made


@pytest.fixture(scope="module", params=[build.__name__ for build in BUILDERS])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    return F.interpolate(torch.rand(4, 3, 6, 8, generator=generator), (50, 70)).mul(255).round() / 255


REQUESTED = [["cat"], ["Dog", "tv"], ["DOG"], []]


def test_detectors_report_requested_objects_inside_the_image(kind, folders, images):
    finder = detector(str(folders[kind]), FLOOR)
    assert finder.classes == (None if kind in OPEN else {"cat", "dog", "tv"})
    detections = finder.detect(images, REQUESTED)
    for things, labels in zip(detections, REQUESTED, strict=True):
        assert {thing.label for thing in things} <= set(labels)
    everything = [thing for things in detections for thing in things]
    assert len(everything) > 3
    for thing in everything:
        left, top, right, bottom = thing.box
        assert 0 <= left < right <= 70
        assert 0 <= top < bottom <= 50
        assert FLOOR < thing.score <= 1
        assert (thing.mask is not None) == (kind in MASKED)
        if thing.mask is not None:
            assert thing.mask.shape == (50, 70)
            assert thing.mask[top:bottom, left:right].sum() == thing.mask.sum() > 0
    for things in detections:
        assert [thing.score for thing in things] == sorted((thing.score for thing in things), reverse=True)


def same(one: list[Detection], two: list[Detection]) -> None:
    """Equal up to rounding, and up to the order of equal scores."""

    def by_position(things):
        return sorted((thing.label, *(round(edge, 2) for edge in thing.box), thing.score) for thing in things)

    assert len(one) == len(two)
    for a, b in zip(by_position(one), by_position(two), strict=True):
        assert a[0] == b[0]
        assert a[1:] == pytest.approx(b[1:], abs=2e-2)


def test_detectors_see_each_image_alone(kind, folders, images):
    finder = detector(str(folders[kind]), FLOOR)
    together = finder.detect(images, REQUESTED)
    for i in range(len(images)):
        same(finder.detect(images[i : i + 1], REQUESTED[i : i + 1])[0], together[i])
    order = [2, 3, 0, 1]
    for things, i in zip(finder.detect(images[order], [REQUESTED[i] for i in order]), order, strict=True):
        same(things, together[i])


def test_masks_agree_with_those_of_transformers(folders, images):
    folder, square = str(folders["mask2former"]), F.interpolate(images, (384, 384))
    processor = AutoImageProcessor.from_pretrained(folder, size={"height": 64, "width": 64})
    finder = detector(folder, FLOOR)
    finder.process = processor
    detections = finder.detect(square, [list(NAMES.values())] * 4)
    with torch.no_grad():
        outputs = finder.model(**processor(images=list(square.mul(255).to(torch.uint8)), return_tensors="pt"))
    stock = processor.post_process_instance_segmentation(
        outputs, threshold=FLOOR, target_sizes=[(384, 384)] * 4, return_binary_maps=True
    )
    for ours, theirs in zip(detections, stock, strict=True):
        assert len(theirs["segments_info"]) == 6  # it returns one per query, we all above the threshold
        for info, mask in zip(theirs["segments_info"], theirs["segmentation"].bool(), strict=True):
            candidates = [t for t in ours if t.label == NAMES[info["label_id"]] and abs(t.score - info["score"]) < 5e-3]
            assert max(float((t.mask & mask).sum() / (t.mask | mask).sum()) for t in candidates) > 0.95


def test_masks_are_placed_correctly_in_padded_images():
    """A 30 x 40 image enlarged to 60 x 80, in the corner of 96 x 96: the mask covers its lower right quarter."""
    shown = torch.zeros(1, 96, 96, dtype=torch.long)
    shown[:, :60, :80] = 1
    masks = torch.full((1, 2, 24, 24), -9.0)
    masks[0, 0, 7:15, 10:20] = 9  # at a quarter of the resolution, of rows 28 to 60 and columns 40 to 80
    inputs = {"pixel_mask": shown, "pixel_values": torch.zeros(1, 3, 96, 96)}

    def detections(*kinds):
        outputs = ModelOutput(class_queries_logits=torch.tensor([kinds]), masks_queries_logits=masks)
        return masked(0.3)(inputs, outputs, (30, 40))[0]

    nothing = [0.0, 0.0, 9.0]
    ((number, score, box, mask),) = detections([0.0, 9.0, 0.0], nothing)
    assert number == 1
    assert score > 0.99
    assert box == pytest.approx((20, 14, 40, 30), abs=1)
    assert mask[16:, 21:].all()
    assert detections(nothing, nothing) == []
    assert detections(nothing, [0.0, 9.0, 0.0]) == []  # a mask without a pixel


def test_a_model_that_detects_nothing_is_refused(tmp_path):
    ViTConfig(hidden_size=16).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"geneval: .*ViTConfig is not a supported detector") as error:
        geneval(str(tmp_path), colour_model=None)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------- the loaded scorer


@pytest.fixture(scope="module")
def scorer(kind, folders):
    return geneval(str(folders[kind]), str(folders["clip"]), None, confidence=FLOOR, counting=FLOOR)


ORDERS = [
    wants({"class": "cat", "count": 2}, tag="counting", exclude=[{"class": "cat", "count": 3}]),
    wants({"class": "dog", "count": 1, "color": "red"}, {"class": "TV", "count": 1, "color": "white"}),
    wants({"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}),
    wants({"class": "tv monitor", "count": 3}),
]


def test_the_scorer_keeps_its_contract(scorer, images):
    prompts, before = [Prompt("", request) for request in ORDERS], images.clone()
    scores = scorer(images, prompts)
    assert not scores.failures
    assert scores.values.dtype == torch.float32
    assert ((scores.values >= 0) & (scores.values <= 1)).all()
    assert scores.regions.shape == (4, 8, 8)
    assert torch.equal(images, before)
    alone = torch.cat([scorer(images[i : i + 1], prompts[i : i + 1]).values for i in range(4)])
    torch.testing.assert_close(alone, scores.values)
    order = [3, 0, 2, 1]
    torch.testing.assert_close(scorer(images[order], [prompts[i] for i in order]).values, scores.values[order])


def test_a_broken_image_or_an_unknown_class_fails_alone(scorer, images, kind):
    broken = images.clone()
    broken[1] = torch.inf
    with_unknown = [*ORDERS[:3], wants({"class": "zebra", "count": 1})]
    scores = scorer(broken, [Prompt("", w) for w in with_unknown])
    assert list(scores.failures) == ([1] if kind in OPEN else [1, 3])
    assert scores.values.isnan().any(1).nonzero().flatten().tolist() == list(scores.failures)
    intact = scorer(images, [Prompt("", w) for w in ORDERS])
    torch.testing.assert_close(scores.values[[0, 2]], intact.values[[0, 2]])


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_constant_images_are_scored(scorer, level):
    scores = scorer(torch.full((2, 3, 32, 32), level), [Prompt("", request) for request in ORDERS[1:3]])
    assert scores.values.isfinite().all()


def test_the_card_tells_weights_and_settings_apart(folders, tmp_path):
    folder, eye = str(folders["detr"]), str(folders["clip"])
    card = geneval(folder, eye, None).card
    assert (card.low, card.high, card.comparable_across_prompts, len(card.checkpoint)) == (0, 1, True, 64)
    assert geneval(folder, eye, None).card == card
    assert geneval(folder, eye, None, surplus=0).card.version != card.version
    assert geneval(folder, None).card.checkpoint != card.checkpoint
    torch.manual_seed(7)
    detr(tmp_path)
    assert geneval(str(tmp_path), eye, None).card.checkpoint != card.checkpoint


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"confidence": -1}, "confidence and counting are 0 to 1, not -1 and 0.9"),
        ({"surplus": -0.5}, "surplus is 0 or more, not -0.5"),
        ({"model": "nobody/nothing"}, "geneval: nobody/nothing could not be loaded"),
        ({"colour_model": "nothing"}, "geneval: the colour model nothing could not be loaded: clip: 'nothing' is"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_line(settings, says, folders):
    with pytest.raises(ValueError, match=says) as error:
        geneval(**({"model": str(folders["detr"]), "colour_model": None} | settings))
    assert "\n" not in str(error.value)


def test_an_object_is_cut_out_on_grey():
    image = torch.arange(48).reshape(1, 6, 8).expand(3, 6, 8) / 48
    mask = torch.zeros(6, 8, dtype=torch.bool)
    mask[2:4, 3] = True
    cut = cut_out(image, Detection("dog", 1, (2.4, 2, 4.6, 4), mask))
    assert cut.shape == (3, 2, 3)
    assert torch.equal(cut[:, :, 1], image[:, 2:4, 3])
    assert cut[:, :, [0, 2]].unique().tolist() == pytest.approx([GREY])
    assert cut_out(image, Detection("dog", 1, (7.8, 5.8, 8, 6))).shape == (3, 1, 1)


def test_colours_are_named_by_the_likeliest_sentence(folders, images):
    eye = ClipColours(clip(str(folders["clip"])))
    things = [
        Detection("dog", 1, (0, 0, 30, 30)),
        Detection("cat", 1, (20, 10, 60, 50)),
        Detection("dog", 1, (5, 5, 25, 40)),
    ]
    named = eye.name(images[0], things)
    assert [eye.name(images[0], [thing])[0] for thing in things] == named
    for thing, colour in zip(things, named, strict=True):
        left, top, right, bottom = thing.box
        with torch.no_grad():
            crop = eye.clip.model.encode_image(eye.clip.prepared(images[:1, :, top:bottom, left:right]))[0]
            likeness = {}
            for candidate in PALETTE:
                texts = [text.format(colour=candidate, label=thing.label) for text in SENTENCES]
                words = eye.clip.model.encode_text(eye.clip.tokenizer(texts), normalize=True).mean(0)
                likeness[candidate] = float(torch.cosine_similarity(crop, words, dim=0))
        assert colour == max(likeness, key=likeness.get)
