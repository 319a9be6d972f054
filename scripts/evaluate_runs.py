"""Evaluate the adapters of several training seeds on the test captions, and print a table (Markdown).

    python scripts/evaluate_runs.py runs/seed-0 runs/seed-1 runs/seed-2
    python scripts/evaluate_runs.py runs/things --prompts assets/prompts/things_test.jsonl

Scorers have the settings that the first run's config gives them. The rise is the mean over runs and meanings; its
interval includes the spread between runs and the evaluation's error (`mmalign.evaluation.comparison.over_runs`), and is
`nan` for one run. The runs must be of one base model.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer

from mmalign.config import load as configs
from mmalign.config.paths import locate
from mmalign.data import prompts as prompt_files
from mmalign.errors import BadInput
from mmalign.evaluation.comparison import cluster_means, over_runs
from mmalign.evaluation.evaluate import Evaluation, evaluate
from mmalign.runs.adapters import config_of
from mmalign.runs.inference import load_policy
from reward_models import load
from reward_models.meaning import clusters

Runs = Annotated[list[Path], typer.Argument(help="folders of runs")]


def main(
    runs: Runs,
    prompts: str = "assets/prompts/test.jsonl",
    rewards: Annotated[str, typer.Option(help="scorers; by default what the first run trains on and watches")] = "",
    steps: Annotated[int, typer.Option(help="ODE steps")] = 6,
    seeds: Annotated[int, typer.Option(help="images per prompt")] = 2,
) -> None:
    torch.set_flush_denormal(True)
    tested = prompt_files.read(locate(prompts))
    config = configs.load(config_of(runs[0]))
    names = rewards.split(",") if rewards else dict.fromkeys([*config.trained, *config.watch])
    scorers = {name: load(name, **config.scorers.get(name, {})) for name in names}
    before, after, base = None, [], ""
    for run in runs:
        policy = load_policy(config.model, None, run)
        base = base or policy.fingerprint()
        if policy.fingerprint() != base:
            raise BadInput(f"{run} has another base model than {runs[0]}")
        with policy.reference():
            before = before or evaluate(policy, tested, seeds, steps, scorers, 256)
        after.append(evaluate(policy, tested, seeds, steps, scorers, 256))
    print(f"{len(before.images)} images of {len(tested)} captions a side, {steps} ODE steps\n")
    print("| score | before | after, each run | mean rise | 95 % | p |\n|---|---|---|---|---|---|")
    cluster = clusters(tested[i].text for i in before.prompt.tolist())
    for name in before.parts:
        print(f"| `{name}` | {' | '.join(row(name, before, after, cluster))} |")
    print(f"\ndiversity {before.means()['diversity']:.3f}, after {', '.join(diversity(after))}")


def row(name: str, before: Evaluation, after: list[Evaluation], cluster: torch.Tensor) -> tuple[str, ...]:
    """The cells of one score: means over meanings."""
    first = cluster_means(before.parts[name], cluster)
    last = torch.stack([cluster_means(one.parts[name], cluster) for one in after])
    rise = over_runs(last - first)
    each = ", ".join(f"{float(values.nanmean()):.3f}" for values in last)
    interval = f"{rise.low:+.3f} to {rise.high:+.3f}"
    return f"{float(first.nanmean()):.3f}", each, f"{rise.rise:+.3f}", interval, f"{rise.p:.1g}"


def diversity(evaluations: list[Evaluation]) -> list[str]:
    return [f"{one.means()['diversity']:.3f}" for one in evaluations]


if __name__ == "__main__":
    typer.run(main)
