"""Files from strangers: nothing runs unless it was allowed, nothing leads out of a folder, no key is kept."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from command_line import mmalign

from mmalign import config as configs, policy as policies
from reward_models import load, trust

ROOT = Path(__file__).parents[1]
MODULES = sorted(path for name in ("mmalign", "reward_models", "scripts") for path in (ROOT / name).rglob("*.py"))
RUNS_CODE = {"eval", "exec", "compile", "__import__", "input"}  # as bare names; model.eval() and re.compile are others
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
PICKLE_ERRORS = {"pickle.UnpicklingError"}  # told to the user when weights_only refuses a file
IMPORTERS = {"reward_models/trust.py"}


def unsafe(source: str, place: str = "module.py") -> list[str]:
    """What in a module can run code it was handed, or unpickle."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            names = {f"{module}.{own.name}" if module else own.name for own in node.names} - PICKLE_ERRORS
            found += [name for name in names if name.partition(".")[0] in PICKLES]
            found += [name for name in names if name.startswith("importlib") and "metadata" not in name
                      and place not in IMPORTERS]  # fmt: skip
        if not isinstance(node, ast.Call):
            continue
        call, given = ast.unparse(node.func), {own.arg: ast.unparse(own.value) for own in node.keywords}
        if call in RUNS_CODE or call in ("os.system", "os.popen", "yaml.load", "yaml.load_all", "yaml.unsafe_load"):
            found.append(call)
        if call == "torch.load" and given.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
        found += [
            f"{name}=True" for name in ("shell", "trust_remote_code", "allow_pickle") if given.get(name) == "True"
        ]
        if re.match(r"Auto[A-Z]\w*\.", call) and given.get("trust_remote_code") != "False":
            found.append(f"{call} without trust_remote_code=False")  # transformers would ask on the terminal
    return found


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
import pathlib
pathlib.Path({mark!r}).touch()


class Thing:
    def __init__(self):
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


NAMES = {
    "model": {"model": "evil:Thing"},
    "rewards": {"rewards": {"evil:Thing.value": 1.0}},
    "at_least": {"at_least": {"evil:Thing.value": {"bound": 0}}},
    "watch": {"watch": ["evil:Thing"]},
    "scorers": {"watch": ["mine"], "scorers": {"mine": {"scorer": "evil:Thing"}}},
    "region": {"rewards": {"evil:Thing.value": 1.0}, "region": "evil:Thing", "region_weight": 1.0},
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
    assert "mmalign: opened" in mmalign(command, path, "--allow", "evil").stderr
    assert evil.exists()


@pytest.mark.parametrize("name", ["os:system", "builtins:exec", "subprocess:run", "mmalign.cli:main", "torch.hub:load"])
def test_modules_that_are_there_already_must_be_allowed_too(monkeypatch, name):
    monkeypatch.setenv("MMALIGN_ALLOW", "own_policy")
    for opened in (lambda: load("mine", scorer=name, command="touch /tmp/no"), lambda: policies.load(name)):
        with pytest.raises(ValueError, match="which is not allowed"):
            opened()


def test_a_run_cannot_allow_itself(settings, monkeypatch):
    monkeypatch.delenv("MMALIGN_ALLOW")
    with pytest.raises(configs.BadInput, match="unknown key 'allow'"):
        configs.build(settings | {"allow": ["evil"]}, "test")
    with pytest.raises(ValueError, match="which is not allowed"):
        load("mine", scorer="evil:Thing", allow="evil")


def test_what_may_be_allowed(monkeypatch):
    monkeypatch.setenv("MMALIGN_ALLOW", " one,,two ")
    trust.allow(["three", "one"])
    assert trust.allowed() == ["one", "two", "three"]
    trust.check("two.deeper", "x")
    for name in ("a.b", "a:b", "", "one,four", "../x"):
        with pytest.raises(ValueError, match="the top-level name of a module is needed"):
            trust.allow([name])
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
    for own in Path(random_model).iterdir():
        (model / own.name).symlink_to(own)
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").unlink()
    (model / "model_index.json").write_text(json.dumps(index | {part: ["evil", "Thing"]}))
    with pytest.raises(ValueError, match=f"the part '{part}' runs code of the module 'evil', which is not allowed"):
        policies.load(str(model))
    assert not evil.exists()
