"""The iteration: prompts -> rollout -> judgement -> advantages -> update.

Every random number comes from a seed derived from (run seed, iteration, prompt id, member, step), so results depend
neither on batch sizes nor on the number of ranks nor on whether the run was interrupted.

Left out on purpose: a replay buffer (each iteration learns from its own images) and reward models that are trained in
the same iteration (`mmalign.training.refreshing` fits one again between two of them).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from mmalign.distributed.gather import gather
from mmalign.errors import NonFinite
from mmalign.objectives.objective import TrainBatch
from mmalign.rewards.judge import stop_if_failing, unscored
from mmalign.rewards.rewards import shares
from mmalign.training import extending, finite, records, selecting, step_rewards, values
from mmalign.training.metrics import deviations, graph_metrics, level, metrics, scout_metrics
from mmalign.training.rollout import Rollout, judged, sample_and_score
from mmalign.training.session import Session
from mmalign.training.snapshots import Snapshot
from mmalign.types import Judgement
from reward_models import Prompt

Row = dict[str, int | float]
Show = Callable[[Snapshot], None]


def iterate(run: Session, iteration: int, show: Show | None = None) -> Row:
    """One iteration; returns its row for metrics.jsonl. `show` gets the rollout with its advantages, to log it."""
    policy, learner, clock = run.policy, run.learner, run.clock
    policy.counts.clear()
    run.rewards.graph.clear()
    learner.skips.reasons.clear()
    learner.set_rate(iteration)
    prompts = run.ranks.local(run.prompts(iteration))
    try:
        with learner.acting():
            batch, row = (records.batch if run.records else partial(from_rollout, show=show))(run, prompts, iteration)
    except NonFinite as error:
        learner.skips.leave_out(iteration, error)
        batch, row = None, {"reward": float("nan"), "rewards": 0}
    forwards = policy.counts["forwards"]
    with clock.of("learn"):
        statistics = learner.update(batch, prompts, iteration) if batch else {"transitions": 0}
    replayed = policy.counts["forwards"] - forwards
    counts = {"forwards": forwards, "replay_forwards": replayed, "decodes": policy.counts["decodes"]}
    row = {"iteration": iteration + 1} | row | run.ranks.all_reduce_sum(counts, "counts")
    row |= shares(run.ranks.all_reduce_sum(run.rewards.usage(), "counts"))
    row |= (graph := graph_metrics(run))
    row["rewards"] += graph.get("rewards_in_graph", 0)
    row |= {"skipped": len(learner.skips.reasons), "lr": learner.rate} | run.fitted()
    return row | statistics | clock.pace(row["forwards"] + row["replay_forwards"])


def from_rollout(run: Session, prompts: list[Prompt], iteration: int, show: Show | None) -> tuple[TrainBatch, Row]:
    """Sample, score and judge on each rank; credit over all ranks; train on this rank's trajectories."""
    c, clock = run.config, run.clock
    rollout, local, extended = finite.on_all_ranks(run.ranks, partial(sample_and_judge, run, prompts, iteration))
    tree, judgement = gather(run.ranks, rollout.tree, local)
    stop_if_failing(unscored(tree, judgement), len(tree.owner), c.max_failed)
    with clock.of("learn"):
        judgement, valued = values.judged(run.ranks, run.values, rollout.paths, tree, judgement, iteration)
        judgement, learnt = step_rewards.judged(run, rollout, local, judgement, iteration)
        selected = selecting.choose(c, tree, judgement)
        advantage = selecting.advantages(c, tree, judgement, selected, iteration, run.prompts.weights(iteration))
        here = run.ranks.is_local(tree.prompt)
        mine = None if advantage is None else advantage[here]
        batch = c.objective.batch(run, *selecting.part(rollout, local, mine, selected[here]), iteration)
    if show:
        clock.timed("io", show)(Snapshot(rollout, tree, judgement, advantage))
    deviation = deviations(run.ranks, rollout)
    row = metrics(run, tree, judgement, deviation, iteration) | selecting.statistics(c, tree, judgement, selected)
    row |= scout_metrics(run, rollout, tree, judgement) | valued | learnt | extending.metrics(run, extended, row)
    row |= run.prompts.learn(iteration, level(run, judgement, iteration), tree.prompt)
    return batch, row | run.rewards.move_multipliers(judgement)


def sample_and_judge(
    run: Session, prompts: list[Prompt], iteration: int
) -> tuple[Rollout, Judgement, extending.Counts]:
    """A judged rollout with what an extension adds to it, and how much that is."""
    rollout = sample_and_score(run, prompts, iteration, whole=run.config.extend is not None)
    rollout, judgement, extended = extending.extend(run, rollout, judged(run, rollout, iteration), iteration)
    return replace(rollout, images=None), judgement, extended
