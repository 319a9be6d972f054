"""The share of signal in a batch's gradient, for each credit, on the embedded model before training.

    OMP_NUM_THREADS=1 python scripts/gradient_agreement.py

The cosine c between the gradients of independent batches is the share of a gradient's squared length that is signal.
Averaging n batches raises signal over noise, c / (1 - c), by n: divided by a batch's processor seconds it is the rate
at which a method gathers signal, whatever its batch size. Variants and their batches are those of compare_credits.py
and, with `--also` for other layers, of compare_regions.py:

    python scripts/gradient_agreement.py --only "scalar;region" --also lora_targets=[attn.to_q,attn.to_k,attn.to_v]
"""

import time
from itertools import combinations
from typing import Annotated

import torch
import typer
from compare_credits import BASE, METHODS
from compare_regions import VARIANTS as REGIONS

from mmalign import policy as policies, train as trainer
from mmalign.config import load as configs
from mmalign.training import setup

VARIANTS = METHODS | REGIONS


def gradients(overrides: list[str], batches: int) -> tuple[list[torch.Tensor], float]:
    """The adapter's gradient on each of `batches` disjoint batches, and the mean seconds of one."""
    still = [*overrides, "learning_rate=1e-12", "warmup=0", "cooldown=0", "held_out=null", "watch=[]", "out=runs/none"]
    run = setup.open_session(configs.load(BASE, still))
    flat, start = [], time.process_time()
    for i in range(batches):
        trainer.iterate(run, i)
        flat.append(torch.cat([p.grad.flatten() for p in run.policy.parameters()]))
    return flat, (time.process_time() - start) / batches


def agreement(flat: list[torch.Tensor]) -> tuple[float, float]:
    """The mean cosine of two batches, and its standard error by the jackknife over batches, because pairs that share a
    batch are not independent."""

    def mean(batches: list[torch.Tensor]) -> float:
        pairs = [float(torch.cosine_similarity(a, b, dim=0)) for a, b in combinations(batches, 2)]
        return sum(pairs) / len(pairs)

    left_out, count = [mean(flat[:i] + flat[i + 1 :]) for i in range(len(flat))], len(flat)
    middle = sum(left_out) / count
    return mean(flat), ((count - 1) / count * sum((value - middle) ** 2 for value in left_out)) ** 0.5


def main(
    batches: int = 8,
    only: Annotated[str, typer.Option(help="variants, separated by semicolons")] = "",
    also: Annotated[str, typer.Option(help="overrides for all of them")] = "",
) -> None:
    torch.set_flush_denormal(True)
    policies.quiet()
    print("| credit | seconds a batch | cosine of two batches (s.e.) | signal over noise per minute |")
    print("|---|---|---|---|")
    for name in only.split(";") if only else VARIANTS:
        flat, seconds = gradients([*VARIANTS[name].split(), *also.split()], batches)
        cosine, error = agreement(flat)
        print(
            f"| {name} | {seconds:.2f} | {cosine:.3f} ({error:.3f}) | {60 * cosine / (1 - cosine) / seconds:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    typer.run(main)
