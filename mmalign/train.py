"""The iteration, and the run around it.

    prompts -> rollout -> judgement -> advantages -> update

One run lives in one folder: `config.yaml` (resolved), `metrics.jsonl`, `images/`, `checkpoints/`, `report.html`. Every
random number comes from a seed derived from (run seed, iteration, prompt id, member, step), so results depend neither
on batch sizes nor on whether the run was interrupted.

Left out on purpose: a replay buffer (each iteration learns from its own images) and reward models that are trained
along.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from mmalign import checkpoint, config as configs, credit, evaluate, policy as policies, prompts as prompt_files
from mmalign.config import BadInput, Config
from mmalign.credit.groups import dead, group_std
from mmalign.flow import plan as plans
from mmalign.flow.sample import gaussian, sample, seed_of
from mmalign.judge import judge
from mmalign.learn.update import transitions, update
from mmalign.types import Plan
from reward_models import Prompt, RewardModel, load as load_scorer


@dataclass
class Clock:
    """Seconds by name, since the last reading."""

    seconds: Counter = field(default_factory=Counter)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def timed(self, name: str, function: Callable) -> Callable:
        def run(*args):
            with self.of(name):
                return function(*args)

        return run

    def read(self) -> dict[str, float]:
        out, self.seconds = dict(self.seconds), Counter()
        return out


@dataclass(frozen=True)
class Session:
    """Everything a run needs, built once by `open_session`. `ema` holds the averaged adapter by name."""

    config: Config
    policy: object
    scorers: dict[str, RewardModel]
    prompts: list[Prompt]
    held_out: list[Prompt]
    plan: Plan
    optimizer: torch.optim.Optimizer
    ema: dict[str, Tensor]
    clock: Clock


def choose_plan(c: Config, times: Tensor) -> Plan:
    if c.plan == "branch":
        return plans.branch(times, c.kernel, c.noise, c.branch_steps, c.children)
    if c.plan == "window":
        return plans.window(times, c.kernel, c.noise, *c.window)
    return plans.sde(times, c.kernel, c.noise)


def choose_credit(c: Config) -> Callable:
    settings = {"scale": c.advantage_scale}
    if c.baseline is not None:
        settings["baseline"] = c.baseline
    return partial(credit.CREDITS[c.credit], **settings)


def load_scorers(c: Config, names) -> dict[str, RewardModel]:
    unused = sorted(set(c.scorers) - {name.rpartition(".")[0] for name in c.rewards} - set(c.watch))
    if unused:
        raise BadInput(f"scorers: settings for {unused[0]!r}, which is neither in rewards nor in watch")
    scorers = {name: load_scorer(name, **c.scorers.get(name, {})) for name in dict.fromkeys(names)}
    for reward in c.rewards:
        name, _, component = reward.rpartition(".")
        if component not in scorers[name].names:
            raise BadInput(f"rewards: no component {component!r}; {name} gives {', '.join(scorers[name].names)}")
    return scorers


def open_session(c: Config) -> Session:
    """Load and check everything a config names, before anything is written."""
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise BadInput(f"started as {accelerator.num_processes} processes; this version trains in one")
    prompts = prompt_files.read(configs.locate(c.prompts))
    prompt_files.batch(prompts, c.prompts_per_iteration, 0, c.seed)
    held_out = prompt_files.read(configs.locate(c.held_out)) if c.held_out else []
    shared = {p.text for p in prompts} & {p.text for p in held_out}
    if shared:
        raise BadInput(f"held_out: {len(shared)} prompts are training prompts too, e.g. {min(shared)!r}")
    with configs.refusing():
        scorers = load_scorers(c, [*(name.rpartition(".")[0] for name in c.rewards), *c.watch])
        policy = policies.load(
            configs.locate(c.model), dtype=c.precision, device=str(accelerator.device), guidance=c.guidance
        )
        policy.attach_lora(c.lora_rank, c.lora_alpha, c.lora_targets, seed_of(c.seed, "adapter"))
        plan = choose_plan(c, policy.times(c.steps))
    if c.compile:
        policy.compile()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=c.learning_rate, weight_decay=c.weight_decay)
    return Session(c, policy, scorers, prompts, held_out, plan, optimizer, policy.adapter(), Clock())


# --------------------------------------------------------------------------------------------------- one iteration


def iterate(run: Session, iteration: int) -> dict[str, int | float]:
    """Roll out, judge, credit, learn. Returns the row for metrics.jsonl."""
    c, policy, clock = run.config, run.policy, run.clock
    policy.spent.clear()
    prompts = prompt_files.batch(run.prompts, c.prompts_per_iteration, iteration, c.seed)
    starts = [(p, m) for p in range(len(prompts)) for m in range(c.seeds)]

    def key(start: int, *rest) -> int:
        p, member = starts[start]
        return seed_of(c.seed, "rollout", iteration, prompts[p].id, member, *rest)

    with clock.of("rollout"):
        cond = policy.encode([p.text for p in prompts])
        index = torch.tensor([p for p, _ in starts], device=policy.device)
        noise = torch.stack([gaussian(policy.latent_shape, key(i)) for i in range(len(starts))]).to(policy.device)
        paths = sample(
            policy.velocity, noise, cond, index, run.plan,
            lambda start, step, path: gaussian(policy.latent_shape, key(start, step, path)).to(policy.device),
            c.batch,
        )  # fmt: skip
    scorers = {name: clock.timed("reward", scorer) for name, scorer in run.scorers.items() if name in _trained(c)}
    judged, images = judge(paths, prompts, clock.timed("decode", policy.decode), scorers, c.rewards, c.batch)
    _stop_if_failing(judged, len(images), c.max_failed)
    with clock.of("learn"):
        advantage = choose_credit(c)(paths, judged)
        batch = transitions(paths, advantage, c.weighting)
        _set_rate(run.optimizer, c, iteration)
        forwards = policy.spent["forwards"]
        statistics = update(
            policy, run.optimizer, batch, cond,
            kernel=c.kernel, t_max=run.plan.t_max, clip=c.clip, beta=c.beta, epochs=c.epochs, minibatches=c.minibatches,
            micro_batch=c.micro_batch, max_grad_norm=c.max_grad_norm,
            generator=torch.Generator().manual_seed(seed_of(c.seed, "shuffle", iteration)),
        )  # fmt: skip
        _average(run.ema, policy.adapter(), c.ema)
    reward = judged.reward[:, -1]
    row = {"iteration": iteration + 1, "reward": float(reward.nanmean())}
    row |= {f"part/{name}": float(values.nanmean()) for name, values in judged.parts.items()}
    row |= {
        "group_std": float(group_std(reward, paths.prompt).nanmean()),
        "dead_groups": float(dead(reward, paths.prompt).mean()),
        "diversity": evaluate.diversity(images, paths.prompt.cpu()),
        "failed": len(judged.failures),
        "forwards": forwards,
        "replay_forwards": policy.spent["forwards"] - forwards,
        "decodes": policy.spent["decodes"],
        "rewards": policy.spent["decodes"],
        "transitions": len(batch),
        "lr": run.optimizer.param_groups[0]["lr"],
    }
    row |= statistics | {f"seconds/{name}": seconds for name, seconds in clock.read().items()}
    return row


def _trained(c: Config) -> set[str]:
    return {name.rpartition(".")[0] for name in c.rewards}


def _stop_if_failing(judged, images: int, limit: float) -> None:
    if len(judged.failures) > limit * images:
        why = next(iter(judged.failures.values()))
        raise RuntimeError(f"{len(judged.failures)} of {images} images could not be scored (limit {limit:.0%}): {why}")


def _set_rate(optimizer: torch.optim.Optimizer, c: Config, iteration: int) -> None:
    up = (iteration + 1) / c.warmup if c.warmup else 1.0
    down = (c.iterations - iteration) / c.cooldown if c.cooldown else 1.0
    for group in optimizer.param_groups:
        group["lr"] = c.learning_rate * min(1.0, up, down)


def _average(ema: dict[str, Tensor], now: dict[str, Tensor], decay: float) -> None:
    for name, value in now.items():
        ema[name].lerp_(value, 1 - decay)


@contextmanager
def averaged(run: Session) -> Iterator[None]:
    """The policy with its averaged adapter."""
    kept = run.policy.adapter()
    run.policy.load_adapter(run.ema)
    try:
        yield
    finally:
        run.policy.load_adapter(kept)


# ----------------------------------------------------------------------------------------------------- a whole run


def train(c: Config, resume: bool = False, console: Console | None = None) -> Path:
    """Run a config to its end and return the run's folder. Raises BadInput before anything is written."""
    console = console or Console()
    out = Path(c.out)
    _check_folder(out, c, resume)
    run = open_session(c)
    done = _restore(run, out) if resume else 0
    _claim(out, c)
    _truncate(out, done)
    if done == 0 and run.held_out:
        console.print(
            f"before: {len(run.held_out)} held-out prompts, {c.eval_seeds} seeds each, {c.eval_steps} ODE steps"
        )
        with run.policy.reference():
            _evaluate(run, out, "before", 0, run.held_out, c.eval_seeds)
    began, first = time.monotonic(), done
    with _progress(console) as bar:
        task = bar.add_task("training", total=c.iterations, completed=done, note="")
        while done < c.iterations:
            row = iterate(run, done)
            done += 1
            spent = time.monotonic() - began
            row["seconds/total"] = spent / (done - first)
            _append(out / "metrics.jsonl", row)
            rate = (row["forwards"] + row["replay_forwards"]) / sum(row[f"seconds/{k}"] for k in ("rollout", "learn"))
            bar.update(task, completed=done, note=f"reward {row['reward']:.3f}  {rate:.0f} NFE/s")
            if c.eval_every and done % c.eval_every == 0 and done < c.iterations and run.held_out:
                with averaged(run):
                    means = _evaluate(run, out, None, done, run.held_out[:: _stride(run, c)], 1)
                console.print(f"iteration {done}: reward {row['reward']:.3f}, held-out {_say(means)}")
            if done % c.checkpoint_every == 0 or done == c.iterations:
                _save(run, out, done)
    if run.held_out:
        with averaged(run):
            _evaluate(run, out, "after", done, run.held_out, c.eval_seeds)
    return out


def _stride(run: Session, c: Config) -> int:
    return max(1, len(run.held_out) // c.eval_prompts) if c.eval_prompts else 1


def _say(means: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in means.items())


def _evaluate(
    run: Session, out: Path, name: str | None, iteration: int, prompts: list[Prompt], members: int
) -> dict[str, float]:
    """Evaluate the policy as it stands; a `name` keeps the images."""
    c = run.config
    start = time.perf_counter()
    result = evaluate.evaluate(run.policy, prompts, members, c.eval_steps, run.scorers, c.batch)
    means = result.means()
    _append(
        out / "evaluations.jsonl",
        {"iteration": iteration, "name": name, "images": len(result.images), "seconds": time.perf_counter() - start}
        | means,
    )
    evaluate.contact_sheet(result.images, out / "images" / f"{name or f'{iteration:06d}'}.png")
    if name:
        evaluate.write(result, prompts, out / "images" / name)
    return means


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(), console=console,
    )  # fmt: skip


def _append(path: Path, row: dict) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def _truncate(out: Path, done: int) -> None:
    """Drop the rows that a run resumed after `done` iterations writes again: later ones, and the last evaluation."""
    for file in (out / "metrics.jsonl", out / "evaluations.jsonl"):
        if file.exists():
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            file.write_text("")
            for row in rows:
                if done and row["iteration"] <= done and row.get("name") != "after":
                    _append(file, row)


def _check_folder(out: Path, c: Config, resume: bool) -> None:
    saved = out / "config.yaml"
    if resume:
        if not saved.exists():
            raise BadInput(f"--resume: {out} holds no run")
        before = configs.load(saved)
        changed = [key for key, value in c.model_dump().items() if value != getattr(before, key)]
        if changed:
            key = changed[0]
            raise BadInput(
                f"--resume: {key} is {getattr(c, key)!r} and was {getattr(before, key)!r}; a run keeps its config"
            )
    elif saved.exists():
        raise BadInput(f"{out} already holds a run; go on with --resume or choose another `out`")


def _claim(out: Path, c: Config) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.yaml").write_text(configs.dump(c))
    except OSError as error:
        raise BadInput(f"out: cannot write in {out}: {error.strerror}") from None


def _save(run: Session, out: Path, iteration: int) -> None:
    adapter = run.policy.adapter()
    tensors = {"adapter": adapter, "ema": run.ema, "optimizer": checkpoint.optimizer_tensors(run.optimizer)}
    checkpoint.save(out / "checkpoints", iteration, tensors, {"adapter_hash": checkpoint.fingerprint(adapter)})


def _restore(run: Session, out: Path) -> int:
    """Load the newest checkpoint, or start over where there is none."""
    path = checkpoint.latest(out / "checkpoints")
    if path is None:
        return 0
    tensors, state = checkpoint.read(path)
    run.policy.load_adapter(tensors["adapter"])
    for name, value in tensors["ema"].items():
        run.ema[name].copy_(value)
    checkpoint.load_optimizer(run.optimizer, tensors["optimizer"])
    return state["iteration"]
