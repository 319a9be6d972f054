"""Kill a run with SIGKILL at random moments, resume it until it is finished, compare with an uninterrupted run.

    OMP_NUM_THREADS=1 python scripts/kill_and_resume.py configs/quickstart.yaml --kills 50 iterations=12 cooldown=0 \
        eval_every=4 checkpoint_every=2 prompts_per_iteration=2 eval_prompts=4 eval_seeds=1

Every second kill waits for a checkpoint that is being written. The children are forked after all imports: they are
separate processes, and start in a fraction of a second. Exit code 1 if a finished run differs in a bit of its adapter,
average or optimiser, or in a number of its record that is not a time.
"""

import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import torch
import typer

from mmalign import policy as policies, run as runs
from mmalign.config import load as configs
from mmalign.config.schema import Config
from mmalign.runs import checkpoint, folder, jsonl
from reward_models import files
from reward_models.weights import fingerprint


def start(c: Config, log: Path) -> int:
    """A process that trains or resumes; its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with log.open("ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        runs.train(c, resume=Path(c.out, "config.yaml").exists())
        code = 0
    finally:
        sys.stdout.flush()
        os._exit(code)


def kill(child: int, after: float, saves: Path | None, rng: random.Random) -> bool:
    """Kill a process `after` seconds or, given the folder of its checkpoints, while it writes one. False where it ended
    by itself before; RuntimeError where it failed."""
    moment = time.monotonic() + after
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if saves is None and time.monotonic() >= moment:
            os.kill(child, signal.SIGKILL)
        elif saves is not None and any(saves.glob(".*.partial")):
            time.sleep(rng.uniform(0, 0.005))
            os.kill(child, signal.SIGKILL)
        time.sleep(0.0005)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError(f"the run failed with exit code {os.WEXITSTATUS(status)}")
    return os.WIFSIGNALED(status)


def outcome(out: Path) -> dict:
    """Hashes of all that is in the last checkpoint, and the record without its times."""
    tensors, state = checkpoint.read(checkpoint.latest(out / "checkpoints"))
    timeless = {
        name: [
            {k: v for k, v in row.items() if not k.startswith(("seconds", "nfe_per_second"))}
            for row in jsonl.rows(out / name)
        ]
        for name in folder.RECORDS
    }
    return {name: fingerprint(part) for name, part in tensors.items()} | {"iteration": state["iteration"]} | timeless


def main(
    config: Annotated[Path, typer.Argument(help="YAML file")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value")] = None,
    kills: Annotated[int, typer.Option(min=1)] = 50,
    seed: Annotated[int, typer.Option(help="of the moments")] = 0,
) -> None:
    torch.set_num_threads(1)
    policies.quiet()
    c, rng, counts = configs.load(config, overrides or []), random.Random(seed), Counter()
    with tempfile.TemporaryDirectory() as place:
        out, log, began = Path(place, "cut"), Path(place, "log"), time.monotonic()
        whole = c.model_copy(update={"out": str(Path(place, "whole"))})
        try:
            kill(start(whole, log), math.inf, None, rng)
            seconds, expected = time.monotonic() - began, outcome(Path(whole.out))
            while counts["kills"] < kills or not counts["runs"]:
                wanted, child = counts["kills"] < kills, start(c.model_copy(update={"out": str(out)}), log)
                saves = out / "checkpoints" if wanted and counts["kills"] % 2 else None
                if kill(child, rng.uniform(0, seconds) if wanted else math.inf, saves, rng):
                    counts["kills"] += 1
                    counts["half-written checkpoints left"] += any((out / "checkpoints").glob(".*.partial"))
                    continue
                result = outcome(out)
                different = [name for name in expected if result.get(name) != expected[name]]
                if different:
                    raise RuntimeError(f"after {counts['kills']} kills these differ: {', '.join(different)}")
                counts["runs"] += 1
                shutil.rmtree(out)
        except RuntimeError as error:
            print(files.text(log)[-3000:], error, sep="\n", file=sys.stderr)
            raise typer.Exit(1) from None
    print(f"{dict(counts)}: all finished runs equal the uninterrupted one, adapter {expected['adapter']}")


if __name__ == "__main__":
    typer.run(main)
