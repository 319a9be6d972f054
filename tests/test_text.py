"""Text is UTF-8 and lines end at a line feed, whatever the locale; nothing reads or writes it by another way."""

import ast
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import mmalign
from corpus import tables as corpus
from hypothesis import given, settings, strategies as st
from PIL import Image

from mmalign.cli import output
from mmalign.data import prompts as sources
from mmalign.errors import BadInput
from reward_models import tables

ROOT = Path(__file__).parents[1]
MODULES = sorted(path for folder in ("mmalign", "reward_models", "scripts") for path in (ROOT / folder).rglob("*.py"))
WORDS = ("read_text", "write_text", "splitlines")
texts = st.text(
    st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("\t\x0b\x0c\x85\u2028,;'\"=+-@#"), max_size=20
).filter(lambda text: text.strip() and not text.strip().startswith("#"))


def in_the_locales_encoding(call: ast.Call) -> bool:
    """Whether a call opens, reads, writes or cuts text without `reward_models.files`."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if name in WORDS:
        return True
    owner = getattr(getattr(call.func, "value", None), "id", "")
    modes = [
        item.value for item in (*call.args, *(key.value for key in call.keywords)) if isinstance(item, ast.Constant)
    ]
    return (
        name == "open" and owner not in ("Image", "os") and not any("b" in mode for mode in modes if mode is not None)
    )


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_text_is_read_and_written_in_one_place(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]
    assert [ast.unparse(call) for call in calls if in_the_locales_encoding(call)] == []


@pytest.mark.parametrize(
    "call", ["open(p)", "open(p, 'w')", "p.open('a')", "p.open()", "p.read_text()", "p.write_text(t)", "t.splitlines()"]
)
def test_what_is_looked_for_is_found(call):
    assert in_the_locales_encoding(ast.parse(call, mode="eval").body)


@pytest.mark.parametrize("what", corpus.READ)
def test_prompts_come_out_as_they_were_meant(tmp_path, what):
    name, data, expected = corpus.READ[what]
    (tmp_path / name).write_bytes(data)
    assert [prompt.text for prompt in sources.read(tmp_path / name)] == expected


@pytest.mark.parametrize("what", corpus.REFUSED)
def test_prompts_that_are_none_are_one_line(tmp_path, what):
    name, data, says = corpus.REFUSED[what]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BadInput) as error:
        sources.read(tmp_path / name)
    assert str(error.value).startswith(f"prompts {tmp_path / name}: ")
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@settings(deadline=None)
@given(st.lists(texts, min_size=1, max_size=4), st.booleans(), st.sampled_from(("\n", "\r\n")), st.booleans())
def test_marks_and_line_ends_change_no_prompt(tmp_path_factory, prompts, mark, end, last):
    path = tmp_path_factory.mktemp("p") / "p.txt"
    path.write_bytes(corpus.BOM * mark + (end.join(prompts) + end * last).encode())
    assert [prompt.text for prompt in sources.read(path)] == [text.strip() for text in prompts]


@settings(deadline=None)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4), st.booleans())
def test_tables_of_every_kind_give_the_same_prompts(tmp_path_factory, cells, mark):
    import pyarrow
    from pyarrow import parquet

    folder = tmp_path_factory.mktemp("t")
    rows = [{"prompt": text, "tag": tag, "id": 7 * number} for number, (text, tag) in enumerate(cells)]
    forms = {
        "p.jsonl": "".join(json.dumps(row, ensure_ascii=mark) + "\n" for row in rows),
        "p.json": json.dumps(rows, ensure_ascii=mark),
        "p.csv": tables.separated(rows),
    }
    for name, text in forms.items():
        (folder / name).write_bytes(corpus.BOM * mark + text.encode())
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "p.parquet")
    for name in (*forms, "p.parquet"):
        read = sources.read(folder / name)
        assert [(item.text, item.wants, item.id) for item in read] == [
            (r["prompt"], {"tag": r["tag"]}, r["id"]) for r in rows
        ]
        assert [item.text for item in sources.read(f"{folder / name}:tag")] == [
            *dict.fromkeys(t.strip() for _, t in cells)
        ]


def test_in_an_ascii_locale_all_is_as_elsewhere(tmp_path):
    """A caption, a table, a prompt of the command line, a page and the names of files."""
    folder = tmp_path / "Bilder, 絵"
    folder.mkdir()
    for name in ("ä", "b"):
        Image.new("RGB", (8, 8)).save(folder / f"{name}.png")
    (folder / "ä.txt").write_bytes("ein Kätzchen, 猫\n".encode())
    arguments = ["score", folder, "--rewards", "image_stats", "--prompt", "ein Hündchen"]
    outputs = {name: ["--out", tmp_path / f"{name} 猫.jsonl", "--html", tmp_path / f"{name}.html"] for name in "ab"}
    here = mmalign(*arguments, *outputs["a"])
    assert (here.returncode, "猫.jsonl" in here.stdout) == (0, True)
    ascii_ = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", "from mmalign.cli.app import main; main()", *map(str, arguments + outputs["b"])]
    there = subprocess.run(command, env=os.environ | ascii_, capture_output=True, check=False)
    assert (there.returncode, b"Traceback" in there.stderr) == (0, False), there.stderr
    one, two = ((tmp_path / f"{name} 猫.jsonl").read_bytes() for name in "ab")
    assert one == two
    rows = [json.loads(line) for line in one.decode("ascii").split("\n")[:-1]]
    assert [(row["image"], row["prompt"]) for row in rows] == [("b.png", "ein Hündchen"), ("ä.png", "ein Kätzchen, 猫")]
    assert "ein Kätzchen, 猫" in (tmp_path / "b.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("encoding", "written"),
    [("ascii", b"a \\xe9 \\u732b"), ("latin-1", b"a \xe9 \\u732b"), ("utf-8", "a é 猫".encode())],
)
def test_what_a_terminal_lacks_is_escaped(encoding, written):
    file = io.BytesIO()
    stream = output.Output(file, encoding, "backslashreplace")
    stream.write("a é 猫")
    stream.flush()
    assert file.getvalue() == written
