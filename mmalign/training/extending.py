"""Extend a judged rollout: draw the trajectories that an extension wants, judge them, keep those that it accepts."""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mmalign.evaluation.evaluate import deviation
from mmalign.extension.extension import Draws
from mmalign.extension.rest import grafted, rest, taken
from mmalign.flow.sample import sample
from mmalign.policy.protocol import fused
from mmalign.rewards.judge import joined, score
from mmalign.seeds import gaussian, seed_of
from mmalign.training import finite, planning
from mmalign.training.rollout import Rollout, decoded, judged
from mmalign.training.session import Session
from mmalign.types import Judgement, Trajectories

Counts = dict[str, int | float]


def extend(run: Session, rollout: Rollout, judgement: Judgement, iteration: int) -> tuple[Rollout, Judgement, Counts]:
    """A whole rollout with the trajectories that the run's extension adds, its judgement, and the sums of what was
    drawn, kept, and gained by what was kept. Trajectories stay sorted by prompt. Raises NonFinite
    as a rollout does."""
    extension, counts, rounds = run.config.extend, {"drawn": 0, "kept": 0, "rise": 0.0}, 0
    if extension is None:
        return rollout, judgement, counts
    drawn = torch.zeros(len(rollout.prompts), dtype=torch.long)  # of each prompt so far, which numbers its noise
    while extension.rounds is None or rounds < extension.rounds:
        draws = extension(rollout.tree, judgement, requests(rollout))
        if not draws.row:
            break
        row, count = torch.tensor(draws.row), len(rollout.tree.prompt)
        prompt = rollout.tree.prompt[row]
        wider = with_rests(run, rollout, draws, numbers(drawn, prompt), iteration)
        verdict = judged(run, wider, iteration)
        reward, new = verdict.reward[:, -1].tensor_split([count])
        best = torch.stack([reward[rollout.tree.prompt == p].nan_to_num(-torch.inf).max() for p in prompt])
        accepted = extension.accepted(new, reward[row], best)
        rows = torch.cat([torch.ones_like(reward, dtype=torch.bool), accepted]).nonzero()[:, 0]
        rows = rows[wider.tree.prompt[rows].argsort(stable=True)]
        rollout = replace(wider, paths=taken(wider.paths, rows))
        parts = {name: values[rows] for name, values in verdict.parts.items()}
        ends = None if verdict.ends is None else verdict.ends[rows]
        judgement = replace(verdict, reward=verdict.reward[rows], parts=parts, ends=ends)
        counts["drawn"] += len(row)
        counts["kept"] += int(accepted.sum())
        counts["rise"] += float((new - reward[row])[accepted].nansum())
        rounds += 1
    each = deviation(rollout.images[rollout.tree.final[:, -1]], rollout.tree.prompt)
    return replace(rollout, deviation=each), judgement, counts


def numbers(drawn: Int[Tensor, "P"], prompt: Int[Tensor, "n"]) -> list[int]:
    """The number of each draw among its prompt's, which `drawn` counts on."""
    result = []
    for p in prompt.tolist():
        result.append(int(drawn[p]))
        drawn[p] += 1
    return result


def requests(rollout: Rollout) -> list[str]:
    """The revised request that the first critic gives for the image of each trajectory, empty where it has none."""
    given = next(iter(rollout.scored.requests.values()), ("",) * len(rollout.tree.owner))
    return [given[image] for image in rollout.tree.final[:, -1].tolist()]


def with_rests(run: Session, rollout: Rollout, draws: Draws, number: list[int], iteration: int) -> Rollout:
    """The rollout with what was wanted drawn and scored after the rest, all of it."""
    c, policy, paths = run.config, run.policy, rollout.paths
    row, step = torch.tensor(draws.row), torch.tensor(draws.step)
    prompt = paths.tree.prompt[row]

    def noise(start: int, *rest: Any) -> Tensor:
        key = (rollout.prompts[int(prompt[start])].id, number[start])
        return gaussian(policy.latent_shape, seed_of(c.seed, "extend", iteration, *key, *rest))

    with run.clock.of("rollout"):
        cond, index = rollout.cond, prompt
        if draws.request is not None:
            cond, index = policy.encode(draws.request), torch.arange(len(row))
        each = zip(draws.row, draws.step, prompt.tolist(), strict=True)
        plans = [_plan(run, paths, r, k, rollout.prompts[p].id, iteration) for r, k, p in each]
        start = paths.x[row, step].to(policy.device)

        def work(size: int) -> Trajectories:
            with fused(policy):
                return sample(policy.velocity, start, cond, index.to(policy.device), plans, noise, size)

        rests = run.fits["batch"](work)
    if draws.request is not None:
        rests = replace(rests, tree=replace(rests.tree, owner=prompt[rests.tree.owner]))
    with run.clock.of("decode"):
        images = decoded(run, rests, slice(None))
    finite.check_trajectories(rests, rollout.prompts)
    finite.check_images(images, rests.tree.owner, rollout.prompts)
    owners = [rollout.prompts[p] for p in rests.tree.owner.tolist()]
    finished = rests.tree.final[:, -1].unique()
    scored = run.clock.timed("reward", score)(images, owners, run.rewards.trained, c.late, finished)
    return replace(
        rollout,
        paths=grafted(paths, rests, row, step, draws.request is not None),
        images=torch.cat([rollout.images, images]),
        scored=joined([rollout.scored, scored]),
    )


def _plan(run: Session, paths: Trajectories, row: int, k: int, prompt: int, iteration: int) -> Any:
    """The plan of the rest of a trajectory, with the states that the credit needs completed."""
    c, tree = run.config, paths.tree
    states, lengths = planning.completed(c, run.times, planning.position_of(c, iteration, prompt))
    return rest(tree.t[row], tree.noise[row], k, paths.kernel, paths.t_max, states, lengths)


def metrics(run: Session, counts: Counts, row: Counts) -> Counts:
    """What an extension adds to the metrics of an iteration, from the counts of all ranks. The `rewards` of the row so
    far are those of what was kept where a scorer is shown finished images alone; it was shown the others too."""
    c = run.config
    if c.extend is None:
        return {}
    total = run.ranks.all_reduce_sum(counts, "counts")
    rise = total["rise"] / total["kept"] if total["kept"] else float("nan")
    rewards = row["rewards"] + len(c.late) * (total["drawn"] - total["kept"])
    return {"extend/drawn": total["drawn"], "extend/kept": total["kept"], "extend/rise": rise, "rewards": rewards}
