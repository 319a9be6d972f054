"""Save a session in a checkpoint, and restore it: what a resumed run continues from.

The next iteration is a function of the config, the iteration and the checkpoint, so that a resumed run is bit-identical
to an uninterrupted one.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from mmalign.config.methods import named
from mmalign.config.schema import LATER, RESUMABLE, Config
from mmalign.errors import BadInput
from mmalign.runs import checkpoint, folder, jsonl, machine, optimizer_state, state as states
from mmalign.seeds import gaussian, seed_of
from mmalign.training import planning, refreshing, step_rewards
from mmalign.training.learner import optimizer_class
from mmalign.training.session import Session
from reward_models.weights import fingerprint


def size(run: Session) -> int:
    """About the bytes of a checkpoint: adapter, averages and two moments; those of an adapter that learns rewards."""
    return (
        4
        * (4 + (run.learner.old is not None) + 3 * (run.step_rewards is not None))
        * sum(p.numel() for p in run.policy.parameters())
    )


def best(out: Path, name: str | None) -> int | None:
    """The saved iteration with the highest held-out mean of `name`, on the images that all evaluations share."""
    saved = {int(path.name) for path in checkpoint.numbered(out / "checkpoints")}
    rows = jsonl.rows(out / "evaluations.jsonl") if name else []
    means = {row["iteration"]: row["compared"] for row in rows if row["iteration"] in saved}
    return max((done for done, mean in means.items() if mean == mean), key=means.get, default=None)


def _identity(run: Session, iteration: int) -> dict[str, dict]:
    """What a resumed run must agree in: its config, what it is made of, and what it draws next. Prompts, plans and
    noise have no state to save; a resumed run shows that it draws the same."""
    c = run.config
    prompts = run.prompts(iteration)
    noise = gaussian((8,), seed_of(c.seed, "rollout", iteration, prompts[0].id, 0))
    draws = {
        "order of prompts": [p.id for p in prompts],
        "windows": [planning.position_of(c, iteration, p.id) for p in prompts],
        "random numbers": fingerprint({"noise": noise}, digits=16),
    }
    made = run.origin | {"reference": run.rewards.reference} | draws
    left_out = {*RESUMABLE, *(key for key in LATER if getattr(c, key) == type(c).model_fields[key].get_default())}
    return json.loads(json.dumps({"config": c.model_dump(mode="json", exclude=left_out), "made": made}))


def _machine(run: Session) -> dict[str, int | str]:
    return machine.describe(run.ranks.size, run.ranks.accelerator.device)


def _averages(run: Session) -> dict[str, dict[str, Tensor]]:
    averages = {"ema": run.learner.ema, "old": run.learner.old}
    return {kind: tensors for kind, tensors in averages.items() if tensors is not None}


def save(run: Session, out: Path, iteration: int) -> None:
    """Write the checkpoint after an iteration, on the main process; all ranks must call it."""
    adapter = run.policy.adapter()
    adapter_hash = fingerprint(adapter, digits=16)
    run.ranks.assert_equal(adapter_hash, f"the adapter after iteration {iteration}")
    if run.values is not None:
        run.ranks.assert_equal(
            fingerprint(run.values.tensors(), digits=16), f"the value head after iteration {iteration}"
        )
    optimizer = optimizer_state.tensors(run.learner.optimizer)  # of which each process may have a part
    learns, reward = run.step_rewards is not None, {}
    if learns:
        reward = {"reward": run.policy.adapter(step_rewards.NAME)}
        run.ranks.assert_equal(fingerprint(reward["reward"], digits=16), f"the rewards after iteration {iteration}")
        reward["reward_optimizer"] = optimizer_state.tensors(run.step_rewards.optimizer)
    if not run.ranks.main:
        return
    tensors = {"adapter": adapter, "optimizer": optimizer} | _averages(run) | reward
    tensors |= {} if run.values is None else {"values": run.values.tensors()}
    state = {"adapter_hash": adapter_hash, "multipliers": run.rewards.multipliers, "machine": _machine(run)}
    state |= {"learnt": optimizer_state.trained(optimizer)} | _identity(run, iteration)
    if learns:
        state["learnt_reward"] = optimizer_state.trained(reward["reward_optimizer"])
    if run.config.draw.learns:
        state["rates"] = {str(id_): rate for id_, rate in run.prompts.rates.items()}
    folder.sync(out)
    checkpoint.save(out / "checkpoints", iteration, tensors, state)
    prune(run.config, out, iteration)


def prune(c: Config, out: Path, done: int) -> None:
    """Remove old checkpoints, if the newest is that of `done` iterations: a newer one, which was passed over because it
    is broken, stays until the run is past it."""
    saved = checkpoint.numbered(out / "checkpoints")
    if saved and int(saved[-1].name) <= done:
        checkpoint.prune(out / "checkpoints", done, c.keep_checkpoints, best(out, c.best_by))


def restore(run: Session, out: Path, say: Callable[[str], None]) -> int:
    """Load the newest complete checkpoint and return its iteration; 0, to start over, if there is none."""
    saved = out / "checkpoints"
    path = checkpoint.latest(saved, say)
    if path is None and checkpoint.numbered(saved):
        raise BadInput(f"--resume: no checkpoint in {saved} is complete; to start over, remove {out}")
    if path is None:
        say(f"--resume: {out} has no checkpoint yet; starting from the beginning")
        return 0
    tensors, state = states.read(path)
    refreshing.reopen(run, out, state.iteration)
    done = _check_identity(run, path, state)
    states.check_adapter(path, tensors, run.learner.ema, ("adapter", *_averages(run)))
    kind = optimizer_class(run.config)
    optimizer_state.check(path, state.learnt, tensors["optimizer"], run.policy.parameters(), kind)
    _restore_values(run, path, tensors)
    if run.step_rewards is not None:
        _restore_rewards(run, path, tensors, state, kind)
    run.policy.load_adapter(tensors["adapter"])
    optimizer_state.load(run.learner.optimizer, tensors["optimizer"])
    run.rewards.multipliers.update(state.multipliers)
    for kind, average in _averages(run).items():
        for name, value in tensors[kind].items():
            average[name].copy_(value)
    changed = machine.difference(state.machine, _machine(run))
    if changed and run.ranks.main:
        print(f"mmalign: {changed}", file=sys.stderr)
    return done


def _restore_values(run: Session, path: Path, tensors: checkpoint.Tensors) -> None:
    """Load the value head. BadInput where it is missing, or is another."""
    if run.values is None:
        return
    file = path / "values.safetensors"
    if "values" not in tensors:
        raise states.refused(file, f"not in {checkpoint.MANIFEST}")
    try:
        run.values.load(tensors["values"])
    except ValueError as error:
        raise states.refused(file, str(error)) from None


def _restore_rewards(run: Session, path: Path, tensors: checkpoint.Tensors, state: states.State, kind: type) -> None:
    """Load the adapter that learns rewards of steps, and its optimiser. BadInput where they do not fit."""
    name = step_rewards.NAME
    states.check_adapter(path, tensors, run.policy.adapter(name), ("reward",))
    if "reward_optimizer" not in tensors or state.learnt_reward is None:
        raise states.refused(
            path / "reward_optimizer.safetensors", "the moments of the rewards, or their list, are missing"
        )
    moments, parameters = tensors["reward_optimizer"], run.policy.parameters(name)
    optimizer_state.check(path, state.learnt_reward, moments, parameters, kind, "reward_optimizer")
    run.policy.load_adapter(tensors["reward"], name)
    optimizer_state.load(run.step_rewards.optimizer, moments)


def _restore_rates(run: Session, file: Path, state: states.State) -> None:
    """Load what the draw has learnt, which the next prompts depend on. BadInput where it is of other prompts."""
    if (state.rates is None) == run.config.draw.learns:
        raise states.refused(
            file, f"rates: {'missing' if state.rates is None else 'not'} with draw {named(run.config.draw)}"
        )
    ids = {str(p.id): p.id for p in run.prompts.all}
    rates = state.rates or {}
    if unknown := sorted(rates.keys() - ids.keys()):
        raise states.refused(file, f"rates: no prompt has the id {unknown[0]!r}")
    run.prompts.rates.clear()
    run.prompts.rates.update({ids[key]: rate for key, rate in rates.items()})


def _check_identity(run: Session, path: Path, state: states.State) -> int:
    """The iteration of a checkpoint of this run. BadInput for a checkpoint of another run."""
    file, done = path / checkpoint.STATE, state.iteration
    if done > run.config.iterations:
        raise states.refused(file, f"iteration: {done}, of a run of {run.config.iterations}")
    if state.multipliers.keys() != run.rewards.multipliers.keys():
        odd = min(state.multipliers.keys() ^ run.rewards.multipliers.keys())
        raise states.refused(file, f"multipliers: {odd!r} is in one of checkpoint and config alone")
    _restore_rates(run, file, state)
    for kind, now in _identity(run, done).items():
        saved = getattr(state, kind)
        for what in dict.fromkeys([*saved, *now]):
            if what not in saved or what not in now:
                raise states.refused(file, f"{kind}: {'no' if what in now else 'unknown key'} {what!r}")
            if json.dumps(saved[what], sort_keys=True) != json.dumps(now[what], sort_keys=True):
                raise BadInput(f"--resume: {what} was {saved[what]} and is {now[what]} now; a run keeps its {what}")
    return done
