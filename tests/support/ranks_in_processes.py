"""What a process of many does in the tests, and how they are started.

As a script, one rank: trains each config of a JSON file, keeps what was learnt, runs whole runs, and keeps how they
ended.
"""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]


def learn(settings: dict) -> dict[str, torch.Tensor]:
    """Advantages, gradients, the numbers of each iteration, and the adapter at the end."""
    from mmalign import train
    from mmalign.config import load as configs
    from mmalign.objectives.advantage import Advantage
    from mmalign.training.setup import open_session

    run, tensors, credit = open_session(configs.build(settings, "test")), {}, Advantage.__call__

    def recorded(*args):
        tensors[f"advantage/{len(tensors)}"] = advantage = credit(*args)
        return advantage

    def step(optimizer, *_):
        grads = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        tensors[f"gradient/{len(tensors)}"] = torch.cat([torch.empty(0), *grads])  # DeepSpeed leaves none where it was

    Advantage.__call__ = recorded
    run.learner.optimizer.register_step_pre_hook(step)
    try:
        for i in range(run.config.iterations):
            row = train.iterate(run, i)
            row = {key: value for key, value in row.items() if "second" not in key}
            tensors |= {f"row/{i}/{key}": torch.tensor([float(value)]) for key, value in row.items()}
    finally:
        Advantage.__call__ = credit
    for name, matrices in (("adapter", run.policy.adapter()), ("ema", run.learner.ema)):
        tensors |= {f"{name}/{key}": value for key, value in matrices.items()}
    return {key: value.contiguous() for key, value in tensors.items()}


def ending(settings: dict, resume: bool) -> list:
    """How a whole run ends, and after how many seconds."""
    from mmalign import run as runs
    from mmalign.config import load as configs

    began = time.monotonic()
    try:
        runs.train(configs.build(settings, "test"), resume)
        how = "done"
    except Exception as error:
        how = f"{type(error).__name__}: {error}"
    return [how, time.monotonic() - began]


def launch(
    folder: Path, size: int, learnt: dict[str, dict], runs: dict[str, tuple[dict, bool]], seconds: float = 3000, **env
):
    """The same jobs by `size` processes: what each config of `learnt` gave, how each of `runs` ended by rank, and what
    each rank printed and exited with."""
    (folder / "jobs.json").write_text(json.dumps([learnt, runs]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests/support"), os.environ.get("PYTHONPATH", "")])
    common = {"PYTHONPATH": path, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | env
    started = []
    for rank in range(size):
        environment = os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with (folder / f"out-{rank}").open("w") as out, (folder / f"err-{rank}").open("w") as err:
            command = [sys.executable, __file__, str(folder)]
            started.append(subprocess.Popen(command, stdout=out, stderr=err, env=environment))
    try:
        codes = [process.wait(timeout=seconds) for process in started]
    finally:
        for process in started:
            process.kill()
    results = {f.stem: load_file(f) for f in folder.glob("*.safetensors")}
    ended = [{f.stem: json.loads(f.read_text()) for f in folder.glob(f"*.{rank}")} for rank in range(size)]
    return results, ended, [(folder / f"out-{rank}").read_text() for rank in range(size)], codes


def main(folder: Path) -> None:
    from mmalign import policy as policies

    torch.set_num_threads(1)
    policies.quiet()
    rank = int(os.environ["RANK"])
    learnt, runs = json.loads((folder / "jobs.json").read_text())
    for name, settings in learnt.items():
        result = learn(settings)
        if rank == 0:
            save_file(result, folder / f"{name}.safetensors")
    for name, (settings, resume) in runs.items():
        (folder / f"{name}.{rank}").write_text(json.dumps(ending(settings, resume)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
