"""Compare methods that improve images without training, on held-out prompts of an embedded world.

    OMP_NUM_THREADS=1 python scripts/compare_refine.py
    OMP_NUM_THREADS=1 python scripts/compare_refine.py --world things

All methods start from the same first image of a prompt and seed. "best of N" generates all N; the others stop at an
image without faults. `strict` is the verifier's, of the best image; forwards and judgements are per prompt.
"""

from dataclasses import replace
from statistics import mean

import torch
import typer
from compare_credits import Captions, Named
from tiny_worlds import SHAPES, world_of

from mmalign import policy as policies
from mmalign.config.paths import locate
from mmalign.evaluation.best_of_n import best_of, expected_best
from mmalign.refinement.loop import Refinement, Settings, refine
from reward_models import load

NEVER = 2.0  # no image is this good
WAYS = {
    "first image": Settings(images=1),
    "best of 2": Settings(moves=("seed",), images=2, good=NEVER),
    "best of 4": Settings(moves=("seed",), images=4, good=NEVER),
    "best of 4, stops": Settings(moves=("seed",)),
    "request": Settings(moves=("request", "seed")),
    "region: inpaint what is wrong": Settings(moves=("region", "seed")),
    "region: preserve what is right": Settings(moves=("keep", "seed")),
    "request + region": Settings(moves=("request", "keep", "seed")),
    "request + cut": Settings(moves=("request", "seed", "cut")),
    "request + guidance": Settings(moves=("request", "seed", "guidance")),
    "request, up to 16 images": Settings(moves=("request", "seed"), images=16),
}
PRUNED = ((None, None), (2, 3), (2, 5), (2, 7), (4, 5))
SEVERAL = ("two_objects", "position", "color_attr", "counting")


def strict(refinements: list[Refinement]) -> list[float]:
    return [float(one.rounds[one.best].scores["overall"] == 1) for one in refinements]


def main(
    prompts: int = 200, seeds: int = 3, steps: int = 10, name: Named = SHAPES.name, captions: Captions = "test"
) -> None:
    torch.set_flush_denormal(True)
    policies.quiet()
    world = world_of(name)
    dtype = "bfloat16" if world.half else "float32"
    policy = policies.load(locate(f"assets/{world.model}"), dtype=dtype, device="cpu", guidance=1.0)
    every = world.held_out(captions)
    chosen = [every[round(i)] for i in torch.linspace(0, len(every) - 1, prompts).tolist()]
    several = [i for i, prompt in enumerate(chosen) if prompt.wants["tag"] in SEVERAL]
    critic = load(f"{world.name}_critic")
    print(f"{len(chosen)} prompts, {len(several)} of them with several objects, {seeds} seeds, {steps} steps\n")
    print("| method | strict (each seed) | several objects | forwards | judgements | better first images lost |")
    print("|---|---|---|---|---|---|")
    for way, settings in WAYS.items():
        runs = [refine(policy, critic, chosen, replace(settings, seed=s, steps=steps), 256) for s in range(seeds)]
        scores = [strict(run) for run in runs]
        refinements = [one for run in runs for one in run]
        lost = sum(s.rounds[s.best].scores["overall"] < s.rounds[0].scores["overall"] for s in refinements)
        each = ", ".join(f"{mean(seed):.3f}" for seed in scores)
        overall = mean(map(mean, scores))
        hard = mean(seed[i] for seed in scores for i in several)
        forwards, images = mean(s.forwards for s in refinements), mean(len(s.rounds) for s in refinements)
        print(
            f"| {way} | {overall:.3f} ({each}) | {hard:.3f} | {forwards:.1f} | {images:.2f} | {lost} |",
            flush=True,
        )
    print("\n| best of 8 seeds | strict | mean score | forwards | judgements |")
    print("|---|---|---|---|---|")
    for survivors, after in PRUNED:
        best = best_of(policy, chosen, [[*range(8)]] * len(chosen), steps, critic, "overall", 256, survivors, after)
        way = f"{survivors} continue after step {after}" if survivors else "all completed"
        share = float((best.score == 1).float().mean())
        cost = best.forwards / len(chosen), best.judgements / len(chosen)
        print(f"| {way} | {share:.3f} | {float(best.score.mean()):.3f} | {cost[0]:.0f} | {cost[1]:.0f} |", flush=True)
        if survivors is None:
            curves = [expected_best((scores == 1).float()) for scores in best.scores]
            line = ", ".join(f"{mean(column):.3f}" for column in zip(*curves, strict=True))
    print(f"\nexpected strict of the best of k = 1..8: {line}")


if __name__ == "__main__":
    typer.run(main)
