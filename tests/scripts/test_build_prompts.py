"""The prompt lists of the recipes."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from build_prompts import TEST, lists
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

from mmalign.data import prompts as prompt_files
from reward_models import load
from reward_models.detect import known_as
from reward_models.meaning import meaning
from reward_models.scorers.geneval import PALETTE, checked
from reward_models.scorers.ocr import wanted
from reward_models.shapes_world import caption, draw

FOLDER = Path(__file__).parents[2] / "assets/prompts"
COCO = {known_as(name) for name in MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]}


def read(kind):
    return {split: prompt_files.read(FOLDER / f"{kind}_{split}.jsonl") for split in ("train", "held_out")}


@pytest.mark.parametrize(("name", "rows"), lists())
def test_shipped_lists_are_what_the_script_writes(name, rows):
    shipped = prompt_files.read(FOLDER / name)
    assert [{"prompt": p.text, "id": p.id, **p.wants} for p in shipped] == rows
    assert len({p.text for p in shipped}) == len(shipped)


def test_test_captions_have_one_wording_and_can_be_drawn_and_verified():
    prompts, ids = prompt_files.read(FOLDER / "test.jsonl"), set()
    for name in ("train", "validation"):
        ids |= {p.id for p in prompt_files.read(FOLDER / f"{name}.jsonl")}
    assert Counter(p.wants["tag"] for p in prompts) == TEST
    assert len({meaning(p.text) for p in prompts}) == len(prompts) == 248
    assert not {p.id for p in prompts} & ids
    rng = np.random.default_rng(0)
    assert [p.text for p in prompts] == [caption(p.wants) for p in prompts]
    drawn = torch.from_numpy(np.stack([draw(p.wants, rng) for p in prompts]))
    assert load("shapes")(drawn, prompts).values[:, 0].min() == 1


@pytest.mark.parametrize("kind", ["geneval", "ocr", "scenes"])
def test_both_lists_of_a_kind_differ_in_texts_and_ids(kind):
    train, held_out = read(kind).values()
    assert not {p.text for p in train} & {p.text for p in held_out}
    assert not {p.id for p in train} & {p.id for p in held_out}


def test_geneval_can_judge_every_request():
    for p in [p for prompts in read("geneval").values() for p in prompts]:
        assert checked(p.wants, COCO, PALETTE)
        assert not p.text.startswith("a photo of")  # the benchmark's wording
        for item in p.wants["include"]:
            assert item["class"][:-2] in p.text  # knife, knives
            assert item.get("color", "") in p.text


def test_no_pair_of_objects_in_a_relation_is_in_both_lists():
    def pairs(prompts):
        positions = [p.wants["include"] for p in prompts if p.wants["tag"] == "position"]
        return {frozenset(item["class"] for item in include) for include in positions}

    train, held_out = read("geneval").values()
    assert len(pairs(held_out)) == 17
    assert not pairs(train) & pairs(held_out)


def test_no_phrase_is_written_in_both_lists():
    train, held_out = ({tuple(wanted(p)) for p in prompts} for prompts in read("ocr").values())
    assert (len(train), len(held_out)) == (400, 100)
    assert not train & held_out
