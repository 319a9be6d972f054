"""GenEval's judgement against known answers, and the detectors it can use as tiny random models of the real classes."""

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
from reward_models.shapes_world import COLOURS, OPPOSITE, RELATIONS, SHAPES, draw, requests, thing as shaped

# ---------------------------------------------------------------------------------------------- pure functions


def found(label: str, x: float = 0, y: float = 0, score: float = 0.95, side: float = 10) -> Detection:
    return Detection(label, score, (x - side / 2, y - side / 2, x + side / 2, y + side / 2))


def dogs(n: int) -> list[Detection]:
    return [found("dog", 20 * k) for k in range(n)]


def wants(*include: dict, **extra) -> dict:
    return {"include": list(include), **extra}


def verdict(asked: dict, things: list[Detection], colours: list[str] | None = None, **settings):
    return judge(asked, things, colours or [None] * len(things), **settings)


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
    assert related(found("a", x, y, side=2).box, found("b", side=2).box) == expected


def test_relations_of_known_boxes():
    reference = found("b").box
    assert related(reference, reference) == set()
    assert related(found("a", 1.9).box, reference) == set()  # within a tenth of the widths' sum
    assert related(found("a", 3.9).box, reference) == set()  # 1.9 of 3.9 is below the cosine of 60 degrees
    assert related(found("a", 4.1).box, reference) == {"right of"}
    assert related(found("a", -4.1).box, reference) == {"left of"}
    assert related((0, 0, 100, 2), (45, 50, 55, 52)) == {"above"}


def test_relations_are_the_opposite_the_other_way_round():
    rng = np.random.default_rng(0)
    for _ in range(200):
        one, two = (found("a", *rng.uniform(-30, 30, 2), side=rng.uniform(1, 20)).box for _ in range(2))
        assert related(one, two) == {OPPOSITE[relation] for relation in related(two, one)}


@pytest.mark.parametrize(
    ("asked", "seen", "surplus", "expected"),
    [(1, 1, 1, 1), (3, 2, 1, 2 / 3), (3, 0, 1, 0), (3, 4, 1, 2 / 3), (3, 4, 0.5, 5 / 6), (3, 4, 0, 1), (1, 5, 1, 0)],
)
def test_count_term(asked, seen, surplus, expected):
    assert count_score(asked, seen, surplus) == pytest.approx(expected)


def test_single_object():
    dog = wants({"class": "dog", "count": 1})
    assert verdict(dog, dogs(1)).strict == verdict(dog, dogs(1)).soft == 1
    assert verdict(dog, dogs(1)).critique == "right"
    missing = verdict(dog, [found("cat")])
    assert (missing.strict, missing.soft, missing.critique, missing.regions) == (0, 0, "0 dog instead of 1", ())


def test_five_for_one_is_not_below_nothing():
    crowd = verdict(wants({"class": "dog", "count": 1}), dogs(5))
    assert crowd.soft == 0
    assert crowd.strict == 1  # at least one is there, and no exclusion forbids the others
    assert [region.credit for region in crowd.regions] == [1, -1, -1, -1, -1]
    lenient = verdict(wants({"class": "dog", "count": 1}), dogs(5), surplus=0)
    assert (lenient.soft, lenient.critique, len(lenient.regions)) == (1, "right", 1)


@pytest.mark.parametrize(("seen", "strict", "soft"), [(2, 0, 2 / 3), (3, 1, 1), (4, 0, 2 / 3), (6, 0, 0), (16, 0, 0)])
def test_counting_is_exact_by_its_exclusion(seen, strict, soft):
    asked = wants({"class": "dog", "count": 3}, tag="counting", exclude=[{"class": "dog", "count": 4}])
    judged = verdict(asked, dogs(seen))
    assert (judged.strict, judged.soft) == (strict, pytest.approx(soft))


def test_an_exclusion_of_something_else_is_a_term():
    asked = wants({"class": "dog", "count": 1}, exclude=[{"class": "cat", "count": 1}])
    assert verdict(asked, dogs(1)).soft == 1
    judged = verdict(asked, [*dogs(1), found("Cat", 50)])
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
    right = verdict(CAT_AND_DOG, [found("dog", 0), found("cat", 50)])
    assert (right.strict, right.soft) == (1, 1)
    wrong = verdict(CAT_AND_DOG, [found("dog", 50), found("cat", 0)])
    assert (wrong.strict, wrong.soft) == (0, pytest.approx(2 / 3))
    assert wrong.critique == "dog is not left of cat"
    assert {region.reason: region.credit for region in wrong.regions} == {"cat": 1, "dog": 0}


def test_a_relation_to_something_missing_is_wrong():
    judged = verdict(CAT_AND_DOG, [found("dog", 0)])
    assert (judged.strict, judged.soft) == (0, pytest.approx(1 / 3))
    assert verdict(CAT_AND_DOG, []).soft == 0
    assert verdict(CAT_AND_DOG, [found("cat")]).soft == pytest.approx(1 / 3)


def test_a_relation_may_point_to_a_later_entry():
    asked = wants({"class": "dog", "count": 1, "position": ["above", 1]}, {"class": "cat", "count": 1})
    assert verdict(asked, [found("dog", 0, 0), found("cat", 0, 50)]).strict == 1
    assert verdict(asked, [found("dog", 0, 50), found("cat", 0, 0)]).strict == 0


def test_every_pair_must_stand_in_the_relation():
    asked = wants({"class": "cat", "count": 1}, {"class": "dog", "count": 2, "position": ["left of", 0]})
    assert verdict(asked, [found("dog", 0), found("dog", 20), found("cat", 50)]).strict == 1
    judged = verdict(asked, [found("dog", 0), found("dog", 90), found("cat", 50)])
    assert (judged.strict, judged.soft) == (0, pytest.approx(2 / 3))
    assert [region.credit for region in judged.regions] == [1, 1, 0]


@pytest.mark.parametrize(("x", "soft"), [(0, 0.75), (90, 0.5)])
def test_the_position_is_judged_after_a_failed_colour(x, soft):
    asked = wants(
        {"class": "cat", "count": 1}, {"class": "dog", "count": 1, "color": "red", "position": ["left of", 0]}
    )
    judged = verdict(asked, [found("dog", x), found("cat", 50)], ["blue", None])
    assert (judged.strict, judged.soft) == (0, soft)


def test_scores_stay_in_range_and_strict_implies_soft_without_surplus():
    rng = np.random.default_rng(0)
    for _ in range(300):
        things = [found(rng.choice(["dog", "cat", "cow"]), *rng.uniform(0, 50, 2)) for _ in range(rng.integers(0, 6))]
        colours = [str(colour) for colour in rng.choice(["red", "blue"], len(things))]
        asked = wants(
            {"class": "dog", "count": int(rng.integers(1, 3)), "color": "red"},
            {"class": "cat", "count": int(rng.integers(1, 3)), "position": [str(rng.choice([*RELATIONS])), 0]},
            exclude=[{"class": "cow", "count": 1}],
        )
        judged = verdict(asked, things, colours, surplus=float(rng.choice([0, 0.5, 1, 3])))
        assert 0 <= judged.soft <= 1
        assert judged.strict in (0, 1)
        if judged.strict:
            assert verdict(asked, things, colours, surplus=0).soft == 1
        elif judged.soft == 1:
            pytest.fail(f"soft is full where strict is not: {asked}, {things}")


def test_labels_have_one_spelling():
    same = [("Cell-Phone", "cell phone"), ("computer mouse", "mouse"), ("TV remote", "remote"), ("tvmonitor", "TV")]
    assert all(known_as(one) == known_as(two) for one, two in same)
    assert verdict(wants({"class": "computer keyboard", "count": 1}), [found("Keyboard")]).strict == 1


def test_only_the_strongest_objects_count():
    things = [found("dog", k, score=0.01 * (k + 1)) for k in range(40)] + [found("cat", score=0.35)]
    kept = strongest(things, 0.3)
    assert [thing.score for thing in kept if thing.label == "dog"] == pytest.approx([0.4 - 0.01 * k for k in range(10)])
    assert [thing.label for thing in kept].count("cat") == 1
    assert len(strongest(things, 0)) == 17
    assert strongest([found("dog", score=0.3)], 0.3) == []


@pytest.mark.parametrize(
    ("asked", "says"),
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
def test_what_cannot_be_judged_is_refused(asked, says):
    with pytest.raises(ValueError, match=says):
        checked(asked, {"dog", "cat"}, PALETTE)


def test_what_can_be_judged_is_asked_for_once():
    asked = wants({"class": "Dog"}, {"class": "cat", "position": ("left of", 0)}, exclude=[{"class": "Dog"}])
    assert checked(asked, {"dog", "cat"}, PALETTE) == ["Dog", "cat"]
    assert checked(wants({"class": "unicorn"}), None, PALETTE) == ["unicorn"]


# ------------------------------------------------------------------------------- the embedded world, end to end


class WorldDetector:
    """The exact verifier of the embedded world as a detector."""

    classes = frozenset(SHAPES)

    def detect(self, images, asked):
        return [
            [Detection(seen.name, 1.0, seen.box) for seen in things if seen.name in labels]
            for things, labels in zip(find_blobs(images.numpy()), asked, strict=True)
        ]


class WorldEye:
    palette = tuple(COLOURS)

    def name(self, image, found):
        by_box = {seen.box: seen.colour for seen in find_blobs(image[None].numpy())[0]}
        return [by_box[thing.box] for thing in found]


@pytest.fixture(scope="module")
def world():
    return GenEval(WorldDetector(), WorldEye(), Card("geneval"))


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(0)
    by_tag = {}
    for asked in requests():
        if asked["tag"] != "text" and not any("size" in item for item in asked["include"]):
            by_tag.setdefault(asked["tag"], []).append(asked)
    chosen = [tagged[i] for tagged in by_tag.values() for i in rng.choice(len(tagged), 12)]
    return torch.from_numpy(np.stack([draw(asked, rng) for asked in chosen])), chosen


def test_right_drawings_are_right(world, drawn):
    images, asked = drawn
    assert {w["tag"] for w in asked} == {"one_object", "two_objects", "counting", "colors", "color_attr", "position"}
    scores = world(images, [Prompt("", w) for w in asked])
    assert not scores.failures
    assert scores.values.min() == 1
    assert set(scores.critiques) == {"right"}
    assert scores.regions[scores.regions.isfinite()].min() == 1


def changed(asked: dict) -> tuple[dict, float] | None:
    """A request that a drawing of `asked` fails by one thing, and the soft score it should get."""
    (first, *rest) = asked["include"]
    if asked["tag"] == "position":
        relation, other = first["position"]
        terms = 3 + 2 * ("color" in first)
        return asked | {"include": [first | {"position": [OPPOSITE[relation], other]}, *rest]}, 1 - 1 / terms
    if asked["tag"] == "counting":
        terms = 1 + ("color" in first)
        missing = 1 / (first["count"] + 1)
        return wants(first | {"count": first["count"] + 1}), 1 - missing * (2 if terms == 2 else 1) / terms
    if asked["tag"] in ("colors", "color_attr"):
        other = next(colour for colour in COLOURS if colour != first["color"])
        return wants(first | {"color": other}, *rest), 1 - 1 / (2 * len(asked["include"]))
    if asked["tag"] == "one_object":
        return wants(shaped(next(shape for shape in SHAPES if shape != first["class"]))), 0.0
    return None


def test_drawings_of_something_else_are_wrong_by_as_much(world, drawn):
    cases = [(image, changed(asked)) for image, asked in zip(*drawn, strict=True)]
    cases = [(image, *case) for image, case in cases if case]
    assert len(cases) == 60
    scores = world(torch.stack([image for image, *_ in cases]), [Prompt("", asked) for _, asked, _ in cases])
    assert scores.column("strict").max() == 0
    torch.testing.assert_close(scores.column("soft"), torch.tensor([soft for *_, soft in cases]))


def test_surplus_shapes_are_seen_where_they_are(world):
    image = torch.from_numpy(draw(wants(shaped("circle", "red", 2), tag="counting"), np.random.default_rng(1)))
    scores = world(image[None], [Prompt("", wants(shaped("circle")))])
    assert scores.column("strict").item() == 1
    assert scores.column("soft").item() == 0
    credits = scores.regions[scores.regions.isfinite()]
    assert credits.max() == 1
    assert credits.min() == -1
    assert scores.critiques == ("2 circle instead of 1",)


def test_what_cannot_be_judged_fails_alone(world, drawn):
    images, asked = drawn[0][:5].clone(), [Prompt("", w) for w in drawn[1][:5]]
    images[0, 0, 3, 3] = torch.nan
    asked[2] = Prompt("a dog", wants({"class": "dog"}))
    asked[3] = Prompt('the text "H O"', {"tag": "text", "text": "H O"})
    scores = world(images, asked)
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
        def detect(self, images, asked):
            return [[replace(thing, score=0.8) for thing in things] for things in super().detect(images, asked)]

    asked = wants(shaped("circle", count=2), tag="counting")
    image = torch.from_numpy(draw(asked, np.random.default_rng(0)))[None]
    unsure = GenEval(Unsure(), None, Card("geneval"))
    assert unsure(image, [Prompt("", asked)]).column("soft").item() == 0
    assert unsure(image, [Prompt("", asked | {"tag": "two_object"})]).column("soft").item() == 1


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


ASKED = [["cat"], ["Dog", "tv"], ["DOG"], []]


def test_detectors_find_what_is_asked_inside_the_image(kind, folders, images):
    finder = detector(str(folders[kind]), FLOOR)
    assert finder.classes == (None if kind in OPEN else {"cat", "dog", "tv"})
    seen = finder.detect(images, ASKED)
    assert all({thing.label for thing in things} <= set(asked) for things, asked in zip(seen, ASKED, strict=True))
    everything = [thing for things in seen for thing in things]
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
    for things in seen:
        assert [thing.score for thing in things] == sorted((thing.score for thing in things), reverse=True)


def same(one: list[Detection], two: list[Detection]) -> None:
    """Equal up to rounding, and up to the order of equal scores."""

    def by_place(things):
        return sorted((thing.label, *(round(edge, 2) for edge in thing.box), thing.score) for thing in things)

    assert len(one) == len(two)
    for a, b in zip(by_place(one), by_place(two), strict=True):
        assert a[0] == b[0]
        assert a[1:] == pytest.approx(b[1:], abs=2e-2)


def test_detectors_see_each_image_alone(kind, folders, images):
    finder = detector(str(folders[kind]), FLOOR)
    together = finder.detect(images, ASKED)
    for i in range(len(images)):
        same(finder.detect(images[i : i + 1], ASKED[i : i + 1])[0], together[i])
    order = [2, 3, 0, 1]
    for things, i in zip(finder.detect(images[order], [ASKED[i] for i in order]), order, strict=True):
        same(things, together[i])


def test_masks_agree_with_those_of_transformers(folders, images):
    folder, square = str(folders["mask2former"]), F.interpolate(images, (384, 384))
    processor = AutoImageProcessor.from_pretrained(folder, size={"height": 64, "width": 64})
    finder = detector(folder, FLOOR)
    finder.process = processor
    seen = finder.detect(square, [list(NAMES.values())] * 4)
    with torch.no_grad():
        outputs = finder.model(**processor(images=list(square.mul(255).to(torch.uint8)), return_tensors="pt"))
    stock = processor.post_process_instance_segmentation(
        outputs, threshold=FLOOR, target_sizes=[(384, 384)] * 4, return_binary_maps=True
    )
    for ours, theirs in zip(seen, stock, strict=True):
        assert len(theirs["segments_info"]) == 6  # it keeps as many as there are queries, we all above the threshold
        for info, mask in zip(theirs["segments_info"], theirs["segmentation"].bool(), strict=True):
            alike = [t for t in ours if t.label == NAMES[info["label_id"]] and abs(t.score - info["score"]) < 5e-3]
            assert max(float((t.mask & mask).sum() / (t.mask | mask).sum()) for t in alike) > 0.95


def test_masks_lie_where_they_are_in_padded_images():
    """A 30 x 40 image shown as 60 x 80 in the corner of 96 x 96: its right lower quarter is queried."""
    shown = torch.zeros(1, 96, 96, dtype=torch.long)
    shown[:, :60, :80] = 1
    masks = torch.full((1, 2, 24, 24), -9.0)
    masks[0, 0, 7:15, 10:20] = 9  # at a quarter of the resolution, of rows 28 to 60 and columns 40 to 80
    inputs = {"pixel_mask": shown, "pixel_values": torch.zeros(1, 3, 96, 96)}

    def seen(*kinds):
        outputs = ModelOutput(class_queries_logits=torch.tensor([kinds]), masks_queries_logits=masks)
        return masked(0.3)(inputs, outputs, (30, 40))[0]

    nothing = [0.0, 0.0, 9.0]
    ((number, score, box, mask),) = seen([0.0, 9.0, 0.0], nothing)
    assert number == 1
    assert score > 0.99
    assert box == pytest.approx((20, 14, 40, 30), abs=1)
    assert mask[16:, 21:].all()
    assert seen(nothing, nothing) == []
    assert seen(nothing, [0.0, 9.0, 0.0]) == []  # a mask without a pixel


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
    prompts, before = [Prompt("", asked) for asked in ORDERS], images.clone()
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
    asked = [*ORDERS[:3], wants({"class": "zebra", "count": 1})]
    scores = scorer(broken, [Prompt("", w) for w in asked])
    assert list(scores.failures) == ([1] if kind in OPEN else [1, 3])
    assert scores.values.isnan().any(1).nonzero().flatten().tolist() == list(scores.failures)
    whole = scorer(images, [Prompt("", w) for w in ORDERS])
    torch.testing.assert_close(scores.values[[0, 2]], whole.values[[0, 2]])


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_constant_images_are_scored(scorer, level):
    scores = scorer(torch.full((2, 3, 32, 32), level), [Prompt("", asked) for asked in ORDERS[1:3]])
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
