"""Implicit rewards on the embedded model: where in an image they are, and when in a trajectory.

    OMP_NUM_THREADS=1 python scripts/implicit_reward.py places --seed 0
    OMP_NUM_THREADS=1 python scripts/implicit_reward.py steps --seed 0

`places` draws pictures of the shapes world, plants a patch of speckle in half of them, at one of 16 places, and trains
an adapter on the outcome alone, clean or not (`objective: outcome`). In new pictures with a patch the map's lowest
cells, as many as the patch has, are compared with the cells of the patch (intersection over union), and so is the
lowest of the 16 blocks; the whole reward orders clean and spoilt pictures.

`steps` trains an adapter (`credit: implicit`) and a value head (`credit: value`) on the outcomes of the same
trajectories, without training the policy. On prompts that they were not trained on, the partial sums of the adapter's
rewards order siblings before each step, and so do the value head on the features of the state, and the shapes verifier
and CLIP on the clean latent that it predicts. The order of the finished images by the verifier is what all are compared
with: the share of pairs of siblings with unequal rewards, ties half.
"""

import time
from typing import Annotated

import numpy as np
import torch
import typer
from jaxtyping import Float, Int
from torch import Tensor

from mmalign import policy as policies
from mmalign.config import load as configs
from mmalign.config.paths import locate
from mmalign.data import prompts as prompt_files
from mmalign.distributed.gather import gather
from mmalign.learn.update import update
from mmalign.objectives.objective import Finished
from mmalign.objectives.outcome import Outcome, reward_map
from mmalign.seeds import seed_of
from mmalign.training.rollout import judged, sample_and_score
from mmalign.training.setup import open_session
from reward_models import load, shapes_world

PIXELS, CELLS = 8, 2  # sides of a patch: in pixels, in latent cells
app = typer.Typer(help=__doc__)
Seed = Annotated[int, typer.Option(help="of pictures, noises and adapters")]


def pictures(count: int, seed: int) -> tuple[list[str], Float[Tensor, "N 3 H W"], Int[Tensor, "N"]]:
    """Captions and pictures; `place` is the number of the patch of speckle, -1 in every second picture."""
    rng = np.random.default_rng(seed)
    wants = shapes_world.requests()
    chosen = [wants[i] for i in rng.integers(len(wants), size=count)]
    images = np.stack([shapes_world.draw(each, rng) for each in chosen])
    wide = images.shape[-1] // PIXELS
    place = np.where(np.arange(count) % 2 == 0, -1, rng.integers(wide * wide, size=count))
    for image, where in zip(images, place, strict=True):
        if where >= 0:
            y, x = (PIXELS * part for part in divmod(where, wide))
            patch = image[:, y : y + PIXELS, x : x + PIXELS]
            patch[:] = np.clip(patch + rng.normal(0, 0.2, patch.shape), 0, 1)
    return [shapes_world.caption(each) for each in chosen], torch.from_numpy(images), torch.from_numpy(place)


@app.command()
def places(
    seed: Seed = 0,
    train: Annotated[int, typer.Option(help="pictures to train on")] = 512,
    test: Annotated[int, typer.Option(help="new pictures")] = 128,
    updates: Annotated[int, typer.Option(help="optimiser steps, of 64 pictures each")] = 200,
    scale: float = 10.0,
    rate: float = 1e-3,
    draws: Annotated[int, typer.Option(help="noises and times of a map")] = 16,
) -> None:
    """Where an image is spoilt, from labels of whole images."""
    policy = opened()
    policy.attach_lora(16, 32.0, None, seed_of(seed, "adapter"))
    objective = Outcome(draws=1, scale=scale, label="reward")
    texts, images, place = pictures(train, seed)
    x, cond = policy.encode_images(images), policy.encode(texts)
    optimizer, start = torch.optim.AdamW(policy.parameters(), lr=rate, weight_decay=0.0), time.process_time()
    for number in range(updates):
        optimizer.param_groups[0]["lr"] = rate * (1 - number / updates)
        generator = torch.Generator().manual_seed(seed_of(seed, "update", number))
        rows = torch.randperm(train, generator=generator)[:64]
        batch = objective.examples(policy, Finished(x[rows], rows, (place[rows] < 0).float()), generator)
        statistics = update(
            policy.parameters(), optimizer, batch, lambda part: objective.replay(policy, cond, part), epochs=1,
            minibatches=1, micro_batch=lambda work: work(64), max_grad_norm=1.0, generator=generator,
        )  # fmt: skip
    seconds = time.process_time() - start

    texts, images, place = pictures(test, seed + 1000)
    generator, index = torch.Generator().manual_seed(seed), torch.arange(test)
    maps = reward_map(policy, policy.encode(texts), policy.encode_images(images), index, draws, generator, scale)
    spoilt = place >= 0
    truth = torch.stack([cells(int(where), maps.shape[-1]) for where in place[spoilt]]).flatten(1)
    lowest = maps[spoilt].flatten(1).topk(CELLS * CELLS, largest=False).indices
    guess = torch.zeros_like(truth).scatter(1, lowest, True)
    overlap = (guess & truth).sum(1) / (guess | truth).sum(1)
    blocks = torch.nn.functional.avg_pool2d(maps[:, None], CELLS).flatten(1)
    hit = (blocks[spoilt].argmin(1) == place[spoilt]).float()
    order = agreement(maps.mean((1, 2)), (~spoilt).float(), torch.zeros_like(place))
    print(f"seed {seed}: {updates} updates on {train} pictures, {seconds:.0f} s of one core; {statistics}\n")
    print("| new pictures | intersection over union | above 0.5 | lowest block is the patch | order of the images |")
    print("|---|---|---|---|---|")
    print(
        f"| {test} | {float(overlap.mean()):.3f} | {float((overlap > 0.5).float().mean()):.3f} | "
        f"{float(hit.mean()):.3f} | {order:.3f} |"
    )


def cells(place: int, wide: int) -> Tensor:
    """The latent cells of a patch."""
    y, x = (CELLS * part for part in divmod(place, wide // CELLS))
    mask = torch.zeros(wide, wide, dtype=torch.bool)
    mask[y : y + CELLS, x : x + CELLS] = True
    return mask


@app.command()
def steps(
    seed: Seed = 0,
    iterations: int = 40,
    scale: float = 100.0,
    rate: float = 1e-3,
    updates: Annotated[int, typer.Option(help="optimiser steps an iteration of the adapter")] = 1,
    form: str = "outcome",
    file: Annotated[str, typer.Option(help="prompts to measure on")] = "assets/prompts/test.jsonl",
    prompts: Annotated[int, typer.Option(help="how many of them")] = 31,
) -> None:
    """When in a trajectory it is decided."""
    implicit = {"type": "implicit", "scale": scale, "rate": rate, "updates": updates, "form": form}
    settings = {
        "plan": "sde", "kernel": {"type": "ddim", "noise": 1.0}, "steps": 6, "prompts_per_iteration": 8, "seeds": 12,
        "credit": [implicit, {"type": "value"}], "seed": seed, "iterations": iterations, "held_out": None,
        "rewards": {"shapes.partial": 1.0},
    }  # fmt: skip
    policies.quiet()
    run = open_session(configs.build(settings, "implicit_reward"))
    start = time.process_time()
    for number in range(iterations):
        chosen = run.prompts(number)
        rollout = sample_and_score(run, chosen, number)
        local = judged(run, rollout, number)
        _, verdict = gather(run.ranks, rollout.tree, local)
        run.values.judge(rollout.tree, verdict, rollout.paths.features, number)
        _, statistics = run.step_rewards(run, rollout, local, verdict, number)
        if (number + 1) % 10 == 0:
            print(f"iteration {number + 1}: {statistics}", flush=True)
    print(f"seed {seed}: {iterations} iterations, {time.process_time() - start:.0f} s of one core\n")

    held_out = prompt_files.read(locate(file))
    held_out = held_out[:: max(1, len(held_out) // prompts)][:prompts]
    rollout = sample_and_score(run, held_out, iterations)
    tree, reward = rollout.tree, judged(run, rollout, 0).reward[:, -1]
    learnt = run.step_rewards
    process = learnt.of(run, rollout, learnt.steps(run, rollout)).mean((2, 3))
    scorers = {"shapes.partial": (load("shapes"), 1), "clip.cosine": (load("clip"), 0)}
    pairs = sum(len(unequal(reward[tree.prompt == p])[0]) for p in tree.prompt.unique())
    print(f"{len(held_out)} prompts, {len(reward)} trajectories, {pairs} pairs\n")
    print("| state before step | time | implicit, sum | implicit, last | value head | "
          + " | ".join(f"{name}, one step" for name in scorers) + " |")  # fmt: skip
    print("|---|---|---|---|---|---|---|")
    wanted = [held_out[i] for i in tree.prompt.tolist()]
    for k in range(tree.steps + 1):
        x, t = rollout.paths.x[:, k], tree.t[:, k]
        if k < tree.steps:
            with torch.no_grad(), run.policy.reference():
                v = torch.cat([run.policy.velocity(x[i], t[i], rollout.cond, tree.prompt[i])
                               for i in torch.arange(len(x)).split(128)])  # fmt: skip
            x = x - t[:, None, None, None] * v
        images = run.policy.decode(x)
        values = [process[:, :k].sum(1), process[:, max(k - 1, 0)] * (k > 0)]
        values += [run.values.head.value(rollout.paths.features[:, k], t) if k < tree.steps else None]
        values += [scorer(images, wanted).values[:, column] for scorer, column in scorers.values()]
        row = " | ".join("" if v is None else f"{agreement(v, reward, tree.prompt):.3f}" for v in values)
        print(f"| {k} | {float(t[0]):.2f} | {row} |", flush=True)


def agreement(value: Float[Tensor, "N"], reward: Float[Tensor, "N"], group: Int[Tensor, "N"]) -> float:
    """The share of pairs of a group with unequal rewards that the value orders in the same way; a tie counts half."""
    right, count = 0.0, 0
    for g in group.unique():
        rows = (group == g).nonzero()[:, 0]
        better, worse = unequal(reward[rows])
        difference = value[rows][better] - value[rows][worse]
        right += float((difference > 0).sum() + 0.5 * (difference == 0).sum())
        count += len(difference)
    return right / max(1, count)


def unequal(reward: Float[Tensor, "n"]) -> tuple[Tensor, Tensor]:
    """The pairs of unequal rewards: rows of the better and of the worse."""
    return (reward[:, None] > reward[None, :]).nonzero(as_tuple=True)


def opened():
    policies.quiet()
    return policies.load(locate("assets/tiny_sd3"), dtype="float32", device="cpu", guidance=1.0)


if __name__ == "__main__":
    torch.set_flush_denormal(True)
    app()
