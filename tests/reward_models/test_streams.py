"""Streams of images: the samples of tars and tables, places to begin from, and scoring block by block."""

import csv
import io
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from reward_models import Card, Prompt, Scores, files, limits
from reward_models.tools import picture_files, score_files, score_parts, streams
from reward_models.tools.score_parts import Parts, Processes, score_stream
from reward_models.tools.streams import Place


class Level:
    """The mean of an image; it counts what it is shown, and stops at a number of calls as Ctrl-C does."""

    names = ("mean",)

    def __init__(self, groupwise: bool = False, calls: int = 10**9, sees_prompt: bool = False):
        self.card = Card("level", groupwise=groupwise, sees_prompt=sees_prompt)
        self.calls, self.shown = calls, []

    def __call__(self, images, prompts):
        if len(self.shown) == self.calls:
            raise KeyboardInterrupt
        self.shown.append([prompt.text for prompt in prompts])
        return Scores(self.names, images.mean((1, 2, 3))[:, None])


def picture(level: int, ending: str = "png") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (level % 256, level // 256, 0)).save(file, ending)
    return file.getvalue()


def tar(path: Path, *members: tuple[str, bytes | tarfile.TarInfo], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in members:
            if isinstance(data, tarfile.TarInfo):
                archive.addfile(data)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def shard(path: Path, numbers, form: int = tarfile.PAX_FORMAT) -> Path:
    members = [(f"a/{i:04d}.{end}", data) for i in numbers for end, data in (("png", picture(i)), ("txt", b"p%d" % i))]
    return tar(path, *members, form=form)


BEGIN = Place()


def items(source: Path, place: Place = BEGIN, prompt: str | None = None) -> list[picture_files.Item]:
    return [sample.item() for sample in streams.of_files(source, prompt).samples(place)]


# ---------------------------------------------------------------------------------------------------------------- tars


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_of_a_tar(tmp_path, form):
    long = "d" * 90 + "/" + "n" * 90
    details = {"prompt": "a cat", "id": 7, "tag": "x", "reference": "/etc/passwd", "none": None}
    path = tar(
        tmp_path / "s.tar",
        ("a/1.png", picture(1)), ("a/1.txt", b"p 1 \n"),
        ("b/1.JPG", picture(2, "jpeg")), ("b/1.json", json.dumps(details).encode()), ("b/1.seg.png", b"mask"),
        (f"{long}.bmp", picture(3, "bmp")), (".hidden", b"x"),
        ("../../up.png", picture(4)),
        form=form,
    )  # fmt: skip
    one, two, three, four = items(path)
    assert (one.name, one.prompt, one.data) == ("s.tar/a/1.png", Prompt("p 1"), picture(1))
    assert (two.name, two.prompt) == ("s.tar/b/1.JPG", Prompt("a cat", {"tag": "x", "reference": None}, 7))
    assert (three.name, three.prompt) == (f"s.tar/{long}.bmp", None)
    assert (four.name, four.data) == ("s.tar/../../up.png", picture(4))
    assert items(path, prompt="q")[2].prompt == Prompt("q")


def test_what_is_no_picture_is_a_row_with_the_reason(tmp_path, monkeypatch):
    link, secret = tarfile.TarInfo("b.png"), tmp_path / "secret.png"
    secret.write_bytes(picture(9))
    link.type, link.linkname = tarfile.SYMTYPE, str(secret)
    monkeypatch.setattr(limits, "PICTURE", 1000)
    members = [("a.png", b"0" * 1001), ("b.png", link), ("c.txt", b"alone"), ("d.png", picture(1)), ("d.bmp", b"two")]
    rows = items(tar(tmp_path / "s.tar", *members))
    reasons = ["more than the 1000", "not a regular member", "it has 0 of 1", "it has 2 of 2"]
    for item, reason in zip(rows, reasons, strict=True):
        with pytest.raises(ValueError, match=reason):
            picture_files.picture(item)


def test_a_caption_that_is_a_link_or_too_long_is_refused(tmp_path, monkeypatch):
    link = tarfile.TarInfo("a.txt")
    link.type, link.linkname = tarfile.LNKTYPE, "a.png"
    monkeypatch.setattr(limits, "CAPTION", 10)
    for caption in (link, b"x" * 11):
        with pytest.raises(ValueError, match=r"row 1: 'a\.txt' must be a regular member of at most 10 bytes"):
            items(tar(tmp_path / "s.tar", ("a.png", picture(1)), ("a.txt", caption)))


def damaged(data: bytes, how: str) -> bytes:
    place = data.index(b"a/0002.png")
    return {
        "cut in a header": data[: place + 100],
        "cut between members": data[:place],
        "cut in a picture": data[: place + 520],
        "a broken header": data[:place] + b"\xff" * 512 + data[place + 512 :],
        "none": b"no tar at all" * 100,
        "empty": b"",
    }[how]


@pytest.mark.parametrize(
    "how", ["cut in a header", "cut between members", "cut in a picture", "a broken header", "none", "empty"]
)
def test_a_damaged_tar_is_one_line_that_names_it(tmp_path, how):
    path = shard(tmp_path / "s.tar", range(4), tarfile.USTAR_FORMAT)
    path.write_bytes(damaged(path.read_bytes(), how))
    with pytest.raises(ValueError, match=r"s\.tar") as error:
        items(path)
    assert "\n" not in str(error.value)


def test_a_name_of_a_tar_is_bounded(tmp_path):
    path = tar(tmp_path / "s.tar", ("n" * (2**20 + 1000) + ".png", picture(1)), form=tarfile.GNU_FORMAT)
    with pytest.raises(ValueError, match=r"a header of .* bytes, more than 1048576"):
        items(path)


def test_a_sample_of_many_members_is_refused(tmp_path):
    with pytest.raises(ValueError, match="row 1: more than 64 members"):
        items(tar(tmp_path / "s.tar", *((f"a.{i}", b"") for i in range(65))))


# -------------------------------------------------------------------------------------------------------------- tables


def tables_of(folder: Path) -> list[Path]:
    """The same seven images in each form, some cells with line ends, commas and characters of several bytes."""
    rows = [
        {"image": f"{i}.png", "prompt": "a \u00fc,\n cat" if i % 2 else f"p{i}", "id": i, "tag": "x" * i}
        for i in range(7)
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    files.write(folder / "t.jsonl", "\ufeff" + "\n\n".join(lines))
    for ending, mark in (("csv", ","), ("tsv", "\t")):
        with (folder / f"t.{ending}").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*rows[0]], delimiter=mark)
            writer.writeheader()
            writer.writerows(rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "t.parquet", row_group_size=3)
    for row, level in zip(rows, range(7), strict=True):
        row["image"] = {"bytes": picture(level), "path": row["image"]}
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "bytes.parquet", row_group_size=2)
    return [folder / name for name in ("t.jsonl", "t.csv", "t.tsv", "t.parquet", "bytes.parquet")]


def test_a_table_gives_the_same_images_as_a_stream(tmp_path):
    for path in tables_of(tmp_path):
        assert items(path) == picture_files.read(path)[0]
        assert len(items(path)) == 7


def test_reading_begins_at_any_place(tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    for number, count in enumerate((3, 0, 4)):
        numbers = range(10 * number, 10 * number + count)
        shard(shards / f"{number}.tar", numbers) if count else tar(shards / f"{number}.tar", (".x", b""))
    for source in (*tables_of(tmp_path), shards):
        stream = streams.of_files(source)
        samples = [*stream.samples(Place())]
        whole = items(source)
        assert len(whole) == 7
        for number, sample in enumerate(samples, 1):
            assert items(source, sample.after) == whole[number:]


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("t.jsonl", b'{"image": "a.png"}\n[1]\n', "line 2: not a JSON object"),
        ("t.jsonl", b'{"image": "a.png"}\n\xff\n', "byte 19: a line that is not UTF-8"),
        ("t.jsonl", b'{"prompt": "a"}\n', "row 1: no `image`; columns are prompt"),
        ("t.csv", b"image,prompt\na.png\n", "row 1: 1 cells under 2 headings"),
        ("t.csv", b"image,prompt\na.png,p\nb.png," + b"x" * 200_000, "row 2: field larger than field limit"),
        ("t.csv", b"image,image\n", "two columns are called 'image'"),
        (
            "t.jsonl",
            b'{"image_a": "a.png", "image_b": "b.png", "chosen": "a"}\n',
            "row 1: pairs; they are read without",
        ),
        ("t.parquet", b"PAR1", "no Parquet that can be read"),
        ("t.json", b"[]", "a tar, a folder of tars or a table"),
    ],
)
def test_a_table_that_is_none_is_one_line(tmp_path, name, data, says):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=says) as error:
        items(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path / name))


def test_a_line_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "JSON", 100)
    (tmp_path / "t.jsonl").write_bytes(b'{"image": "a.png"}\n' + b"x" * 1000)
    with pytest.raises(ValueError, match="byte 19: a line longer than 100 bytes"):
        items(tmp_path / "t.jsonl")


# ------------------------------------------------------------------------------------------------------------- scoring


@pytest.fixture
def shards(tmp_path):
    """Two tars of 25 and 12 images; the prompts of groups of three come one after another."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for name, numbers in (("0.tar", range(25)), ("1.tar", range(25, 37))):
        members = [(f"{i:04d}.{end}", data) for i in numbers
                   for end, data in (("png", picture(7 * i)), ("txt", b"p%d" % (i // 3)))]  # fmt: skip
        tar(folder / name, *members)
    return folder


def parts_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.parts")


def test_a_stream_is_scored_in_order_and_summarised(shards, tmp_path):
    result = score_stream(shards, {"own": Level()}, tmp_path / "s.jsonl", batch=8)
    rows = [files.parsed(line) for line in files.lines(files.text(tmp_path / "s.jsonl"))]
    assert [row["image"] for row in rows] == [f"{int(i > 24)}.tar/{i:04d}.png" for i in range(37)]
    expected = score_files.summarise(rows)["scores"]["own.mean"]
    for name in ("count", "missing", "mean", "std", "min", "max"):
        assert result.summary["scores"]["own.mean"][name] == pytest.approx(expected[name], abs=1e-12)
    assert (result.summary["images"], result.summary["failed"], result.scored) == (37, 0, 37)
    assert not parts_of(tmp_path / "s.jsonl").exists()
    held = [*score_files.score(items(shards), {"own": Level()}, 8)]
    assert rows == held


@pytest.mark.parametrize("groupwise", [False, True])
@pytest.mark.parametrize("calls", [0, 1, 3])
def test_an_interrupted_stream_continues_where_it_stopped(shards, tmp_path, calls, groupwise):
    score_stream(shards, {"own": Level(groupwise)}, tmp_path / "whole.jsonl", batch=7)
    out, first, again = tmp_path / "s.jsonl", Level(groupwise, calls), Level(groupwise)
    with pytest.raises(KeyboardInterrupt):
        score_stream(shards, {"own": first}, out, batch=7)
    assert not out.exists()
    score_stream(shards, {"own": again}, out, batch=100)  # blocks keep their size
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sum(map(len, first.shown)) + sum(map(len, again.shown)) == 37
    if groupwise:
        prompts = [text for call in (*first.shown, *again.shown) for text in sorted(set(call))]
        assert len(prompts) == len(set(prompts))


def test_prompts_that_are_not_together_are_refused_for_those_who_compare(tmp_path):
    names = ["p", "q", "p"]
    members = [(f"{i}.{end}", data) for i, name in enumerate(names)
               for end, data in (("png", picture(i)), ("txt", name.encode()))]  # fmt: skip
    path = tar(tmp_path / "s.tar", *members)
    for _ in range(2):  # the second continues the first
        with pytest.raises(ValueError, match="the images of prompt 0 'p' are not one after another"):
            score_stream(path, {"own": Level(groupwise=True)}, tmp_path / "s.jsonl", batch=1)
    score_stream(path, {"own": Level()}, tmp_path / "t.jsonl", batch=1)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_other_outputs_are_those_of_a_table_that_is_held(shards, tmp_path, ending):
    score_stream(shards, {"own": Level()}, tmp_path / f"s.{ending}", batch=8)
    rows = [*score_files.score(items(shards), {"own": Level()}, 8)]
    score_files.write(rows, tmp_path / f"held.{ending}")
    if ending == "csv":
        assert (tmp_path / "s.csv").read_bytes() == (tmp_path / "held.csv").read_bytes()
    else:
        tables = [parquet.read_table(tmp_path / f"{name}.parquet").to_pylist() for name in ("s", "held")]
        assert tables[0] == tables[1]


def test_other_work_in_the_folder_is_refused(shards, tmp_path):
    out = tmp_path / "s.jsonl"
    with pytest.raises(KeyboardInterrupt):
        score_stream(shards, {"own": Level(calls=2)}, out, batch=8)
    with pytest.raises(ValueError, match="scores of another prompt"):
        score_stream(shards, {"own": Level()}, out, "a cat", batch=8)
    with pytest.raises(ValueError, match="scores of another scorers"):
        score_stream(shards, {"other": Level()}, out, batch=8)
    (shards / "2.tar").write_bytes((shards / "1.tar").read_bytes())
    with pytest.raises(ValueError, match="scores of another source"):
        score_stream(shards, {"own": Level()}, out, batch=8)
    (shards / "2.tar").unlink()
    data = (shards / "0.tar").read_bytes()
    (shards / "0.tar").write_bytes(data.replace(picture(56), picture(57)))  # of block 1, the last that is done
    with pytest.raises(ValueError, match="has changed since"):
        score_stream(shards, {"own": Level()}, out, batch=8)
    (shards / "0.tar").write_bytes(data)
    (parts_of(out) / "000000.jsonl").write_bytes(b"")
    with pytest.raises(ValueError, match=r"000000\.jsonl: not a part of scores; remove it"):
        score_stream(shards, {"own": Level()}, out, batch=8)
    assert not out.exists()
    (parts_of(out) / "000000.jsonl").unlink()
    assert score_stream(shards, {"own": Level()}, out, batch=8).summary["images"] == 37
    with pytest.raises(ValueError, match="is there already"):
        score_stream(shards, {"own": Level()}, out, batch=8)


def test_a_prompt_that_is_needed_and_missing_is_one_line(tmp_path):
    path = tar(tmp_path / "s.tar", ("a.png", picture(1)))
    with pytest.raises(ValueError, match=r"own needs the prompt, and s\.tar/a\.png"):
        score_stream(path, {"own": Level(sees_prompt=True)}, tmp_path / "s.jsonl")
    assert score_stream(path, {"own": Level(sees_prompt=True)}, tmp_path / "t.jsonl", "a cat").scored == 1


def test_failures_files_of_other_kinds_and_animations_are_counted(shards, tmp_path):
    (shards / "notes.md").write_text("x")
    file = io.BytesIO()
    frames = [Image.new("RGB", (4, 4), (level, 0, 0)) for level in (1, 200)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    tar(shards / "2.tar", ("a.gif", file.getvalue()), ("b.png", b"broken"))
    lines = []
    result = score_stream(shards, {"own": Level()}, tmp_path / "s.jsonl", warn=lines.append)
    assert (result.summary["images"], result.summary["failed"]) == (39, 1)
    assert lines == [
        f"left out of {shards}: 1 files of other kinds",
        "1 of 39 pictures are animated; the first frame is scored",
    ]


HOLD = """
import fcntl, os, sys, time
lock = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.lockf(lock, fcntl.LOCK_EX, 1, int(sys.argv[2]))
print("held", flush=True)
time.sleep(20)
"""


def test_a_block_of_another_process_is_left_to_it_until_that_ends(shards, tmp_path, monkeypatch):
    out, waits = tmp_path / "s.jsonl", []
    with pytest.raises(KeyboardInterrupt):
        score_stream(shards, {"own": Level(calls=0)}, out, batch=8)
    command = [sys.executable, "-S", "-c", HOLD, parts_of(out) / "lock", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        other = Level()
        assert score_stream(shards, {"own": other}, out, batch=8, processes=Processes(1, 2)).scored == 37 - 8
        assert not (parts_of(out) / "000002.jsonl").exists()

        def pause(seconds):
            waits.append(seconds)
            holder.kill()
            holder.wait()

        monkeypatch.setattr(time, "sleep", pause)
        assert score_stream(shards, {"own": Level()}, out, batch=8).scored == 8
    assert len(waits) == 1
    score_stream(shards, {"own": Level()}, tmp_path / "whole.jsonl", batch=8)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_second_command_is_refused(shards, tmp_path):
    out = tmp_path / "s.jsonl"
    with pytest.raises(KeyboardInterrupt):
        score_stream(shards, {"own": Level(calls=0)}, out, batch=8)
    command = [sys.executable, "-S", "-c", HOLD, parts_of(out) / "lock", str(score_parts.PROCESS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="another command is scoring into"):
            score_stream(shards, {"own": Level()}, out, batch=8)
        holder.kill()


def test_without_locks_blocks_are_dealt_by_number(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(score_parts.fcntl, "lockf", none)
    taken = [[n for n in range(6) if Parts(tmp_path, 0, Processes(rank, 3), 8).take(n)] for rank in range(3)]
    assert taken == [[0, 3], [1, 4], [2, 5]]


# ------------------------------------------------------------------------------------------------------------ datasets


@pytest.fixture
def dataset(tmp_path) -> Path:
    """Two files of three rows, as `datasets` stores pictures."""
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(2):
        rows = [{"image": {"bytes": picture(i), "path": f"{i}.png"}, "prompt": f"p{i}", "tag": "x"}
                for i in range(3 * number, 3 * number + 3)]  # fmt: skip
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"train-{number:05d}-of-00002.parquet")
    return folder


def of_split(source: str, place: Place = BEGIN) -> list[picture_files.Item]:
    return [sample.item() for sample in streams.of_source(source).samples(place)]


def test_the_rows_of_a_dataset_from_any_place(dataset):
    source = f"hf:{dataset}:train"
    every = of_split(source)
    assert [(item.name, item.prompt.text, item.prompt.wants, item.data) for item in every] == [
        (f"{i}.png", f"p{i}", {"tag": "x"}, picture(i)) for i in range(6)
    ]
    places = [sample.after for sample in streams.of_source(source).samples(BEGIN)]
    assert places[2:4] == [Place(0, 3, 3), Place(1, 1, 1)]
    for done, place in enumerate(places, 1):
        assert of_split(source, place) == every[done:]


def test_a_dataset_that_was_saved_is_a_stream_too(dataset, tmp_path):
    import datasets

    datasets.load_dataset(str(dataset), split="train").save_to_disk(tmp_path / "saved")
    assert [item.data for item in of_split(f"hf:{tmp_path / 'saved'}:train")] == [picture(i) for i in range(6)]


def test_scores_of_a_dataset_are_those_of_its_tables_even_if_it_is_stopped(dataset, tmp_path):
    source = f"hf:{dataset}:train"
    with pytest.raises(KeyboardInterrupt):
        score_stream(source, {"level": Level(calls=2)}, tmp_path / "some.jsonl", batch=2)
    rest = Level()
    assert score_stream(source, {"level": rest}, tmp_path / "some.jsonl", batch=2).scored == 2
    score_stream(dataset, {"level": Level()}, tmp_path / "tables.jsonl", batch=2)
    some, tables = ((tmp_path / name).read_text() for name in ("some.jsonl", "tables.jsonl"))
    assert some == tables
    assert [json.loads(line)["prompt"] for line in some.splitlines()] == [f"p{i}" for i in range(6)]


def test_rows_from_elsewhere_name_no_files_here(dataset):
    local = dataset / "secret.png"
    local.write_bytes(picture(9))
    for cell in (str(local), {"path": str(local)}, 7):
        item = streams._fetched("hf:a/b:train", "hf:a/b:train, file 1, row 1", {"image": cell, "prompt": "p"}, None)
        assert (item.data, item.prompt.text) == (b"", "p")
        assert item.reason == "no bytes of a picture in `image`"
    row = {"image": picture(1), "prompt": "p", "reference": str(local)}
    assert streams._fetched("hf:a/b:train", "hf:a/b:train, file 1, row 1", row, None).prompt.wants["reference"] is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hf:{}", "hf:NAME:SPLIT"),
        ("hf:{}:train:prompt", "hf:NAME:SPLIT"),
        ("hf:{}:other", "other"),
        ("hf:a/b:train", "a/b"),
    ],
)
def test_a_dataset_that_cannot_be_read_is_one_line(dataset, name, words):
    with pytest.raises(ValueError, match=words) as error:
        of_split(name.format(dataset))
    assert "\n" not in str(error.value)


def test_a_file_of_a_dataset_that_is_damaged_is_named(dataset):
    damaged = dataset / "train-00001-of-00002.parquet"
    damaged.write_bytes(damaged.read_bytes()[:60])
    with pytest.raises(ValueError, match=f"hf:{dataset}:train"):
        of_split(f"hf:{dataset}:train")
