"""Where prompts come from, and whether benchmarks find what was drawn for them."""

import json
import shutil
import sys
from pathlib import Path

import datasets
import pytest
import torch
from pyarrow import Table
from pyarrow.parquet import write_table
from typer.testing import CliRunner

from mmalign.cli.app import app
from mmalign.config import load as configs
from mmalign.data import prompts as sources
from mmalign.errors import BadInput
from mmalign.evaluation import evaluate, layouts
from reward_models import Card, Prompt
from reward_models.detect import Detection
from reward_models.images import from_file
from reward_models.scorers.geneval import GenEval
from reward_models.tools import picture_files

# rows as GenEval's own metadata has them: one of each tag that differs in shape
METADATA = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "counting",
        "include": [{"class": "clock", "count": 2}],
        "exclude": [{"class": "clock", "count": 3}],
        "prompt": "a photo of two clocks",
    },
    {
        "tag": "position",
        "include": [{"class": "bench", "count": 1}, {"class": "cow", "count": 1, "position": ["left of", 0]}],
        "prompt": "a photo of a cow left of a bench",
    },
    {
        "tag": "color_attr",
        "include": [{"class": "cow", "count": 1, "color": "red"}, {"class": "dog", "count": 1, "color": "white"}],
        "prompt": "a photo of a red cow and a white dog",
    },
]
PROMPTS = [
    Prompt(row["prompt"], {key: value for key, value in row.items() if key != "prompt"}, number)
    for number, row in enumerate(METADATA)
]


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def geneval(tmp_path) -> Path:
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text(lines(METADATA))
    return path


class Scripted:
    """A detector with a given answer for each image."""

    classes = None

    def __init__(self, things):
        self.things = things

    def detect(self, images, request):
        return self.things


class Painted:
    """Cows are red and everything else is black."""

    palette = ("red", "white", "black")

    def name(self, image, results):
        return ["red" if thing.label == "cow" else "black" for thing in results]


def test_geneval_metadata_is_what_its_scorer_asks_for(geneval):
    prompts = sources.read(geneval)
    assert prompts == PROMPTS
    left, right = (0, 4, 4, 8), (12, 4, 16, 8)
    things = [
        [Detection("bench", 0.9, left)],
        [Detection("clock", 0.95, left), Detection("clock", 0.95, right), Detection("clock", 0.95, (4, 0, 8, 4))],
        [Detection("bench", 0.9, right), Detection("cow", 0.9, left)],
        [Detection("cow", 0.9, left), Detection("dog", 0.9, right)],
    ]
    scores = GenEval(Scripted(things), Painted(), Card("geneval"))(torch.zeros(4, 3, 16, 16), prompts)
    assert not scores.failures
    assert scores.column("strict").tolist() == [1, 0, 1, 0]
    assert scores.column("soft").tolist() == [1, 0.5, 1, 0.75]  # one clock of two too many; one colour of four terms


def test_a_table_is_read_like_lines_of_objects(tmp_path):
    rows = [METADATA[1] | {"id": 7}, METADATA[3] | {"id": -1}, {"prompt": "anything", "id": 8}]
    (tmp_path / "rows.jsonl").write_text(lines(rows))
    write_table(Table.from_pylist(rows), tmp_path / "rows.parquet")
    expected = sources.read(tmp_path / "rows.jsonl")
    assert [p.id for p in expected] == [7, -1, 8]
    assert expected[2] == Prompt("anything", {}, 8)
    assert sources.read(tmp_path / "rows.parquet") == expected


def test_a_column_gives_each_text_once_by_its_first_row(tmp_path):
    texts = ["a cat", None, "a dog", " a cat ", "", "two\nlines"]
    expected = [Prompt("a cat", {}, 0), Prompt("a dog", {}, 2), Prompt("two\nlines", {}, 5)]
    rows = [{"caption": text, "image": b"\0"} for text in texts]
    write_table(Table.from_pylist(rows), tmp_path / "pairs.parquet")
    assert sources.read(f"{tmp_path}/pairs.parquet:caption") == expected
    assert sources.read(f"hf:{tmp_path}:train:caption") == expected
    assert sources.read(f"hf:{tmp_path}:train[2:]:caption") == [
        Prompt("a dog", {}, 0), Prompt("a cat", {}, 1), Prompt("two\nlines", {}, 3)
    ]  # fmt: skip


def test_datasets_from_a_folder_and_as_saved(tmp_path, geneval):
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(geneval, folder / "test.jsonl")
    assert sources.read(f"hf:{folder}:test") == PROMPTS
    results = datasets.load_dataset(str(folder), split="test")
    results.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(test=results, few=results.select([2])).save_to_disk(tmp_path / "both")
    assert sources.read(f"hf:{tmp_path}/one:test") == PROMPTS
    assert sources.read(f"hf:{tmp_path}/both:few:prompt") == [Prompt(METADATA[2]["prompt"], {}, 0)]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("hf:FOLDER", "a dataset is named hf:NAME[/CONFIG]:SPLIT"),
        ("hf:FOLDER:dev", "Unknown split \"dev\". Should be one of ['train']"),
        ("hf:FOLDER:train:text", "no column 'text'; there are caption, count, note"),
        ("hf:FOLDER:train", "no column 'prompt'; there are caption, count, note"),
        ("hf:FOLDER:train:count", "row 1: 'count' holds int, not text"),
        ("hf:FOLDER:train[:0]:caption", "corresponds to no data"),
        ("hf:FOLDER:train:note", "no prompts in it"),
        ("FOLDER/train.parquet:note", "no prompts in it"),
        ("hf:FOLDER/absent:train:caption", "Couldn't find any data file"),
        ("hf:somebody/something:train:caption", "Couldn't reach 'somebody/something' on the Hub"),
        ("hf:somebody/something/config:train:caption", "Couldn't reach 'somebody/something' on the Hub"),
        ("hf:a//b:train:caption", "a/"),
        ("FOLDER/train.parquet", "no column 'prompt'; there are caption, count, note"),
        ("FOLDER/train.parquet:text", "no column 'text'; there are caption, count, note"),
        ("FOLDER/absent.parquet", "No such file"),
    ],
)
def test_what_is_not_there_is_one_line(tmp_path, monkeypatch, source, says):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    write_table(Table.from_pylist([{"caption": "a cat", "count": 1, "note": " "}]), tmp_path / "train.parquet")
    with pytest.raises(BadInput) as error:
        sources.read(source.replace("FOLDER", str(tmp_path)))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("[1]", "line 2: not a JSON object, but list"),
        ('{"prompt": null}', "line 2: an object with a `prompt`"),
        ('{"prompt": 5}', "line 2: an object with a `prompt`"),
        ("{", "line 2: not a JSON object"),
        ('{"prompt": "b", "id": "x"}', "line 2: `id` must be a whole number of 64 bits, got 'x'"),
        ('{"prompt": "b", "id": 1.5}', "line 2: `id` must be a whole number of 64 bits, got 1.5"),
        ('{"prompt": "b", "id": 9223372036854775808}', "of 64 bits, got 9223372036854775808"),
        ('{"prompt": "b", "id": 0}', "ids repeat"),
    ],
)
def test_bad_lines(tmp_path, line, says):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(BadInput, match="prompts") as error:
        sources.read(path)
    assert says in str(error.value)


def test_ground_truth_that_json_cannot_hold_is_refused(tmp_path):
    write_table(Table.from_pylist([{"prompt": "a cat", "png": b"\0"}]), tmp_path / "p.parquet")
    with pytest.raises(BadInput, match=r"row 1: .*bytes.*; name the column of prompts"):
        sources.read(tmp_path / "p.parquet")
    assert sources.read(f"{tmp_path / 'p.parquet'}:prompt") == [Prompt("a cat", {}, 0)]


@pytest.mark.parametrize(
    ("package", "source", "extra"),
    [("datasets", "hf:a/b:train:c", "mmalign[datasets]"), ("pyarrow.parquet", "p.parquet", "mmalign[parquet]")],
)
def test_a_missing_extra_is_named(monkeypatch, package, source, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BadInput) as error:
        sources.read(source)
    assert extra in str(error.value)


def test_a_config_and_the_command_line_take_a_dataset(tmp_path, settings, random_model):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(lines([{"text": "a red circle"}, {"text": "a cross"}]))
    source = f"hf:{tmp_path}/data:train[1:]:text"
    path = tmp_path / "run.yaml"
    path.write_text(configs.dump(configs.build(settings, "test")))
    assert configs.load(path, [f"prompts={source}", f"held_out={source}"]).held_out == source
    arguments = ["--prompts", source, "--model", random_model, "--steps", "2", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["sample", *arguments, "--json"])
    assert result.exit_code == 0, result.output
    assert [row["prompt"] for row in json.loads(result.stdout)] == ["a cross"]


@pytest.mark.parametrize("command", ["sample", "evaluate", "refine", "collect"])
def test_help_says_how_prompts_are_named(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0, result.exception
    assert "hf:NAME/CONFIG:SPLIT" in result.stdout


# ------------------------------------------------------------------------------------------------------- layouts


def drawn(prompts, members: int = 2) -> evaluate.Evaluation:
    """Images of random pixels that a PNG can hold, as if they had been drawn and scored."""
    count = len(prompts) * members
    images = torch.randint(256, (count, 3, 4, 4), generator=torch.Generator().manual_seed(0)) / 255
    prompt, member = torch.arange(len(prompts)).repeat_interleave(members), torch.arange(members).repeat(len(prompts))
    return evaluate.Evaluation(images, {"size.bytes": torch.arange(float(count))}, prompt, member, {})


def same(items: list[picture_files.Item], prompts: list[Prompt], images) -> bool:
    shown = [prompts[i // 2] for i in range(2 * len(prompts))]
    return [item.prompt for item in items] == shown and torch.equal(
        torch.cat([from_file(item.path) for item in items]), images
    )


def test_geneval_layout_there_and_back(tmp_path, geneval):
    prompts, out = sources.read(geneval), tmp_path / "out"
    result = drawn(prompts)
    layouts.fits("geneval", prompts, out)
    layouts.write(result, prompts, out, "geneval")
    assert sorted(str(path.relative_to(out)) for path in (out / "00002").rglob("*.*")) == [
        "00002/metadata.jsonl", "00002/samples/0000.png", "00002/samples/0001.png",
    ]  # fmt: skip
    assert [json.loads((out / f"{i:05d}" / "metadata.jsonl").read_text()) for i in range(4)] == METADATA
    assert same(picture_files.read(out)[0], prompts, result.images)  # by our scores.jsonl
    (out / "scores.jsonl").unlink()
    assert same(picture_files.read(out)[0], prompts, result.images)  # by the layout alone


def test_t2i_compbench_layout(tmp_path):
    prompts = [Prompt("a bathroom has a red towel.", {}, 5), Prompt("café, 100% blue", {}, 2)]
    out = tmp_path / "out"
    result = drawn(prompts)
    layouts.fits("t2i_compbench", prompts, out)
    layouts.write(result, prompts, out, "t2i_compbench")
    assert sorted(path.name for path in (out / "samples").iterdir()) == [
        "a bathroom has a red towel._000000.png", "a bathroom has a red towel._000001.png",
        "café, 100% blue_000002.png", "café, 100% blue_000003.png",
    ]  # fmt: skip
    assert same(picture_files.read(out)[0], prompts, result.images)


@pytest.mark.parametrize("layout", ["mmalign", "geneval"])
def test_pictures_of_the_ground_truth_are_found_again(tmp_path, monkeypatch, layout):
    monkeypatch.chdir(tmp_path)
    Path("prompts").mkdir()
    Path("prompts/rows.jsonl").write_text(lines([METADATA[0] | {"reference": "bench.png", "image": "other.png"}]))
    prompts = sources.read("prompts/rows.jsonl")
    layouts.write(drawn(prompts), prompts, Path("out"), layout)
    items, _ = picture_files.read(Path("out"))
    assert items[0].path.is_file()
    assert Path(items[0].prompt.wants["reference"]) == tmp_path / "prompts" / "bench.png"


@pytest.mark.parametrize(
    ("layout", "prompt", "says"),
    [
        ("geneval", Prompt("a cat"), "`tag` and `include` with class and count; not in 'a cat'"),
        ("geneval", Prompt("a cat", {"tag": "x", "include": [{"class": "cat"}]}), "class and count"),
        ("t2i_compbench", Prompt("either/or"), "it may have no /, _"),
        ("t2i_compbench", Prompt("a_b"), "got 'a_b'"),
        ("t2i_compbench", Prompt("a\tb"), r"got 'a\tb'"),
        ("t2i_compbench", Prompt("é" * 123), "at most 244 bytes"),
    ],
)
def test_prompts_a_layout_cannot_hold_are_refused(tmp_path, layout, prompt, says):
    with pytest.raises(BadInput) as error:
        layouts.fits(layout, [prompt], tmp_path / "out")
    assert says in str(error.value)
    layouts.fits("mmalign", [prompt], tmp_path / "out")


def test_evaluate_writes_a_layout(tmp_path, geneval, random_model):
    out = tmp_path / "out"
    arguments = ["--prompts", str(geneval), "--model", random_model, "--rewards", "jpeg_size", "--steps", "2"]
    arguments += ["--layout", "geneval"]
    result = CliRunner().invoke(app, ["evaluate", *arguments])
    assert "--layout geneval sets how images are written; give --out FOLDER" in str(result.exception)
    result = CliRunner().invoke(app, ["evaluate", *arguments, "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    assert len(list(out.glob("0000[0-3]/samples/000[01].png"))) == 8
    (out / "scores.jsonl").rename(tmp_path / "scores.jsonl")
    items, _ = picture_files.read(out)
    assert [item.prompt for item in items] == [prompt for prompt in PROMPTS for _ in range(2)]
    result = CliRunner().invoke(app, ["evaluate", *arguments, "--out", str(out)])
    assert "needs a new or empty folder" in str(result.exception)
