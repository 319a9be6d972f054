"""Files from strangers: nothing runs unless it was allowed, nothing leads out of a folder, no key is kept."""

import ast
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from chats import chatting
from command_line import mmalign
from PIL import Image

from mmalign import errors, policy as policies, run as runs
from mmalign.config import load as configs
from mmalign.refinement import page as refine_page
from mmalign.reporting import report
from reward_models import Prompt, allowlist as trust, load
from reward_models.tools import gallery

ROOT = Path(__file__).parents[1]
MODULES = sorted(path for name in ("mmalign", "reward_models", "scripts") for path in (ROOT / name).rglob("*.py"))
RUNS_CODE = {"eval", "exec", "compile", "__import__", "input"}  # as bare names; model.eval() and re.compile are others
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
PICKLE_ERRORS = {"pickle.UnpicklingError"}  # reported to the user when weights_only refuses a file
IMPORTERS = {
    "reward_models/allowlist.py": "importlib.import_module",
    "reward_models/shipped.py": "importlib.resources.files",
}


def unsafe(source: str, place: str = "module.py") -> list[str]:
    """What in a module can run code it was handed, or unpickle."""
    outside = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            names = {f"{module}.{item.name}" if module else item.name for item in node.names} - PICKLE_ERRORS
            outside += [name for name in names if name.partition(".")[0] in PICKLES]
            outside += [name for name in names if name.startswith("importlib") and "metadata" not in name
                      and IMPORTERS.get(place) != name]  # fmt: skip
        if not isinstance(node, ast.Call):
            continue
        call, given = ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if call in RUNS_CODE or call in ("os.system", "os.popen", "yaml.load", "yaml.load_all", "yaml.unsafe_load"):
            outside.append(call)
        if call == "torch.load" and given.get("weights_only") != "True":
            outside.append("torch.load without weights_only=True")
        outside += [
            f"{name}=True" for name in ("shell", "trust_remote_code", "allow_pickle") if given.get(name) == "True"
        ]
        if re.match(r"Auto[A-Z]\w*\.", call) and given.get("trust_remote_code") != "False":
            outside.append(f"{call} without trust_remote_code=False")  # transformers would ask on the terminal
    return outside


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_runs_what_it_reads(path):
    assert unsafe(path.read_text(), str(path.relative_to(ROOT))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import torch\ntorch.load('x')", 
        "torch.load('x', weights_only=False)",
        "yaml.load(text, yaml.Loader)", "eval('1')", "exec('1')", "subprocess.run('ls', shell=True)", "os.system('ls')",
        "AutoModel.from_pretrained('x', trust_remote_code=True)", "AutoConfig.from_pretrained('x')", "import importlib",
        "np.load('x', allow_pickle=True)",
    ],
)  # fmt: skip
def test_what_would_is_seen(source):
    assert unsafe(source)


# ------------------------------------------------------------------------------------------------------- import paths

EVIL = """
import dataclasses
import pathlib
pathlib.Path({mark!r}).touch()


@dataclasses.dataclass(frozen=True)
class Thing:
    def __post_init__(self):
        raise ValueError("opened")

    @classmethod
    def load(cls, model, **settings):
        cls()
"""


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A module in the current directory that leaves a mark when it is run."""
    mark = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(EVIL.format(mark=str(mark)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MMALIGN_ALLOW")
    yield mark
    sys.modules.pop("evil", None)


METHODS = ("plan", "kernel", "credit", "objective", "loss", "combine", "mask")
NAMES = {
    "model": {"model": "evil:Thing"},
    "rewards": {"rewards": {"evil:Thing.value": 1.0}},
    "at_least": {"at_least": {"evil:Thing.value": {"bound": 0}}},
    "watch": {"watch": ["evil:Thing"]},
    "scorers": {"watch": ["mine"], "scorers": {"mine": {"scorer": "evil:Thing"}}},
    "region": {"rewards": {"evil:Thing.value": 1.0}, "region": "evil:Thing"},
    **{method: {method: {"type": "evil:Thing"}} for method in METHODS},
}


@pytest.mark.parametrize(
    ("command", "key"), [*(("train", key) for key in NAMES), ("doctor", "model"), ("calibrate", "scorers")]
)
def test_a_config_runs_no_code_that_was_not_allowed(settings, evil, tmp_path, monkeypatch, command, key):
    monkeypatch.syspath_prepend(tmp_path)  # even where Python would find it
    path = tmp_path / "strange.yaml"
    path.write_text(yaml.safe_dump(settings | NAMES[key]))
    result = mmalign(command, path)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert (
        "the module 'evil', which is not allowed; if you trust it: --allow evil, or MMALIGN_ALLOW=evil" in result.stderr
    )
    assert not evil.exists()
    assert not Path(settings["out"]).exists()
    assert re.search(r"^mmalign: (\S+: \w+: )?opened", mmalign(command, path, "--allow", "evil").stderr, re.MULTILINE)
    assert evil.exists()


@pytest.mark.parametrize(
    "name", ["os:system", "builtins:exec", "subprocess:run", "mmalign.cli.app:main", "torch.hub:load"]
)
def test_modules_that_are_there_already_must_be_allowed_too(monkeypatch, name):
    monkeypatch.setenv("MMALIGN_ALLOW", "own_policy")
    for opened in (lambda: load("mine", scorer=name, command="touch /tmp/no"), lambda: policies.load(name)):
        with pytest.raises(ValueError, match="which is not allowed"):
            opened()


def test_a_run_cannot_allow_itself(settings, monkeypatch):
    monkeypatch.delenv("MMALIGN_ALLOW")
    with pytest.raises(errors.BadInput, match="unknown key 'allow'"):
        configs.build(settings | {"allow": ["evil"]}, "test")
    with pytest.raises(ValueError, match="which is not allowed"):
        load("mine", scorer="evil:Thing", allow="evil")


def test_what_may_be_allowed(monkeypatch):
    monkeypatch.setenv("MMALIGN_ALLOW", " one,,two ")
    trust.allow_modules(["three", "one"])
    assert trust.allowed() == ["one", "two", "three"]
    trust.check("two.deeper", "x")
    for name in ("a.b", "a:b", "", "one,four", "../x"):
        with pytest.raises(ValueError, match="the top-level name of a module is needed"):
            trust.allow_modules([name])
    for module in ("tw", "two_more", ".two", ""):
        with pytest.raises(ValueError, match="not allowed"):
            trust.check(module, "x")


def test_the_current_directory_is_no_place_for_modules(evil, tmp_path):
    """Even an allowed name is found on Python's own path alone."""
    command = [
        Path(sys.executable).with_name("mmalign"),
        "score",
        tmp_path,
        "--rewards",
        "evil:Thing",
        "--allow",
        "evil",
    ]
    (tmp_path / "a.png").touch()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (result.returncode, result.stderr) == (2, "mmalign: scorer 'evil:Thing': no module named 'evil'\n")
    assert not evil.exists()


@pytest.mark.parametrize("part", ["vae", "tokenizer"])
def test_a_model_names_no_code_that_was_not_allowed(random_model, evil, tmp_path, monkeypatch, part):
    """diffusers imports what a pipeline's index names."""
    monkeypatch.syspath_prepend(tmp_path)
    model = tmp_path / "model"
    model.mkdir()
    for path in Path(random_model).iterdir():
        (model / path.name).symlink_to(path)
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").unlink()
    (model / "model_index.json").write_text(json.dumps(index | {part: ["evil", "Thing"]}))
    with pytest.raises(ValueError, match=f"the part '{part}' runs code of the module 'evil', which is not allowed"):
        policies.load(str(model))
    assert not evil.exists()


# ------------------------------------------------------------------------------------------------------------ secrets


@pytest.mark.parametrize(
    "scorer_settings",
    [
        {"key": "sk-hush"}, {"api_key": "sk-hush"}, {"token": "sk-hush"}, {"extra": {"auth_token": "sk-hush"}},
        {"extra": {"headers": {"Authorization": "sk-hush"}}}, {"url": "https://me:sk-hush@host/v1"},
        {"scorers": ["http://sk-hush@host"]},
    ],
)  # fmt: skip
def test_a_config_holds_no_secret(settings, tmp_path, scorer_settings):
    path = tmp_path / "config.yaml"
    path.write_text(
        yaml.safe_dump(settings | {"watch": ["judge"], "scorers": {"judge": {"scorer": "remote"} | scorer_settings}})
    )
    result = mmalign("train", path)
    assert result.returncode == 2
    assert "put it into the environment (OPENAI_API_KEY for judges, MMALIGN_TOKEN for remote)" in result.stderr
    assert "sk-hush" not in result.stderr + result.stdout
    assert not Path(settings["out"]).exists()


def test_a_key_from_the_environment_is_nowhere_in_a_run(settings, tmp_path, monkeypatch):
    """Not even where the server sends it back in its refusal."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-hush")
    refusal = (401, {}, {"error": {"message": "Incorrect API key provided: sk-hush"}})
    with chatting(lambda request: refusal) as (url, requests):
        judge = {"scorer": "vlm_yes_no", "model": "m", "url": url, "retries": 0}
        c = configs.build(
            settings
            | {
                "watch": ["judge"],
                "scorers": {"judge": judge},
                "iterations": 1,
                "cache": str(tmp_path / "cache.sqlite"),
            },
            "test",
        )
        out = runs.train(c)
        report.write(out)
        answer = load("judge", **judge)(torch.zeros(1, 3, 8, 8), [Prompt("a cross")])
    assert requests
    assert "the server answered 401" in answer.failures[0]
    assert "sk-hush" not in answer.failures[0]
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.yaml", "metrics.jsonl", "scores.jsonl", "report.html", "cache.sqlite"} <= {p.name for p in written}
    assert not [path for path in written if b"sk-hush" in path.read_bytes()]


def test_a_url_with_a_password_is_refused():
    with pytest.raises(ValueError, match="a URL with a password in it would appear in reports"):
        load("vlm_yes_no", model="m", url="http://me:pw@127.0.0.1:1/v1")


# -------------------------------------------------------------------------------------------------- a stranger's folder

HOSTILE = "</p><script>alert(1)</script><img src=x onerror=alert(1)>\" ' onload=alert(1) --> ]]> $\\frac{ [/b] \u202e"


class Tags(HTMLParser):
    """Names of all tags of a page, and of their attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.names: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.names |= {tag, *(f"{tag} {name}" for name, _ in attrs)}


def a_run(folder: Path, words: str, image: str = "a.png", step: str = "0", size=(8, 8)) -> Path:
    """A run's folder as a stranger may have written it."""
    places = {words: {"size": size, "map": None, "boxes": [
        {"box": [0, 0, 4, 4], "credit": 1.0, "label": words, "reason": words}]}}  # fmt: skip
    row = {"image": image, "prompt": words, "id": 0, "tag": words, "scores": {words: 1.0}, "places": places}
    for side in ("before", "after"):
        (folder / "images" / side).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "images" / side / "a.png")
        rows = [row, row | {"id": 1}]
        (folder / "images" / side / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    credit = {"iteration": 1, "image": "images/after/a.png", "prompt": words, "reward": 1.0, "map": [[1.0]]}
    (folder / "credit.jsonl").write_text(json.dumps(credit | {"advantage": {step: [[1.0]]}}) + "\n")
    counts = dict.fromkeys(("forwards", "replay_forwards", "decodes", "rewards", "seconds/rollout"), 1)
    (folder / "metrics.jsonl").write_text(json.dumps({"iteration": 1, "reward": 0.5} | counts) + "\n")
    (folder / "evaluations.jsonl").write_text(
        "".join(
            json.dumps({"iteration": n, "name": side, "images": 2, "seconds": 1.0, words: 0.5}) + "\n"
            for n, side in enumerate(("before", "after"))
        )
    )
    (folder / "config.yaml").write_text(words)
    return folder


def test_a_report_shows_words_and_runs_none(tmp_path):
    pages = []
    for name, words in (("tame", "tame"), ("wild" + HOSTILE.replace("/", "|"), HOSTILE)):
        result = mmalign("report", a_run(tmp_path / name, words, step=words))
        assert result.returncode == 0, result.stderr
        pages.append((tmp_path / name / "report.html").read_text())
    tame, wild = (Tags(page).names for page in pages)
    assert wild == tame
    assert pages[1].count("alert(1)") > 20  # it is all there, as text


@pytest.mark.parametrize(
    "changed", [dict(size=('8"><script>alert(1)</script>', 8)), dict(size=["<b>", "<b>"])], ids=["quote", "tag"]
)
def test_a_report_leaves_out_what_is_no_number(tmp_path, changed):
    assert mmalign("report", a_run(tmp_path / "run", "tame", **changed)).returncode == 0
    page = (tmp_path / "run/report.html").read_text()
    assert "images/after/scores.jsonl: line 1: places.tame.size" in page
    assert not {"b", "script"} & Tags(page).names


@pytest.mark.parametrize("image", ["../../../secret.png", "{root}/secret.png", "link.png"])
def test_a_report_reads_no_file_outside_the_run(tmp_path, image):
    Image.new("RGB", (8, 8), (9, 8, 7)).save(tmp_path / "secret.png")
    run = a_run(tmp_path / "run", "tame", image=image.format(root=tmp_path))
    if image == "link.png":
        for side in ("before", "after"):
            (run / "images" / side / image).symlink_to(tmp_path / "secret.png")
    result = mmalign("report", run)
    assert (result.returncode, result.stdout) == (2, "")
    assert "leads out of that folder" in result.stderr
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("name", ["report.html", "metrics.jsonl", "checkpoints", "images/after/b.png"])
def test_a_run_with_a_link_out_of_it_is_not_touched(settings, tmp_path, name):
    """What was written there would be written elsewhere."""
    run, target = a_run(tmp_path / "run", "tame"), tmp_path / "target"
    target.write_text("mine")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(target)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings | {"out": str(run)}))
    for command in (["report", run], ["train", config, "--resume"], ["export", run], ["sample", "x", "--adapter", run]):
        result = mmalign(*command)
        assert result.returncode == 2
        assert f"{name!r} leads out of that folder" in result.stderr
    assert target.read_text() == "mine"


def test_links_within_a_run_and_to_it_are_fine(tmp_path):
    run = a_run(tmp_path / "elsewhere", "tame")
    (run / "newest.png").symlink_to("images/after/a.png")
    (tmp_path / "run").symlink_to(run)
    assert mmalign("report", tmp_path / "run").returncode == 0


def test_a_gallery_shows_words_and_runs_none(tmp_path):
    pages = []
    for name, words in (("tame", "tame"), ("wild", HOSTILE)):
        places = {words: {"size": [8, 8], "map": [[1.0]], "boxes": []}}
        row = {"image": words, "prompt": words, "scores": {words: 1.0}, "failures": {words: words}, "places": places}
        row |= {"critiques": {words: words}, "requests": {words: words}}
        summary = {"scores": {words: {"count": 1}}, "failed": 1}
        gallery.write([row], summary, tmp_path, tmp_path / f"{name}.html")
        pages.append((tmp_path / f"{name}.html").read_text())
    assert Tags(pages[0]).names == Tags(pages[1]).names


def test_a_page_of_refinements_shows_words_and_runs_none(tmp_path):
    tags = []
    for name, words in (("tame", "tame"), ("wild", HOSTILE)):
        places = {"size": [8, 8], "map": None, "boxes": []}
        places["boxes"] = [{"box": [0, 0, 4, 4], "credit": 1.0, "label": words, "reason": words}]
        entry = {
            "image": words,
            "moves": [words],
            "attempt": {"request": words + "."},
            "scores": {words: 1.0, "b": 0.5},
        }
        entry |= {"critique": words, "failure": words, "places": places}
        row = {"prompt": words, "rounds": [entry, entry], "best": 1, "stopped": words, "forwards": 4}
        summary = dict.fromkeys(("prompts", "images", "forwards", "gained"), 1)
        summary |= {"first": 0.5, "best": 1.0, "stopped": {words: 1}}
        refine_page.write([row], summary, words, tmp_path, tmp_path / f"{name}.html")
        tags.append(Tags((tmp_path / f"{name}.html").read_text()).names)
    assert tags[0] == tags[1]


def test_a_message_is_one_line_whatever_is_in_it(tmp_path):
    result = mmalign("report", tmp_path / "a\nb\x1b[31m\u202e")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert result.stderr[:-1].isprintable()
