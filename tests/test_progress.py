"""Progress: time left by closed form, what is shown where, and real runs in a log and in a narrow terminal."""

import fcntl
import io
import json
import os
import pty
import re
import struct
import sys
import termios
import threading
import time
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import pytest
import torch
import yaml
from command_line import mmalign
from rich.cells import cell_len
from rich.console import Console
from run_config import cut_off, rows, run

from mmalign import activity, run as runs
from mmalign.activity import Left, Work, counted, doing, left, pace
from mmalign.config import load as configs
from mmalign.distributed.processes import Ranks, join
from mmalign.evaluation.generate import generate
from mmalign.reporting import progress
from mmalign.runs.inference import load_policy
from mmalign.training.clock import Clock
from reward_models import Prompt, load

CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
SHOWN, HIDDEN = "\x1b[?25h", "\x1b[?25l"


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Now:
    """A clock that is moved by hand."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


# ----------------------------------------------------------------------------------------------------------- time left


@pytest.mark.parametrize(
    ("spans", "seconds"),
    [
        ([(30, 1)], 30),  # all there is
        ([(30, 1), (10, 1)], 10),  # the first warms up
        ([(30, 1), (10, 1), (20, 1)], 15),
        ([(30, 1), (10, 1), (20, 1), (12, 1)], 12),
        ([(30, 1), (1, 1), (2, 1), (4, 1), (99, 1)], 3),  # neither the shortest nor the longest
        ([(5, 1), (60, 30), (8, 4)], 2),  # seconds for one
    ],
)
def test_a_pace_is_a_mean_of_what_was_measured(spans, seconds):
    assert pace(tuple(spans)) == seconds


@pytest.mark.parametrize(
    ("to_do", "paces", "expected"),
    [
        ({"iterations": 10, "images": 100, "checkpoints": 2}, {}, None),
        ({"iterations": 10, "images": 100}, {"images": 0.5}, None),  # the main part is unknown
        ({"iterations": 10, "images": 100, "checkpoints": 2}, {"iterations": 3, "images": 0.5}, Left(80, True)),
        (
            {"iterations": 10, "images": 100, "checkpoints": 2},
            {"iterations": 3, "images": 0.5, "checkpoints": 4},
            Left(88, False),
        ),
        ({"iterations": 0, "images": 100, "checkpoints": 0}, {"images": 0.5}, Left(50, False)),
        ({"images": 0}, {}, Left(0, False)),
    ],
)
def test_the_time_left_is_amounts_times_paces(to_do, paces, expected):
    assert left(to_do, paces) == expected


def test_the_time_left_of_a_run_counts_evaluations_and_checkpoints():
    """Four iterations of 10 s (the first of 30), evaluations of 100, 20 and 100 images at 0.1 s, two saves of 2 s."""
    now = Now()
    work = Work("training", "iterations", 4, 0, {"images": 220, "checkpoints": 2}, now)
    lefts = []
    for kind, amount, seconds in (
        ("images", 100, 10), ("iterations", 1, 30), ("iterations", 1, 10), ("checkpoints", 1, 2), ("images", 20, 2),
        ("iterations", 1, 10), ("iterations", 1, 10), ("checkpoints", 1, 2), ("images", 100, 10),
    ):  # fmt: skip
        now.seconds += seconds
        work.did(kind, amount)
        lefts.append(work.left())
    assert lefts == [
        None, Left(102, True), Left(32, True), Left(34, False), Left(32, False), Left(22, False), Left(12, False),
        Left(10, False), Left(0, False),
    ]  # fmt: skip
    assert (work.done, set(work.to_do.values())) == (4, {0})


def test_the_time_left_runs_on_for_as_long_as_the_next_piece_should_take():
    now = Now()
    work = Work("training", "iterations", 10, now=now)
    now.seconds = 10
    work.did("iterations")
    assert work.left() == (90, False)
    for more, expected in ((4, 86), (10, 80), (100, 80)):
        now.seconds = 10 + more
        assert work.left() == (expected, False)


def test_what_was_done_before_is_counted_but_measures_nothing():
    now = Now()
    work = Work("scoring", "images", 100, 60, now=now)
    assert (work.done, work.left()) == (60, None)
    now.seconds = 5
    work.did("images", 10)
    assert (work.done, work.left()) == (70, (15, False))


def test_rows_that_come_in_batches_are_measured_in_batches():
    """16 rows at a time after 32 s, which reach the file within milliseconds."""
    now, lefts = Now(), []
    work = Work("scoring", "images", 64, 0, now=now)
    for row in range(48):
        now.seconds += 32 if row % 16 == 0 else 0.001
        work.did("images")
        lefts.append(work.left())
    assert [lefts[row].seconds for row in (15, 31, 47)] == pytest.approx([48 * 2, 32 * 2, 16 * 2], rel=1e-3)


def test_rows_are_counted_while_they_are_made():
    shown = []
    for row in counted("abc", 2, 5, "scoring", "images"):
        shown.append((row, *((work.name, work.done, work.total, work.unit) for work in activity.current())))
    assert shown == [(row, ("scoring", 2 + i, 5, "images")) for i, row in enumerate("abc")]
    assert activity.current() == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"), (59.6, "60 s"), (119, "119 s"), (120, "2 min"), (7140, "119 min"), (7200, "2 h 0 min"),
        (11400, "3 h 10 min"), (172799, "2 d 0 h"), (187200, "2 d 4 h"),
    ],
)  # fmt: skip
def test_times_in_words(seconds, text):
    assert progress.span(seconds) == text


# --------------------------------------------------------------------------------------------------- what is waited for


class Recording:
    """`jpeg_size`, which notes what the process is doing when it is called."""

    def __init__(self):
        self.scorer = load("jpeg_size")
        self.names, self.card, self.doing = self.scorer.names, self.scorer.card, []

    def __call__(self, images, prompts):
        self.doing.append(tuple((work.name, work.done, work.total) for work in activity.current()))
        return self.scorer(images, prompts)


def test_the_phases_of_a_run_are_named(settings):
    """What a scorer sees of a run: iterations so far, and the phase; and at the end nothing is left to do."""
    recording = Recording()
    runs.train(configs.build(settings, "test"), console=Console(quiet=True), scorers={"jpeg_size": recording})
    evaluating = [("evaluating", 0, 0), ("scoring 4 images by jpeg_size", 0, 0)]
    between = [("evaluating", 0, 0), ("scoring 2 images by jpeg_size", 0, 0)]
    sampled = [("scoring", 0, 0), ("scoring 16 images by jpeg_size", 0, 0)]
    phases = [(0, evaluating), (0, sampled), (1, sampled), (2, between), (2, sampled), (3, sampled), (4, evaluating)]
    assert recording.doing == [(("training", done, 4), *phase) for done, phase in phases]
    assert activity.current() == []


@pytest.fixture
def works(monkeypatch):
    """What runs have to do, as it stands now."""
    noted = []

    @contextmanager
    def noting(*args):
        with doing(*args) as work:
            noted.append(work)
            yield work

    monkeypatch.setattr(runs, "doing", noting)
    return noted


@pytest.mark.parametrize(
    ("changed", "images", "checkpoints"),
    [
        ({}, 4 + 2 + 4, 2),
        ({"checkpoint_every": 3, "eval_every": 0}, 4 + 4, 2),
        ({"held_out": None, "eval_every": 3, "checkpoint_every": 1}, 0, 4),
        ({"eval_prompts": 1}, 4 + 1 + 4, 2),
    ],
)
def test_all_that_a_run_has_to_do_is_known_when_it_begins(settings, works, changed, images, checkpoints):
    out = run(settings | changed)
    work = works[0]
    assert dict(work.besides) == {"images": images, "checkpoints": checkpoints}
    assert work.to_do == {"iterations": 0, "images": 0, "checkpoints": 0}
    evaluations = rows(out / "evaluations.jsonl") if images else []
    assert sum(row["images"] for row in evaluations) == images
    assert work.left().seconds == 0


def test_a_resumed_run_and_one_that_ends_early_know_what_is_left(settings, works):
    with cut_off(3):
        run(settings)
    run(settings, resume=True)
    assert dict(works[1].besides) == {"images": 4, "checkpoints": 1}
    assert (works[1].done, works[1].to_do) == (4, {"iterations": 0, "images": 0, "checkpoints": 0})
    run(settings, out=settings["out"] + "-short", max_kl=1e-9)
    assert works[2].done < 4
    assert works[2].to_do == {"iterations": 0, "images": 0, "checkpoints": 0}


def test_images_are_counted_as_they_are_made(monkeypatch):
    policy, shown = load_policy("assets/tiny_sd3"), []
    decode = policy.decode

    def looking(latents):
        shown.append([(work.name, work.done, work.total, work.unit) for work in activity.current()])
        return decode(latents)

    monkeypatch.setattr(policy, "decode", looking)
    generate(policy, [Prompt("a red circle")], [[0, 1, 2]], 1, batch=2)
    assert shown == [[("sampling", 0, 3, "images")], [("sampling", 2, 3, "images")]]


def test_waiting_for_other_processes_is_named():
    class First(Ranks):
        size, rank = 2, 0

    ranks = First(join(60.0).accelerator, 60.0, torch.distributed.HashStore())
    ranks.store.set("1", json.dumps({"barriers": 0, "what": "the start"}))
    waiting = threading.Thread(target=ranks.barrier, args=("the rewards",))
    waiting.start()
    while not activity.current() and waiting.is_alive():
        time.sleep(0.001)
    assert [work.name for work in activity.current()] == ["waiting for other processes"]
    ranks.store.set("1", json.dumps({"barriers": 1, "what": "the rewards"}))
    waiting.join(60)
    assert activity.current() == []


def test_a_clock_names_its_phases_and_leaves_none_behind():
    clock = Clock()
    for name, phase in (("rollout", "sampling"), ("learn", "learning"), ("io", "saving"), ("another", "another")):
        names = clock.timed(name, lambda: [work.name for work in activity.current()])()
        assert names == [phase]
        with pytest.raises(ZeroDivisionError):
            clock.timed(name, lambda: 1 / 0)()
    assert activity.current() == []


# ----------------------------------------------------------------------------------------------------- what is written


@pytest.fixture
def display():
    """57 of 170 iterations in 10 s each and an evaluation, an hour after the start."""
    now = Now()
    shown = progress.Display(now)
    with doing("training", "iterations", 170, 56, {"images": 496}) as work:
        work.now, work.last = now, 0.0
        work.notes = "reward 0.612", "231 NFE/s"
        now.seconds = 10.0
        work.did("iterations")
        work.spans["images"] = ((49.6, 496),)
        now.seconds = work.last = 3600.0
        yield shown


def drawn(display, width):
    file = io.StringIO()
    Console(file=file, width=width, force_terminal=True, color_system=None).print(display, end="")
    return file.getvalue()


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (12, "57/170"),
        (22, "57/170  20 min left"),
        (24, "57/170  sampling 120/496"),
        (40, "57/170  20 min left  sampling 120/496"),
        (60, "57/170  reward 0.612  20 min left  sampling 120/496 images"),
        (80, "training  [10]  57/170  reward 0.612  20 min left  sampling 120/496 images"),
        (
            160,
            "training  [30]  57/170  iterations  reward 0.612  231 NFE/s  20 min left  "
            "evaluating: sampling 120/496 images  60 min elapsed",
        ),
    ],
)
def test_a_line_keeps_what_matters_when_it_is_narrow(display, width, line):
    with doing("evaluating"), doing("sampling", "images", 496) as work:
        work.done = 120
        assert re.sub("\u2501+\u2578? +", lambda bar: f"[{len(bar[0]) - 2}]  ", drawn(display, width)) == line


@pytest.mark.parametrize(
    "name", ["learning", "scoring 496 images by a_module_with_a_long_name:Scorer", "\u8bc4\u5206 \u56fe\u50cf"]
)
def test_a_line_is_never_wider_than_the_terminal(display, name):
    for width in range(1, 170):
        with doing("evaluating"), doing(name):
            line = drawn(display, width)
        assert "\n" not in line
        assert cell_len(line) <= width


def test_before_anything_is_counted_the_phase_is_shown():
    shown = progress.Display(Now())
    assert (drawn(shown, 40), shown.text()) == ("", "")
    with doing("loading model and scorers"):
        assert drawn(shown, 40) == "loading model and scorers  0 s elapsed"
        assert drawn(shown, 30) == "loading  0 s elapsed"
        assert drawn(shown, 16) == "loading"
        assert shown.text() == "loading model and scorers, 0 s elapsed"


def test_a_time_that_has_run_out_is_not_shown():
    assert [progress.remaining(rest) for rest in (None, Left(0, False), Left(0, True))] == ["", "", ""]
    assert progress.remaining(Left(90, True)) == "over 90 s left"


@contextmanager
def drawing(monkeypatch, every=0.005, **environment):
    """Displays draw every so many seconds, in a terminal as the environment describes it."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLORTERM", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"TERM": "xterm-256color"} | environment).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(progress, "DRAWN", every)
    monkeypatch.setattr(progress, "WRITTEN", every)
    yield


def worked(file):
    """What a display writes into a file of a little work."""
    console = Console(file=file, width=60)
    with progress.shown(console) as refresh, doing("sampling", "images", 4) as work:
        for _ in range(4):
            refresh()
            time.sleep(0.02)
            console.print("a message")
            work.did("images")
    return file.getvalue()


def test_a_terminal_gets_one_line_that_stays_below_the_messages(monkeypatch):
    with drawing(monkeypatch):
        text = worked(Terminal())
    assert text.count("a message\n") == 4
    last = CODES.sub("", text.rpartition("\r")[2])
    assert re.fullmatch(r"sampling  \u2501+  4/4  images  \d s elapsed\n", last)
    assert text.rindex(SHOWN) > text.rindex(HIDDEN)


@pytest.mark.parametrize(
    ("file", "environment"),
    [(io.StringIO, {}), (Terminal, {"TERM": "dumb"}), (io.StringIO, {"FORCE_COLOR": "1"})],
    ids=["a file", "a dumb terminal", "a file, colours forced"],
)
def test_where_no_line_can_be_kept_up_to_date_lines_are_written_now_and_then(monkeypatch, file, environment):
    with drawing(monkeypatch, **environment):
        text = worked(file())
    assert "\x1b" not in text
    assert "\r" not in text
    lines = [line for line in text.splitlines() if line != "a message"]
    assert len(lines) >= 4
    assert all(re.fullmatch(r"sampling [0-4]/4 images, \d s elapsed(, \d s left)?", line) for line in lines)


def test_without_colour_nothing_is_coloured(monkeypatch):
    with drawing(monkeypatch, NO_COLOR="1"):
        assert re.search(r"\x1b\[[0-9;]*m", worked(Terminal())) is None
    with drawing(monkeypatch):
        assert re.search(r"\x1b\[[0-9;]*m", worked(Terminal()))


def test_a_quiet_console_shows_nothing(monkeypatch):
    with drawing(monkeypatch):
        threads = threading.active_count()
        with progress.shown(Console(file=Terminal(), quiet=True)) as write:
            write()
            assert threading.active_count() == threads


def test_a_notebook_gets_an_output_that_is_updated(monkeypatch):
    texts = []
    handle = SimpleNamespace(update=lambda data, raw: texts.append(data["text/plain"]))
    fake = SimpleNamespace(display=lambda data, raw, display_id: handle)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(display=fake))
    monkeypatch.setitem(sys.modules, "IPython.display", fake)
    console = Console(force_jupyter=True)
    with drawing(monkeypatch), progress.shown(console) as refresh, doing("sampling", "images", 2) as work:
        refresh()
        work.did("images", 2)
    assert texts[0].startswith("sampling 0/2 images, ")
    assert texts[-1].startswith("sampling 2/2 images, ")


@pytest.mark.parametrize("counted", [True, False])
def test_a_failure_leaves_the_terminal_in_order(monkeypatch, counted):
    file, threads = Terminal(), threading.active_count()

    def interrupted():
        console = Console(file=file, width=60)
        with progress.shown(console) as refresh, doing("sampling", "images", 4 * counted):
            refresh()
            raise KeyboardInterrupt

    with drawing(monkeypatch), pytest.raises(KeyboardInterrupt):
        interrupted()
    text = file.getvalue()
    assert text.rindex(SHOWN) > text.rindex(HIDDEN)
    assert ("0/4" in text.rpartition("\r\x1b[2K")[2]) == counted  # nothing counted: the line is taken away
    assert threading.active_count() == threads
    assert activity.current() == []


def test_a_display_that_cannot_be_written_does_not_end_the_work(monkeypatch):
    class Broken(io.StringIO):
        def write(self, text):
            raise OSError("gone")

    with drawing(monkeypatch), progress.shown(Console(file=Broken(), width=60)), doing("sampling", "images", 4) as work:
        time.sleep(0.1)
        work.did("images", 4)
    assert work.done == 4


# ------------------------------------------------------------------------------------------------------------ commands


def shown_by(*args):
    """The standard output of a command, and the last line that it leaves in a terminal."""
    file = Terminal()
    result = mmalign(*args, stderr=file)
    assert result.returncode == 0, result.stderr
    return result.stdout, CODES.sub("", result.stderr.rpartition("\r")[2])


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (("sample", "a red circle", "a cross", "--seeds", "0,1", "--batch", "3", "--out"), "sampling  B  4/4  images"),
        (("sample", "a red circle", "--seeds", "0,1", "--best", "clip.cosine", "--out"), "sampling  B  2/2  images"),
        (("score", "assets/pictures", "--rewards", "shapes", "--html"), "scoring  B  (\\d+)/\\1  images"),
        (("evaluate", "--prompts", "PROMPTS", "--rewards", "image_stats", "--out"), "sampling  B  4/4  images"),
        (("refine", "a red circle", "a cross", "--rounds", "1", "--out"), "refining  B  2/2  prompts"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_commands_show_what_they_do_on_standard_error_alone(monkeypatch, prompt_files, tmp_path, command, line):
    command = [prompt_files["held_out"] if word == "PROMPTS" else word for word in command]
    with drawing(monkeypatch):
        more = ["--out", tmp_path / "scores.jsonl"] if command[0] == "score" else ["--steps", "2"]
        stdout, last = shown_by(*command, tmp_path / "out", *more, "--json")
    json.loads(stdout)
    assert re.match(line.replace("B", "\u2501+") + r"  (saving|\d+ s elapsed)", last)


# ----------------------------------------------------------------------------------------------------------- real runs

TRAIN = """
import sys
import time
from rich.console import Console
from mmalign import policy, run
from mmalign.config import load as configs
from mmalign.reporting import progress
from reward_models import load

class Slow:
    def __init__(self):
        self.scorer = load("jpeg_size")
        self.names, self.card = self.scorer.names, self.scorer.card

    def __call__(self, images, prompts):
        time.sleep(0.3)
        return self.scorer(images, prompts)

policy.quiet()
progress.WRITTEN, progress.DRAWN = 0.1, 0.05
log, config, out = sys.argv[1:]
with open(log, "w") as file:
    run.train(configs.load(config, []), console=Console(file=file), scorers={"jpeg_size": Slow()})
run.train(configs.load(config, ["out=" + out]), scorers={"jpeg_size": Slow()})
"""


@pytest.fixture(scope="module")
def real_runs(random_model, prompt_files, tmp_path_factory):
    """What two runs of four iterations write, one into a file and one into a terminal of 40 columns."""
    folder = tmp_path_factory.mktemp("real")
    settings = dict(
        model=random_model, prompts=prompt_files["train"], held_out=prompt_files["held_out"], plan="ode",
        objective="nft", rewards={"jpeg_size.kilobytes": 1.0}, out=str(folder / "logged"), iterations=4, seeds=2,
        prompts_per_iteration=2, steps=2, lora_rank=2, eval_seeds=2, eval_steps=2, eval_every=2,
    )  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    arguments = [str(folder / name) for name in ("log", "config.yaml", "shown")]
    process, terminal = pty.fork()
    if process == 0:
        environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        os.execvpe(sys.executable, [sys.executable, "-c", TRAIN, *arguments], environment | {"TERM": "xterm"})
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    written = b""
    with suppress(OSError):  # the process has ended
        while more := os.read(terminal, 65536):
            written += more
    os.close(terminal)
    assert os.waitpid(process, 0)[1] == 0, written.decode()
    return (folder / "log").read_text(), written.decode()


def test_the_log_of_a_run_has_lines_now_and_then(real_runs):
    log = real_runs[0]
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", log)
    lines = [line for line in log.splitlines() if line.endswith((" left", " elapsed"))]
    training = [line for line in lines if line.startswith("training ")]
    score, phase, left = r"(, reward -?\d+\.\d{3}, \d+ NFE/s)?", r"(, [\w :/]+)?", r"(, (over )?\d+ s left)?"
    form = rf"training \d/4 iterations{score}{phase}, \d+ s elapsed{left}"
    assert [line for line in training if not re.fullmatch(form, line)] == []
    done = [int(line[9]) for line in training]
    assert {0, 2, 4} <= {*done}
    assert done == sorted(done)
    assert all(("reward" in line) == (n > 0) for line, n in zip(training, done, strict=True))
    assert not any(" left" in line for line, n in zip(training, done, strict=True) if n == 0)
    assert any(" left" in line for line in training)
    assert any(", evaluating: scoring 4 images by jpeg_size, " in line for line in training)


def test_a_run_fits_into_a_narrow_terminal(real_runs):
    text = real_runs[1]
    assert text.rindex(SHOWN) > text.rindex(HIDDEN)
    *drawings, last = (CODES.sub("", part).split("\r\n") for part in text.split("\r\x1b[2K")[1:])
    frames = [*(lines[-1] for lines in drawings), last[0]]  # messages, which stand above a frame, may be longer
    assert max(map(cell_len, frames)) <= 40
    assert any(re.fullmatch(r"[1-3]/4  .* s left.*", frame) for frame in frames)
    assert any("  scoring" in frame for frame in frames)
    assert re.match(r"training  .*4/4  reward -?\d", frames[-1])
