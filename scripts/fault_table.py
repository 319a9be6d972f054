"""Provoke each fault in a run of a few thousand random weights, resume the run, and write the outcomes as a table.

    OMP_NUM_THREADS=1 python scripts/fault_table.py docs/faults.md

Each run is the command line in a forked process, with the fault injected before the fourth of six iterations; then
it is resumed without the fault. The bits of adapter, average and optimiser, and all records except their times, are
compared with an uninterrupted run.
"""

import json
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from kill_and_resume import outcome
from rich.console import Console

from mmalign import policy as policies, run as runs
from mmalign.cli import app as cli, output
from mmalign.config import yaml12
from mmalign.policy.sd3 import SD3Policy
from mmalign.runs import checkpoint, jsonl
from reward_models import Scores, files
from reward_models.scorers import jpeg_size
from reward_models.weights import fingerprint

sys.path.append(str(Path(__file__).parents[1] / "tests/support"))
from services import Faulty
from tiny_pipelines import sd3

AT = 3  # iterations done when the fault comes; the last checkpoint is of iteration 2
TEXTS = ["a red circle", "a blue square", "two green crosses", "a circle above a square", "a cross", "a triangle"]
SETTINGS = dict(
    rewards={"jpeg_size.kilobytes": 1.0}, iterations=6, prompts_per_iteration=2, seeds=2, steps=4,
    plan={"type": "branch", "steps": [0, 1], "children": 2}, lora_rank=2, eval_seeds=1, eval_steps=2, eval_every=0,
    checkpoint_every=2,
)  # fmt: skip
Plant = Callable[[], None]  # what is done in the process before it begins


@dataclass(frozen=True)
class Place:
    """A folder for one fault, with a config for its run, and the result of an uninterrupted run."""

    folder: Path
    settings: dict

    @property
    def out(self) -> Path:
        return self.folder / "run"

    def mmalign(self, *options: str, plant: Plant | None = None, **changed) -> tuple[int, str]:
        """The exit code of `mmalign train` and the last line it printed."""
        child = self.begin(*options, plant=plant, **changed)
        return self.ended(child)

    def begin(self, *options: str, plant: Plant | None = None, **changed) -> int:
        """The number of a process that trains."""
        config = self.folder / "config.yaml"
        files.write(config, yaml12.written(self.settings | {"out": str(self.out)} | changed))
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            for stream, name in ((1, "output"), (2, "errors")):
                os.dup2(os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), stream)
            output.console = Console(file=sys.stdout)
            if plant:
                plant()
            sys.argv = ["mmalign", "train", str(config), *options]
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def ended(self, child: int) -> tuple[int, str]:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output, errors = (files.lines(files.text(self.folder / name)) for name in ("output", "errors"))
        refusals = [line for line in errors if line.startswith("mmalign: ")]
        last = refusals or [line for line in output if line.strip() and code >= 0]
        line = "".join(last[-1:]).removeprefix("mmalign: ")
        return code, line.replace(str(self.out), "OUT").replace(str(self.folder), "")

    def expected(self, **changed) -> dict:
        """The result of the run without a fault."""
        whole = Place(self.folder / "whole", self.settings)
        whole.folder.mkdir()
        code, line = whole.mmalign(**changed)
        if code:
            raise RuntimeError(f"the run without a fault ended with {code}: {line}")
        return outcome(whole.out)


def before(iteration: int, act: Plant, always: bool = False) -> Plant:
    """Act when that many iterations are done."""

    def plant() -> None:
        iterate = runs.iterate

        def planted(run, done, *rest):
            if done == iteration or (always and done > iteration):
                act()
            return iterate(run, done, *rest)

        runs.iterate = planted

    return plant


def spoil(method: str, how: Callable) -> Plant:
    """From then on the policy's `method` returns `how(its result, its arguments)`."""

    def act() -> None:
        whole = getattr(SD3Policy, method)
        setattr(SD3Policy, method, lambda self, *args: how(whole(self, *args), *args))

    return before(AT, act)


def same(result: dict, expected: dict) -> str:
    different = [name for name in expected if result.get(name) != expected[name]]
    return f"other {', '.join(different)}" if different else "all equal"


Cells = tuple[str, str, str]  # end of the run, loss, afterwards


def ended(code: int, line: str) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}" + (f": {line or 'silent'}" if code else "")


def resumed(place: Place, plant: Plant, mend: Plant = lambda: None, expected: dict | None = None, **changed) -> Cells:
    """The run with the fault, and resumed without it."""
    expected = expected or place.expected(**changed)
    code, line = place.mmalign(plant=plant, **changed)
    missing = lost(place.out)
    mend()
    if code == 0:
        return ended(code, line), "nothing", "finished: " + same(outcome(place.out), expected)
    again, last = place.mmalign("--resume", **changed)
    if again:
        return ended(code, line), missing, "resumed: " + ended(again, last)
    return ended(code, line), missing, "resumed: " + same(outcome(place.out), expected)


def lost(out: Path) -> str:
    """The work since the last checkpoint of a run that has just ended; after a signal that it handles, nothing."""
    done, saved = len(jsonl.rows(out / "metrics.jsonl")), int(checkpoint.latest(out / "checkpoints").name)
    if done == saved:
        return "nothing"
    return f"finished iterations: {done - saved}" + (" and the one under way" if done == AT else "")


def apart(one: Path, other: Path) -> float:
    """The greatest difference between the last adapters of two runs."""
    a, b = (checkpoint.read(checkpoint.latest(out / "checkpoints"))[0]["adapter"] for out in (one, other))
    return max(float((a[name] - b[name]).abs().max()) for name in a)


# ---------------------------------------------------------------------------------------------------------- the faults


def service(place: Place, broken: Callable, max_failed: float = 0.2, **remote) -> Cells:
    """A reward service whose replies come from `broken` once a file exists."""
    server, sign = Faulty(), place.folder / "broken"

    def answer(sent: dict) -> dict:
        return server.answer(sent) | {"scores": [{"clip.cosine": len(image) / 1e4} for image in sent["images"]]}

    def well(sent: dict):
        return 200, {}, json.dumps(answer(sent)).encode()

    server.reply = lambda sent: broken(sent, answer(sent)) if sign.exists() else well(sent)
    settings = {"url": server.url, "retries": 0, "timeout": 1, "rest": 0} | remote
    changed = dict(rewards={"remote.clip.cosine": 1.0}, scorers={"remote": settings}, max_failed=max_failed)
    try:
        return resumed(place, before(AT, sign.touch), partial(sign.unlink, missing_ok=True), **changed)
    finally:
        server.close()


def late(sent: dict, answer: dict):
    time.sleep(2)
    return 200, {}, json.dumps(answer).encode()


def one_missing(sent: dict, answer: dict):
    answer["scores"][0], answer["failures"][0] = {"clip.cosine": None}, {"clip": "too dark to see"}
    return 200, {}, json.dumps(answer).encode()


def one_failed(place: Place) -> Cells:
    """The failed images are counted."""
    how, _, _ = service(place, one_missing, 0.5, batch=100)  # of two held-out images half fail
    metrics = jsonl.rows(place.out / "metrics.jsonl")
    failed, images = sum(row["failed"] for row in metrics), sum(row["rewards"] for row in metrics)
    return how, f"the scores of {failed} of {images} images", "finished"


def full_disk(place: Place) -> Cells:
    def fill() -> None:
        save = checkpoint.save

        def limited(*args):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
            return save(*args)

        checkpoint.save = limited

    return resumed(place, before(AT, fill))


def unwritable(place: Place) -> Cells:
    """As a user other than root, for whom no file is read-only."""
    place.out.mkdir()
    place.out.chmod(0o555)

    def nobody() -> None:
        if os.geteuid() == 0:
            os.setuid(65534)

    code, line = place.mmalign(plant=nobody)
    place.out.chmod(0o755)
    again, last = place.mmalign()
    return ended(code, line), "nothing", f"writable again: {ended(again, last)}"


def short_of_memory(rows: int, place: Place) -> Cells:
    """A network that takes at most `rows` while it is trained."""

    def act() -> None:
        network = SD3Policy.network

        def small(self, x, t, cond):
            if torch.is_grad_enabled() and len(x) > rows:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return network(self, x, t, cond)

        SD3Policy.network = small

    expected = place.expected()
    cells = resumed(place, before(AT, act), expected=expected)
    last = jsonl.rows(place.out / "metrics.jsonl")[-1]
    if "fit/micro_batch" not in last:
        return cells
    off = apart(place.out, place.folder / "whole/run")
    return *cells[:2], f"finished with micro_batch {last['fit/micro_batch']}: adapter off by at most {off:.1g}"


def spoilt_weights(place: Place) -> Cells:
    def plant() -> None:
        iterate = runs.iterate

        def planted(run, done, *rest):
            if done == AT:
                run.policy.parameters()[0].data.view(-1)[0] = torch.nan
            return iterate(run, done, *rest)

        runs.iterate = planted

    return resumed(place, plant)


def of_first_prompt(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return torch.where((index == 0)[:, None, None, None], x * torch.nan, x)


def sampling(v, x, t, cond, index):
    return v if torch.is_grad_enabled() else of_first_prompt(v, index)


def learning(v, x, t, cond, index):
    return of_first_prompt(v, index) if torch.is_grad_enabled() else v


def left_out(place: Place) -> Cells:
    """One step of six is left out; the adapter is that of the iteration before."""

    def plant() -> None:
        iterate, velocity = runs.iterate, SD3Policy.velocity

        def planted(run, done, *rest):
            SD3Policy.velocity = velocity
            if done == AT:
                SD3Policy.velocity = lambda self, *args: learning(velocity(self, *args), *args)
            return iterate(run, done, *rest)

        runs.iterate = planted

    code, line = place.mmalign(plant=plant, max_skips=1, checkpoint_every=1, keep_checkpoints=9)
    around = [checkpoint.read(place.out / f"checkpoints/{i:06d}")[0] for i in (AT, AT + 1)]
    one, two = ({kind: fingerprint(part) for kind, part in tensors.items()} for tensors in around)
    skipped = sum(row["skipped"] for row in jsonl.rows(place.out / "metrics.jsonl"))
    return ended(code, line), f"{skipped} step", f"finished; adapter, average and optimiser around it: {same(one, two)}"


def infinite_scores(place: Place) -> Cells:
    def act() -> None:
        call = jpeg_size.JpegSize.__call__

        def infinite(self, images, prompts):
            scores = call(self, images, prompts)
            return Scores(scores.names, scores.values * torch.inf)

        jpeg_size.JpegSize.__call__ = infinite

    return resumed(place, before(AT, act))


def signalled(number: int, place: Place) -> Cells:
    return resumed(place, before(AT, lambda: os.kill(os.getpid(), number)))


@dataclass(frozen=True)
class Pair:
    """One run by two processes that gloo joins, as a launcher would start them; `place` is theirs."""

    place: Place

    @property
    def out(self) -> Path:
        return self.place.out

    def mmalign(self, *options: str, killed: int | None = None) -> list[tuple[int, str]]:
        """The exit code and the last line of each, of which one may be `killed` before the fourth iteration."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])

        def join(rank: int) -> None:
            world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update(world | {"RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""})
            if rank == killed:
                before(AT, lambda: os.kill(os.getpid(), signal.SIGKILL))()

        sides = [Place(self.place.folder / f"rank {rank}", self.place.settings) for rank in range(2)]
        for side in sides:
            side.folder.mkdir(parents=True, exist_ok=True)
        begun = [side.begin(*options, plant=partial(join, rank), out=str(self.out)) for rank, side in enumerate(sides)]
        return [side.ended(child) for side, child in zip(sides, begun, strict=True)]


def one_of_two(killed: int, place: Place) -> Cells:
    """Without a launcher, which would end the other at once. It is compared with an uninterrupted run of two;
    one process adds up in another order."""
    place.settings["patience"] = 5.0
    pair, whole = Pair(place), Pair(Place(place.folder / "whole", place.settings))
    if any(code for code, _ in whole.mmalign()):
        raise RuntimeError("the run without a fault failed")
    how = pair.mmalign(killed=killed)[1 - killed]
    missing, copy = lost(place.out), shutil.copytree(place.out, place.folder / "copy")
    code, line = max(pair.mmalign("--resume"), key=lambda end: abs(end[0]))
    two = same(outcome(place.out), outcome(whole.out)) if code == 0 else ended(code, line)
    shutil.rmtree(place.out)
    shutil.copytree(copy, place.out)
    code, line = place.mmalign("--resume")
    one = f"adapter off by at most {apart(place.out, whole.out):.1g}" if code == 0 else ended(code, line)
    return f"the other: {ended(*how)}", missing, f"resumed by two: {two}; by one: {one}"


def clock(place: Place) -> Cells:
    """The wall clock loses an hour whenever it is read."""

    def act() -> None:
        now = [time.time()]

        def backwards() -> float:
            now[0] -= 3600
            return now[0]

        time.time = backwards

    return resumed(place, act)


def damaged(how: Callable[[bytes], bytes], places: slice, place: Place) -> Cells:
    """Checkpoints of a finished run."""
    expected = place.expected()
    place.mmalign()
    for path in checkpoint.numbered(place.out / "checkpoints")[places]:
        file = path / "adapter.safetensors"
        file.write_bytes(how(file.read_bytes()))
    whole = checkpoint.latest(place.out / "checkpoints", lambda line: None)
    code, line = place.mmalign("--resume")
    lost = f"{SETTINGS['iterations'] - int(whole.name)} iterations, made again" if whole else "all"
    return ended(code, line), lost, same(outcome(place.out), expected) if code == 0 else "nothing is written"


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def two_runs(place: Place) -> Cells:
    """The second one starts while the first is in its fourth iteration."""
    expected, sign = place.expected(), place.folder / "second is done"

    def wait() -> None:
        (place.folder / "first is there").touch()
        while not sign.exists():
            time.sleep(0.01)

    first = place.begin(plant=before(AT, wait))
    while not (place.folder / "first is there").exists():
        time.sleep(0.01)
    second = Place(place.folder / "second", place.settings)
    second.folder.mkdir()
    code, line = second.mmalign(out=str(place.out))
    sign.touch()
    first_code, _ = place.ended(first)
    line = line.replace(str(place.out), "OUT").replace(str(first), "PID").replace(os.uname().nodename, "HOST")
    return ended(code, line), "nothing", f"the first: exit code {first_code}, {same(outcome(place.out), expected)}"


FAULTS: dict[str, Callable[[Place], Cells]] = {
    "reward service gone": partial(service, broken=lambda sent, answer: None),
    "reward service later than its timeout": partial(service, broken=late),
    "reward service answers with garbage": partial(service, broken=lambda *_: (200, {}, b"<html>busy</html>")),
    "reward service fails one image of each request, with max_failed 0.5": one_failed,
    "disk full": full_disk,
    "folder not writable": unwritable,
    "no memory for more than 3 rows of learning": partial(short_of_memory, 3),
    "no memory for one row": partial(short_of_memory, 0),
    "NaN in the weights": spoilt_weights,
    "NaN in latents of one prompt": lambda place: resumed(place, spoil("velocity", sampling)),
    "NaN in decoded images": lambda place: resumed(place, spoil("decode", lambda images, x: images * torch.nan)),
    "infinite scores": infinite_scores,
    "NaN in the loss of one prompt": lambda place: resumed(place, spoil("velocity", learning)),
    "the same, with max_skips 1": left_out,
    "SIGTERM": partial(signalled, signal.SIGTERM),
    "SIGKILL": partial(signalled, signal.SIGKILL),
    "clock going backwards": clock,
    "last checkpoint cut": partial(damaged, lambda data: data[: len(data) // 2], slice(-1, None)),
    "a bit of the last checkpoint flipped": partial(damaged, flipped, slice(-1, None)),
    "a bit of every checkpoint flipped": partial(damaged, flipped, slice(None)),
    "a second run in the folder": two_runs,
    "SIGKILL of one rank of two": partial(one_of_two, 1),
    "the same, of the first": partial(one_of_two, 0),
}
HEAD = """# Faults

Made by `OMP_NUM_THREADS=1 python scripts/fault_table.py docs/faults.md`: each fault is provoked in a run of six
iterations on a random model, before the fourth, with a checkpoint every two; then the run is resumed without it. *All
equal*: adapter, average and optimiser to the bit, and all records except their times, compared with an uninterrupted
run. OUT is the run's folder.

| fault | end of the run | loss | afterwards |
|---|---|---|---|
"""


def main(
    file: Annotated[Path, typer.Argument(help="Markdown file to write")],
    only: Annotated[str, typer.Option(help="faults whose name has this in it")] = "",
) -> None:
    torch.set_num_threads(1)
    policies.quiet()
    lines = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        torch.manual_seed(0)
        sd3(root / "model")
        for side, texts in (("train", TEXTS[:4]), ("held_out", TEXTS[4:])):
            files.write(root / f"{side}.txt", "\n".join(texts))
        given = {
            "model": str(root / "model"), "prompts": str(root / "train.txt"), "held_out": str(root / "held_out.txt"),
        }  # fmt: skip
        for fault, provoke in FAULTS.items():
            if only in fault:
                place = Place(root / str(len(lines)), SETTINGS | given)
                place.folder.mkdir()
                try:
                    cells = provoke(place)
                except Exception:
                    print(*(files.text(path)[-3000:] for path in place.folder.rglob("errors")), file=sys.stderr)
                    raise
                lines.append(f"| {fault} | {' | '.join(cell.replace('|', '/') for cell in cells)} |")
                print(lines[-1], flush=True)
                shutil.rmtree(place.folder)
    if not only:
        files.write(file, HEAD + "\n".join(lines) + "\n")


if __name__ == "__main__":
    typer.run(main)
