"""Ways to spend forwards on better images without training, on held-out prompts of the embedded world.

    OMP_NUM_THREADS=1 python scripts/compare_refine.py

Every way begins from the same first image of a prompt and seed. "best of N" draws all N; the others stop at an image
with nothing to blame. `strict` is the verifier's, of the image that is kept; forwards and judgements are per prompt.
"""

from dataclasses import replace
from statistics import mean

import torch
import typer

from mmalign import policy as policies
from mmalign.config.paths import locate
from mmalign.data import prompts as prompt_files
from mmalign.evaluation.best_of_n import best_of, expected_best
from mmalign.refine.loop import Refinement, Settings, refine
from reward_models import load

NEVER = 2.0  # no image is this good
WAYS = {
    "first image": Settings(images=1),
    "best of 2": Settings(moves=("seed",), images=2, good=NEVER),
    "best of 4": Settings(moves=("seed",), images=4, good=NEVER),
    "best of 4, stops": Settings(moves=("seed",)),
    "request": Settings(moves=("request", "seed")),
    "region: redraw what is blamed": Settings(moves=("region", "seed")),
    "region: keep what is right": Settings(moves=("keep", "seed")),
    "request + region": Settings(moves=("request", "keep", "seed")),
    "request + cut": Settings(moves=("request", "seed", "cut")),
    "request + guidance": Settings(moves=("request", "seed", "guidance")),
    "request, up to 16 images": Settings(moves=("request", "seed"), images=16),
}
PRUNED = ((None, None), (2, 3), (2, 5), (2, 7), (4, 5))
SEVERAL = ("two_objects", "position", "color_attr", "counting")


def strict(stories: list[Refinement]) -> list[float]:
    return [float(own.rounds[own.best].scores["overall"] == 1) for own in stories]


def main(prompts: int = 200, seeds: int = 3, steps: int = 10) -> None:
    torch.set_flush_denormal(True)
    policies.quiet()
    policy = policies.load(locate("assets/tiny_sd3"), dtype="float32", device="cpu", guidance=1.0)
    every = prompt_files.read(locate("assets/prompts/held_out.jsonl"))
    chosen = [every[round(i)] for i in torch.linspace(0, len(every) - 1, prompts).tolist()]
    several = [i for i, own in enumerate(chosen) if own.wants["tag"] in SEVERAL]
    critic = load("shapes_critic")
    print(f"{len(chosen)} prompts, {len(several)} of them with several objects, {seeds} seeds, {steps} steps\n")
    print("| way | strict (each seed) | several objects | forwards | judgements | better first images lost |")
    print("|---|---|---|---|---|---|")
    for name, settings in WAYS.items():
        runs = [refine(policy, critic, chosen, replace(settings, seed=s, steps=steps), 256) for s in range(seeds)]
        scores = [strict(own) for own in runs]
        stories = [own for run in runs for own in run]
        lost = sum(own.rounds[own.best].scores["overall"] < own.rounds[0].scores["overall"] for own in stories)
        seen = ", ".join(f"{mean(own):.3f}" for own in scores)
        whole = mean(map(mean, scores))
        hard = mean(own[i] for own in scores for i in several)
        forwards, images = mean(own.forwards for own in stories), mean(len(own.rounds) for own in stories)
        print(
            f"| {name} | {whole:.3f} ({seen}) | {hard:.3f} | {forwards:.1f} | {images:.2f} | {lost} |",
            flush=True,
        )
    print("\n| best of 8 seeds | strict | mean score | forwards | judgements |")
    print("|---|---|---|---|---|")
    for kept, after in PRUNED:
        found = best_of(policy, chosen, [[*range(8)]] * len(chosen), steps, critic, "overall", 256, kept, after)
        name = f"{kept} go on after step {after}" if kept else "all drawn to the end"
        share = float((found.score == 1).float().mean())
        cost = found.forwards / len(chosen), found.judgements / len(chosen)
        print(f"| {name} | {share:.3f} | {float(found.score.mean()):.3f} | {cost[0]:.0f} | {cost[1]:.0f} |", flush=True)
        if kept is None:
            each = [expected_best((own == 1).float()) for own in found.scores]
            line = ", ".join(f"{mean(column):.3f}" for column in zip(*each, strict=True))
    print(f"\nexpected strict of the best of k = 1..8: {line}")


if __name__ == "__main__":
    typer.run(main)
