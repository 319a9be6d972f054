"""Implicit rewards on the embedded model: where in an image they are, and when in a trajectory.

    OMP_NUM_THREADS=1 python scripts/implicit_reward.py places --seed 0
    OMP_NUM_THREADS=1 python scripts/implicit_reward.py steps --seed 0

`places` draws pictures of the shapes world, half of them bad, and trains an adapter on the outcome alone, good or bad
(`objective: outcome`), without prompts. Each bad picture stands beside the same one without the defect, at the same
noise and time. In new pictures the map's lowest cells, as many as the defect covers, are compared with those of the
defect (intersection over union); and so are the cells where the model without adapter has the largest error, which no
label has taught, and as many by chance. There are two defects:

- `speckle`: a patch of noise of 16 x 16 pixels, on the grid of the network's tokens (8 x 8 pixels) or half a token off;
- `colour`: of two objects one is blue, which has another colour in the good picture: nothing that the model finds odd.

`steps` trains an adapter (`credit: implicit`) and a value head (`credit: value`) on the outcomes of the same
trajectories, without training the policy. On prompts that they were not trained on, the partial sums of the adapter's
rewards order siblings before each step, and so do the value head on the features of the state, and the shapes verifier
and CLIP on the clean latent that it predicts. The order of the finished images by the verifier is what all are compared
with: the share of pairs of siblings with unequal rewards, ties half.
"""

import time
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import torch
import typer
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import avg_pool2d

from mmalign import policy as policies
from mmalign.config import load as configs
from mmalign.config.paths import locate
from mmalign.data import prompts as prompt_files
from mmalign.distributed.gather import gather
from mmalign.learn.update import update
from mmalign.objectives.flow_matching import error, noise_like
from mmalign.objectives.objective import Finished
from mmalign.objectives.outcome import Outcome
from mmalign.seeds import seed_of
from mmalign.training.rollout import judged, sample_and_score
from mmalign.training.setup import open_session
from reward_models import load, shapes_world

CELL, TOKEN, PATCH = 4, 8, 16  # sides in pixels
COLOURS = [c for c in shapes_world.COLOURS if c not in ("blue", "black")]
TIMES = torch.linspace(0.05, 0.75, 8).repeat(2)  # of a map
app = typer.Typer(help=__doc__)
Seed = Annotated[int, typer.Option(help="of pictures, noises and adapters")]


@dataclass(frozen=True)
class Pictures:
    """Pictures, of which every second is bad; the latent cells of its defect, and whether it lies on whole tokens."""

    images: Float[Tensor, "N 3 H W"]
    cells: Bool[Tensor, "N h w"]
    whole: Bool[Tensor, "N"]

    @property
    def bad(self) -> Bool[Tensor, "N"]:
        return self.cells.flatten(1).any(1)


def speckled(count: int, seed: int, twins: bool) -> Pictures:
    """A patch of noise at a multiple of a latent cell; with `twins` each bad picture follows the same one without."""
    rng = np.random.default_rng(seed)
    wants = shapes_world.requests()
    chosen = [wants[i] for i in rng.integers(len(wants), size=count // 2 if twins else count)]
    images = np.stack([shapes_world.draw(each, rng) for each in chosen])
    images = np.repeat(images, 2, 0) if twins else images
    wide = images.shape[-1]
    cells = torch.zeros(count, wide // CELL, wide // CELL, dtype=torch.bool)
    whole = torch.zeros(count, dtype=torch.bool)
    for i in range(1, count, 2):
        y, x = rng.integers((wide - PATCH) // CELL + 1, size=2) * CELL
        patch = images[i, :, y : y + PATCH, x : x + PATCH]
        patch[:] = np.clip(patch + rng.normal(0, 0.2, patch.shape), 0, 1)
        cells[i, y // CELL : (y + PATCH) // CELL, x // CELL : (x + PATCH) // CELL] = True
        whole[i] = bool(y % TOKEN == 0 and x % TOKEN == 0)
    return Pictures(torch.from_numpy(images).float(), cells, whole)


def coloured(count: int, seed: int, twins: bool) -> Pictures:
    """Two objects, one of them blue in bad pictures."""
    rng = np.random.default_rng(seed)
    images = []
    for i in range(count // 2 if twins else count):
        kinds, colours = rng.choice(shapes_world.SHAPES, 2), rng.permutation(COLOURS)[:3]
        same, first = rng.integers(2**31), rng.integers(2)
        for colour in (colours[0], "blue") if twins else ("blue" if i % 2 else colours[0],):
            pair = [colour, colours[1]] if first else [colours[1], colour]
            things = [shapes_world.thing(str(k), str(c)) for k, c in zip(kinds, pair, strict=True)]
            images.append(shapes_world.draw({"tag": "two_objects", "include": things}, np.random.default_rng(same)))
    images = torch.from_numpy(np.stack(images)).float()
    blue = torch.tensor(shapes_world.COLOURS["blue"])[:, None, None]
    share = avg_pool2d(((images - blue).abs().amax(1) < 0.15)[:, None].float(), CELL)[:, 0]
    return Pictures(images, share >= 0.3, torch.zeros(len(images), dtype=torch.bool))


DEFECTS = {"speckle": speckled, "colour": coloured}


@app.command()
def places(
    defect: Annotated[str, typer.Option(help=" or ".join(DEFECTS))] = "speckle",
    seed: Seed = 0,
    train: Annotated[int, typer.Option(help="pictures to train on")] = 512,
    test: Annotated[int, typer.Option(help="new pictures")] = 160,
    updates: Annotated[int, typer.Option(help="optimiser steps, of 64 pictures each")] = 150,
    scale: float = 10.0,
    rate: float = 1e-3,
) -> None:
    """Where an image is bad, from labels of whole images."""
    policy = opened()
    policy.attach_lora(16, 32.0, None, seed_of(seed, "adapter"))
    objective = Outcome(draws=1, scale=scale, label="reward")
    shown = DEFECTS[defect](train, seed, True)
    x, cond = policy.encode_images(shown.images), policy.encode([""] * max(train, test))
    optimizer, start = torch.optim.AdamW(policy.parameters(), lr=rate, weight_decay=0.0), time.process_time()
    for number in range(updates):
        optimizer.param_groups[0]["lr"] = rate * (1 - number / updates)
        generator = torch.Generator().manual_seed(seed_of(seed, "update", number))
        twins = 2 * torch.randperm(train // 2, generator=generator)[:32]
        rows = torch.stack([twins, twins + 1], 1).flatten()
        batch = objective.examples(policy, Finished(x[rows], rows, (~shown.bad[rows]).float()), generator)
        noise, t = (column[::2].repeat_interleave(2, 0) for column in (batch.noise, 0.8 * batch.t))
        update(
            policy.parameters(), optimizer, replace(batch, noise=noise, t=t),
            lambda part: objective.replay(policy, cond, part), epochs=1, minibatches=1,
            micro_batch=lambda work: work(64), max_grad_norm=1.0, generator=generator,
        )  # fmt: skip
    print(f"{defect}, seed {seed}: {updates} updates, {time.process_time() - start:.0f} s of one core\n")

    new = DEFECTS[defect](test, seed + 1000, False)
    base, learnt = errors(policy, policy.encode_images(new.images), cond, seed + 1000)
    bad, truth = new.bad, new.cells[new.bad]
    print("| times | cells by | good before bad | overlap | above 0.5 | on tokens | off tokens |")
    print("|---|---|---|---|---|---|---|")
    for name, chosen in {"all": TIMES < 1, "0.2 to 0.6": (TIMES > 0.2) & (TIMES < 0.6)}.items():
        maps = {"map": (base - learnt)[chosen].mean(0), "error of the model": -base[chosen].mean(0)}
        maps["chance"] = torch.rand(base.shape[1:], generator=torch.Generator().manual_seed(seed))
        for kind, cells in maps.items():
            share, whole = overlap(cells[bad], truth), new.whole[bad]
            order = agreement(cells.mean((1, 2)), (~bad).float(), torch.zeros(test))
            row = (order, share, (share > 0.5).float(), share[whole], share[~whole])
            print(f"| {name} | {kind} | " + " | ".join(f"{float(torch.as_tensor(v).mean()):.3f}" for v in row) + " |")


@torch.no_grad()
def errors(policy, x: Tensor, cond, seed: int) -> tuple[Float[Tensor, "D N h w"], Float[Tensor, "D N h w"]]:
    """The errors of flow matching of the model and of its adapter, at noises that all images share."""
    noise = noise_like(x[:1].expand(len(TIMES), *x.shape[1:]), torch.Generator().manual_seed(seed))
    index, base, learnt = torch.arange(len(x)), [], []
    for one, t in zip(noise, TIMES, strict=True):
        rows = (x, one.expand_as(x), t.expand(len(x)), cond, index)
        with policy.reference():
            base.append(error(policy, *rows))
        learnt.append(error(policy, *rows))
    return torch.stack(base), torch.stack(learnt)


def overlap(maps: Float[Tensor, "N h w"], truth: Bool[Tensor, "N h w"]) -> Float[Tensor, "N"]:
    """The intersection over union of the defect's cells and as many of the lowest."""
    rank = maps.flatten(1).argsort(1).argsort(1).view_as(maps)
    guess = rank < truth.sum((1, 2), keepdim=True)
    return (guess & truth).sum((1, 2)) / (guess | truth).sum((1, 2))


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
        rollout = sample_and_score(run, chosen, number, whole=True)
        local = judged(run, rollout, number)
        _, verdict = gather(run.ranks, rollout.tree, local)
        run.values.judge(rollout.tree, verdict, rollout.paths.features, number)
        _, statistics = run.step_rewards(run, rollout, local, verdict, number)
        if (number + 1) % 10 == 0:
            print(f"iteration {number + 1}: {statistics}", flush=True)
    print(f"seed {seed}: {iterations} iterations, {time.process_time() - start:.0f} s of one core\n")

    held_out = prompt_files.read(locate(file))
    held_out = held_out[:: max(1, len(held_out) // prompts)][:prompts]
    rollout = sample_and_score(run, held_out, iterations, whole=True)
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
