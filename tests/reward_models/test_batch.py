"""Tests of scoring files on disk: every input and output format, and broken images."""

import csv
import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from pyarrow import parquet

from reward_models import Card, Prompt, Scores, limits
from reward_models.images import to_pil
from reward_models.tools import gallery, picture_files, score_files as batch


class Brightness:
    """A fake scorer that records its calls and fails for the given images."""

    card = Card("brightness", sees_prompt=False)
    names = ("mean", "red")

    def __init__(self, fails=None):
        self.calls, self.fails = [], fails

    def __call__(self, images, prompts):
        self.calls.append((tuple(images.shape), [p.text for p in prompts]))
        if self.fails == "all":
            raise RuntimeError("out of\nmemory")
        values = torch.stack([images.mean((1, 2, 3)), images[:, 0].mean((1, 2))], 1)
        failures = {}
        if self.fails == "some":
            values[0, 0], failures = torch.nan, {0: "too dark"}
        return Scores(self.names, values, failures=failures)


@pytest.fixture
def folder(tmp_path):
    """Five pictures of two sizes, one of them broken, each with its prompt beside it."""
    g = torch.Generator().manual_seed(0)
    for i in range(5):
        size = 8 if i % 2 else 12
        to_pil(torch.rand(1, 3, size, size, generator=g))[0].save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"picture {i % 2}\n")
    (tmp_path / "3.png").write_bytes(b"no picture")
    return tmp_path


def scored(source, scorer=None, size=2, prompt=None):
    items, _ = picture_files.read(source, prompt)
    return list(batch.score(items, {"own": scorer or Brightness()}, size))


def test_a_folder_is_scored_in_order_and_a_broken_file_fails_alone(folder):
    rows = scored(folder)
    assert [row["image"] for row in rows] == [f"{i}.png" for i in range(5)]
    assert [row["prompt"] for row in rows] == [f"picture {i % 2}" for i in range(5)]
    assert [list(row["failures"]) for row in rows] == [[], [], [], ["image"], []]
    assert rows[3]["failures"]["image"].startswith("cannot be read: cannot identify image file")
    assert rows[3]["scores"] == {"own.mean": None, "own.red": None}
    pixels = torch.tensor(list(Image.open(folder / "4.png").get_flattened_data())).float() / 255
    assert rows[4]["scores"]["own.mean"] == pytest.approx(float(pixels.mean()), abs=1e-6)
    assert rows[4]["scores"]["own.red"] == pytest.approx(float(pixels[:, 0].mean()), abs=1e-6)


@pytest.mark.parametrize("size", [1, 3, 64])
def test_batches_change_nothing_and_hold_one_size_each(folder, size):
    scorer = Brightness()
    rows = scored(folder, scorer, size)
    for row, expected in zip(rows, scored(folder), strict=True):
        assert row["failures"] == expected["failures"]
        for name, value in expected["scores"].items():
            assert row["scores"][name] == (None if value is None else pytest.approx(value, abs=1e-6))
    assert sum(shape[0] for shape, _ in scorer.calls) == 4
    assert all(shape[0] <= size for shape, _ in scorer.calls)


def test_a_scorers_failure_is_a_reason_never_a_zero(folder):
    for row in scored(folder, Brightness("all")):
        assert row["scores"] == {"own.mean": None, "own.red": None}
        assert row["failures"].get("own", "out of memory") == "out of memory"
    row = scored(folder, Brightness("some"), size=64)[0]
    assert row["failures"] == {"own": "too dark"}
    assert row["scores"]["own.mean"] is None
    assert row["scores"]["own.red"] > 0


def test_tables_of_every_kind_give_the_same_rows(folder):
    rows = [{"image": f"{i}.png", "prompt": f"number {i}", "id": i + 7} for i in range(3)]
    (folder / "t.jsonl").write_text("".join(json.dumps(row | {"tag": "x"}) + "\n" for row in rows))
    with (folder / "t.csv").open("w") as file:
        writer = csv.DictWriter(file, ["image", "prompt", "id", "tag"])
        writer.writeheader()
        writer.writerows([row | {"tag": "x"} for row in rows])
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist([row | {"tag": "x"} for row in rows]), folder / "t.parquet")
    expected = [
        picture_files.Item(f"{i}.png", folder / f"{i}.png", Prompt(f"number {i}", {"tag": "x"}, i + 7))
        for i in range(3)
    ]
    for ending in ("jsonl", "csv", "parquet"):
        assert picture_files.read(folder / f"t.{ending}") == (expected, [])
    (folder / "t.jsonl").rename(folder / "metadata.jsonl")
    assert picture_files.read(folder) == (expected, [])


def test_genevals_layout(folder):
    for number, count in (("00000", 2), ("00001", 1)):
        samples = folder / "geneval" / number / "samples"
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps({"prompt": f"p {number}", "tag": "colors"}) + "\n")
        for i in range(count):
            Image.new("RGB", (8, 8)).save(samples / f"{i:05d}.png")
    items, _ = picture_files.read(folder / "geneval")
    assert [item.prompt for item in items] == [Prompt("p 00000", {"tag": "colors"}, 0)] * 2 + [
        Prompt("p 00001", {"tag": "colors"}, 1)
    ]


def test_one_prompt_for_all_that_have_none(folder):
    (folder / "0.txt").unlink()
    items, _ = picture_files.read(folder)
    assert items[0].prompt is None
    assert picture_files.read(folder, "a cat")[0][0].prompt == Prompt("a cat")
    assert picture_files.read(folder, "a cat")[0][1].prompt == Prompt("picture 1")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no rows in it"),
        ("[1]\n", "line 1: not a JSON object"),
        ('{"prompt": "a"}\n', "row 1: no `image`; columns are prompt"),
        ('{"image": "0.png", "prompt": "a", "id": "x"}\n', "row 1: `id` must be a whole number, got 'x'"),
        ('{"image_a": "0.png", "image_b": "1.png", "chosen": "c"}\n', "`chosen` must be a, b or tie, got 'c'"),
    ],
)
def test_a_table_that_is_none_is_explained(folder, text, says):
    (folder / "t.jsonl").write_text(text)
    with pytest.raises(ValueError, match=says) as error:
        picture_files.read(folder / "t.jsonl")
    assert "\n" not in str(error.value)


def test_sources_that_are_none(tmp_path):
    for source, says in ((tmp_path, "no pictures in it"), (tmp_path / "a.txt", "a folder or a table")):
        with pytest.raises(ValueError, match=says):
            picture_files.read(source)
    with pytest.raises(ValueError, match="No such file"):
        picture_files.read(tmp_path / "a.jsonl")


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_what_was_cut_off_or_failed_is_scored_again_and_nothing_else(folder):
    rows, out = scored(folder), folder / "out.jsonl"
    items, _ = picture_files.read(folder)
    out.write_text(lines(rows)[:-40])
    done, left = batch.resume(out, items, {"own": Brightness()})
    assert list(done) == [item.key for item in items[:3]]
    assert left == items[3:]
    assert out.read_text() == lines(rows[:3])
    with pytest.raises(ValueError, match=r"holds own\.mean, own\.red; score into another file"):
        batch.resume(out, items, {"other": Brightness()})
    out.unlink()
    assert batch.resume(out, items, {"own": Brightness()}) == ({}, items)


def test_nothing_to_score_is_no_rows():
    assert list(batch.score([], {"own": Brightness()}, 4)) == []


class Rank(Brightness):
    """The share of its siblings an image is brighter than: it needs them all, and counts how it was called."""

    card = Card("rank", groupwise=True)
    names = ("rank",)

    def __call__(self, images, prompts):
        self.calls.append(sorted({p.text for p in prompts}))
        level = images.mean((1, 2, 3))
        same = torch.tensor([[a.text == b.text for a in prompts] for b in prompts])
        below = ((level[None] < level[:, None]) & same).sum(1) / (same.sum(1) - 1)
        return Scores(self.names, below[:, None])


@pytest.fixture
def groups(tmp_path):
    """Nine pictures with increasing brightness, of three prompts in turn."""
    for i in range(9):
        Image.new("RGB", (8, 8), (20 * i,) * 3).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("abc"[i % 3])
    return tmp_path


@pytest.mark.parametrize("size", [1, 4, 6, 64])
def test_images_of_a_prompt_stay_together_for_those_who_compare_them(groups, size):
    scorer = Rank()
    scores = {row["image"]: row["scores"]["own.rank"] for row in scored(groups, scorer, size)}
    assert scores == {f"{i}.png": (i // 3) / 2 for i in range(9)}
    assert [text for call in scorer.calls for text in call] == ["a", "b", "c"]


def test_a_prompt_with_an_image_left_is_compared_again_completely(groups):
    items, _ = picture_files.read(groups)
    rows, out = scored(groups, Rank()), groups / "out.jsonl"
    out.write_text(lines(row for row in rows if row["image"] != "4.png"))
    done, left = batch.resume(out, items, {"own": Rank()})
    assert [item.name for item in left] == ["1.png", "4.png", "7.png"]
    assert {name for name, _ in done} == {f"{i}.png" for i in (0, 2, 3, 5, 6, 8)}
    assert out.read_text() == lines(row for row in rows if row["prompt"] != "b")


def test_images_of_unlike_sizes_cannot_be_compared(groups):
    Image.new("RGB", (9, 8)).save(groups / "4.png")
    for row in scored(groups, Rank(), 64):
        assert (row["scores"]["own.rank"] is None) == (row["prompt"] == "b") == ("own" in row["failures"])


def test_what_is_written_reads_back(folder):
    rows = scored(folder)
    for ending in ("csv", "parquet"):
        batch.write(rows, folder / f"out.{ending}")
    with (folder / "out.csv").open(newline="") as file:
        back = list(csv.DictReader(file))
    assert [row["own.mean"] for row in back[2:4]] == [str(rows[2]["scores"]["own.mean"]), ""]
    table = parquet.read_table(folder / "out.parquet").to_pylist()
    assert table == [batch.flat(row) for row in rows]


def row_of(image, prompt, one, two=None):
    return {"image": image, "prompt": prompt, "id": 0, "scores": {"one": one, "two": two}, "failures": {}}


def test_summary_by_hand():
    rows = [
        row_of("a", "p", 1.0, 4.0),
        row_of("b", "p", 2.0, 3.0),
        row_of("c", "q", 3.0, 1.0),
        row_of("d", "q", None, 2.0),
    ]
    choices = [
        picture_files.Choice("p", "b", "a"),
        picture_files.Choice("q", "c", "d"),
        picture_files.Choice("p", "a", "a"),
    ]
    summary = batch.summarise(rows, choices)
    assert summary["scores"]["one"] == pytest.approx(
        {"count": 3, "missing": 1, "mean": 2.0, "std": (2 / 3) ** 0.5, "min": 1.0, "max": 3.0}
        | {"best": 2.5, "prompts": 2, "choices": 2, "agrees": 0.75}
    )
    assert summary["scores"]["two"]["agrees"] == pytest.approx((0 + 0 + 0.5) / 3)
    assert summary["correlation"] == {"one ~ two": pytest.approx(-1.0)}


def test_pairs_are_read_once_each(folder):
    lines = [
        {"image_a": "0.png", "image_b": "1.png", "prompt": "p", "chosen": "b"},
        {"image_a": "2.png", "image_b": "0.png", "prompt": "p", "chosen": "A"},
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    items, choices = picture_files.read(folder / "pairs.jsonl")
    assert [item.name for item in items] == ["0.png", "1.png", "2.png"]
    assert choices == [picture_files.Choice("p", "1.png", "0.png"), picture_files.Choice("p", "2.png", "0.png")]


def test_the_gallery_shows_every_image_best_first_and_escapes(folder):
    (folder / "4.txt").write_text("<script>alert(1)</script>")
    rows = scored(folder)
    rows[0]["critiques"] = {"own": "<b>dark"}
    page = folder / "pages" / "gallery.html"
    page.parent.mkdir()
    gallery.write(rows, batch.summarise(rows), folder, page)
    text = page.read_text()
    assert text.count("<figure") == 5
    assert "<script>alert" not in text
    assert text.count('class="critique"') == 1
    assert "own: &lt;b&gt;dark" in text
    best = max((row for row in rows if row["scores"]["own.mean"]), key=lambda row: row["scores"]["own.mean"])
    assert text.index(f"../{best['image']}") == min(text.index(f"../{i}.png") for i in range(5))
    assert text.index("cannot be read") > max(text.index(f"../{i}.png") for i in range(5))


MEMORY = """
import sys, psutil
from pathlib import Path
from reward_models import load
from reward_models.tools import picture_files, score_files as batch

items, _ = picture_files.read(Path(sys.argv[1]), "a red square")
scorers = {name: load(name) for name in ("clip", "shapes", "jpeg_size", "image_stats")}
process, memory = psutil.Process(), {}
for number, row in enumerate(batch.score(items, scorers, 25), 1):
    assert row["scores"]["clip.cosine"] is not None
    memory[number] = process.memory_info().rss
print(len(memory), memory[1000] / memory[200])
"""


def test_memory_is_flat_from_200_to_1000_images(tmp_path):
    for i in range(1000):
        Image.new("RGB", (64, 64), (i % 256, i // 4, 90)).save(tmp_path / f"{i:04d}.png")
    result = subprocess.run([sys.executable, "-c", MEMORY, tmp_path], capture_output=True, text=True, check=True)
    count, growth = result.stdout.split()
    assert int(count) == 1000
    assert float(growth) <= 1.05


def test_a_batch_is_bounded_in_pixels_too(tmp_path, monkeypatch):
    """Large pictures are scored in smaller batches, and every picture in one, even one beyond the bound."""
    for number, side in enumerate((4, 4, 8, 4, 16, 4)):
        Image.new("RGB", (side, side), (number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "6.png").write_bytes(b"no picture")
    monkeypatch.setattr(limits, "TOGETHER", 100)
    sizes = []

    class Shown:
        names, card = ("red",), Card("shown", sees_prompt=False)

        def __call__(self, images, prompts):
            sizes.append(images[:, 0].numel())
            return Scores(self.names, images[:, 0, :1, 0] * 255)

    items, _ = picture_files.read(tmp_path)
    rows = list(batch.score(items, {"shown": Shown()}, 3))
    assert [row["scores"].get("shown.red") for row in rows] == [0, 1, 2, 3, 4, 5, None]
    assert sizes == [2 * 16, 64, 16, 256, 16]  # by size within a batch
