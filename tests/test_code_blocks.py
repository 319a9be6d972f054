"""Every block of code in the pages is run here, or is marked with what it needs.

A page is run from first to last in a folder of its own, which has the repository's files and short lists of prompts.
Commands run in this process, trained for one iteration; blocks that are marked are parsed: options, configs, scripts.
By default that is done with the pages that are read first; running the others is marked slow.
"""

import itertools
import json
import multiprocessing
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import typer
from code_blocks import blocks, indented
from command_line import mmalign
from PIL import Image

from mmalign.cli.app import app
from mmalign.config import load as configs, yaml12
from mmalign.data import judged_images

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("assets/*/README.md")])
BLOCKS = {page: [*blocks(page)] for page in PAGES}
ALL = [*itertools.chain.from_iterable(BLOCKS.values())]
KINDS = ("", "console", "json", "python", "sh", "text", "yaml")
NEEDS = (  # beside this repository
    "released weights", "a GPU", "a judge", "several processes", "several machines", "the network", "a checkout",
    "files of yours", "minutes", "hours",
)  # fmt: skip
COMMANDS = typer.main.get_command(app).commands
PROMPTS = {"train": 8, "validation": 4, "test": 4}  # captions of the embedded world
SMALL = ["prompts_per_iteration=2", "seeds=2"]
SHORTER = {
    "train": ["iterations=1", "warmup=0", "cooldown=0", "checkpoint_every=1", *SMALL],
    "calibrate": ["--rounds", "2", *SMALL],
    "scripts/kill_and_resume.py": ["--kills", "4"],
}
STANDS_FOR = {"CONFIG": "configs/quickstart.yaml"}  # names that a reader replaces, in blocks that are marked


# ---------------------------------------------------------------------------------------------------------- every block


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_has_a_kind_and_every_mark_is_known(page):
    assert [(str(block), block.kind) for block in BLOCKS[page] if block.kind not in KINDS] == []
    assert [(str(block), block.needs) for block in BLOCKS[page] if block.needs not in ("", *NEEDS)] == []
    marks = re.findall(r"^ *<!-- needs: ", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(marks) == sum(bool(block.needs) for block in BLOCKS[page])  # each is right before its block
    assert indented(page) == []


@pytest.mark.parametrize("block", [block for block in ALL if block.kind == "text"], ids=str)
def test_no_command_is_hidden_in_a_text(block):
    first = [line.split()[:2] for line in block.text.splitlines() if line.strip()]
    assert [words for words in first if words[0] == "mmalign" and words[-1] in COMMANDS] == []


@pytest.mark.parametrize("block", [block for block in ALL if block.kind == "yaml"], ids=str)
def test_a_block_of_yaml_is_part_of_a_config(block):
    configs.build(yaml12.parsed(block.text), str(block))


@pytest.mark.parametrize("block", [block for block in ALL if block.kind == "json"], ids=str)
def test_a_block_of_json_is_a_record_of_a_judged_image(block, tmp_path):
    record = json.loads(block.text)
    Image.new("RGB", tuple(record["size"])).save(tmp_path / record["image"])
    (tmp_path / "records.jsonl").write_text(json.dumps(record))
    result = judged_images.read(tmp_path / "records.jsonl", tuple(reversed(record["size"])))
    assert (len(result.records), result.refused) == (1, [])


# ---------------------------------------------------------------------------------------------------------- what is run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one iteration, for commands that begin with one."""
    folder = tmp_path_factory.mktemp("trained")
    with furnished(folder):
        assert mmalign("train", "configs/quickstart.yaml", "out=run", *SHORTER["train"]).returncode == 0
    return folder / "run"


@contextmanager
def furnished(folder: Path, few: bool = True):
    """The folder with what a checkout has, as the current one; with `few` captions of the embedded world."""
    for name in ("configs", "examples", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "assets/prompts").mkdir(parents=True)
    for path in ROOT.glob("assets/*"):
        if path.name != "prompts":
            (folder / "assets" / path.name).symlink_to(path)
    for name, count in PROMPTS.items():
        lines = (ROOT / f"assets/prompts/{name}.jsonl").read_text().splitlines(keepends=True)
        shown = lines[:: len(lines) // count][:count] if few else lines
        (folder / f"assets/prompts/{name}.jsonl").write_text("".join(shown))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield


def runnable(page: Path, needs: tuple[str, ...]) -> bool:
    return any((block.runs or block.kind == "python") and block.needs in needs for block in BLOCKS[page])


FIRST = [ROOT / name for name in ("README.md", "docs/start.md", "docs/install.md")]  # the others by hand
QUICK = [pytest.param(page, marks=[] if page in FIRST else pytest.mark.slow) for page in PAGES if runnable(page, ("",))]
LONG = [
    pytest.param(page, marks=pytest.mark.slow)
    for page in PAGES
    if any(block.needs == "minutes" for block in BLOCKS[page])
]


@pytest.mark.parametrize("page", QUICK, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_runs(page, trained, tmp_path):
    run_page(page, ("",), trained, tmp_path)


@pytest.mark.parametrize("page", LONG, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_takes_minutes_runs(page, trained, tmp_path):
    run_page(page, ("", "minutes"), trained, tmp_path)


def run_page(page: Path, needs: tuple[str, ...], trained: Path, folder: Path) -> None:
    names = {"redness": redness, "__name__": "page"}
    with ExitStack() as servers, furnished(folder, few=not any(block.kind == "console" for block in BLOCKS[page])):
        port = free_port()
        for block in BLOCKS[page]:
            if block.needs not in needs:
                continue
            if block.kind == "python":
                exec(compile(block.text, str(block), "exec"), names)
            output = [
                run_command([word.replace(":8000", f":{port}") for word in words], trained, port, servers)
                for words in block.commands
            ]
            if block.kind == "console":
                assert "".join(output).split() == block.output


def redness(images, prompts):
    return [image.resize((1, 1)).getpixel((0, 0))[0] / 255 for image in images]


def run_command(words: list[str], trained: Path, port: int, servers: ExitStack) -> str:
    """Its standard output, if it ends by itself and well."""
    while "=" in words[0]:  # variables of the environment
        words = words[1:]
    words = [re.sub(r"checkpoints/\d{6}", "checkpoints/000001", word) for word in words]
    for name in re.findall(r"(?<!out=)runs/[\w-]+", " ".join(words)) + ["runs/quickstart"] * ("--resume" in words):
        if not Path(name).exists():
            shutil.copytree(trained, name)
    program, *arguments = [*words, *SHORTER.get(words[1], ())]
    if program == "python":
        subprocess.run([sys.executable, *arguments], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    elif arguments[0] == "serve" or "--serve" in arguments:
        servers.enter_context(serving([*arguments, "--port", str(port)], port))
    else:
        assert program == "mmalign"
        ended = mmalign(*arguments)
        assert ended.returncode == 0, f"{' '.join(words)}\n{ended.stderr}"
        return ended.stdout
    return ""


@contextmanager
def serving(words: list[str], port: int):
    """`mmalign` in a process of its own, forked after all imports, from when it answers at its port."""
    process = multiprocessing.get_context("fork").Process(target=mmalign, args=words)
    process.start()
    try:
        for _ in range(600):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        assert process.is_alive(), f"{' '.join(words)} does not serve at port {port}"
        yield
    finally:
        process.terminate()
        process.join()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


# ------------------------------------------------------------------------------------------------------- what is marked


@pytest.mark.parametrize("block", [block for block in ALL if block.needs], ids=str)
def test_a_marked_block_parses(block, monkeypatch):
    monkeypatch.chdir(ROOT)
    if block.kind == "python":
        compile(block.text, str(block), "exec")
    for words in block.commands:
        if "-m" in words:  # a launcher
            words = words[words.index("-m") + 1 :]
        if words[0] == "mmalign":
            check_options(words[1], words[2:])
        for word in words:
            assert Path(word).exists() or not word.startswith(("scripts/", "tests/", "configs/")), word
            for extra in re.findall(r"mmalign\[(\w+)\]", word):
                assert extra in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def check_options(command: str, words: list[str]) -> None:
    """The options are those of the command, and a config of the repository takes the overrides."""
    shown = COMMANDS[command]
    if hasattr(shown, "commands"):  # a group, whose first word is one of its commands
        command, *words = words
        shown = shown.commands[command]
    values = shown.make_context(command, [STANDS_FOR.get(word, word) for word in words]).params
    path = Path(values.get("config") or values.get("source") or "none")
    if path.suffix == ".yaml" and path.exists():
        configs.load(path, values["overrides"] or [])
