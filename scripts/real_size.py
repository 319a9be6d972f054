"""Train a model of real size for two iterations on a machine without a GPU: time, and memory beside the estimate's.

    OMP_NUM_THREADS=1 python scripts/real_size.py                        # all methods, resumed where it stopped
    OMP_NUM_THREADS=1 python scripts/real_size.py --method nft --work /tmp/real_size

The model is Stable Diffusion 3.5 Medium without T5: transformer, autoencoder and both CLIP text encoders have their
real sizes, from the configs in `assets/architectures`, and random weights in bfloat16. Speed and memory do not depend
on the values of weights. It is written once (about 6 GB); then each method trains in a process of its own, at 256 x
256 pixels and four steps, on two images, with LoRA of rank 32. A table of Markdown is printed:

- seconds: processor time of an iteration, the mean of two;
- network: the time that the bare transformer takes for the same forwards, and forwards with backward, over that;
- GiB: the most memory of the process, above what it had after its imports;
- estimated: the total of `mmalign estimate`, with the images and texts in main memory.
"""

import json
import resource
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import torch
import typer
from benchmark import bare
from transformers import CLIPTokenizer

from mmalign import policy as policies, train as trainer
from mmalign.checks import estimate
from mmalign.config import load as configs
from mmalign.config.paths import locate
from mmalign.config.schema import Config
from mmalign.policy import meta
from mmalign.training import setup
from reward_models import files

MODEL = "stabilityai/stable-diffusion-3.5-medium"
ENCODERS = ("text_encoder", "text_encoder_2")
ITERATIONS, GIB = 2, 2**30
BASE = {
    "prompts": "assets/prompts/train.jsonl", "held_out": None, "rewards": {"clip.cosine": 1.0}, "size": [256, 256],
    "steps": 4, "seeds": 2, "prompts_per_iteration": 1, "precision": "bfloat16", "batch": 2, "micro_batch": 1,
    "decode_batch": 1, "lora_rank": 32, "lora_alpha": 64, "iterations": ITERATIONS, "eval_every": 0,
}  # fmt: skip
METHODS = {
    "terminal": {"plan": "sde", "credit": "terminal"},
    "dense": {"plan": "sde", "credit": {"type": "gain", "completion": 1}},
    "branch": {"plan": {"type": "branch", "steps": [0], "children": 2}, "credit": "branch", "seeds": 1},
    "nft": {"plan": "ode", "objective": "nft"},
}


def config(method: str, model: Path) -> Config:
    return configs.build(BASE | METHODS[method] | {"model": str(model), "out": str(model / "run")}, method)


def build(model: Path, architecture: str = MODEL) -> None:
    """Write the pipeline with random weights. It appears under its name when it is complete."""
    policy = meta.load(estimate.folder(architecture), dtype="bfloat16")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        for name in ("transformer", "vae"):
            part = getattr(policy.pipe, name)
            policy.pipe.register_modules(**{name: type(part).from_config(part.config)})
        for name in ENCODERS:
            part = getattr(policy.pipe, name)
            policy.pipe.register_modules(**{name: type(part)(part.config)})
    finally:
        torch.set_default_dtype(torch.float32)
    length = policy.pipe.text_encoder.config.max_position_embeddings
    tokenizer = CLIPTokenizer.from_pretrained(locate("assets/tiny_sd3/tokenizer"), model_max_length=length)
    policy.pipe.register_modules(text_encoder_3=None, tokenizer_3=None, tokenizer=tokenizer, tokenizer_2=tokenizer)
    partial = model.with_suffix(".partial")
    policy.pipe.save_pretrained(partial)
    partial.replace(model)


def resident() -> int:
    """The most bytes that this process has had in memory."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(method: str, model: Path) -> dict[str, float | str]:
    """The figures of a method, in this process."""
    policies.quiet()
    torch.set_flush_denormal(True)
    before = resident()
    run = setup.open_session(config(method, model))
    start, rows = time.process_time(), [trainer.iterate(run, i) for i in range(ITERATIONS)]
    seconds, most = time.process_time() - start, resident() - before
    cond = run.policy.encode(["a"])
    forward, learning = (bare(run.policy, cond, size, learn, 1) for size, learn in ((BASE["batch"], False), (1, True)))
    network = sum(row["forwards"] * forward + row["replay_forwards"] * learning for row in rows)
    counts = {name: rows[-1][name] for name in ("forwards", "replay_forwards", "decodes")}
    return {"method": method, "seconds": seconds / ITERATIONS, "network": network / seconds, "GiB": most / GIB} | counts


def estimated(method: str, model: Path) -> float:
    """GiB by `mmalign estimate`, which does not load the weights."""
    memory = estimate.estimate(config(method, model))["memory"]
    return (memory["device"]["total"] + sum(memory["main"].values())) / GIB


def table(rows: list[dict]) -> str:
    lines = [
        "| method | forwards, replayed, images | seconds | network | GiB | estimated |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        counts = ", ".join(f"{row[name]:.0f}" for name in ("forwards", "replay_forwards", "decodes"))
        figures = f"{row['seconds']:.0f} | {row['network']:.2f} | {row['GiB']:.2f} | {row['estimated']:.2f}"
        lines.append(f"| {row['method']} | {counts} | {figures} |")
    return "\n".join(lines)


def main(
    method: Annotated[str | None, typer.Option(help="one method, in this process; all by default")] = None,
    work: Annotated[Path, typer.Option(help="where the model and the results are kept")] = Path("runs/real_size"),
) -> None:
    model = work / "model"
    work.mkdir(parents=True, exist_ok=True)
    if not model.exists():  # in another process: the peak of one counts for those that it starts
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            pool.submit(build, model).result()
    if method is not None:
        row = measure(method, model)
        row["estimated"] = estimated(method, model)
        files.write(work / f"{method}.json", json.dumps(row))
        return
    for name in METHODS:
        if not (work / f"{name}.json").exists():
            subprocess.run([sys.executable, __file__, "--method", name, "--work", str(work)], check=True)
    print(table([json.loads(files.text(work / f"{name}.json")) for name in METHODS]))


if __name__ == "__main__":
    typer.run(main)
