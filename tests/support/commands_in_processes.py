"""Commands by several processes at once: how they are started, and as a script one rank of them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def launch(folder: Path, size: int, commands: list[list[str]]) -> list[list[tuple[int, str]]]:
    """Run the commands one after another in `size` processes; the exit code and standard output of each, by rank."""
    (folder / "commands.json").write_text(json.dumps(commands))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests/support")]), "WORLD_SIZE": str(size)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    started = []
    for rank in range(size):
        environment = os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "MMALIGN_ALLOW": "ranked"}
        with (folder / f"err-{rank}").open("w") as err:
            command = [sys.executable, __file__, str(folder), str(rank)]
            started.append(subprocess.Popen(command, stderr=err, env=environment))
    try:
        for process in started:
            process.wait(timeout=600)
    finally:
        for process in started:
            process.kill()
    return [json.loads((folder / f"ended-{rank}").read_text()) for rank in range(size)]


def main(folder: Path, rank: str) -> None:
    import torch
    from command_line import mmalign

    torch.set_num_threads(1)
    results = []
    for command in json.loads((folder / "commands.json").read_text()):
        result = mmalign(*command)
        sys.stderr.write(result.stderr)
        results.append((result.returncode, result.stdout))
    (folder / f"ended-{rank}").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
