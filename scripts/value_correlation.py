"""Whether the gains of single steps can say something: how values of neighbouring states correlate, by noise and step.

    OMP_NUM_THREADS=1 python scripts/value_correlation.py --world things

The value of a state is the reward of the image that completes it by ODE (DenseGRPO, arXiv 2601.20218). A gain is the
difference of two values; it is less noisy than the later of them only where the two correlate by more than a half
within a prompt. The model is not trained.
"""

from typing import Annotated

import torch
import typer
from compare_credits import BASE, METHODS, Named, words_of
from jaxtyping import Float, Int
from tiny_worlds import SHAPES, world_of
from torch import Tensor

from mmalign import policy as policies
from mmalign.config import load as configs
from mmalign.credit.gain import values
from mmalign.credit.groups import group_std
from mmalign.selection.scouts import correlation
from mmalign.training import setup
from mmalign.training.rollout import judged, sample_and_score

STILL = ["warmup=0", "cooldown=0", "held_out=null", "watch=[]", "scorers={}", "out=runs/none"]


def rows(
    before: Float[Tensor, "N T"], after: Float[Tensor, "N T"], prompt: Int[Tensor, "N"]
) -> list[tuple[float, float, float]]:
    """For each step, within prompts: the correlation of the two values, and the standard deviations of the gain and of
    the value after."""

    def deviation(x: Float[Tensor, "N"]) -> float:
        return float(group_std(x, prompt).square().mean().sqrt())

    steps = zip(before.unbind(1), after.unbind(1), strict=True)
    return [(correlation(one, two, prompt), deviation(two - one), deviation(two)) for one, two in steps]


def main(
    noises: Annotated[str, typer.Option(help="of flow_sde, separated by commas")] = "0.1,0.3,0.5,0.7,1",
    prompts: int = 24, seeds: int = 8, steps: int = 10, also: Annotated[str, typer.Option(help="overrides")] = "",
    name: Named = SHAPES.name,
) -> None:  # fmt: skip
    torch.set_flush_denormal(True)
    policies.quiet()
    words = [*words_of(world_of(name), f"{METHODS['dense, published']} {also}"), *STILL]
    size = [f"prompts_per_iteration={prompts}", f"seeds={seeds}", f"steps={steps}"]
    print(f"| noise | {' | '.join(f'step {k}' for k in range(steps - 1))} |\n|{'---|' * steps}")
    for noise in noises.split(","):
        run = setup.open_session(configs.load(BASE, [*words, *size, f"kernel.noise={noise}"]))
        rollout = sample_and_score(run, run.prompts(0), 0)
        before, after = values(rollout.tree, judged(run, rollout, 0))
        cells = [f"{r:.2f} ({gain:.2f} of {value:.2f})" for r, gain, value in rows(before, after, rollout.tree.prompt)]
        print(f"| {noise} | {' | '.join(cells[: steps - 1])} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
