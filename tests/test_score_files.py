"""What `score` and `refine` write: never over another file, known by what it is made of, whole on a full disk."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import mmalign
from hypothesis import HealthCheck, given, settings as examples, strategies as st
from PIL import Image

from mmalign.cli import app as cli
from reward_models import Card, Prompt, Scores, files
from reward_models.tools import picture_files, score_files as batch

ROOT = Path(__file__).parents[1]


class Level:
    """How bright an image is, times a factor that its card names; it counts what it is shown."""

    names = ("mean",)

    def __init__(self, factor: float = 1.0):
        self.factor, self.shown = factor, 0
        self.card = Card("level", settings={"factor": factor})

    def __call__(self, images, prompts):
        self.shown += len(images)
        return Scores(self.names, self.factor * images.mean((1, 2, 3))[:, None])


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (8, 8), (60 * i,) * 3).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"grey {i}")
    return folder


def scored(out: Path, items, scorer) -> int:
    """Score into a file as the command line does; how many were scored now."""
    done, left = batch.resume(out, items, {"own": scorer})
    for row in batch.score(left, {"own": scorer}, 2):
        files.append(out, row)
        done[row["image"], row["prompt"]] = row
    assert [done[item.key]["image"] for item in items] == [item.name for item in items]
    return len(left)


def means(out: Path) -> dict[str, float]:
    rows = [files.parsed(line) for line in files.lines(files.text(out))]
    return {row["image"]: round(row["scores"]["own.mean"], 4) for row in rows}


GREYS = {f"{i}.png": round(60 * i / 255, 4) for i in range(4)}


def test_what_is_the_same_is_not_scored_again(pictures, tmp_path):
    out, items = tmp_path / "s.jsonl", picture_files.read(pictures)[0]
    assert scored(out, items, Level()) == 4
    assert scored(out, items, Level()) == 0
    assert means(out) == GREYS


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (lambda folder: Image.new("RGB", (8, 8), (255,) * 3).save(folder / "1.png"), ["1.png"]),
        (lambda folder: Image.new("RGB", (9, 8), (60,) * 3).save(folder / "1.png"), ["1.png"]),
        (lambda folder: (folder / "2.txt").write_text("another"), ["2.png"]),
        (lambda folder: os.utime(folder / "2.png", (0, 0)), []),
    ],
)
def test_another_picture_or_prompt_is_scored_again(pictures, tmp_path, change, again):
    out = tmp_path / "s.jsonl"
    scored(out, picture_files.read(pictures)[0], Level())
    change(pictures)
    items = picture_files.read(pictures)[0]
    assert [item.name for item in batch.resume(out, items, {"own": Level()})[1]] == again
    scored(out, items, Level())
    assert means(out)["0.png"] == 0


def test_another_version_of_a_scorer_scores_again_and_replaces(pictures, tmp_path):
    out, items = tmp_path / "s.jsonl", picture_files.read(pictures)[0]
    scored(out, items, Level())
    assert scored(out, items, Level(0.5)) == 4
    assert means(out) == {name: pytest.approx(value / 2, abs=1e-4) for name, value in GREYS.items()}


@pytest.mark.parametrize(("one", "two"), [({"tag": "a"}, {"tag": "b"}), ({}, {"reference": "ref.png"})])
def test_other_ground_truth_is_scored_again(pictures, tmp_path, one, two):
    def items(wants):
        return [picture_files.Item("1.png", pictures / "1.png", Prompt("grey", wants))]

    out = tmp_path / "s.jsonl"
    scored(out, items(one), Level())
    assert [scored(out, items(environment), Level()) for environment in (one, two, two)] == [0, 1, 0]


def test_a_picture_of_the_ground_truth_that_changed_is_scored_again(pictures, tmp_path):
    out, wants = tmp_path / "s.jsonl", {"reference": str(pictures / "0.png")}
    items = [picture_files.Item("1.png", pictures / "1.png", Prompt("grey", wants))]
    assert [scored(out, items, Level()) for _ in range(2)] == [1, 0]
    Image.new("RGB", (8, 8), (9, 9, 9)).save(pictures / "0.png")
    assert [scored(out, items, Level()) for _ in range(2)] == [1, 0]


def test_rows_that_do_not_say_what_they_are_made_of_are_scored_again(pictures, tmp_path):
    out, items = tmp_path / "s.jsonl", picture_files.read(pictures)[0]
    scored(out, items, Level())
    rows = [files.parsed(line) for line in files.lines(files.text(out))]
    files.write(out, "".join(json.dumps({k: v for k, v in row.items() if k != "made_of"}) + "\n" for row in rows))
    assert scored(out, items, Level()) == 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A file of four rows, its items, and a place for damaged copies."""
    folder = tmp_path_factory.mktemp("whole")
    for i in range(4):
        Image.new("RGB", (4, 4), (60 * i,) * 3).save(folder / f"{i}.png")
    items = picture_files.read(folder, "p")[0]
    out = tmp_path_factory.mktemp("out") / "s.jsonl"
    scored(out, items, Level())
    return out.read_bytes(), items, out


@examples(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1))
def test_a_file_cut_anywhere_goes_on(whole, share):
    data, items, out = whole
    cut = data[: int(share * len(data))]
    out.write_bytes(cut)
    rows = cut.count(b"\n") + (cut.rpartition(b"\n")[2] in {line for line in data.split(b"\n") if line})
    assert scored(out, items, Level()) == 4 - rows
    assert means(out) == GREYS


FOREIGN = [
    b"hello", b"{}", b"[]", b"null", b'{"image": "a.png", "prompt": "p"}', b'{"prompt": "a red circle", "id": 1}',
    b"\0\0\0", b"\xff\xfe", b"image,prompt,id", b'{"image": 1, "prompt": null, "scores": {}, "failures": {}}',
    b'{"image": "0.png", "prompt": "p", "id": 0, "scores": {"own.mean": "high"}, "failures": {}, "critiques": {}, '
    b'"requests": {}, "replies": {}, "places": {}}',
    b'{"image": "0.png", "prompt": "p", "id": 0, "scores": {"own.mean": NaN}, "failures": {}}', b"[" * 10**5,
]  # fmt: skip


@examples(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(line=st.sampled_from(FOREIGN), place=st.integers(0, 4))
def test_a_foreign_line_anywhere_is_refused_and_nothing_is_lost(whole, line, place):
    data, items, out = whole
    lines = data.splitlines(keepends=True)
    damaged = b"".join([*lines[:place], line + b"\n", *lines[place:]])
    out.write_bytes(damaged)
    with pytest.raises(ValueError, match=rf"line {place + 1}\b.*|not UTF-8|is UTF-16") as error:
        batch.resume(out, items, {"own": Level()})
    assert "\n" not in str(error.value)
    assert out.read_bytes() == damaged


# ------------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("prompts.jsonl", '{"prompt": "a red circle", "id": 0}\n' * 3),
        ("notes.jsonl", "not JSON at all"),
        ("scores.jsonl", '{"image": "0.png", "prompt": "p", "id": 0, "scores": {"clip.cosine": 1}, "places": {}}\n'),
        ("table.csv", "image,prompt\n0.png,p\n"),
        ("page.html", "<html>mine</html>"),
    ],
)
def test_score_overwrites_no_other_file(pictures, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    option = (
        ["--html", tmp_path / name, "--out", tmp_path / "out.jsonl"]
        if name == "page.html"
        else ["--out", tmp_path / name]
    )
    result = mmalign("score", pictures, "--rewards", "image_stats", *option)
    assert (result.returncode, result.stdout) == (2, "")
    assert str(tmp_path / name) in result.stderr
    assert result.stderr.count("\n") == 1
    assert (tmp_path / name).read_text() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "pictures"])


def test_a_page_of_ours_is_written_again(pictures, tmp_path):
    score = [
        "score",
        pictures,
        "--rewards",
        "image_stats",
        "--out",
        tmp_path / "s.jsonl",
        "--html",
        tmp_path / "a/p.html",
    ]
    assert mmalign(*score).returncode == 0
    (pictures / "3.png").unlink()
    assert mmalign(*score).returncode == 0
    assert (tmp_path / "a/p.html").read_text().count("<figure") == 3


@pytest.mark.parametrize("option", ["--html", "--out"])
@pytest.mark.parametrize("place", ["pictures/0.png/x", "folder"])
def test_what_cannot_be_written_is_known_before_anything_is_scored(pictures, tmp_path, option, place):
    path = tmp_path / f"{place}.{'html' if option == '--html' else 'jsonl'}"
    if place == "folder":
        path.mkdir()
    others = ["--out", tmp_path / "s.jsonl"] if option == "--html" else []
    result = mmalign("score", pictures, "--rewards", "image_stats", option, path, *others)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert not (tmp_path / "s.jsonl").exists()


def test_a_folder_is_not_read_by_the_scores_that_are_written_into_it(pictures, monkeypatch):
    monkeypatch.chdir(pictures)
    assert mmalign("score", ".", "--rewards", "image_stats").returncode == 0
    lines = Path("scores.jsonl").read_text().splitlines(keepends=True)
    Path("scores.jsonl").write_text("".join(lines[:2]))
    assert "2 images scored now, 2 before" in " ".join(mmalign("score", ".", "--rewards", "image_stats").stdout.split())


@pytest.mark.parametrize("seeds", ["9" * 23, "9223372036854775808", "-1", "1,1", "1_0", "١", "", "1,,2", "1.0", "1e3"])
def test_seeds_that_are_none(seeds, random_model, tmp_path):
    result = mmalign("sample", "a cat", f"--seeds={seeds}", "--model", random_model, "--out", tmp_path / "out")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "--seeds" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("prompt", ["", " ", "a\0b", "a\udcff", "\x1b[31m"])
@pytest.mark.parametrize("command", ["sample", "refine", "score"])
def test_prompts_of_the_command_line_that_are_none(command, prompt, pictures, tmp_path, random_model):
    given = [pictures, "--prompt", prompt] if command == "score" else [prompt, "--model", random_model]
    result = mmalign(command, *given, "--out", tmp_path / "out.jsonl")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "the prompt" in result.stderr


FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)  # as a full disk: no file grows beyond this
from mmalign.cli.app import main
main()
"""


def run(*arguments, size: int | None = None, **streams) -> subprocess.CompletedProcess:
    code = ["-c", FULL, str(size)] if size else ["-c", "from mmalign.cli.app import main; main()"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    return subprocess.run(
        [sys.executable, *code, *map(str, arguments)], env=environment, text=True, check=False, **streams
    )


def test_a_full_disk_is_one_line_and_what_is_written_stays(pictures, tmp_path):
    out = tmp_path / "s.jsonl"
    score = ["score", pictures, "--rewards", "image_stats", "--out", out]
    result = run(*score, size=1600)
    assert (result.returncode, "Traceback" in result.stderr) == (1, False)
    last = result.stderr.strip().split("\n")[-1]
    assert last.startswith("mmalign: cannot write in ")
    assert "earlier results are on the disk" in last
    rows = [json.loads(line) for line in out.read_text().split("\n")[:-1]]
    assert 0 < len(rows) < 4
    assert mmalign(*score).returncode == 0
    assert [json.loads(line) for line in out.read_text().split("\n")[: len(rows)]] == rows


def test_a_disk_that_fills_while_a_row_is_written_keeps_the_rows_before(tmp_path, monkeypatch):
    """The same without a process: the disk takes half a row, then nothing."""

    room = [30]

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            if not room[0]:
                raise OSError(28, "No space left on device")
            taken, room[0] = self.file.write(data[: room[0]]), 0
            return taken

        def __getattr__(self, name):
            return getattr(self.file, name)

    out = tmp_path / "s.jsonl"
    files.append(out, {"a": 1})
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *settings, **more: Full(opened(path, *settings, **more)))
    with pytest.raises(OSError, match="No space left"):
        files.append(out, {"b": "x" * 100})
    with pytest.raises(OSError, match="No space left"):
        files.replace(out, b"y" * 100)
    monkeypatch.undo()
    assert out.read_text() == '{"a": 1}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["s.jsonl"]


def test_a_full_standard_output_is_one_line(pictures, tmp_path):
    score = ["score", pictures, "--rewards", "image_stats", "--out", tmp_path / "s.jsonl"]
    with open("/dev/full", "w") as full:
        result = run(*score, stdout=full)
    assert (result.returncode, "Traceback" in result.stderr) == (1, False)
    assert result.stderr.strip().split("\n")[-1] == (
        "mmalign: standard output cannot be written: No space left on device"
    )
    assert len((tmp_path / "s.jsonl").read_text().split("\n")) == 5


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_closed_pipe_is_one_line(pictures, tmp_path, monkeypatch, capsys, more):
    reader, writer = os.pipe()
    os.close(reader)
    score = ["score", str(pictures), "--rewards", "image_stats", "--out", str(tmp_path / "s.jsonl")]
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr(sys, "argv", ["mmalign", *score, *more])
        monkeypatch.setattr(sys, "stdout", closed)
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert ended.value.code == 1
    last = capsys.readouterr().err.strip().split("\n")[-1]
    assert last == "mmalign: standard output cannot be written: Broken pipe"
    assert len((tmp_path / "s.jsonl").read_text().split("\n")) == 5


@pytest.mark.parametrize(
    ("command", "option", "name"),
    [
        (["calibrate", "configs/tiny_branch.yaml"], "--out", "noise.json"),
        (["doctor", "--rewards", "jpeg_size"], "--out", "report.md"),
        (["doctor", "configs/quickstart.yaml"], "--out", "report.md"),
        (["evaluate", "--rewards", "jpeg_size"], "--reference", "reference.json"),
        (["evaluate", "--rewards", "jpeg_size"], "--out", "scores.jsonl"),
    ],
)
def test_no_command_overwrites_another_file(tmp_path, monkeypatch, random_model, prompt_files, command, option, name):
    monkeypatch.chdir(ROOT)
    (tmp_path / name).write_text('{"prompt": "mine"}\n')
    if command[0] == "evaluate":
        command = [*command, "--model", random_model, "--prompts", prompt_files["train"]]
    place = tmp_path if name == "scores.jsonl" else tmp_path / name
    result = mmalign(*command, option, place)
    assert (result.returncode, result.stdout) == (2, "")
    assert f"{option} {tmp_path / name}: another file is there; it is not overwritten" in result.stderr
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, '{"prompt": "mine"}\n')]


def test_a_plot_that_is_not_ours_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "noise.png").write_bytes(b"mine")
    result = mmalign("calibrate", "configs/tiny_branch.yaml", "--out", tmp_path / "noise.json")
    assert (result.returncode, (tmp_path / "noise.png").read_bytes()) == (2, b"mine")


# ------------------------------------------------------------------------------------------------------------- refine


def refined(random_model, tmp_path, *more):
    given = ["a red circle", "a cross", "--model", random_model, "--steps", "2", "--rounds", "2", "--batch", "1"]
    return mmalign("refine", *given, "--out", tmp_path / "out", *more)


def test_refine_overwrites_no_other_file(random_model, tmp_path):
    for option, name in (("--html", "p.html"), ("--pairs", "p.jsonl"), ("--requests", "r.jsonl")):
        (tmp_path / name).write_text('{"prompt": "mine"}\n')
        result = refined(random_model, tmp_path, option, tmp_path / name)
        assert (result.returncode, result.stderr.count("\n")) == (2, 1)
        assert f"{option} {tmp_path / name}: another file is there" in result.stderr
        assert (tmp_path / name).read_text() == '{"prompt": "mine"}\n'
    assert not (tmp_path / "out").exists()


def test_refine_on_a_full_disk_keeps_what_was_done(random_model, tmp_path, monkeypatch):
    append, taken = files.append, []

    def full(path, *rows):
        if taken:
            raise OSError(28, "No space left on device")
        taken.append(path)
        append(path, *rows)

    monkeypatch.setattr(files, "append", full)
    result = refined(random_model, tmp_path)
    assert result.returncode == 1
    assert result.stderr.strip().split("\n")[-1].startswith("mmalign: cannot write in ")
    assert "No space left on device" in result.stderr
    monkeypatch.undo()
    again = refined(random_model, tmp_path, "--json", "--html", tmp_path / "p.html", "--pairs", tmp_path / "p.jsonl")
    assert json.loads(again.stdout)["before"] == 1
    more = refined(random_model, tmp_path, "--json", "--html", tmp_path / "p.html", "--pairs", tmp_path / "p.jsonl")
    assert json.loads(more.stdout)["before"] == 2


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("settings.json", "[" * 10**5, "JSON nested too deeply"),
        ("settings.json", "[1]", "no settings of a refinement"),
        ("settings.json", "\udcff", "is not UTF-8"),
        ("trace.jsonl", "hello\n", "line 1: not a JSON object"),
        ("trace.jsonl", "{}\n", "line 1: not a row of a refinement"),
        ("trace.jsonl", '{"id": [], "prompt": 1, "wants": 1, "rounds": 1, "best": 1, "stopped": 1, "forwards": 1}\n',
         "line 1: not a row of a refinement"),
    ],
)  # fmt: skip
def test_a_folder_of_refinements_that_is_none_is_one_line(random_model, tmp_path, name, content, says):
    assert refined(random_model, tmp_path).returncode == 0
    (tmp_path / "out" / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    result = refined(random_model, tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert says in result.stderr


def test_animations_are_counted_and_their_first_frame_is_scored(tmp_path):
    """An animation of red, then black, scores as a still of red."""
    red, black = (Image.new("RGB", (16, 16), colour) for colour in ("red", "black"))
    folder = tmp_path / "pictures"
    folder.mkdir()
    for ending in ("gif", "png", "webp"):
        red.save(folder / f"moves.{ending}", save_all=True, append_images=[black], lossless=True)
        red.save(folder / f"still.{ending}", lossless=True)
    red.save(folder / "pages.tiff", save_all=True, append_images=[black])
    out = tmp_path / "scores.jsonl"
    result = mmalign("score", folder, "--rewards", "image_stats", "--out", out)
    assert result.returncode == 0
    assert "mmalign: 3 of 7 pictures are animated; the first frame is scored" in result.stderr
    assert len({row["scores"]["image_stats.brightness"] for row in map(json.loads, out.open(encoding="utf-8"))}) == 1
