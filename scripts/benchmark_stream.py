"""The memory and time of scoring a long stream, killed and continued, by one process and by several.

    python scripts/benchmark_stream.py --count 1000000

Tars of tiny pictures with captions are made in a temporary folder and scored by a scorer that takes no time. The first
scoring is not interrupted, and reports its resident memory at a tenth of the images and at all. Then, for each number
of processes, the same is scored again and all processes are killed (SIGKILL) at a third and at two thirds; the command
that continues reports how long it takes to its first new block. The files must be equal to the first, byte by byte.
"""

import hashlib
import io
import json
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image

WORKER = """
import json, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from reward_models import Card, Scores
from reward_models.tools.score_parts import Processes, score_stream

class Level:
    names, card = ("mean",), Card("level", sees_prompt=False)
    def __call__(self, images, prompts):
        return Scores(self.names, images.mean((1, 2, 3))[:, None])

def memory():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

source, out, rank, size, tenth = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
begin, noted = time.time(), {}
def shown(count):
    if not noted:
        noted["first"] = time.time() - begin
    if count >= tenth and "tenth" not in noted:
        noted["tenth"] = memory()
    noted["last"] = memory()
# the processes need not meet: the folder is there before the others start
result = score_stream(source, {"level": Level()}, out, batch=64, shown=shown, processes=Processes(rank, size))
print(json.dumps(noted | {"seconds": time.time() - begin, "scored": result.scored, "end": memory()}))
"""


def shards(folder: Path, count: int, each: int = 100_000) -> None:
    """Tars of pictures of 8 x 8 pixels, all different, each with a caption."""
    folder.mkdir()
    for first in range(0, count, each):
        with tarfile.TarFile(folder / f"{first // each:04d}.tar", "w") as archive:
            for i in range(first, min(first + each, count)):
                pixels = np.full((8, 8, 3), (i % 256, i // 256 % 256, i // 65536), np.uint8)
                file = io.BytesIO()
                Image.fromarray(pixels).save(file, "BMP")
                for ending, data in (("bmp", file.getvalue()), ("txt", f"picture {i}".encode())):
                    member = tarfile.TarInfo(f"{i:08d}.{ending}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))


def start(source: Path, out: Path, size: int, count: int) -> list[subprocess.Popen]:
    workers, made = [], out.with_name(f"{out.name}.parts") / "settings.json"
    for rank in range(size):
        arguments = [source, out, rank, size, count // 10]
        command = [sys.executable, "-c", WORKER, *map(str, arguments)]
        workers.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        while not made.exists():
            time.sleep(0.05)
    return workers


def digest(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def uninterrupted(source: Path, out: Path, count: int) -> dict:
    """Score by one process; its memory in bytes at a tenth of the images and at all."""
    [worker] = start(source, out, 1, count)
    noted = json.loads(worker.communicate()[0])
    with out.open("rb") as rows:
        return {"count": count, "rows": sum(1 for _ in rows), "memory": noted["last"] / noted["tenth"]} | noted


def interrupted(source: Path, out: Path, whole: Path, size: int, count: int) -> dict:
    """Score by `size` processes that are killed twice; whether the file is that of `whole`."""
    parts, killed = out.with_name(f"{out.name}.parts"), []
    for share in (1 / 3, 2 / 3):
        workers = start(source, out, size, count)
        while (blocks := sum(path.suffix == ".jsonl" for path in parts.iterdir())) * 64 < share * count:
            time.sleep(0.5)
        for worker in workers:
            worker.send_signal(signal.SIGKILL)
        for worker in workers:
            worker.communicate()
        killed.append(blocks)
    workers = start(source, out, size, count)
    noted = [json.loads(worker.communicate()[0]) for worker in workers]
    same = digest(out) == digest(whole)
    return {"processes": size, "killed_after_blocks": killed, "same_bytes": same, "continued": noted}


def main(
    count: Annotated[int, typer.Option(help="images")] = 1_000_000,
    processes: Annotated[str, typer.Option(help="numbers of processes")] = "1,3",
    place: Annotated[Path | None, typer.Option(help="folder for the temporary files: 3 KB an image")] = None,
) -> None:
    with tempfile.TemporaryDirectory(dir=place) as folder:
        source, whole = Path(folder) / "shards", Path(folder) / "whole.jsonl"
        shards(source, count)
        print(json.dumps(uninterrupted(source, whole, count)), flush=True)
        for size in map(int, processes.split(",")):
            result = interrupted(source, Path(folder) / f"{size}.jsonl", whole, size, count)
            print(json.dumps(result), flush=True)
            if not result["same_bytes"]:
                raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
