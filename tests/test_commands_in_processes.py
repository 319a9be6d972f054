"""`score`, `evaluate`, `collect` and `refine` by several processes: the files of one process."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
from command_line import mmalign
from commands_in_processes import launch
from PIL import Image

from mmalign.runs import resumable
from reward_models import Prompt

BROKEN = "4.png"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Twelve pictures of three prompts in turn, one of them broken; and the same in a tar, prompt by prompt."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "pictures").mkdir()
    with tarfile.open(folder / "pictures.tar", "w") as archive:
        for i in sorted(range(12), key=lambda i: i % 3):
            file = io.BytesIO()
            Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(file, "PNG")
            content = {"png": b"broken" if f"{i}.png" == BROKEN else file.getvalue(), "txt": b"abc"[i % 3 : i % 3 + 1]}
            for ending, data in content.items():
                (folder / f"pictures/{i}.{ending}").write_bytes(data)
                member = tarfile.TarInfo(f"{i}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    prompts = [{"prompt": text, "id": i} for i, text in enumerate(("a red circle", "a cross", "a blue square"))]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    return folder


def commands(sources: Path, out: Path) -> dict[str, list[str]]:
    prompts = ["--prompts", str(sources / "prompts.jsonl"), "--steps", "2", "--batch", "1"]
    pictures, scorers = str(sources / "pictures"), ["--rewards", "ranked:Ranked,image_stats", "--batch", "4"]
    return {
        "folder": ["score", pictures, *scorers, "--out", f"{out}/folder.jsonl", "--html", f"{out}/page.html"],
        "table": ["score", pictures, *scorers, "--out", f"{out}/table.csv"],
        "tar": ["score", f"{pictures}.tar", *scorers, "--out", f"{out}/tar.jsonl", "--json"],
        "evaluate": ["evaluate", *prompts, "--out", f"{out}/evaluated", "--json"],
        "collect": ["collect", *prompts, "--seeds", "1,2", "--out", f"{out}/collected"],
        "refine": ["refine", *prompts, "--rounds", "2", "--out", f"{out}/refined"],
    }  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_write_what_one_does(sources, tmp_path, monkeypatch, size):
    monkeypatch.setenv("MMALIGN_ALLOW", "ranked")
    one, many = tmp_path / "one", tmp_path / "many"
    alone = {name: mmalign(*command) for name, command in commands(sources, one).items()}
    many.mkdir()
    shutil.copytree(one / "collected", many / "collected")  # one process has begun, and was interrupted
    record = many / "collected/judged_images.jsonl"
    record.write_text("".join(record.read_text().splitlines(keepends=True)[:3]))
    ended = launch(tmp_path, size, [*commands(sources, many).values()])
    codes = [result.returncode for result in alone.values()]
    assert codes == [1, 1, 1, 0, 0, 0]  # a picture is broken
    assert [[code for code, _ in of_rank] for of_rank in ended] == [codes] + [[0] * 6] * (size - 1)
    assert all(text == "" for of_rank in ended[1:] for _, text in of_rank)
    assert contents(many) == contents(one)
    for name, (_, text) in zip(alone, ended[0], strict=True):
        if name in ("tar", "evaluate"):
            results = [json.loads(out) | {"out": ""} for out in (alone[name].stdout, text)]
            assert results[0] == results[1]


def test_parts_of_processes_are_joined_in_order(tmp_path):
    prompts = [Prompt(text, {}, number) for number, text in enumerate("abcd")]
    record = tmp_path / "rows.jsonl"

    def opened():
        return resumable.open_folder(tmp_path, {}, prompts, "rows.jsonl", ("id", "prompt"), "a test")

    assert opened() == []
    rows = [{"id": prompt.id, "prompt": prompt.text} for prompt in prompts]
    resumable.append(record, rows[2:3])
    resumable.append(tmp_path / "rows.0.part.jsonl", rows[:1])
    resumable.append(tmp_path / "rows.11.part.jsonl", [rows[3], rows[2]])  # the last was joined before
    with (tmp_path / "rows.0.part.jsonl").open("a") as file:
        file.write('{"id": 1, "pro')  # killed in the middle
    assert opened() == [rows[0], *rows[2:]]
    assert record.read_text() == "".join(json.dumps(row) + "\n" for row in (rows[0], *rows[2:]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "settings.json"]
