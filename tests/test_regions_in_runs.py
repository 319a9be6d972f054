"""Regions of images on their way through a run."""

import json
import shutil

import pytest
import torch
from careless import Careless
from run_config import cut_off, rows, run
from torchvision.utils import save_image

from mmalign.checks import estimate
from mmalign.config import load as configs
from mmalign.errors import BadInput
from mmalign.reporting import report
from mmalign.rewards import judge, regions
from reward_models import Prompt
from reward_models.regions import Region, box_shares

nan = torch.nan


def test_labels_share_a_column_and_the_rest_stands_alone():
    one = (Region((0, 0, 4, 4), 1.0, "1 dog"), Region((4, 0, 8, 4), -1.0), Region((0, 4, 4, 8), -0.5, "1 dog"))
    two = (Region((4, 4, 8, 8), -1.0, "1 dog"), Region((0, 0, 4, 4), 0.5, "2 cat"))
    other = (Region((0, 0, 8, 8), 1.0, "2 cat"),)
    marks = regions.marked([one, two, other, ()], [0, 0, 5, 5], (8, 8), (2, 2))
    expected = torch.tensor([[1, nan, -1, -0.5], [-1, 0.5, nan, nan], [1, nan, nan, nan], [nan] * 4])
    torch.testing.assert_close(marks.credit, expected, equal_nan=True)
    assert marks.named[0].tolist() == [True, True, False, False]
    assert marks.share[0, 0].tolist() == [[1, 0], [0, 0]]
    assert marks.share[1, 0].tolist() == [[0, 0], [0, 1]]
    assert marks.share[2, 0].eq(1).all()


def test_a_map_without_regions_is_what_is_right_and_what_is_wrong():
    marks = regions.signs(torch.tensor([[[0.5, nan], [-0.1, 0.0]], [[1.0, 1.0], [1.0, 1.0]]]))
    torch.testing.assert_close(marks.credit, torch.tensor([[1.0, -1.0], [1.0, nan]]), equal_nan=True)
    assert marks.share[0].tolist() == [[[1, 0], [0, 0]], [[0, 0], [1, 0]]]
    assert not marks.named.any()


def test_an_image_whose_box_lies_outside_fails_alone():
    scores = judge.score(torch.zeros(4, 3, 8, 8), [Prompt("a")] * 4, {"careless": Careless()})
    assert list(scores.failures) == [1]
    assert scores.failures[1] == "careless: box (0, 0, 4.0, 16) lies outside the image of 8 x 8 pixels"
    assert scores.parts["careless.value"].isnan().tolist() == [False, True, False, False]
    assert scores.maps["careless"][1].isnan().all()
    assert scores.boxes["careless"][1] == ()


IMAGES = {"plan": "ode", "seeds": 4}
SRUM = {
    "objective": {"type": "srum", "draws": 2, "alpha": (0, 1), "background": 0.0, "anchor": 0.5, "margin": 1.0},
}
RGDPO = {"objective": {"type": "rgdpo", "draws": 2, "scale": 10.0, "intra": 1.0}}
CARELESS = {
    "rewards": {"careless:Careless.value": 1.0},
    "region": "careless:Careless",
    "max_failed": 0.5,
}


@pytest.mark.parametrize("objective", [SRUM, RGDPO], ids=["srum", "rgdpo"])
def test_a_run_learns_from_finished_images_and_from_no_bad_one(settings, tmp_path, objective):
    out = run(settings | IMAGES | CARELESS | objective)
    metrics = rows(out / "metrics.jsonl")
    assert all(row["failed"] > 0 for row in metrics)
    assert all(row["transitions"] > 0 and row["grad_norm"] > 0 for row in metrics)
    c = configs.load(out / "config.yaml")
    images = c.prompts_per_iteration * c.seeds
    if objective is SRUM:
        assert metrics[0]["transitions"] == 2 * (images - metrics[0]["failed"])
        assert metrics[0]["replay_forwards"] == metrics[0]["transitions"]
    else:
        assert metrics[0]["replay_forwards"] == 4 * metrics[0]["transitions"]
    again = run(settings | IMAGES | CARELESS | objective, out=str(tmp_path / "again"), micro_batch=3)
    for one, two in zip(metrics[:2], rows(again / "metrics.jsonl")[:2], strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)


def test_the_adapter_of_an_earlier_run_guides_another_one(settings, tmp_path):
    """One forward more of each image of a pair. A resumed run has the same guide, or is refused."""
    first = run(settings | IMAGES | CARELESS | RGDPO, out=str(tmp_path / "first"), iterations=1, learning_rate=1e-2)
    guided = {"objective": RGDPO["objective"] | {"guide": str(tmp_path / "guide"), "guidance": 0.5}}
    shutil.copytree(first, tmp_path / "guide")
    some = settings | IMAGES | CARELESS | guided | {"iterations": 2, "eval_every": 0, "checkpoint_every": 1}
    whole = run(some, out=str(tmp_path / "whole"))
    metrics = rows(whole / "metrics.jsonl")
    assert all(row["replay_forwards"] == 6 * row["transitions"] > 0 for row in metrics)
    figures = estimate.estimate(configs.build(some, "test"))["iteration"]
    assert figures["replay_forwards"] == 6 * figures["transitions"]
    cut = str(tmp_path / "cut")
    with cut_off(1):
        run(some, out=cut)
    again = run(some, resume=True, out=cut)
    one, two = ((out / "checkpoints/000002/adapter.safetensors").read_bytes() for out in (whole, again))
    assert one == two
    with cut_off(1):
        run(some, out=str(tmp_path / "other"))
    shutil.rmtree(tmp_path / "guide")
    run(settings | IMAGES | CARELESS | RGDPO, out=str(tmp_path / "guide"), iterations=1, learning_rate=2e-2)
    with pytest.raises(BadInput, match="guide"):
        run(some, resume=True, out=str(tmp_path / "other"))
    elsewhere = some | {"model": "assets/tiny_sd3"}
    with pytest.raises(BadInput, match="was trained for"):
        run(elsewhere, out=str(tmp_path / "no"))


@pytest.mark.parametrize("objective", [SRUM, RGDPO], ids=["srum", "rgdpo"])
def test_a_run_on_records_samples_nothing(settings, tmp_path, objective, random_model):
    from mmalign import policy as policies

    high, wide = policies.load(random_model).image_size
    lines = []
    for k in range(8):
        save_image(torch.rand(3, high, wide, generator=torch.Generator().manual_seed(k)), tmp_path / f"{k}.png")
        region = {"box": [0, 0, wide / 2, high], "score": (-1) ** k, "label": "1 it"}
        lines.append({"image": f"{k}.png", "prompt": f"thing {k // 4}", "score": k / 8, "regions": [region]})
    lines[7]["regions"] = [{"box": [9, 0, 3, 3], "score": 1}]
    (tmp_path / "records.jsonl").write_text("\n".join(map(json.dumps, lines)))
    records = {"records": str(tmp_path / "records.jsonl"), "prompts_per_iteration": 2}
    remaining = {
        name: settings[name] for name in ("model", "held_out", "out", "iterations", "eval_steps") if name in settings
    }
    out = run(remaining | objective | records)
    metrics = rows(out / "metrics.jsonl")
    assert metrics[0]["images"] == 7
    assert metrics[0]["forwards"] == metrics[0]["decodes"] == metrics[0]["rewards"] == 0
    assert all(row["grad_norm"] > 0 for row in metrics)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"objective": "srum"}, "objective: srum needs region, a scorer with a map, or records"),
        (IMAGES | RGDPO | {"region": "shapes", "credit": "terminal"}, "credit does not act with objective: rgdpo"),
        (IMAGES | RGDPO | {"region": "shapes", "max_kl": 0.1}, "max_kl does not act with objective: rgdpo"),
        (IMAGES | RGDPO | {"region": "shapes", "loss": "guard"}, "loss does not act with objective: rgdpo"),
        (IMAGES | RGDPO | {"region": "shapes", "mask": "map"}, "mask does not act with objective: rgdpo"),
        ({"objective": {"type": "rgdpo", "beta": 0.1}}, "objective: rgdpo has no setting 'beta'"),
        ({"objective": {"type": "rgdpo", "anchor": 0.1}}, "objective: rgdpo has no setting 'anchor'"),
        ({"objective": {"type": "srum", "alpha": (1, 0)}}, "objective: alpha [1.0, 0.0] must rise"),
        (IMAGES | SRUM | {"region": "shapes", "kernel": {"type": "flow_sde", "noise": 0.5}},
         "kernel does not act with plan: ode"),
        (IMAGES, "plan: ode has no stochastic step"),
        ({"objective": {"type": "grpo", "draws": 2}}, "objective: grpo has no setting 'draws'"),
        ({"mask": "map"}, "mask: map needs region"),
        ({"mask": {"type": "map", "share": 0.5}}, "mask: map has no setting 'share'"),
        ({"records": "r.jsonl"}, "records does not act with objective: grpo"),
        ({"advantage": {"whole": 0.5}}, "advantage: whole and regional act only with region"),
        (SRUM | {"records": "r.jsonl"}, "steps does not act with records"),
        ({"rewards": {}}, "rewards: at least one is needed"),
        (SRUM | {"records": "r.jsonl", "region": "shapes"}, "region does not act with records"),
    ],
)  # fmt: skip
def test_what_cannot_act_is_refused(settings, changed, says):
    with pytest.raises(BadInput) as refusal:
        configs.build(settings | {"rewards": {"shapes.strict": 1.0}} | changed, "test")
    assert says in str(refusal.value)


@pytest.mark.parametrize("mask", ["map", {"type": "prompt", "share": 0.25}])
def test_masks_and_ratios_by_credit_run(settings, mask):
    out = run(settings | CARELESS | {"mask": mask, "objective": {"type": "grpo", "ratio": "credit"}})
    assert all(row["grad_norm"] > 0 for row in rows(out / "metrics.jsonl"))


def test_a_few_images_are_kept_with_their_credit(settings):
    out = run(settings | CARELESS)
    logged = rows(out / "credit.jsonl")
    assert {row["iteration"] for row in logged} == {2, 4}
    assert len(logged) == 2 * 6
    for row in logged:
        assert (out / row["image"]).is_file()
        (step,) = row["advantage"]
        grid = row["advantage"][step]
        assert (len(grid), len(grid[0])) == (len(row["map"]), len(row["map"][0]))
        assert all(value is None or abs(value) == 1 for line in row["map"] for value in line)
        assert (row["reward"] is None) == all(value is None for line in row["map"] for value in line)
    page = report.write(out).read_text()
    assert "Images of iteration 4, evenly" in page
    assert page.count(">credit of step ") == page.count("credit of step 0<") + page.count("credit of step 1<") == 6
    judged = json.loads((out / "images" / "after" / "scores.jsonl").read_text().splitlines()[0])["places"]
    assert judged["careless:Careless"]["map"][0][0] == -1
    assert "show regions judged right" in page
    run(settings | CARELESS, resume=True)
    assert len(rows(out / "credit.jsonl")) == len(logged)


def test_boxes_cover_tokens_of_packed_latents():
    """FLUX's tokens are two positions a side, row by row: a box of positions is a box of tokens."""
    from diffusers import FluxPipeline

    region = Region((16, 8, 40, 24), 1.0)
    share = box_shares([region], (64, 96), (8, 12))[0]
    packed = FluxPipeline._pack_latents(share[None, None].expand(1, 4, 8, 12), 1, 4, 8, 12)
    tokens = packed.mean(2)[0].view(4, 6)
    assert torch.equal(tokens, box_shares([region], (64, 96), (4, 6))[0])
