"""What is left of a gradient when less is spent on it, on the embedded model before training.

    OMP_NUM_THREADS=1 python scripts/compare_spending.py selections
    OMP_NUM_THREADS=1 python scripts/compare_spending.py batches --batches 24
    OMP_NUM_THREADS=1 python scripts/compare_spending.py predictions --value RUN

`selections`: the gradients of the same rollouts from all images of a prompt and from some, as cosines with the first.
`batches`: signal over noise of independent batches as in gradient_agreement.py, per processor minute, with scouts and
with selections. `predictions`: how well scouts predict the rewards of images without noise after the start, and how
much those that they choose differ. Before training no prompt has been drawn, so that draws cannot be compared here.
"""

import time
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Annotated

import torch
import typer
from compare_credits import BASE, METHODS

from mmalign import policy as policies, train as trainer
from mmalign.config import load as configs
from mmalign.credit.groups import group_std
from mmalign.selection.extremes import Extremes
from mmalign.selection.scouts import chosen, correlation
from mmalign.selection.selection import Selection
from mmalign.training import selecting, setup
from mmalign.training.rollout import foreseen, judged, sample_and_score
from mmalign.training.session import Session

STILL = ["learning_rate=1e-12", "warmup=0", "cooldown=0", "held_out=null", "watch=[]", "out=runs/none"]
BATCHES = {
    "terminal, 12 seeds": "",
    "the same, 6 selected": "select={type: extremes, keep: 6}",
    "the same, 4 selected": "select={type: extremes, keep: 4}",
    "4 seeds": "seeds=4",
    "4 of 12 scouts of 3 steps": "seeds=4 scouts={ratio: 3, steps: 3}",
    "4 of 12 scouts of 2 steps": "seeds=4 scouts={ratio: 3, steps: 2}",
}
app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Random(Selection):
    """Any `keep` images of a prompt, to compare with."""

    keep: int

    def __call__(self, reward: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        order = torch.rand(len(reward), generator=torch.Generator().manual_seed(0))
        selected = torch.zeros_like(prompt, dtype=torch.bool)
        for number in prompt.unique():
            rows = (prompt == number).nonzero()[:, 0]
            selected[rows[order[rows].argsort()[: self.keep]]] = True
        return selected


def opened(overrides: str) -> Session:
    words = overrides.replace(": ", ":").replace(", ", ",").split()
    words = [word.replace(":", ": ") for word in words]
    policies.quiet()
    return setup.open_session(configs.load(BASE, [*METHODS["terminal"].split(), *words, *STILL]))


def gradient(run: Session) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in run.policy.parameters()])


@app.command()
def selections(batches: int = 4) -> None:
    torch.set_flush_denormal(True)
    run, rules = opened(""), {"all": None}
    rules |= {f"extremes, {k}": Extremes(k) for k in (8, 6, 4, 2)}
    rules |= {f"extremes, {k}, against the selected": Extremes(k, "selected") for k in (6, 4)}
    rules |= {f"any {k}": Random(k) for k in (6, 4)}
    cosines: dict[str, list[float]] = {name: [] for name in rules}
    counts, seconds = dict.fromkeys(rules, 0), dict.fromkeys(rules, 0.0)
    for i in range(batches):
        prompts = run.prompts(i)
        rollout = sample_and_score(run, prompts, i)
        judgement, whole = judged(run, rollout, i), None
        for name, rule in rules.items():
            c = run.config.model_copy(update={"select": rule})
            selected = selecting.choose(c, rollout.tree, judgement)
            advantage = selecting.advantages(c, rollout.tree, judgement, selected)
            start, before = time.process_time(), run.policy.counts["forwards"]
            batch = c.objective.batch(
                replace(run, config=c), *selecting.part(rollout, judgement, advantage, selected), i
            )
            run.learner.update(batch, prompts, i)
            seconds[name] += (time.process_time() - start) / batches
            counts[name] += run.policy.counts["forwards"] - before
            whole = gradient(run) if whole is None else whole
            cosines[name].append(float(torch.cosine_similarity(gradient(run), whole, dim=0)))
    print("| learnt from, of 12 images | replay forwards | processor seconds of learning | cosine with all |")
    print("|---|---|---|---|")
    for name in rules:
        mean = sum(cosines[name]) / batches
        print(f"| {name} | {counts[name] / batches:.0f} | {seconds[name]:.2f} | {mean:.3f} |")


@app.command()
def batches(batches: int = 8, only: str = "") -> None:
    torch.set_flush_denormal(True)
    print(
        "| rollout | forwards + replay | images | processor seconds | correlation | cosine (s.e.) | signal per minute |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in only.split(";") if only else BATCHES:
        run, flat, seconds, rows = opened(BATCHES[name]), [], 0.0, []
        for i in range(batches):
            start = time.process_time()
            rows.append(trainer.iterate(run, i))
            seconds += (time.process_time() - start) / batches
            flat.append(gradient(run))
        pairs = torch.tensor([float(torch.cosine_similarity(a, b, dim=0)) for a, b in combinations(flat, 2)])
        cosine, error = float(pairs.mean()), float(pairs.std() / len(pairs) ** 0.5)
        names = ("forwards", "replay_forwards", "decodes", "scouts/correlation")
        drawn, replayed, images, within = (sum(row.get(key, float("nan")) for row in rows) / batches for key in names)
        print(
            f"| {name} | {drawn:.0f} + {replayed:.0f} | {images:.0f} | {seconds:.2f} | {within:.2f} "
            f"| {cosine:.3f} ({error:.3f}) | {60 * cosine / (1 - cosine) / seconds:.2f} |",
            flush=True,
        )


@app.command()
def predictions(
    prompts: int = 48,
    value: Annotated[str, typer.Option(help="folder of a run whose value head predicts, too")] = "",
) -> None:
    torch.set_flush_denormal(True)
    print("| 4 of 12 starts, by scouts of | forwards | correlation, all starts | of the chosen | deviation of R |")
    print("|---|---|---|---|---|")
    base = (
        f"plan=ode objective=rft kernel=flow_sde credit=null advantage=null loss=null prompts_per_iteration={prompts}"
    )
    every = sample_and_score(run := opened(f"{base} seeds=12"), run.prompts(0), 0)
    exact, start = judged(run, every, 0).reward[:, -1], torch.arange(prompts).repeat_interleave(12)
    first = torch.arange(len(exact)) % 12 < 4
    spread = float(group_std(exact[first], start[first]).mean())
    print(f"| none: the first 4 | {prompts * 4 * 6} | | | {spread:.3f} |")
    for steps in (2, 3, 4, 6):
        scout = sample_and_score(run := opened(f"{base} seeds=12 steps={steps}"), run.prompts(0), 0)
        predicted(f"{steps} steps", steps, judged(run, scout, 0).reward[:, -1], exact, start)
    for steps in (2, 3, 4, 5, 6) if value else ():
        run = opened(f"{base} seeds=12 scouts={{steps:{steps},by:{value}}}")
        every = torch.arange(12).repeat(prompts, 1)
        cond = run.policy.encode([p.text for p in run.prompts(0)])
        guess = foreseen(run, run.prompts(0), cond, 0, every)
        predicted(f"a value head, {steps} steps", steps, guess, exact, start)


def predicted(name: str, steps: int, guess: torch.Tensor, exact: torch.Tensor, start: torch.Tensor) -> None:
    """How well guesses by scouts of so many steps agree with the rewards of 12 starts of each prompt."""
    prompts = len(exact) // 12
    rows = (chosen(guess, prompts, 4) + 12 * torch.arange(prompts)[:, None]).flatten()
    within = [correlation(guess[r], exact[r], start[r]) for r in (torch.arange(len(exact)), rows)]
    spread = float(group_std(exact[rows], start[rows]).mean())
    drawn = prompts * (12 * steps + 4 * 6)
    print(f"| {name} | {drawn} | {within[0]:.2f} | {within[1]:.2f} | {spread:.3f} |", flush=True)


if __name__ == "__main__":
    app()
