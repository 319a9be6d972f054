"""From a config to plans: where the window stands this iteration, which states are shown, and what fits a budget."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass

from jaxtyping import Float
from torch import Tensor

from mmalign.config.paths import locate
from mmalign.config.schema import Config
from mmalign.errors import BadInput
from mmalign.flow import plan as plans
from mmalign.flow.sample import seed_of
from mmalign.training import noise_calibration as calibrate
from mmalign.types import Plan, Policy

LEAST = 1e-5  # standard deviation that a stochastic step draws, in latent units; float32 rounds by some 5e-7 there
TOO_MUCH, NOTICEABLE = 2.0, 0.1  # standard deviation left after a step: in units of what belongs there; in latent units


@dataclass(frozen=True)
class Cost:
    """Of one iteration: network forwards (rollout with completions; replay), rows that are learnt from, images decoded,
    and images scored, times reward scorers. Replay takes fewer where advantages are 0, and R-GDPO finds fewer pairs."""

    rollout: int
    replay: int
    rows: int
    images: int
    rewards: int

    @property
    def forwards(self) -> int:
        return self.rollout + self.replay


def plan_for(c: Config, times: Float[Tensor, "states"], levels: plans.Noise, start: int = 0) -> Plan:
    """The plan of a prompt's group, which all its seeds and children share; `start` is where its window stands."""
    if c.plan == "ode":
        plan = plans.ode(times, c.kernel)
    elif c.plan == "branch":
        plan = plans.branch(times, c.kernel, levels, c.branch_steps, c.children)
    elif c.plan == "window":
        stop = start + c.window[1] - c.window[0]
        plan = plans.window(times, c.kernel, levels, start, stop, c.children or 1)
    else:
        plan = plans.sde(times, c.kernel, levels)
    if not c.score_states:
        return plan
    return plans.complete(plan, needed(plan) if c.score_states == "all" else c.score_states, c.completion)


def needed(plan: Plan) -> list[int]:
    """The states before and after every stochastic step."""
    steps = (plan.noise > 0).any(0).nonzero()[:, 0].tolist()
    return sorted({*steps, *(k + 1 for k in steps)})


def window_starts(c: Config) -> range:
    """Where the window may stand: one place unless it moves. 0 for plans without one. One that moves at random lies
    within the first half of the steps, or stays where it is if it cannot."""
    if c.plan != "window":
        return range(1)
    first, size = c.window[0], c.window[1] - c.window[0]
    last = {"progressive": c.steps - 1 - size, "random": c.steps // 2 - size}
    return range(first, max(first, last.get(c.window_moves, first)) + 1)


def window_start(c: Config, iteration: int, prompt_id: int) -> int:
    """Fixed; progressive (MixGRPO, arXiv 2507.21802); or drawn for each group, so that it lies in the first half of the
    steps (Flow-GRPO-Fast). Never per image: siblings with unlike windows cannot be compared."""
    places = window_starts(c)
    if c.window_moves == "progressive":
        return places[iteration // c.window_every % len(places)]
    return random.Random(seed_of(c.seed, "window", iteration, prompt_id)).choice(places)


def cost_of(c: Config, plan: Plan, guided: bool) -> Cost:
    """What an iteration costs where all groups have this plan; `guided`: a row's velocity takes two forwards."""
    forwards, images, learnt = plan.cost
    walks, halves = c.prompts_per_iteration * c.seeds, 2 if guided else 1
    rows, passes = walks * learnt, 2 if c.measures_kl else 1
    if c.objective == "srum":
        rows = walks * plan.learnt * c.draws
    if c.objective == "rgdpo":  # a pair is two images, and both are shown to the model without adapter
        rows, passes = c.prompts_per_iteration * (c.seeds * plan.learnt // 2) * c.draws, 4
    attended = 2 * rows if c.focus == "prompt" else 0
    return Cost(
        walks * forwards * halves + attended, rows * passes * c.epochs * halves, rows, walks * images,
        walks * images * len(c.trained),
    )  # fmt: skip


def cost(c: Config, times: Float[Tensor, "states"], levels: plans.Noise, guided: bool) -> Cost:
    """What an iteration may cost at most, wherever its windows stand."""
    placed = [astuple(cost_of(c, plan_for(c, times, levels, start), guided)) for start in window_starts(c)]
    return Cost(*(max(column) for column in zip(*placed, strict=True)))


def settled(c: Config, policy: Policy) -> tuple[Config, Float[Tensor, "states"], plans.Noise, Cost]:
    """What a config comes to with a policy: itself, thinned until it keeps its budgets, the times and noise of its
    steps, and what an iteration costs. Raises BadInput or ValueError where a step, the noise, the grid of credit or an
    evaluation's steps do not suit the policy."""
    times = policy.times(c.steps)
    levels = calibrate.load(locate(c.noise), c, times) if isinstance(c.noise, str) else c.noise
    check_noise(c, times, levels)
    if c.held_out:
        plans.ode(policy.times(c.eval_steps))
    high, wide = policy.latent_shape[1:]
    a, b = c.region_grid or (1, 1)
    if high % a or wide % b:
        raise BadInput(f"region_grid: {a}x{b} does not divide the latent's {high}x{wide} positions")
    thinned, spent = fit(c, times, levels, getattr(policy, "true_guidance", c.guidance > 1))
    return thinned, times, levels, spent


def fit(c: Config, times: Float[Tensor, "states"], levels: plans.Noise, guided: bool) -> tuple[Config, Cost]:
    """The config, thinned until it keeps `max_forwards` and `max_rewards`, and its cost; `guided`: a row's velocity
    takes two forwards.

    In this order: shorter completions, down to two steps (one is the jump to the predicted clean latent, which
    DenseGRPO found worse than no step-wise reward); every second, third, ... state, always with the first; fewer branch
    steps, the latest first, for the layout is decided early; fewer children, down to two. Raises BadInput where nothing
    fits.
    """
    if c.records:
        return c, Cost(0, 0, 0, 0, 0)  # nothing is sampled; replay takes as many images as the prompts have records
    for candidate in _candidates(c, times, levels):
        spent = cost(candidate, times, levels, guided)
        if spent.forwards <= (c.max_forwards or spent.forwards) and spent.rewards <= (c.max_rewards or spent.rewards):
            return candidate, spent
    raise BadInput(
        f"the thinnest plan takes {spent.forwards} forwards and {spent.rewards} rewards an iteration, allowed are "
        f"{c.max_forwards or 'any'} and {c.max_rewards or 'any'}; lower prompts_per_iteration or seeds"
    )


def check_noise(c: Config, times: Float[Tensor, "states"], levels: plans.Noise) -> None:
    """Raises BadInput for a stochastic step that draws next to no noise, whose density is one of rounding errors, or
    that leaves far more than belongs there: later steps cannot remove it, and every training image carries it."""
    placed = [] if c.records else [plan_for(c, times, levels, start) for start in window_starts(c)]
    for k in sorted({k for plan in placed for k in (plan.noise > 0).any(0).nonzero()[:, 0].tolist()}):
        (left, drawn), s = plans.noise_after(c.kernel, times, levels, k), float(times[k + 1])
        if not drawn >= LEAST:
            raise BadInput(
                f"step {k}, from t = {float(times[k]):.3g} to {s:.3g}, would draw noise of standard deviation "
                f"{drawn:.1g} ({c.kernel}), which rounding hides; raise noise, or leave the step deterministic"
            )
        if not (left <= TOO_MUCH * s or left <= NOTICEABLE):
            raise BadInput(
                f"step {k}, from t = {float(times[k]):.3g} to {s:.3g}, would leave {left / s:.1f} times the noise that "
                f"belongs there ({c.kernel}); keep it deterministic with a window or branch steps before it, or use "
                "kernel ddim or cps, which leave the right amount"
            )


def _candidates(c: Config, times: Float[Tensor, "states"], levels: plans.Noise) -> Iterator[Config]:
    branches: list[dict] = [{}]
    if c.plan == "branch":
        kept = sorted(c.branch_steps)
        branches = [{"branch_steps": kept[:n], "children": c.children} for n in range(len(kept), 0, -1)]
        branches += [{"branch_steps": kept[:1], "children": n} for n in range(c.children - 1, 1, -1)]
    for chosen in branches:
        thinner = c.model_copy(update=chosen)
        for states in _states(thinner, times, levels):
            for n in _lengths(thinner):
                yield thinner.model_copy(update={"score_states": states, "completion": n})


def _states(c: Config, times: Float[Tensor, "states"], levels: plans.Noise) -> Sequence[list[int] | str | None]:
    if not c.score_states or (c.score_states == "all" and c.window_moves):  # what is needed moves with the window
        return [c.score_states]
    states = c.score_states if c.score_states != "all" else needed(plan_for(c, times, levels, window_starts(c)[0]))
    return [c.score_states, *(states[::stride] for stride in range(2, len(states) + 1))]


def _lengths(c: Config) -> Sequence[int | list[int] | None]:
    if not c.score_states or isinstance(c.completion, list):
        return [c.completion]
    longest = c.completion or c.steps
    return [c.completion, *range(longest - 1, 1, -1)]


def describe(c: Config, spent: Cost) -> str:
    """One line: what a run does in an iteration and what it costs at most."""
    if c.records:
        return f"{c.objective} on the images of {c.prompts_per_iteration} prompts of {c.records} an iteration"
    what = {
        "ode": "no stochastic step",
        "sde": f"{c.steps - 1} stochastic steps",
        "window": f"stochastic window {list(c.window or ())}" + (f" ({c.window_moves})" if c.window_moves else ""),
        "branch": f"{c.children} children at steps {c.branch_steps}",
    }[c.plan]
    if c.score_states:
        length = "all steps that remain" if c.completion is None else f"steps {c.completion}"
        what += f"; states {c.score_states} completed by ODE, {length}"
    if c.objective != "grpo":
        what += f"; {c.objective} on the finished images, {c.draws} draws each"
    return f"{what}; an iteration takes at most {spent.rollout} + {spent.replay} forwards and {spent.rewards} rewards"
