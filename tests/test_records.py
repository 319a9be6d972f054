"""Judged images from disk: what is read, what is refused by its line, and what becomes of the rest."""

import json

import pytest
import torch
from torchvision.utils import save_image

from mmalign import policy as policies
from mmalign.config.paths import locate
from mmalign.data import judged_images as records
from mmalign.errors import BadInput
from mmalign.evaluation.generate import generate
from mmalign.policy.gaussian import GaussianFlow
from reward_models import Prompt

SIZE = (8, 12)  # height, width
GOOD = {"box": [0, 0, 6, 4], "score": 1.0, "label": "circle"}


@pytest.fixture
def write(tmp_path):
    def of(*rows, name="records.jsonl"):
        for k in range(3):
            save_image(torch.full((3, *SIZE), k / 4), tmp_path / f"{k}.png")
        save_image(torch.zeros(3, 8, 8), tmp_path / "square.png")
        path = tmp_path / name
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
        return path

    return of


def row(image="0.png", prompt="a circle", score=0.5, regions=(GOOD,), **more):
    return {"image": image, "prompt": prompt, "score": score, "regions": [*regions]} | more


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (row(regions=[GOOD | {"box": [6, 0, 0, 4]}]), "box (6, 0, 0, 4) is empty"),
        (row(regions=[GOOD | {"box": [0, 4, 6, 4]}]), "box (0, 4, 6, 4) is empty"),
        (row(regions=[GOOD | {"box": [0, 0, 13, 4]}]), "box (0, 0, 13, 4) lies outside the image of 12 x 8 pixels"),
        (row(regions=[GOOD | {"box": [-1, 0, 3, 4]}]), "lies outside"),
        (row(regions=[GOOD | {"box": [float("nan"), 0, 3, 4]}]), "box (nan, 0, 3, 4) is empty"),
        (row(regions=[GOOD | {"box": [0, 0, 3]}]), "box [0, 0, 3] is not four numbers"),
        (row(regions=[GOOD | {"box": [0, 0, "3", 4]}]), "is not four numbers"),
        (row(regions=[GOOD | {"score": 1.5}]), "credit 1.5 is outside [-1, 1]"),
        (row(regions=[GOOD | {"score": None}]), "the score of a region is None"),
        (row(regions=[{"box": [0, 0, 3, 4]}]), "no 'score'"),
        (row(size=[24, 16]), "the boxes refer to an image of [24, 16] pixels, 0.png is [12, 8]"),
        (row("square.png"), "square.png is 8 x 8 pixels; the model generates 12 x 8"),
        (row("lost.png"), "lost.png"),
        (row(score=None), "the score of the full image is None"),
        (row(score=float("nan")), "the score of the full image is nan"),
        ({"image": "0.png", "score": 1}, "no 'prompt'"),
        ("not JSON", "Expecting value"),
        ([1, 2], "an object with image, prompt"),
    ],
)
def test_a_bad_record_is_refused_by_its_line_and_the_rest_goes_on(write, bad, says):
    result = records.read(write(row(), bad, row("1.png")), SIZE)
    assert [record.image.name for record in result.records] == ["0.png", "1.png"]
    (reason,) = result.refused
    assert reason.startswith("record 2: ")
    assert says in reason


def test_a_file_without_a_right_record_is_the_users_mistake(write, tmp_path):
    with pytest.raises(BadInput, match=r"none can be used; record 1: .*lost\.png"):
        records.read(write(row("lost.png")), SIZE)
    with pytest.raises(BadInput, match=r"none can be used$"):
        records.read(write(""), SIZE)
    with pytest.raises(BadInput, match="No such file"):
        records.read(tmp_path / "nowhere.jsonl", SIZE)


def test_srums_own_layout_is_read(write):
    theirs = {
        "image_file": "1.png",
        "prompt": "a circle",
        "vlm_rewards": [{"object": "circle", "bbox": [0, 0, 6, 4], "score": -0.7}],
        "global": {"score": 0.4, "reason": "well placed"},
    }
    (record,) = records.read(write(theirs), SIZE).records
    assert (record.score, record.regions[0].credit, record.regions[0].label) == (0.4, -0.7, "circle")


JUDGED = {"object": "circle", "bbox": [0, 0, 6, 4], "score": -0.7, "area": 24, "reason": "blue"}
WHOLE = {"global_layout_score": 0.4, "reason": "well placed", "bbox": [0, 0, 8, 8], "area": 64}


@pytest.mark.parametrize(
    "theirs",
    [
        {"image_file": "1.png", "vlm_rewards": [JUDGED], "global_layout_reward": WHOLE, "vlm_raw_output": "Score: 0.4"},
        {
            "bad_image_file": "1.png", "good_image_file": "1.png",
            "vlm_rewards": [{"object": "global_layout_reward", "score": 0.4, "bbox": [0, 0, 8, 8]}, JUDGED],
        },
        {"image_file": "1.png", "vlm_rewards": [JUDGED], "global_layout_reward": {"score": 0.4}},
        {"image_file": "1.png", "vlm_rewards": [JUDGED], "global_layout_reward": 0.4},
        {"image_file": "1.png", "vlm_rewards": [JUDGED], "global_layout_reward": None, "global": {"score": 0.4}},
    ],
    ids=["as judged", "as trained on", "score", "number", "null"],
)  # fmt: skip
def test_the_files_of_srums_release_are_read_as_they_are(write, theirs):
    (record,) = records.read(write(theirs | {"prompt": "a circle"}), SIZE).records
    assert (record.image.name, record.score) == ("1.png", 0.4)
    assert [(region.box, region.credit, region.label) for region in record.regions] == [((0, 0, 6, 4), -0.7, "circle")]


@pytest.mark.parametrize(
    ("whole", "says"),
    [
        (
            {"global_layout_score": 0.0, "reason": "VLM failed"},
            "global_layout_reward is 0, which stands for a judge without",
        ),
        (None, "no score of the full image: global_layout_reward is needed, or score"),
        ({"reason": "none"}, "the score of the full image is None; a number is needed"),
        ({"global_layout_score": "0.4"}, "the score of the full image is '0.4'; a number is needed"),
        ({"global_layout_score": True}, "the score of the full image is True; a number is needed"),
    ],
)
def test_a_release_record_without_a_score_of_the_whole_is_left_out_with_its_reason(write, whole, says):
    theirs = {"image_file": "1.png", "prompt": "a circle", "vlm_rewards": [JUDGED], "global_layout_reward": whole}
    result = records.read(write(row(), theirs), SIZE)
    assert len(result.records) == 1
    assert result.refused[0].startswith(f"record 2: {says}")


def test_images_of_the_asked_prompts_and_no_others(write):
    result = records.read(write(row(), row("1.png", "a square", -0.5, ()), row("2.png", score=0.25)), SIZE)
    assert [(p.text, p.id) for p in result.prompts] == [("a circle", 0), ("a square", 1)]
    flow = GaussianFlow((3, *SIZE))
    observed = result.finished(flow, [result.prompts[1], result.prompts[0]], (2, 2))
    assert observed.prompt.tolist() == [1, 0, 1]
    assert observed.reward.tolist() == [0.5, -0.5, 0.25]
    torch.testing.assert_close(flow.decode(observed.x)[:, 0, 0, 0], torch.tensor([0, 0.25, 0.5]), atol=1 / 255, rtol=0)
    nan = torch.nan
    torch.testing.assert_close(observed.places[0], torch.tensor([[1, nan], [nan, nan]]), equal_nan=True)
    assert observed.places[1].isnan().all()
    assert observed.marks.credit.isnan().tolist() == [[False], [True], [False]]
    assert observed.marks.share[0, 0].tolist() == [[1, 0], [0, 0]]
    assert observed.marks.named.all()


def test_an_image_is_encoded_once(write):
    class Counting(GaussianFlow):
        encoded = 0

        def encode_images(self, images):
            self.encoded += len(images)
            return images

    result, flow = records.read(write(row(), row("1.png")), SIZE), Counting((3, *SIZE))
    for _ in range(3):
        result.finished(flow, [Prompt("a circle", {}, 0)], (1, 1))
    assert flow.encoded == 2


def test_encoding_undoes_decoding():
    """Of the embedded model, whose autoencoder is trained: its pictures come back."""
    policy = policies.load(locate("assets/tiny_sd3"))
    images, _ = generate(policy, [Prompt("a red circle")], [range(4)], 6, 4)
    again = policy.decode(policy.encode_images(images))
    assert (again - images).abs().mean() < 0.02
    assert (images - images.mean((2, 3), keepdim=True)).abs().mean() > 0.05
