"""Tests of tables of pictures: reading, errors that name the row, and CSV files without formulas."""

import csv
import io
import json
from pathlib import Path

import pyarrow
import pytest
from corpus import tables as corpus
from hypothesis import given, strategies as st
from PIL import Image
from pyarrow import parquet

from reward_models import Prompt, tables
from reward_models.images import from_pil
from reward_models.tools import picture_files, score_files as batch

RED = Image.new("RGB", (8, 8), (255, 0, 0))
BLUE = Image.new("RGB", (8, 8), (0, 0, 255))
cells = st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("=+-@\t\r\n',;\"＝"), max_size=8)


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def read(folder: Path, name: str, data: bytes) -> list[picture_files.Item]:
    (folder / name).write_bytes(data)
    return picture_files.read(folder / name)[0]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("t.csv", b'image,prompt\na.png,"a cat, a dog"\n'),
        ("t.csv", b' image , prompt\na.png,"a cat, a dog"\n'),
        ("t.csv", corpus.BOM + b'file_name,prompt\r\na.png,"a cat, a dog"\r\n'),
        ("t.tsv", b"image\tprompt\na.png\ta cat, a dog\n"),
        ("t.json", b'[{"image": "a.png", "prompt": "a cat, a dog"}]'),
        ("t.ndjson", b'{"file_name": "a.png", "prompt": "a cat, a dog"}'),
        ("t.JSONL", b'{"image": {"path": "a.png", "bytes": null}, "prompt": "a cat, a dog"}\n'),
    ],
)
def test_tables_of_every_kind_name_their_pictures(tmp_path, name, data):
    assert read(tmp_path, name, data) == [picture_files.Item("a.png", tmp_path / "a.png", Prompt("a cat, a dog"))]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_a_folder_of_pictures_may_have_a_table_as_datasets_writes_it(tmp_path, name):
    rows = [{"file_name": "a.png", "prompt": "a cat"}, {"file_name": "sub/b.png", "prompt": "a dog"}]
    if name.endswith("jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif name.endswith("csv"):
        (tmp_path / name).write_text(tables.separated(rows))
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
    (tmp_path / "c.png").write_bytes(png(RED))
    items, _ = picture_files.read(tmp_path)
    assert [(item.name, item.prompt) for item in items] == [("a.png", Prompt("a cat")), ("sub/b.png", Prompt("a dog"))]
    assert picture_files.left_out(tmp_path, items) == "1 x picture that the table does not name"
    (tmp_path / "metadata.csv").touch()
    (tmp_path / "metadata.jsonl").touch()
    with pytest.raises(ValueError, match=r"metadata.jsonl and metadata.csv.*; give one of them as the source"):
        picture_files.read(tmp_path)


def test_pictures_that_lie_in_a_table_are_scored_from_there(tmp_path):
    data, paths, prompts = [png(RED), png(BLUE), png(RED), png(RED)], ["a.png", "a.png", None, ""], ["a", "a", "a", "b"]
    items = read(tmp_path, "t.parquet", corpus.stored(data, paths, prompts))
    assert [item.name for item in items] == ["a.png", "a.png of row 2", "image of row 3", "image of row 4"]
    assert [item.prompt.text for item in items] == prompts
    for item, picture in zip(items, (RED, BLUE, RED, RED), strict=True):
        assert picture_files.picture(item).equal(from_pil([picture]))


def test_bytes_alone_and_pairs_of_them(tmp_path):
    rows = [{"image_a": png(RED), "image_b": png(BLUE), "prompt": "p", "chosen": "b"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    items, choices = picture_files.read(tmp_path / "t.parquet")
    assert [item.name for item in items] == ["image_a of row 1", "image_b of row 1"]
    assert choices == [picture_files.Choice("p", "image_b of row 1", "image_a of row 1")]
    (broken,) = read(tmp_path, "b.parquet", corpus.stored([b"no picture"], ["a.png"], ["p"]))
    with pytest.raises(ValueError, match="cannot be read"):
        picture_files.picture(broken)


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("t.csv", b"image,prompt\na.png,a cat, a dog\n", "row 1: 3 cells under 2 headings"),
        ("t.csv", b"image,prompt,image \na,b,c\n", "two columns are called 'image'"),
        ("t.jsonl", b'{"image": "a.png", "prompt": ""}\n', "row 1: the prompt is blank"),
        ("t.jsonl", b'{"image": "a.png", "prompt": "a\\u0000"}\n', "row 1: the prompt holds U+0000"),
        ("t.jsonl", b'{"image": "a.png", "prompt": 5}\n', "row 1: the prompt is int; a text is needed"),
        (
            "t.jsonl",
            b'{"image": "a.png", "id": Infinity}\n',
            "line 1: not a JSON object: Infinity is not a JSON",
        ),
        ("t.jsonl", b'{"image": "a.png", "prompt": "p", "id": 1e99}\n', "`id` must be a whole number, got 1e+99"),
        ("t.jsonl", b'{"image": "a.png", "prompt": "p", "id": true}\n', "`id` must be a whole number, got True"),
        ("t.jsonl", b'{"image": ["a.png"], "prompt": "p"}\n', "`image` must be the name of a file or its bytes"),
        ("t.jsonl", b'{"image": {"bytes": "aGk=", "path": null}}\n', "`image` must be the name of a file or its bytes"),
        ("t.jsonl", b'{"image": "\\udcff.png"}\n', "half a surrogate pair"),
        (
            "t.jsonl",
            b'{"image_a": "a.png", "prompt": "p", "chosen": "a"}\n',
            "no pairs; its columns are image_a, prompt, chosen, and those of choices: image_a, image_b, chosen|aspects",
        ),
        ("t.csv", b"image,prompt\n,a cat\n", "row 1: no `image`; columns are prompt"),
    ],
)
def test_rows_that_cannot_be_right_are_named(tmp_path, name, data, says):
    with pytest.raises(ValueError, match="t") as error:
        read(tmp_path, name, data)
    assert says in str(error.value)
    assert str(error.value).startswith(f"{tmp_path / name}")
    assert "\n" not in str(error.value)


def test_what_lies_about_in_a_folder_is_left_out_and_said(tmp_path):
    scored, aside = corpus.folder_of_all_kinds(tmp_path, png(RED))
    items, _ = picture_files.read(tmp_path)
    assert sorted(item.name for item in items) == sorted(scored)
    assert picture_files.left_out(tmp_path, items) == aside
    prompts = {item.name: item.prompt for item in items}
    assert prompts["a.PNG"] == Prompt("a caption")
    assert prompts["00000/samples/0001.jpg"] == Prompt("a cat")


@pytest.mark.parametrize("caption", [b"", b" \n", b"a\0b", b"K\xe4tzchen"])
def test_a_caption_that_is_none_is_named(tmp_path, caption):
    (tmp_path / "a.png").write_bytes(png(RED))
    (tmp_path / "a.txt").write_bytes(caption)
    with pytest.raises(ValueError, match=r"a\.txt"):
        picture_files.read(tmp_path)


def test_captions_may_have_a_mark_and_any_line_end(tmp_path):
    (tmp_path / "a.png").write_bytes(png(RED))
    (tmp_path / "a.txt").write_bytes(corpus.BOM + "a\u2028cat\r\nand a dog\r\n".encode())
    assert picture_files.read(tmp_path)[0][0].prompt == Prompt("a\u2028cat\nand a dog")


def test_a_name_that_is_no_utf_8_is_written_out(tmp_path):
    (tmp_path / "a\udcff.png").write_bytes(png(RED))
    ((item,), _) = picture_files.read(tmp_path)
    assert item.name == "a\\xff.png"
    assert picture_files.picture(item).equal(from_pil([RED]))
    (tmp_path / "a\\xff.png").write_bytes(png(RED))
    with pytest.raises(ValueError, match="two pictures have the same name"):
        picture_files.read(tmp_path)


# ------------------------------------------------------------------------------------------------------------ formulas


@pytest.mark.parametrize(
    ("cell", "written"),
    [
        ("=1+1", "'=1+1"), ("+1", "'+1"), ("-1", "'-1"), ("@SUM(A1)", "'@SUM(A1)"), ("\t=1", "'\t=1"),
        ("\r=1", "'\r=1"),
        ("\n=1", "'\n=1"), ("＝1", "'＝1"), ("'=1", "''=1"), ("a=1", "a=1"), ("'a'", "'a'"), ("", ""), (-1.5, -1.5),
        (-3, -3), (None, None),
    ],
)  # fmt: skip
def test_no_cell_is_a_formula(cell, written):
    assert tables.safe(cell) == written


@given(cells)
def test_a_cell_comes_back_whatever_it_is(cell):
    assert tables.FORMULA.match(tables.safe(cell)) is None or tables.safe(cell)[0] == "'"
    assert tables.plain(tables.safe(cell)) == cell


@given(st.lists(st.tuples(cells, cells, st.integers(-(2**53), 2**53)), min_size=1, max_size=4))
def test_a_table_comes_back_whatever_is_in_it(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("t") / "t.csv"
    path.write_bytes(tables.separated([{"=a": a, "b": b, "n": n} for a, b, n in values]).encode())
    back = [row for _, row in tables.read(path).rows(None)]
    assert back == [{"n": str(n)} | {k: v for k, v in (("=a", a), ("b", b)) if v} for a, b, n in values]


def test_scores_are_written_without_formulas(tmp_path):
    row = {"image": "=a.png", "prompt": '=cmd|"/c calc"!A1', "id": -3, "scores": {"x.y": -0.5}, "failures": {}}
    batch.write([row], tmp_path / "t.csv")
    with (tmp_path / "t.csv").open(newline="") as file:
        (written,) = csv.DictReader(file)
    assert written == {"image": "'=a.png", "prompt": '\'=cmd|"/c calc"!A1', "id": "-3", "x.y": "-0.5", "failures": ""}
    ((item,), _) = picture_files.read(tmp_path / "t.csv")
    assert (item.name, item.prompt.text, item.prompt.id) == ("=a.png", row["prompt"], -3)


# -------------------------------------------------------------------------------------------------------------- bounds


def test_tables_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(tables.limits, "ROWS", 3)
    (tmp_path / "t.csv").write_text("prompt\n" + "a\n" * 4)
    with pytest.raises(ValueError, match="more than 3 rows"):
        list(tables.read(tmp_path / "t.csv").rows(None))
    monkeypatch.setattr(tables.limits, "TEXT", 50_000)
    data = corpus.stored([bytes(1000)] * 100, [None] * 100, ["p"] * 100)
    (tmp_path / "t.parquet").write_bytes(data)
    assert len(data) < 50_000  # it is packed: its cells are the larger
    with pytest.raises(ValueError, match="row 1: more than 50000 bytes so far"):
        list(tables.read(tmp_path / "t.parquet").rows(None))
    monkeypatch.setattr(tables.limits, "JSON", 100)
    (tmp_path / "t.json").write_text("[" + "{}," * 50 + "{}]")
    with pytest.raises(ValueError, match="longer than 100 bytes"):
        tables.read(tmp_path / "t.json")
