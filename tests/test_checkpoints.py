"""Days on which something goes wrong: kills, damaged files, signals, full disks, two runs in one folder."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import kill_and_resume
import numpy as np
import pytest
import torch
import yaml
from command_line import mmalign
from run_config import cut_off, rows, run

from mmalign import run as runs
from mmalign.config import load as configs
from mmalign.errors import BadInput, Failed
from mmalign.runs import checkpoint, folder, jsonl, signals
from mmalign.training import setup
from reward_models import files

TENSORS = {"adapter": {"w": torch.arange(6.0)}, "ema": {"w": torch.ones(3)}}


def names(out):
    return [path.name for path in checkpoint.numbered(out / "checkpoints")]


def config_file(settings, folder, **changed):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings | changed))
    return path


@pytest.fixture(scope="module")
def known():
    return {}


@pytest.fixture
def expected(settings, known, tmp_path):
    """The outcome of the run that nothing happened to."""
    if not known:
        known |= kill_and_resume.outcome(run(settings, out=str(tmp_path / "whole")))
    return known


def in_child(work) -> int:
    """The signal that ended a forked process doing this work, 0 if it came to its end."""
    child = os.fork()
    if not child:
        work()
        os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


# damaged checkpoints


def damages(data):
    yield "cut", data[: len(data) // 2]
    yield "empty", b""
    for place in (0, len(data) // 2, len(data) - 1):
        yield f"bit {place}", data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.parametrize("name", ["adapter.safetensors", "ema.safetensors", "state.json", "manifest.json"])
def test_a_damaged_file_takes_its_checkpoint_out_and_the_one_before_is_used(tmp_path, name):
    old, new = (checkpoint.save(tmp_path, i, TENSORS, {"note": i}) for i in (1, 2))
    good = (new / name).read_bytes()
    for what, bad in damages(good):
        (new / name).write_bytes(bad)
        lines = []
        assert checkpoint.latest(tmp_path, lines.append) == old, what
        assert len(lines) == 1
        assert str(new / name) in lines[0] or name == "manifest.json"  # which may then name another file
        with pytest.raises(checkpoint.Broken):
            checkpoint.read(new)
    (new / name).unlink()
    assert checkpoint.latest(tmp_path, lines.append) == old
    assert lines[-1].endswith(f"{new / name} is missing")
    (new / name).write_bytes(good)
    assert checkpoint.latest(tmp_path) == new


def test_every_byte_of_a_checkpoint_counts(tmp_path):
    """Flip one in each byte: whatever is not what was written is found."""
    path = checkpoint.save(tmp_path, 1, {"adapter": {"w": torch.ones(1)}}, {})
    for file in path.iterdir():
        data = file.read_bytes()
        for place in range(len(data)):
            flipped = bytearray(data)
            flipped[place] ^= 1 << place % 8
            file.write_bytes(flipped)
            with pytest.raises(checkpoint.Broken):
                checkpoint.read(path)
        file.write_bytes(data)
    assert checkpoint.read(path)[0]["adapter"]["w"] == 1


def test_a_run_resumes_from_the_checkpoint_before_a_broken_one(settings, expected, capsys):
    out = run(settings)
    file = out / "checkpoints/000004/optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    run(settings, resume=True)
    lines = capsys.readouterr().out.replace("\n", "")
    assert f"a broken checkpoint is left out: {file}" in lines
    assert kill_and_resume.outcome(out) == expected
    for path in checkpoint.numbered(out / "checkpoints"):
        (path / "manifest.json").write_text("{")
    with pytest.raises(BadInput, match=r"no checkpoint in .* is complete; to start over, remove"):
        run(settings, resume=True)
    assert rows(out / "metrics.jsonl")[-1]["iteration"] == 4


# killed


def test_killed_at_any_step_of_a_save_one_of_two_checkpoints_is_whole(tmp_path, monkeypatch):
    """SIGKILL before each call that changes the disk: the old one is used, or the new; the next save tidies up."""
    calls = [(os, "replace"), (os, "fsync"), (os, "mkdir"), (shutil, "rmtree"), (checkpoint.files, "put")]
    used = set()
    for number in range(100):
        place = tmp_path / str(number) / "checkpoints"
        checkpoint.save(place, 1, TENSORS, {"note": "old"})
        checkpoint.save(place, 2, TENSORS, {"note": "broken"})
        (place / "000002/state.json").write_text("{}")
        left = [number]

        def counted(function, left=left):
            def call(*args, **kwargs):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return call

        def work(place=place, counted=counted):
            for module, name in calls:
                setattr(module, name, counted(getattr(module, name)))
            checkpoint.save(place, 2, TENSORS, {"note": "new"})
            checkpoint.prune(place, 2, 1, None)

        ended = in_child(work)
        results = checkpoint.read(checkpoint.latest(place, lambda line: None))[1]["note"]
        assert results in ("old", "new")
        used.add(results)
        checkpoint.save(place, 3, TENSORS, {"note": "next"})
        assert not [path for path in place.iterdir() if path.name.startswith(".")]
        if not ended:
            break
    assert ended == 0
    assert number > 15
    assert used == {"old", "new"}


@pytest.mark.skipif(torch.cuda.is_initialized(), reason="CUDA does not survive a fork; the slow test does without")
def test_killed_three_times_a_run_ends_with_the_same_bits(settings, tmp_path, capsys):
    path = config_file(settings, tmp_path, iterations=5, eval_every=2, checkpoint_every=1, eval_seeds=1)
    kill_and_resume.main(path, [], kills=3)
    assert "'kills': 3" in capsys.readouterr().out


@pytest.mark.slow
def test_killed_fifty_times_a_run_ends_with_the_same_bits(settings, tmp_path):
    path = config_file(settings, tmp_path, iterations=24, eval_every=4, checkpoint_every=1)
    command = [sys.executable, kill_and_resume.__file__, path, "--kills", "50"]
    assert "'kills': 50" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


# what a resumed run must continue with


def test_a_run_neither_uses_nor_moves_the_global_generators(settings, tmp_path):
    def states():  # without Python's: the checks of shapes in tests draw from it
        return torch.get_rng_state().tolist(), str(np.random.get_state())

    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = states()
        results.append(kill_and_resume.outcome(run(settings, out=str(tmp_path / str(seed)), iterations=2)))
        assert states() == before
    assert results[0] == results[1]


def test_what_a_run_is_made_of_must_not_change_under_it(settings, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("a dog\na cat\na cow\n")
    changed = dict(prompts=str(texts), held_out=None, iterations=2)
    out = run(settings, **changed)
    texts.write_text("a dog\na cat\na bird\n")
    with pytest.raises(BadInput, match=r"prompts was [0-9a-f]+ and is [0-9a-f]+ now; a run keeps its prompts"):
        run(settings, resume=True, **changed)
    texts.write_text("a dog\na cat\na cow\n")
    path = checkpoint.latest(out / "checkpoints")
    tensors, state = checkpoint.read(path)
    state["made"]["order of prompts"].reverse()
    checkpoint.save(out / "checkpoints", state["iteration"], tensors, state)
    with pytest.raises(BadInput, match="a run keeps its order of prompts"):
        run(settings, resume=True, **changed)


def test_a_folder_that_was_moved_is_resumed_where_it_lies(settings, tmp_path, expected):
    with cut_off(after=3):
        run(settings)
    moved = Path(settings["out"]).rename(tmp_path / "moved")
    assert kill_and_resume.outcome(run(settings, resume=True, out=str(moved))) == expected
    assert configs.load(moved / "config.yaml").out == str(moved)


def test_config_of_a_checkpoint_is_held_against_an_edited_folder(settings):
    out = run(settings, held_out=None, iterations=2)
    text = (out / "config.yaml").read_text()
    (out / "config.yaml").write_text(text.replace("seed: 0\n", "seed: 1\n"))
    with pytest.raises(BadInput, match="seed was 0 and is 1 now; a run keeps its seed"):
        run(settings, resume=True, held_out=None, iterations=2, seed=1)


# which are kept


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    for iteration in range(1, 7):
        checkpoint.save(tmp_path, iteration, TENSORS, {})
        checkpoint.prune(tmp_path, iteration, 2, 2 if iteration > 2 else None)
    assert [path.name for path in checkpoint.numbered(tmp_path)] == ["000002", "000005", "000006"]
    checkpoint.save(tmp_path, 4, TENSORS, {})  # resumed from 2, since 5 and 6 were broken
    checkpoint.prune(tmp_path, 4, 1, 2)
    assert [path.name for path in checkpoint.numbered(tmp_path)] == ["000002", "000004"]
    assert checkpoint.numbered(tmp_path / "none") == []


def test_the_best_is_told_by_the_images_all_evaluations_share(settings, capsys, monkeypatch):
    means = iter([9.0, 1.0, 5.0, 2.0, 3.0])
    judge = runs.evaluate.evaluate

    def evaluated(*args, **options):
        results = judge(*args, **options)
        value = next(means)
        shared = (results.member == 0) & (results.prompt % (2 if len(results.images) > 1 else 1) == 0)
        results.parts["jpeg_size.kilobytes"][:] = torch.where(shared, value, 1e3)
        return results

    monkeypatch.setattr(runs.evaluate, "evaluate", evaluated)
    changed = dict(iterations=8, eval_every=2, checkpoint_every=1, keep_checkpoints=1, eval_prompts=1)
    out = run(settings, **changed, keep_best="jpeg_size.kilobytes")
    assert [row["compared"] for row in rows(out / "evaluations.jsonl")] == [9, 1, 5, 2, 3]
    assert names(out) == ["000004", "000008"]
    assert "best held-out jpeg_size.kilobytes: " in capsys.readouterr().out
    best = mmalign("export", out / "checkpoints/000004", "--out", out / "lora")
    assert (best.returncode, best.stderr) == (0, "")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(keep_checkpoints=0), "keep_checkpoints: Input should be greater than or equal to 1"),
        (dict(keep_best="clip.cosine"), "keep_best: 'clip.cosine' is not a component of the scorers"),
        (dict(keep_best="jpeg_size.megabytes"), "no component 'megabytes'; jpeg_size gives kilobytes"),
        (
            dict(keep_best="jpeg_size.kilobytes", held_out=None),
            "keep_best does not act with held_out: null or eval_every: 0",
        ),
        (
            dict(keep_best="jpeg_size.kilobytes", eval_every=0),
            "keep_best does not act with held_out: null or eval_every: 0",
        ),
    ],
)
def test_what_cannot_be_kept_is_refused(settings, change, says):
    with pytest.raises(BadInput, match=says):
        run(settings, **change)
    assert not os.path.exists(settings["out"])


# asked to stop


def signalled(monkeypatch, at, number, times=1):
    """Send a signal to this process while it is in iteration `at`."""
    iterate = runs.iterate

    def sending(opened, iteration, *rest):
        row = iterate(opened, iteration, *rest)
        if iteration == at:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return row

    monkeypatch.setattr(runs, "iterate", sending)
    return iterate


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_iteration_saves_and_leaves(settings, expected, tmp_path, monkeypatch, number, code):
    before = signal.signal(number, signal.default_int_handler)  # which a background job ignores, as do its runs
    iterate = signalled(monkeypatch, 2, number)
    path = config_file(settings, tmp_path)
    try:
        result = mmalign("train", path, "--json")
        assert signal.getsignal(number) == signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert result.returncode == code
    assert f"stopped by {number.name} after iteration 3; --resume continues from there" in result.stderr
    out = tmp_path / "run"
    assert names(out) == ["000002", "000003"]
    assert len(rows(out / "metrics.jsonl")) == 3
    monkeypatch.setattr(runs, "iterate", iterate)
    assert kill_and_resume.outcome(run(settings, resume=True)) == expected


def test_an_evaluation_is_left_at_once_and_made_up_for(settings, expected, monkeypatch):
    judge, calls = runs.evaluate.evaluate, []

    def sending(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("the evaluation continued")
        return judge(*args, **options)

    monkeypatch.setattr(runs.evaluate, "evaluate", sending)
    with pytest.raises(signals.Stopped):
        run(settings)
    assert kill_and_resume.outcome(run(settings, resume=True)) == expected


def test_a_second_signal_stops_at_once():
    def work():
        with signals.stopping() as stop, stop.finishing():
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)

    assert in_child(work) == signal.SIGTERM


def test_signals_are_left_alone_elsewhere_and_where_ignored():
    visited = []

    def elsewhere():
        with signals.stopping() as stop, stop.finishing():
            visited.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert visited == [before]
    was = signal.signal(signal.SIGINT, signal.SIG_IGN)  # nohup
    try:
        with signals.stopping():
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != before
    finally:
        signal.signal(signal.SIGINT, was)
    assert signal.getsignal(signal.SIGTERM) == before


# two runs in one folder


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_gone(settings, tmp_path):
    out = tmp_path / "run"
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        with folder.locked(out, print):
            (out / "config.yaml").touch()
            os.write(writer, b"!")
            signal.pause()
    os.read(reader, 1)
    try:
        result = mmalign("train", config_file(settings, tmp_path))
        assert result.returncode == 2
        assert result.stderr.startswith(f"mmalign: out: another run, process {child} on ")
        assert result.stderr.count("\n") == 1
        result = mmalign("train", config_file(settings, tmp_path), "--resume")
        assert result.stderr.startswith(f"mmalign: out: another run, process {child} on ")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with folder.locked(out, print):
        assert json.loads((out / ".lock").read_text())["pid"] == os.getpid()


def test_no_locks_on_a_file_system_is_said(tmp_path, monkeypatch):
    def lacking(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(folder.fcntl, "lockf", lacking)
    lines = []
    with folder.locked(tmp_path, lines.append):
        (line,) = lines
        assert line.startswith(f"{tmp_path}: this disk has no locks (Function not implemented); make sure that no ")


# disks


@contextmanager
def largest_file(size):
    """A disk that takes no file of more bytes than this: writing fails half-way, as on a full one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_line_and_the_checkpoint_before_is_whole(settings, expected, tmp_path, monkeypatch):
    path, out, save = config_file(settings, tmp_path), tmp_path / "run", checkpoint.save

    def full(place, iteration, *rest):
        with largest_file(1000 if iteration == 4 else 10**9):
            return save(place, iteration, *rest)

    monkeypatch.setattr(checkpoint, "save", full)
    result = mmalign("train", path, "--json")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(f"mmalign: cannot write in {out}: File too large; ")
    assert os.listdir(out / "checkpoints") == ["000002"]
    monkeypatch.setattr(checkpoint, "save", save)
    assert kill_and_resume.outcome(run(settings, resume=True)) == expected


def test_rows_are_whole_or_not_there(tmp_path):
    path = tmp_path / "metrics.jsonl"
    files.append(path, {"iteration": 1}, {"iteration": 2})
    before = path.read_bytes()
    with largest_file(len(before) + 5), pytest.raises(OSError, match="File too large"):
        files.append(path, {"iteration": 3, "more": "x" * 100})
    assert path.read_bytes() == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_what_a_disk_does_is_told_and_other_errors_are_not_hidden(tmp_path, number):
    with pytest.raises(Failed, match=r"in .*: .*; earlier checkpoints are complete"), folder.failing(tmp_path):
        raise OSError(number, os.strerror(number))
    with pytest.raises(ConnectionError), folder.failing(tmp_path):
        raise ConnectionError(errno.ECONNREFUSED, "no")


def test_rows_of_a_killed_run_are_mended(tmp_path):
    path, lines = tmp_path / "metrics.jsonl", []
    whole = '{"iteration": 1, "reward": 0.1}\n{"iteration": 2, "reward": NaN}\n'
    path.write_text(whole + '{"iteration": 3, "rew')
    assert [row["iteration"] for row in jsonl.rows(path)] == [1, 2]
    folder.rewind(tmp_path, 5, lines.append)
    assert path.read_text() == whole
    assert lines == [f"{path}: incomplete lines that are left out: 1"]
    folder.rewind(tmp_path, 1, lines.append)
    assert path.read_text() == whole.splitlines(keepends=True)[0]
    assert len(lines) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_no_room_and_no_folder_are_refused_before_the_run(settings, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10**4)
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: usage)
    opened = setup.open_session(configs.build(settings, "test"))
    needed = 4 * 4 * sum(p.numel() for p in opened.policy.parameters()) * (3 + 2)
    with pytest.raises(BadInput, match=rf"0\.0 MB free at .*checkpoints of this run need {needed / 1e6:.1f} MB"):
        run(settings)
    assert not os.path.exists(settings["out"])
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match=r"out: cannot write in .*file/run: Not a directory"):
        run(settings, out=str(tmp_path / "file/run"))
