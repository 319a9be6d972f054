"""What a value head knows of images on the way, on the embedded model: by step, against a look at the predicted image.

    OMP_NUM_THREADS=1 python scripts/value_head.py --iterations 40 --out runs/value_head.json

The embedded model draws SDE trajectories of training captions, and the head of `credit: value` learns from them as in a
run; the adapter is not trained. Then trajectories of held-out captions are judged at every state: by the
head, and by the image that the velocity points at, which is decoded and scored by `shapes` and `clip.cosine`.

- explained: 1 - sum (R - u)^2 / sum R^2, of R and u the differences from their means over the caption's images; of a
  predicted image u is its score times the slope that fits best;
- pairs: how often the one of two images of a caption that is judged higher has the higher reward, ties counted half.
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from jaxtyping import Float
from torch import Tensor

from mmalign.config import load as configs
from mmalign.config.paths import locate
from mmalign.credit.groups import group_mean
from mmalign.data import prompts as prompt_files
from mmalign.rewards.judge import score
from mmalign.training import setup
from mmalign.training.rollout import Rollout, judged, rolled_out, sample_and_score
from mmalign.training.session import Session
from reward_models import Prompt, files

SETTINGS = [
    "objective=grpo",
    "plan=sde",
    "credit=value",
    "steps=8",
    "prompts_per_iteration=8",
    "seeds=12",
    "held_out=null",
    "out=unused",
]


def opened(*settings: str) -> Session:
    return setup.open_session(configs.load("configs/tiny_branch.yaml", [*SETTINGS, "watch=[clip]", *settings]))


def learn(run: Session, iterations: int) -> None:
    """Fit the head to trajectories of so many iterations."""
    for iteration in range(iterations):
        rollout = sample_and_score(run, run.prompts(iteration), iteration, whole=True)
        _, row = run.values.judge(rollout.tree, judged(run, rollout, iteration), rollout.paths.features, iteration)
        if (iteration + 1) % 10 == 0:
            print(iteration + 1, [round(row[f"value/explained/{k}"], 3) for k in range(run.config.steps)], flush=True)


def held_out(run: Session, prompts: list[Prompt], seeds: int) -> Rollout:
    """Trajectories of these captions, whose noises no iteration has drawn."""
    cond = run.policy.encode([p.text for p in prompts])
    return rolled_out(run, prompts, cond, -1, torch.arange(seeds).repeat(len(prompts), 1), whole=True)


def looks(run: Session, rollout: Rollout, k: int) -> dict[str, Float[Tensor, "N"]]:
    """The scores of the image that the velocity at state k points at, decoded; `shapes` as in the reward."""
    x, t, index = rollout.paths.x[:, k], rollout.tree.t[:, k], rollout.tree.prompt
    with torch.no_grad():
        v = torch.cat(
            [run.policy.velocity(x[i], t[i], rollout.cond, index[i]) for i in torch.arange(len(x)).split(128)]
        )
        images = torch.cat([run.policy.decode(part) for part in (x - t[:, None, None, None] * v).split(32)])
    parts = score(images, [rollout.prompts[p] for p in index.tolist()], run.rewards.scorers).parts
    return {"shapes": (parts["shapes.strict"] + parts["shapes.partial"]) / 2, "clip.cosine": parts["clip.cosine"]}


def explained(u: Float[Tensor, "N"], reward: Float[Tensor, "N"], fit: bool) -> float:
    u = u.double()
    slope = float((u * reward).sum() / (u * u).sum().clamp(min=1e-12)) if fit else 1.0
    return float(1 - (reward - slope * u).square().sum() / reward.square().sum())


def pairs(u: Float[Tensor, "N"], reward: Float[Tensor, "N"], group: Tensor) -> float:
    one, two = torch.triu_indices(len(u), len(u), 1)
    apart = (group[one] == group[two]) & (reward[one] != reward[two])
    agree = (u[one] - u[two]).sign() * (reward[one] - reward[two]).sign()
    return float((agree[apart] + 1).mean() / 2)


def main(
    iterations: Annotated[
        int, typer.Option(help="iterations of 8 captions and 12 seeds that the head learns from")
    ] = 40,
    prompts: Annotated[Path, typer.Option(help="captions that it is measured on")] = Path("assets/prompts/test.jsonl"),
    every: Annotated[int, typer.Option(help="of these, each n-th")] = 4,
    seeds: Annotated[int, typer.Option(help="trajectories of a held-out caption")] = 8,
    seed: Annotated[int, typer.Option(help="of the run")] = 0,
    out: Annotated[Path | None, typer.Option(help="a file for the figures")] = None,
) -> None:
    run = opened(f"seed={seed}")
    learn(run, iterations)
    rollout = held_out(run, prompt_files.read(locate(str(prompts)))[::every], seeds)
    tree, reward = rollout.tree, judged(run, rollout, 0).reward[:, -1].double()
    reward = reward - group_mean(reward, tree.prompt)
    rows = []
    for k in range(run.config.steps):
        t = tree.t[:, k]
        judges = {"head": run.values.head.value(rollout.paths.features[:, k], t)} | looks(run, rollout, k)
        row = {"step": k, "t": float(t[0])}
        for name, u in judges.items():
            row[f"{name}, explained"] = explained(u - group_mean(u, tree.prompt), reward, fit=name != "head")
            row[f"{name}, pairs"] = pairs(u, reward, tree.prompt)
        rows.append(row)
        print(json.dumps({key: round(value, 3) for key, value in row.items()}), flush=True)
    print(f"{len(rollout.prompts)} captions, {len(reward)} trajectories, seed {seed}")
    if out is not None:
        files.replace(out, (json.dumps(rows, indent=1) + "\n").encode())


if __name__ == "__main__":
    typer.run(main)
