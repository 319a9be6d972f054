"""From a config to plans: where a plan stands this iteration, which states it completes, and what fits a budget."""

from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.config.methods import described, named
from mmalign.config.paths import locate
from mmalign.config.schema import Config
from mmalign.errors import BadInput
from mmalign.extension.rest import rest
from mmalign.flow import plan as plans
from mmalign.latents import Columns
from mmalign.objectives.objective import Objective
from mmalign.policy.protocol import Policy, two_forwards
from mmalign.rewards import self_reward
from mmalign.seeds import seed_of
from mmalign.training import noise_calibration
from mmalign.types import Kernel, Plan

LEAST = 1e-5  # standard deviation that a stochastic step draws, in latent units; float32 rounds by some 5e-7 there
TOO_MUCH, NOTICEABLE = 2.0, 0.1  # standard deviation left after a step: in units of what belongs there; in latent units

Times = Float[Tensor, "states"]


@dataclass(frozen=True)
class Cost:
    """Of one iteration: network forwards (rollout with completions; replay), rows trained on, images decoded, and
    images scored, times reward scorers. At most: replay leaves out rows whose gradient is zero."""

    rollout: int
    replay: int
    rows: int
    images: int
    rewards: int

    @property
    def forwards(self) -> int:
        return self.rollout + self.replay


def plan_for(c: Config, times: Times, position: int | None = None) -> Plan:
    """The plan of a prompt's group at a position (None: its first), with the states that the credit needs completed."""
    position = c.plan.positions(c.steps)[0] if position is None else position
    plan, (states, lengths) = c.plan(times, c.kernel, position), completed(c, times, position)
    return plans.complete(plan, states, lengths) if states else plan


def completed(c: Config, times: Times, position: int) -> tuple[list[int], int | tuple[int, ...] | None]:
    """The states that the credit needs completed, and the lengths of their completions."""
    return ([], None) if c.credit is None else c.credit.completions(c.plan(times, c.kernel, position))


def read(c: Config, plans: Iterable[Plan]) -> Columns:
    """The latents kept of trajectories by these plans: what the objective, the credit or an extension reads."""
    needs = Columns()
    for plan in plans:
        needs |= c.objective.reads(plan) if c.extend is None else Columns.all(plan.steps)
        if c.credit is not None and (c.credit.drifts or c.credit.learner is not None):
            needs |= Columns.around(plan.stochastic)
    return needs


def position_of(c: Config, iteration: int, prompt_id: int) -> int:
    """Where the plan of a prompt's group stands in an iteration. Siblings share it."""
    return c.plan.position(iteration, c.steps, seed_of(c.seed, "window", iteration, prompt_id))


def cost_of(c: Config, plan: Plan, guided: bool) -> Cost:
    """The cost of an iteration where all groups have this plan; `guided`: a row's velocity takes two forwards."""
    starts, halves = c.prompts_per_iteration * c.seeds, 2 if guided else 1
    forwards, images = starts * plan.cost[0], starts * plan.cost[1]
    if c.scouts is not None:
        forwards += c.prompts_per_iteration * c.scouts.starts(c.seeds) * c.scouts.steps
        images += c.prompts_per_iteration * c.scouts.images(c.seeds)
    extra, unfinished = 0, starts * (plan.routes - plan.trained)
    if c.extend is not None:
        more = [c.prompts_per_iteration * each for each in extended(c, plan)]
        forwards, images, extra = forwards + more[0], images + more[1], more[2] if c.select is None else 0
        unfinished += more[1] - more[3]
    finished = images - unfinished
    rewards = images * (len(c.trained) - len(c.late)) + finished * len(c.late)
    forwards += 0 if c.credit is None else starts * plan.cost[2] * c.credit.forwards
    early = [name for name in c.trained if name not in c.late]
    scoring = images * self_reward.forwards(c, early) + finished * self_reward.forwards(c, c.late)
    before, replay, rows, in_graph = forwards * halves + scoring, 0, 0, 0
    for part in c.objective.summands:
        learnt = c.prompts_per_iteration * rows_of(c, plan, part) + extra
        shared = c.prompts_per_iteration * forwards_of(c, plan, part) + extra
        masked = c.mask.forwards if c.mask is not None and "mask" in part.uses else 0
        before += learnt * (part.prepared(c.epochs * c.minibatches) * halves + masked)
        replay += 0 if c.reuse else shared * part.replayed(part.measures(c)) * c.epochs * halves
        in_graph += learnt * part.decoded * c.epochs
        rows += learnt
    return Cost(before, replay, rows, images + in_graph, rewards + in_graph * len(c.trained))


def rows_of(c: Config, plan: Plan, part: Objective) -> int:
    """The rows of one prompt that a part of the objective learns from, at most: the selected images count as as many
    starts of one route."""
    rows = part.rows(plan, c.seeds)
    return rows if c.select is None else min(rows, part.rows(plans.alone(plan), c.select.keep))


def forwards_of(c: Config, plan: Plan, part: Objective) -> int:
    """The forwards that the rows of one prompt share, at most: all may do so where one minibatch has them."""
    rows = rows_of(c, plan, part)
    return rows if c.minibatches > 1 else min(rows, part.states(plan, c.seeds))


def extended(c: Config, plan: Plan) -> tuple[int, int, int, int]:
    """What an extension adds to one prompt, at most: forwards, images, rows, and how many of the images are of finished
    trajectories. A rest costs most from its earliest state, on the trajectory with most stochastic steps; its states
    are completed as those of the plan."""
    number, k = c.extend.most(plan, c.seeds)
    row = int((plan.noise[: plan.trained] > 0).sum(1).argmax())
    shown = plan.finished_by[row, : plan.steps]
    states = [s for s in range(k + 1, plan.steps) if shown[s] >= 0 and plan.t[row, s] > 0]
    lengths = [int((plan.t[shown[s], s:] > 0).sum()) for s in states]
    each = rest(plan.t[row], plan.noise[row], k, plan.kernel, plan.t_max, states, lengths).cost
    return number * each[0], number * each[1], number * each[2], number


def cost(c: Config, times: Times, guided: bool) -> Cost:
    """The most that an iteration may cost, over all positions of the plan."""
    costs = [astuple(cost_of(c, plan_for(c, times, position), guided)) for position in c.plan.positions(c.steps)]
    return Cost(*(max(column) for column in zip(*costs, strict=True)))


def settled(c: Config, policy: Policy) -> tuple[Config, Times, Cost]:
    """A config with a policy: its noise read from the calibration, thinned until it keeps its budgets; the times of its
    steps; the cost of an iteration. Raises BadInput or ValueError where a step, the noise, the credit grid or an
    evaluation's steps do not suit the policy."""
    times = policy.times(c.steps)
    if isinstance(c.kernel.noise, str):
        levels = noise_calibration.load(locate(c.kernel.noise), c, times)
        c = c.model_copy(update={"kernel": replace(c.kernel, noise=tuple(levels))})
    check_noise(c, times)
    if c.held_out:
        plans.ode(policy.times(c.eval_steps))
    if c.scouts is not None:
        plans.ode(policy.times(c.scouts.steps))
    high, wide = policy.latent_shape[1:]
    a, b = c.region_grid or (1, 1)
    if high % a or wide % b:
        raise BadInput(f"region_grid: {a}x{b} does not divide the latent's {high}x{wide} positions")
    thinned, spent = fit(c, times, two_forwards(policy, c.guidance))
    return thinned, times, spent


def fit(c: Config, times: Times, guided: bool) -> tuple[Config, Cost]:
    """The config, thinned until it keeps `max_forwards` and `max_rewards`, and its cost; `guided`: a row's velocity
    takes two forwards. First the credit is thinned, then the plan, each in its own order. Raises BadInput where nothing
    fits."""
    if c.records:
        return c, Cost(0, 0, 0, 0, 0)  # nothing is sampled; replay takes as many images as the prompts have records
    for candidate in _candidates(c, times):
        spent = cost(candidate, times, guided)
        if spent.forwards <= (c.max_forwards or spent.forwards) and spent.rewards <= (c.max_rewards or spent.rewards):
            return candidate, spent
    raise BadInput(
        f"the thinnest plan takes {spent.forwards} forwards and {spent.rewards} rewards an iteration, allowed are "
        f"{c.max_forwards or 'any'} and {c.max_rewards or 'any'}; lower prompts_per_iteration or seeds"
    )


def _candidates(c: Config, times: Times) -> Iterator[Config]:
    yield c
    positions = c.plan.positions(c.steps)
    for plan in (c.plan, *c.plan.thinner()):
        thinner = c.model_copy(update={"plan": plan})
        if c.credit is None:
            yield thinner
            continue
        table = plan(times, c.kernel, positions[0]) if len(positions) == 1 else None
        for credit in c.credit.thinner(table, c.steps):
            yield thinner.model_copy(update={"credit": credit})


def noise_after(kernel: Kernel, t: Times, noise: float, k: int) -> tuple[float, float]:
    """The standard deviation of the noise in the state after step k, if velocities are exact; `s = t[k+1]` belongs
    there. And of the part of it that the step draws.

    Exactly s for ODE, `cps` and `ddim`. Euler-Maruyama steps leave `sqrt(s^2 + h^2 (g^2/t + g^4/4t^2))`, which is
    harmless where h is small beside s. On the ten-step schedule of stock SD3.5 (shift 3, applied twice) one step goes
    from t = 0.278 to 0.0089: `flow_sde` at a = 0.7 leaves 27 times too much there, and every training image carries it.
    """
    one = torch.ones(1, 1, 1, 1)
    # of clean latent 0 and noise 1 the state is t, the velocity 1, and the mean of the next state m
    mean, std = kernel.step(t[k] * one, one, t[k], t[k + 1], noise, plans.t_max_of(t))
    return float((mean[0, 0, 0, 0] ** 2 + std[0] ** 2).sqrt()), float(std[0])


def check_noise(c: Config, times: Times) -> None:
    """Raises BadInput for a stochastic step that draws next to no noise, whose density is one of rounding errors, or
    that leaves far more than belongs there: later steps cannot remove it, and every training image carries it."""
    positions = [] if c.records else c.plan.positions(c.steps)
    for plan in (c.plan(times, c.kernel, position) for position in positions):
        for k in plan.stochastic:
            level = float(plan.noise[:, k].max())
            (left, drawn), t, s = noise_after(c.kernel, times, level, k), float(times[k]), float(times[k + 1])
            if not drawn >= LEAST:
                raise BadInput(
                    f"step {k}, from t = {t:.3g} to {s:.3g}, would draw noise of standard deviation {drawn:.1g} "
                    f"({named(c.kernel)}), which rounding hides; raise noise, or leave the step deterministic"
                )
            if not (left <= TOO_MUCH * s or left <= NOTICEABLE):
                raise BadInput(
                    f"step {k}, from t = {t:.3g} to {s:.3g}, would leave {left / s:.1f} times the noise that belongs "
                    f"there ({named(c.kernel)}); keep it deterministic with a window or branch steps before it, or use "
                    "kernel ddim or cps, which leave the right amount"
                )


def describe(c: Config, spent: Cost) -> str:
    """One line: what a run does in an iteration and what it costs at most."""
    if c.records:
        return f"{named(c.objective)} on the images of {c.prompts_per_iteration} prompts of {c.records} an iteration"
    methods = {"plan": c.plan, "kernel": c.kernel, "credit": c.credit, "objective": c.objective, "select": c.select}
    what = ", ".join(f"{key} {described(method)}" for key, method in methods.items() if method is not None)
    if c.scouts is not None:
        what += (
            f", of {c.scouts.starts(c.seeds)} scouts of {c.scouts.steps} steps for each prompt the {c.seeds} extremes"
        )
    return f"{what}; an iteration takes at most {spent.rollout} + {spent.replay} forwards and {spent.rewards} rewards"
