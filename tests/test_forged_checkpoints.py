"""A checkpoint whose manifest is right and that is not what it says: refused in one line that names the file, by all
that use one, before any of it is used. And what a checkpoint says of the machine that wrote it."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from command_line import mmalign
from corpus import checkpoints as corpus
from hypothesis import HealthCheck, given, settings as effort, strategies as st
from run_config import run
from safetensors.torch import load_file

from mmalign.config import load as configs
from mmalign.errors import BadInput
from mmalign.runs import adapters, checkpoint, folder, machine, state as states
from mmalign.training import saving
from mmalign.training.setup import open_session

FILES = ("adapter", "ema", "optimizer")
ALWAYS = (
    "iteration",
    "adapter_hash",
    "multipliers",
    "config",
    "made",
    "made.model",
    "machine",
    "learnt",
)  # read by whoever reads any
ANY = [HealthCheck.function_scoped_fixture]


@pytest.fixture(scope="module")
def sound(random_model, prompt_files, tmp_path_factory):
    """A finished run with three checkpoints and a constraint, as (its settings, its folder)."""
    chosen = dict(
        model=random_model, prompts=prompt_files["train"], held_out=None, rewards={"jpeg_size.kilobytes": 1.0},
        at_least={"jpeg_size.kilobytes": {"bound": 5.0, "rate": 0.1}}, iterations=3, prompts_per_iteration=2, seeds=2,
        steps=2, plan="sde", credit="terminal", lora_rank=2, learning_rate=0.01, checkpoint_every=1, keep_checkpoints=3,
        out=str(tmp_path_factory.mktemp("sound") / "run"),
    )  # fmt: skip
    return chosen, run(chosen)


@pytest.fixture(scope="module")
def opened(sound):
    """The run again, before it continues."""
    return open_session(configs.build(sound[0], "test"))


@pytest.fixture(scope="module")
def forgeries(sound):
    """All of them, as (of which file, what is done, how)."""
    path = sound[1] / "checkpoints/000003"
    all_ = [("state", *one) for one in corpus.of_state(json.loads((path / "state.json").read_text()))]
    for name in FILES:
        all_ += [(name, *one) for one in corpus.of_tensors(name, load_file(path / f"{name}.safetensors"))]
    return all_


def restored(session, out: Path) -> int:
    return saving.restore(session, out, lambda line: None)


class Drawing:
    """A policy of the run's model, as far as an adapter is concerned: what it is given last is what it draws with."""

    def __init__(self, session):
        self.values = session.policy.adapter()

    def attach_lora(self, rank, alpha, targets, seed):
        self.strength = alpha / rank

    def adapter(self):
        return self.values

    def load_adapter(self, values):
        self.values = values


def drawn(path: Path, session) -> dict[str, torch.Tensor]:
    policy = Drawing(session)
    adapters.read(path).attach(policy)
    return policy.values | {"strength": torch.tensor(policy.strength)}


def refusal(work) -> str:
    """The message where it is refused, nothing where it is not."""
    try:
        work()
    except BadInput as error:
        return str(error)
    return ""


def try_one(sound, opened, place: Path, of: str, what: str, forge, capsys) -> None:
    """A forged checkpoint is refused by --resume, and by what draws with it unless it does not read what is forged."""
    out = Path(shutil.copytree(sound[1], place, ignore=shutil.ignore_patterns("images", "000001")))
    path = out / "checkpoints/000003"
    forge(path)
    key = what.partition(" ")[0]
    capsys.readouterr()
    resumed = refusal(lambda: restored(opened, out))
    assert "\n" not in resumed
    assert "--resume: " in resumed or f"{path}/{of}." in resumed or key.startswith("machine."), what
    if not resumed:
        message = capsys.readouterr().err
        assert message.startswith("mmalign: resumed ")
        assert message.count("\n") == 1
    not_drawn = refusal(lambda: drawn(path, opened))
    if not_drawn:
        assert f"{path}/{of}." in not_drawn, what
        assert "000002 before it is used" in not_drawn
    else:
        assert of == "optimizer" or (of == "state" and key not in ALWAYS), what
        assert key.removeprefix("config.") not in states.IMAGE_SETTINGS, what
        result, expected = (drawn(one, opened) for one in (path, sound[1] / "checkpoints/000003"))
        assert all(torch.equal(result[name], value) for name, value in expected.items())
    shutil.rmtree(out)


@effort(max_examples=25, deadline=None, suppress_health_check=ANY)
@given(data=st.data())
def test_whatever_is_forged_is_refused(sound, opened, forgeries, tmp_path, capsys, data):
    place = data.draw(st.integers(0, len(forgeries) - 1))
    shutil.rmtree(tmp_path / "forged", ignore_errors=True)
    try_one(sound, opened, tmp_path / "forged", *forgeries[place], capsys)


@pytest.mark.slow
@pytest.mark.parametrize("of", ["state", *FILES])
def test_all_that_can_be_forged_is_refused(sound, opened, forgeries, tmp_path, capsys, of):
    chosen = [one for one in forgeries if one[0] == of]
    assert len(chosen) > 100
    for place, one in enumerate(chosen):
        try_one(sound, opened, tmp_path / str(place), *one, capsys)


def commands(settings, out: Path, path: Path, place: Path):
    config = place / "config.yaml"
    config.write_text(yaml.safe_dump(settings | {"out": str(out), "prompts": settings["prompts"]}))
    yield ["train", config, "--resume"]
    yield ["sample", "a cross", "--steps", "1", "--out", place / "images", "--adapter", path]
    yield ["export", path, "--out", place / "lora"]


CASES = {  # what is done, in which file it is, and the message
    "no adapter hash": (lambda p: corpus.restated(p, lambda s: s.pop("adapter_hash")), "state.json", "adapter_hash: F"),
    "a text": (lambda p: corpus.restated(p, lambda s: s.update(iteration="3")), "state.json", "iteration: Input"),
    "another iteration": (lambda p: corpus.restated(p, lambda s: s.update(iteration=2)), "state.json", "iteration: 2,"),
    "unknown key": (lambda p: corpus.restated(p, lambda s: s.update(code="x")), "state.json", "code: Extra inputs"),
    "wrong adapter hash": (
        lambda p: corpus.restated(p, lambda s: s.update(adapter_hash="0" * 16)), "adapter.safetensors",
        "not the adapter that state.json names",
    ),
    "average with NaN": (
        lambda p: corpus.retensored(p, "ema", lambda t: t[min(t)].fill_(torch.nan)), "ema.safetensors", "is not finite",
    ),
    "average of one number": (
        lambda p: corpus.retensored(p, "ema", lambda t: t.update({min(t): torch.zeros(1, 1)})), "ema.safetensors",
        "does not fit this model and rank: 1 matrices differ",
    ),
    "average in half precision": (
        lambda p: corpus.retensored(p, "ema", lambda t: t.update({min(t): t[min(t)].half()})), "ema.safetensors",
        "is of torch.float16, not torch.float32",
    ),
    "another strength": (
        lambda p: corpus.restated(p, lambda s: s["config"].update(lora_alpha=8.0)), "state.json", "lora_alpha",
    ),
    "a long header": (lambda p: corpus.headed(p / "ema.safetensors", 2**62), "ema.safetensors", "a header of"),
    "FIFO": (lambda p: corpus.replaced(p / "ema.safetensors", "FIFO"), "ema.safetensors", "not a regular file"),
    "circle": (lambda p: corpus.replaced(p / "state.json", "circle"), "state.json", ""),
    "folder": (lambda p: corpus.replaced(p / "manifest.json", "folder"), "manifest.json", "Is a directory"),
    "a name outside": (
        lambda p: (p / "manifest.json").write_text(json.dumps({"../../config.yaml": "0" * 64})), "manifest.json",
        "'../../config.yaml' is not a file of a checkpoint",
    ),
    "deep manifest": (lambda p: (p / "manifest.json").write_text("[" * 10**5), "manifest.json", "is not JSON"),
    "manifest of numbers": (lambda p: (p / "manifest.json").write_text('{"state.json": 5}'), "state.json", "is not"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_each_command_refuses_in_one_line(sound, tmp_path, name):
    """Where there is no checkpoint before it; what is broken is passed over where there is one."""
    forge, file, says = CASES[name]
    settings, whole = sound
    out = Path(shutil.copytree(whole, tmp_path / "run"))
    for number in ("000001", "000002"):
        shutil.rmtree(out / "checkpoints" / number)
    path = out / "checkpoints/000003"
    forge(path)
    for command in commands(settings, out, path, tmp_path):
        ended = mmalign(*command)
        assert (ended.returncode, ended.stderr.count("\n")) == (2, 1), (ended.stderr, ended.stdout)
        output = " ".join((ended.stdout + ended.stderr).split())
        assert file in output.replace("\n", "") or command[0] == "train", output
        assert says in output.replace("\n", "") or command[0] == "train", output


def test_a_checkpoint_before_a_forged_one_is_named_and_can_be_used(sound, tmp_path):
    settings, whole = sound
    out = Path(shutil.copytree(whole, tmp_path / "run"))
    path = out / "checkpoints/000003"
    corpus.retensored(path, "optimizer", lambda tensors: tensors.clear())
    train, sample, _ = commands(settings, out, out, tmp_path)
    ended = mmalign(*train)
    assert ended.returncode == 2
    assert "optimizer.safetensors: " in ended.stderr
    assert "0 matrices have moments, and 30 were trained, e.g. 0; with 000003 removed, 000002 bef" in ended.stderr
    assert mmalign(*sample).returncode == 0  # which draws with the average, and reads no more of the optimiser
    shutil.rmtree(path)
    assert mmalign(*train).returncode == 0
    assert path.is_dir()


def test_moments_are_those_of_each_matrix_that_was_learnt(sound, opened, tmp_path):
    """As many as when it was written, and no negative squares."""
    names = opened.policy.adapter_names()
    saved = load_file(sound[1] / "checkpoints/000003/optimizer.safetensors")
    assert {key.partition(".")[2] for key in saved} == {"step", "exp_avg", "exp_avg_sq"}
    assert {int(key.partition(".")[0]) for key in saved} == set(range(len(names)))
    for i in (0, 1):
        out = Path(shutil.copytree(sound[1], tmp_path / str(i)))

        def lost(tensors, i=i):
            for part in ("step", "exp_avg", "exp_avg_sq"):
                tensors.pop(f"{i}.{part}")

        corpus.retensored(out / "checkpoints/000003", "optimizer", lost)
        with pytest.raises(
            BadInput, match=f"{len(names) - 1} matrices have moments, and {len(names)} were trained, e.g. {i}"
        ):
            restored(opened, out)
    out = Path(shutil.copytree(sound[1], tmp_path / "negative"))
    key = next(key for key in saved if key.endswith("exp_avg_sq"))
    corpus.retensored(out / "checkpoints/000003", "optimizer", lambda tensors: tensors[key].fill_(-1.0))
    with pytest.raises(BadInput, match=r"\.exp_avg_sq is not finite, or below 0"):
        restored(opened, out)


def test_names_that_are_no_numbers_are_no_checkpoints(tmp_path):
    for name in ("²", "٣", "1.5", "-1", "x", ".000001.partial"):
        (tmp_path / name).mkdir()
    assert checkpoint.numbered(tmp_path) == []
    assert checkpoint.latest(tmp_path) is None


# what a kill leaves


def test_what_a_kill_left_is_gone_at_the_next_start(sound, tmp_path):
    """Also where nothing more is saved: the run is finished."""
    settings, whole = sound
    out = Path(shutil.copytree(whole, tmp_path / "run"))
    before = {path.relative_to(out) for path in out.rglob("*")}
    shutil.copytree(out / "checkpoints/000003", out / "checkpoints/.000002.gone.partial")
    shutil.copytree(out / "checkpoints/000003", out / "checkpoints/.000004.partial")
    (out / "checkpoints/.note.partial").write_text("half")
    (out / ".metrics.jsonl.partial").write_text("half")
    (tmp_path / "elsewhere").mkdir()
    (out / ".link.partial").symlink_to("images")
    (out / "images").mkdir(exist_ok=True)
    (out / "images/kept.png").touch()
    run(settings | {"out": str(out)}, resume=True)
    after = {path.relative_to(out) for path in out.rglob("*")}
    assert {path for path in after if "partial" in path.name} == set()
    assert before <= after
    assert (out / "images/kept.png").exists()


def test_a_pruning_that_was_cut_off_is_made_up_for(sound, tmp_path, monkeypatch):
    changed = sound[0] | {"out": str(tmp_path / "run"), "keep_checkpoints": 1}
    prune = checkpoint.prune

    def killed(place, newest, *rest):
        if newest == 3:
            raise KeyboardInterrupt
        prune(place, newest, *rest)

    monkeypatch.setattr(checkpoint, "prune", killed)
    with pytest.raises(KeyboardInterrupt):
        run(changed)
    names = lambda: sorted(os.listdir(tmp_path / "run/checkpoints"))  # noqa: E731
    assert names() == ["000002", "000003"]
    monkeypatch.undo()
    run(changed, resume=True)
    assert names() == ["000003"]


# another machine


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, None),
        ({"threads": 2}, "resumed with 1 thread instead of 2: results are equal to rounding, not to the bit"),
        ({"threads": 16, "processes": 4}, "resumed with 1 thread instead of 16, 1 process instead of 4: results"),
        ({"instructions": "AVX9"}, f"instructions {torch.backends.cpu.get_cpu_capability()} instead of AVX9: results"),
        ({"torch": "1.0"}, "resumed with torch "),
        ({"device": "NVIDIA H100"}, "resumed with device cpu instead of NVIDIA H100: results"),
        (None, "resumed from a checkpoint that does not record its machine; on another, results are equal to round"),
    ],
)
def test_a_run_that_goes_on_elsewhere_says_so_and_goes_on(sound, opened, tmp_path, capsys, change, says):
    out = Path(shutil.copytree(sound[1], tmp_path / "run"))
    path = out / "checkpoints/000003"
    if change is None:
        corpus.restated(path, lambda state: [state.pop("machine"), state.pop("learnt")])
    else:
        corpus.restated(path, lambda state: state["machine"].update(change))
    assert restored(opened, out) == 3
    message = capsys.readouterr().err
    assert (
        message == ""
        if says is None
        else (message.startswith("mmalign: ") and says in message and message.count("\n") == 1)
    )


def test_threads_are_those_that_compute(sound):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        two = machine.describe(1, torch.device("cpu"))
    finally:
        torch.set_num_threads(before)
    one = machine.describe(1, torch.device("cpu"))
    assert (one["threads"], two["threads"]) == (1, 2)
    message = "resumed with 2 threads instead of 1: results are equal to rounding, not to the bit"
    assert machine.difference(one, two) == message
    state = json.loads((sound[1] / "checkpoints/000003/state.json").read_text())
    assert state["machine"] == one


# a run's other files


@pytest.mark.parametrize("text", ["[1]", "5", '"x"', "", "{", '{"pid": 1}'])
def test_a_lock_of_another_kind_is_no_traceback(tmp_path, text):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        with folder.locked(tmp_path, print):
            os.write(writer, b"!")
            signal.pause()
    os.read(reader, 1)
    try:
        (tmp_path / ".lock").write_text(text)
        with pytest.raises(BadInput, match="another run, process"), folder.locked(tmp_path, print):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
