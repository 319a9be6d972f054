"""The report of a run: the same prompts over training, diversity, and images without what was judged over them."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
import torch
import yaml
from matplotlib.figure import Figure
from PIL import Image
from run_config import cut_off, rows, run
from torchvision.utils import save_image

from mmalign import run as runs
from mmalign.evaluation import evaluate
from mmalign.evaluation.evaluate import Evaluation
from mmalign.reporting import curves, report
from mmalign.runs import reader

ROW = {"reward": 0.25, "forwards": 4, "replay_forwards": 2, "decodes": 1, "rewards": 1}


class Sections(HTMLParser):
    """The captions and sources of the figures below each heading, and the text of each paragraph."""

    def __init__(self, text: str):
        super().__init__()
        self.figures, self.heading, self.tag, self.texts = {}, "", "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tag = tag
        if tag == "img":
            self.figures.setdefault(self.heading, []).append([dict(attrs)["src"], ""])

    def handle_data(self, data):
        if not data.strip():
            return
        if self.tag == "h2":
            self.heading, self.tag = data, ""
        elif self.tag == "figcaption":
            self.figures[self.heading][-1][1] += data.strip()
        else:
            self.texts.append(" ".join(data.split()))


@pytest.fixture(scope="module")
def recorded(random_model, prompt_files, tmp_path_factory):
    """A finished run with an evaluation after each iteration, and what each evaluation returned."""
    settings = dict(
        model=random_model, prompts=prompt_files["train"], held_out=prompt_files["held_out"], iterations=3,
        rewards={"jpeg_size.kilobytes": 1.0}, prompts_per_iteration=1, seeds=2, steps=2, plan="sde", credit="terminal",
        lora_rank=2, eval_seeds=2, eval_steps=2, eval_every=1, checkpoint_every=1,
    )  # fmt: skip
    results, work = [], evaluate.evaluate_distributed

    def watched(*arguments, **named):
        results.append(work(*arguments, **named))
        return results[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.evaluate, "evaluate_distributed", watched)
        out = run(settings, out=str(tmp_path_factory.mktemp("recorded") / "run"))
    return settings, out, results


def test_the_same_prompts_over_training_are_those_of_the_evaluations_to_the_bit(recorded, tmp_path):
    _, out, results = recorded
    names = ["before", "000001", "000002", "after"]
    for name, result in zip(names, results, strict=True):
        for p, member, image in zip(result.prompt.tolist(), result.member.tolist(), result.images, strict=True):
            if member == 0:
                save_image(image, tmp_path / "expected.png")
                expected = (tmp_path / "expected.png").read_bytes()
                assert (out / "images" / name / f"{p:05d}-0.png").read_bytes() == expected
    assert sorted(path.name for path in (out / "images/000002").iterdir()) == [
        "00000-0.png", "00001-0.png", "scores.jsonl",
    ]  # fmt: skip
    shown = Sections(report.write(out).read_text()).figures["Over training"]
    captions = ["before", "iteration 1", "iteration 2", "after"]
    assert [caption for _, caption in shown] == captions * 2
    files = [out / "images" / name / f"{prompt:05d}-0.png" for prompt in (0, 1) for name in names]
    assert [base64.b64decode(source.partition(",")[2]) for source, _ in shown] == [file.read_bytes() for file in files]


def test_a_resumed_run_has_the_same_images(recorded, tmp_path):
    settings, out, _ = recorded
    resumed = settings | {"out": str(tmp_path / "run")}
    with cut_off(2):
        run(resumed)
    run(resumed, resume=True)
    names = sorted(path.relative_to(out) for path in (out / "images").rglob("*") if path.is_file())
    assert len(names) > 20
    for name in names:
        assert (tmp_path / "run" / name).read_bytes() == (out / name).read_bytes(), name
    assert [row["iteration"] for row in rows(tmp_path / "run/evaluations.jsonl")] == [0, 1, 2, 3]


def test_the_report_of_a_run_without_these_images_leaves_them_out(recorded, tmp_path):
    old = shutil.copytree(recorded[1], tmp_path / "run")
    for name in ("000001", "000002"):
        shutil.rmtree(old / "images" / name)
    page, new = report.write(old).read_text(), report.write(recorded[1]).read_text()
    assert "Over training" not in page
    assert "Missing or damaged" not in page
    start, end = new.index("<h2>Over training"), new.index("<h2>Credit")
    assert page[: page.index("<h2>Credit")].split() == new[:start].split()
    assert page.count("<img") == new.count("<img") - new[start:end].count("<img")


def test_damaged_rows_of_these_images_are_named(recorded, tmp_path):
    folder = shutil.copytree(recorded[1], tmp_path / "run")
    (folder / "images/000001/scores.jsonl").write_text("{\n")
    (folder / "images/000002/00001-0.png").unlink()
    page = report.write(folder).read_text()
    assert "images/000001/scores.jsonl: line 1: incomplete, or not a JSON object; left out" in page
    assert page.count("no 00000-0.png") == page.count("no 00001-0.png") == 1
    assert "00001-0.png is missing" in page


def folder_of(tmp_path, evaluations: int, size: int = 8, diversity=()):
    """A run with so many evaluations between start and end, and as many iterations."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.yaml").write_text(
        yaml.safe_dump({"iterations": evaluations + 1, "plan": "sde", "credit": "terminal", "seeds": 2})
    )
    names = ["before", *(f"{k:06d}" for k in range(1, evaluations + 1)), "after"]
    for k, name in enumerate(names):
        (out / "images" / name).mkdir(parents=True)
        save_image(torch.full((3, size, size), k / 255), out / "images" / name / "00007-0.png")
        row = {"image": "00007-0.png", "prompt": "a cross", "id": 7, "scores": {"taste.good": 0.5}}
        (out / "images" / name / "scores.jsonl").write_text(json.dumps(row) + "\n")
    with (out / "evaluations.jsonl").open("w") as file:
        for k, name in enumerate(names):
            more = {"diversity": diversity[k > 0]} if diversity and not name.isdigit() else {}
            row = {"iteration": k, "name": None if name.isdigit() else name, "images": 1, "seconds": 1.0}
            file.write(json.dumps(row | {"taste.good": 0.5} | more) + "\n")
    (out / "metrics.jsonl").write_text("".join(json.dumps({"iteration": k + 1} | ROW) + "\n" for k in range(3)))
    return out


def test_many_evaluations_are_thinned_evenly(tmp_path):
    sections = Sections(report.write(folder_of(tmp_path, 20)).read_text())
    captions = [caption for _, caption in sections.figures["Over training"]]
    numbers = [3, 6, 9, 12, 15, 18]
    assert captions == ["before", *(f"iteration {k}" for k in numbers), "after"]
    assert any("at 8 of 22 evaluations, evenly spaced" in text for text in sections.texts)
    pictures = [base64.b64decode(source.partition(",")[2]) for source, _ in sections.figures["Over training"]]
    colours = [Image.open(io.BytesIO(picture)).getpixel((0, 0))[0] for picture in pictures]
    assert colours == [0, *numbers, 21]


def test_few_images_are_evenly_spaced_and_keep_what_is_known_of_them():
    number = torch.arange(11)
    places = {"map": [{"n": k} for k in range(11)]}
    result = Evaluation(number[:, None, None, None] * torch.ones(11, 3, 2, 2), {"a": number * 0.5}, number, number * 0,
                        places, {0: "first", 4: "fourth", 5: "fifth"})  # fmt: skip
    few = evaluate.few(result)
    assert few.prompt.tolist() == few.images[:, 0, 0, 0].tolist() == [0, 2, 4, 6, 8, 10]
    assert few.parts["a"].tolist() == [0, 1, 2, 3, 4, 5]
    assert [row["n"] for row in few.places["map"]] == [0, 2, 4, 6, 8, 10]
    assert few.failures == {0: "first", 2: "fourth"}
    assert evaluate.few(result, 20).prompt.tolist() == number.tolist()


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [(0.2, 0.15, "fell by 25 %, which is more than 10 %"), (0.2, 0.182, None), (0.2, 0.25, None), (0.0, 0.0, None),
     (float("nan"), 0.1, None)],
)  # fmt: skip
def test_a_loss_of_diversity_is_pointed_out(tmp_path, before, after, says):
    page = " ".join(report.write(folder_of(tmp_path, 0, diversity=(before, after))).read_text().split())
    assert f"On held-out prompts it was {before:.3f} before training and is {after:.3f} after." in page
    assert ("Diversity fell" in page) == (says is not None)
    assert says is None or says in page


def test_diversity_of_training_batches_counts_while_there_is_no_other(tmp_path):
    out = folder_of(tmp_path, 0)
    diversities = [0.4] * 5 + [0.9] * 3 + [0.3] * 5
    written = [{"iteration": k + 1, "diversity": d} | ROW for k, d in enumerate(diversities)]
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    page = " ".join(report.write(out).read_text().split())
    assert "it was 0.400 in the first 5 iterations and is 0.300 in the last 5." in page
    assert "fell by 25 %" in page
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written[:9]))
    assert "<h2>Diversity</h2>" not in report.write(out).read_text()


def test_figures_have_the_colour_of_the_text(tmp_path):
    page = report.write(folder_of(tmp_path, 0)).read_text()
    figure = page[page.index("<svg") :]
    assert "currentColor" in figure
    assert curves.INK not in figure
    assert "#ffffff" not in figure  # no background of their own


def test_places_are_shown_on_demand_without_a_script(recorded, tmp_path):
    folder = shutil.copytree(recorded[1], tmp_path / "run")
    file = folder / "images/after/scores.jsonl"
    box = {"box": [0, 0, 4, 4], "credit": 1.0, "label": "a", "reason": "b"}
    places = {"taste": {"size": [32, 32], "map": None, "boxes": [box]}}
    file.write_text("".join(json.dumps(row | {"places": places}) + "\n" for row in rows(file)))
    page = report.write(folder).read_text()
    assert '<input type="checkbox" id="overlays"> <label for="overlays">' in page
    before = page[page.index('id="overlays"') : page.index("<h2>Over training")]
    assert before.count('<svg class="overlay"') == 4  # siblings of the switch, which the style sheet shows with it
    assert re.search(r"\.overlay \{ display: none;", page)
    assert "#overlays:checked ~ * .overlay, .always .overlay { display: block }" in page
    credit = page[page.index("<h2>Credit") : page.index("<h2>Curves")]
    plain, details = credit.split("<details")
    assert "overlay" not in plain
    assert details.count('<svg class="overlay"') > 0
    assert "<script" not in page


def test_large_images_are_reduced_and_small_ones_embedded_unchanged(tmp_path):
    out = folder_of(tmp_path, 1, size=600)
    small = out / "images/after/00007-0.png"
    save_image(torch.rand(3, 512, 512), small)
    shown = Sections(report.write(out).read_text()).figures["Over training"]
    pictures = [base64.b64decode(source.partition(",")[2]) for source, _ in shown]
    assert Image.open(io.BytesIO(pictures[0])).size == (512, 512)
    assert pictures[2] == small.read_bytes()


def costing(tmp_path, watch=("jpeg_size",), distance=None):
    """A run of three evaluations; before training the spread between images is 0.1 of one score and 2 of the other."""
    out = tmp_path / "run"
    (out / "images/before").mkdir(parents=True)
    settings = {"iterations": 2, "plan": "sde", "credit": "terminal", "seeds": 2, "rewards": {"clip.cosine": 1.0}}
    (out / "config.yaml").write_text(yaml.safe_dump(settings | {"watch": [*watch]}))
    names = ("clip.cosine", "jpeg_size.kilobytes")
    images = [dict(zip(names, pair, strict=True)) for pair in ((0.4, -2.0), (0.5, -4.0), (0.6, -6.0))]
    rows = [{"image": f"{k:05d}-0.png", "prompt": "a", "id": k, "scores": scores} for k, scores in enumerate(images)]
    (out / "images/before/scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    means = [(0.5, -4.0), (0.55, -3.0), (0.7, -6.0)]
    with (out / "evaluations.jsonl").open("w") as file:
        for k, (name, pair) in enumerate(zip(("before", None, "after"), means, strict=True)):
            row = {"iteration": k, "name": name, "images": 3, "seconds": 1.0} | dict(zip(names, pair, strict=True))
            file.write(json.dumps(row) + "\n")
    metrics = [{"iteration": k} | ROW | ({distance: 0.5 * k} if distance else {}) for k in (1, 2)]
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    return out


@pytest.mark.parametrize("distance", [None, "kl", "drift"])
def test_one_panel_shows_what_a_reward_costs(tmp_path, distance):
    out = costing(tmp_path, distance=distance)
    [(title, draw)] = curves.cost(reader.read(out)).items()
    assert ("distance" in title) == bool(distance)
    figure = Figure()
    draw(figure.subplots())
    lines = {line.get_label(): [*line.get_ydata()] for axis in figure.axes for line in axis.lines}
    assert lines["clip.cosine, trained"] == pytest.approx([0, 0.5, 2])
    assert lines["jpeg_size.kilobytes, watched"] == pytest.approx([0, 0.5, -1])
    if distance:
        assert [[*line.get_ydata()] for line in figure.axes[1].lines] == [[0.5, 1.0]]
    assert "<svg" in report.write(out).read_text()


def test_a_run_that_watches_nothing_has_no_such_panel(tmp_path):
    assert curves.cost(reader.read(costing(tmp_path, watch=()))) == {}
