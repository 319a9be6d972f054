"""A run's folder that a full disk, a kill or a hand has damaged: its page says what is amiss and shows the rest; what
cannot be answered is refused in one line."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from command_line import mmalign
from matplotlib import pyplot as plt
from run_config import rows, run
from starlette.testclient import TestClient

from mmalign.reporting import curves, live, report

JSONL = ("metrics.jsonl", "evaluations.jsonl", "credit.jsonl", "images/after/scores.jsonl")
BINARY = bytes(range(256)) * 8


@pytest.fixture(scope="module")
def sound(random_model, prompt_files, tmp_path_factory):
    """The folder of a finished run with an alarm."""
    item = dict(
        model=random_model, prompts=prompt_files["train"], held_out=prompt_files["held_out"], iterations=2,
        rewards={"jpeg_size.kilobytes": 1.0}, prompts_per_iteration=2, seeds=2, steps=2, plan="sde", credit="terminal",
        lora_rank=2, eval_seeds=1, eval_steps=1, checkpoint_every=1,
    )  # fmt: skip
    out = run(item, out=str(tmp_path_factory.mktemp("sound") / "run"))
    (out / "alarms.jsonl").write_text(json.dumps({"iteration": 1, "alarm": "skipped", "text": "why"}) + "\n")
    return out


def undrawn(figure) -> str:
    """Curves are plotted and not rendered: that takes a second."""
    plt.close(figure)
    return "<svg></svg>"


@pytest.fixture
def folder(sound, tmp_path):
    return Path(shutil.copytree(sound, tmp_path / "run"))


def cut(path: Path) -> None:
    """In the middle of the last line."""
    data = path.read_bytes()
    path.write_bytes(data[: -len(data.splitlines()[-1]) // 2])


def changed(path: Path, **values) -> None:
    """In the last row."""
    *before, last = rows(path)
    path.write_text("".join(json.dumps(row) + "\n" for row in (*before, last | values)))


def written(path: Path, data: bytes | str) -> None:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def added(path: Path, line: str) -> None:
    path.write_text(line + "\n" + path.read_text())


def gone(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def folded(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replaced(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def forged(checkpoint: Path) -> None:
    """A file that is none of tensors, with a manifest that vouches for it."""
    (checkpoint / "ema.safetensors").write_bytes(BINARY)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["ema.safetensors"] = hashlib.sha256(BINARY).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


DAMAGE = {  # what is done to which file, and what the page says of it; {n}: its lines afterwards
    "cut": [(name, cut, [], "{name}: line {n}: incomplete, or not a JSON object; left out") for name in JSONL],
    "garbage": [
        ("metrics.jsonl", added, ["5"], "{name}: line 1: incomplete, or not a JSON object; left out"),
        ("metrics.jsonl", added, ["[" * 10**5], "{name}: line 1: incomplete, or not a JSON object; left out"),
        *((name, added, ["<html>"], "{name}: line 1: incomplete, or not a") for name in (*JSONL, "alarms.jsonl")),
    ],
    "binary": [(name, written, [BINARY], "{name}: line 1: incomplete") for name in (*JSONL, "alarms.jsonl")],
    "a text for a number": [
        ("metrics.jsonl", changed, dict(reward="high"), "{name}: line 2: reward: Input should be a valid number"),
        ("metrics.jsonl", changed, {"loss": "low"}, "{name}: line 2: loss: Input should be a valid number"),
        ("metrics.jsonl", changed, {"seconds/total": None}, "{name}: line 2: seconds/total: Input should be a valid"),
        ("metrics.jsonl", changed, dict(iteration="2"), "{name}: line 2: iteration: Input should be a valid integer"),
        ("evaluations.jsonl", changed, {"jpeg_size.kilobytes": "0"}, "{name}: line 2: jpeg_size.kilobytes: Input"),
        ("evaluations.jsonl", changed, dict(seconds=[]), "{name}: line 2: seconds: Input"),
        ("credit.jsonl", changed, dict(advantage={"0": [["x"]]}), "advantage.0.0.0: Input should be a valid number"),
        ("credit.jsonl", changed, dict(map=[[]]), "{name}: line {n}: map.0: List should have at least 1 item"),
        ("credit.jsonl", changed, dict(image=7), "{name}: line {n}: image: Input should be a valid string"),
        ("images/after/scores.jsonl", changed, dict(scores={}), "{name}: line 2: scores: Dictionary should have"),
        ("images/after/scores.jsonl", changed, dict(scores={"a": "b"}), "{name}: line 2: scores.a: Input should be"),
        ("images/after/scores.jsonl", changed, dict(id=2**80), "{name}: line 2: id: Input should be less"),
        ("images/after/scores.jsonl", changed, dict(places={"a": {"size": [0, 0]}}), "{name}: line 2: places.a.size"),
        ("alarms.jsonl", changed, dict(text=None), "{name}: line 1: text: Input should be a valid string"),
    ],
    "empty": [
        ("metrics.jsonl", written, [""], "{name}: empty"),
        ("evaluations.jsonl", written, [""], "{name}: empty"),
        ("config.yaml", written, [""], "config.yaml: a mapping of keys to values is needed, got NoneType"),
    ],
    "gone": [
        ("metrics.jsonl", gone, [], "{name}: missing"),
        ("evaluations.jsonl", gone, [], "{name}: missing"),
        ("images/before", gone, [], "images/before/scores.jsonl: missing"),
        ("images/after/scores.jsonl", gone, [], "{name}: missing"),
        ("images/after/00000-0.png", gone, [], "00000-0.png is missing"),
        ("images/credit", gone, [], "000002-00.png is missing"),
        ("images", gone, [], "images/after/scores.jsonl: missing"),
    ],
    "a folder in its place": [
        (name, folded, [], "{name}: cannot be read: Is a directory") for name in ("metrics.jsonl", "alarms.jsonl")
    ],
    "no picture": [
        ("images/after/00000-0.png", written, [BINARY], "00000-0.png is damaged"),
        ("images/after/00000-0.png", written, [b""], "00000-0.png is damaged"),
        ("images/credit/000002-00.png", written, [BINARY], "000002-00.png is damaged"),
    ],
    "no config": [
        ("config.yaml", written, ["{"], "config.yaml: not YAML"),
        ("config.yaml", written, [BINARY], "config.yaml: not YAML"),
        ("config.yaml", written, ["itterations: 2"], "config.yaml: unknown key &#39;itterations&#39;"),
    ],
}  # fmt: skip
CASES = [pytest.param(*case, id=f"{case[0]}: {kind}") for kind, item in DAMAGE.items() for case in item]


@pytest.mark.parametrize(("name", "damage", "with_", "says"), CASES)
def test_its_page_says_what_is_amiss(folder, name, damage, with_, says, monkeypatch):
    if name in ("metrics.jsonl", "evaluations.jsonl"):
        monkeypatch.setattr(curves, "_svg", undrawn)
    else:
        monkeypatch.setattr(curves, "curves", lambda *_: "")
    damage(folder / name, **with_) if isinstance(with_, dict) else damage(folder / name, *with_)
    ended = mmalign("report", folder)
    assert (ended.returncode, ended.stderr) == (0, "")
    page = (folder / "report.html").read_text()
    n = len((folder / name).read_bytes().splitlines()) if "{n}" in says else 0
    assert says.format(name=name, n=n) in page
    assert "<h2>Config</h2>" in page
    assert live.state(folder, 0.0).iterations <= 2


def test_a_picture_that_breaks_off_is_not_shown(folder):
    picture = folder / "images/after/00001-0.png"
    picture.write_bytes(picture.read_bytes()[:-20])
    report.write(folder)
    assert "00001-0.png is damaged" in (folder / "report.html").read_text()


def test_a_served_page_stays_while_files_are_written(folder, monkeypatch):
    """Each file with so many of its bytes; in the end it is the page of a sound run."""
    monkeypatch.setattr(curves, "_svg", undrawn)
    client = TestClient(live.app(folder), base_url="http://127.0.0.1")
    whole = client.get("/main").text
    assert "Missing or damaged" not in whole
    for path in (folder / name for name in (*JSONL, "config.yaml")):
        data = path.read_bytes()
        for end in (0, len(data) // 2):
            path.write_bytes(data[:end])
            assert {client.get(where).status_code for where in ("/", "/state", "/main")} == {200}
        path.write_bytes(data)
    assert client.get("/main").text == whole
    shutil.rmtree(folder)
    assert client.get("/state").json()["message"] == "config.yaml: No such file or directory; iteration 0"
    assert "config.yaml: No such file or directory" in client.get("/main").text


def test_what_is_no_run_is_refused(tmp_path, folder):
    for place in (tmp_path, folder / "metrics.jsonl", tmp_path / "nowhere"):
        for command in (["report", place], ["report", place, "--serve"], ["export", place]):
            ended = mmalign(*command)
            assert (ended.returncode, ended.stdout) == (2, "")
            assert ended.stderr == f"mmalign: {place}: no run there (config.yaml is missing)\n"
    (folder / "report.html").mkdir()
    ended = mmalign("report", folder)
    assert (ended.returncode, ended.stderr) == (2, f"mmalign: {folder / 'report.html'}: Is a directory\n")


@pytest.mark.parametrize(
    ("name", "damage", "with_", "says"),
    [
        ("config.yaml", written, ["{"], "config.yaml: not YAML"),
        ("config.yaml", written, [BINARY], "config.yaml: not YAML"),
        ("config.yaml", replaced, ["lora_rank: 2", "lora_rank: 4"], "does not fit this model and rank: 30 matrices"),
        ("checkpoints", gone, [], "no complete checkpoint yet"),
        ("checkpoints/000002/manifest.json", written, ["[" * 10**5], "manifest.json, 100000 bytes, is not JSON"),
        ("checkpoints/000002/ema.safetensors", cut, [], "ema.safetensors, "),
        ("checkpoints/000002", forged, [], "000002/ema.safetensors: a header of 50"),
    ],
)
def test_what_needs_its_adapter_refuses_in_one_line(folder, name, damage, with_, says, prompt_files):
    damage(folder / name, *with_)
    used = folder / "checkpoints/000002" if "000002" in name else folder  # of the run, the one before would be used
    for command in (
        ["export", used], ["sample", "a cross", "--adapter", used],
        ["evaluate", "--adapter", used, "--rewards", "jpeg_size", "--prompts", prompt_files["held_out"]],
    ):  # fmt: skip
        ended = mmalign(*command)
        assert (ended.returncode, ended.stdout) == (2, "")
        assert says in ended.stderr
        assert ended.stderr.count("\n") == 1
