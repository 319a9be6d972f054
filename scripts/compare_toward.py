"""Compare guidance toward `clip` with the best of two images by `clip`, on the embedded model.

    OMP_NUM_THREADS=1 python scripts/compare_toward.py --prompts assets/prompts/validation.jsonl --grid
    OMP_NUM_THREADS=1 python scripts/compare_toward.py --push 0.05 --since 0.9

An image of each caption from one seed (the best of two: from two), 6 ODE steps, no classifier-free guidance. Seconds
are of processor time for one image, scoring for the choice included, scoring for the table not. The interval is that of
the mean rise of `shapes.strict` over the plain ODE.
"""

import time
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from torch import Tensor

from mmalign import policy as policies
from mmalign.config.paths import locate
from mmalign.data import prompts as prompt_files
from mmalign.evaluation.best_of_n import best_of
from mmalign.evaluation.comparison import rises
from mmalign.evaluation.evaluate import noise_seed
from mmalign.evaluation.generate import generate
from mmalign.evaluation.toward import Term, Toward
from reward_models import load
from reward_models.meaning import clusters

GRID = [(push, since) for since in (0.6, 0.9) for push in (0.05, 0.1, 0.2)]
BATCH = 32


def main(
    prompts: str = "assets/prompts/test.jsonl",
    push: float = 0.05,
    since: Annotated[float, typer.Option(help="time from which images are guided")] = 0.9,
    grid: Annotated[bool, typer.Option("--grid", help="try several pushes and times instead")] = False,
    steps: int = 6,
) -> None:
    torch.set_flush_denormal(True)
    policies.quiet()
    policy = policies.load(locate("assets/tiny_sd3"), dtype="float32", device="cpu", guidance=1.0)
    wanted = prompt_files.read(locate(prompts))
    clip, shapes, group = load("clip"), load("shapes"), clusters(prompt.text for prompt in wanted)
    seeds = [[noise_seed(prompt, member) for member in range(2)] for prompt in wanted]
    first = [pair[:1] for pair in seeds]

    def plain() -> Tensor:
        return generate(policy, wanted, first, steps, BATCH)[0]

    def best() -> Tensor:
        return best_of(policy, wanted, seeds, steps, clip, "cosine", BATCH).images

    def guided(push: float, since: float) -> Callable[[], Tensor]:
        toward = Toward((Term(clip),), push, since, BATCH)
        return lambda: generate(policy, wanted, first, steps, BATCH, toward=toward)[0]

    ways = {"plain ODE": plain, "best of 2 by clip": best}
    ways |= {f"push {p:g} from {s:g}": guided(p, s) for p, s in (GRID if grid else [(push, since)])}
    print(f"{len(wanted)} captions of {prompts}, {steps} steps, times {policy.times(steps).tolist()}\n")
    print("| images | clip.cosine | strict | rise of strict | 95 % | forwards | decodes | seconds an image |")
    print("|---|---|---|---|---|---|---|---|")
    before = None
    for name, draw in ways.items():
        policy.counts.clear()
        start = time.process_time()
        images = draw()
        seconds = (time.process_time() - start) / len(wanted)
        parts = {"clip": clip(images, wanted).values[:, 0], "strict": shapes(images, wanted).values[:, 0]}
        before = before or parts
        rows = rises(before, parts, group)
        rise = rows["strict"]
        counts = [policy.counts[key] / len(wanted) for key in ("forwards", "decodes")]
        print(
            f"| {name} | {rows['clip']['after']:.3f} | {rise['after']:.3f} | {rise['rise']:+.3f} | "
            f"{rise['low']:+.3f} to {rise['high']:+.3f} | {counts[0]:g} | {counts[1]:g} | {seconds:.4f} |",
            flush=True,
        )


if __name__ == "__main__":
    typer.run(main)
