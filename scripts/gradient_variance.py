"""Bias and noise of each credit's policy gradient, on a flow whose exact gradient is known.

    python scripts/gradient_variance.py

A linear-Gaussian flow (`mmalign.policy.gaussian`), a quadratic reward, T = 6, `flow_sde` at a = 0.7, raw advantages.
Every estimate is the library's own: sample, credit, one replay. Exact gradients come from automatic differentiation
through the sampler with fixed noise, over many starts: of the reward under the noisy trajectory (the target of
terminal credit), of the reward of one noisy step followed by the ODE, summed over steps (the target of step-wise and
branch credit), and of the reward of the plain ODE (used in inference).

Noise is the trace of the covariance of one estimate over the squared length of its mean, times the forwards it took
(in thousands): the forwards, sampling and replay, after which the noise is as long as the gradient.
"""

from functools import partial

import torch
import typer
from torch import Tensor

from mmalign.credit import Branch, Gain, Terminal
from mmalign.credit.groups import Credit, Units
from mmalign.flow import kernels, plan as plans
from mmalign.flow.sample import sample
from mmalign.learn.loss import Clipped
from mmalign.learn.update import update
from mmalign.objectives.replay import Surrogate, transitions
from mmalign.policy.gaussian import GaussianFlow
from mmalign.sampling.kernels import FlowSde
from mmalign.seeds import gaussian, seed_of
from mmalign.training.microbatch import AdaptiveBatch
from mmalign.types import Judgement, Plan

SHAPE, STEPS, KERNEL = (2, 2, 2), 6, FlowSde(0.7)
RAW = Units("none")


def reward(x: Tensor) -> Tensor:
    """Less the mean square distance to a target."""
    target = torch.linspace(-1, 1, x[0].numel()).view(x.shape[1:])
    return -((x - target) ** 2).mean((1, 2, 3))


def variants(times: Tensor) -> dict[str, tuple]:
    """name -> (plan, credit, starts of one estimate, which exact gradient it estimates)."""
    sde, first = plans.sde(times, KERNEL), range(STEPS)
    branch = plans.branch(times, KERNEL, range(STEPS - 1), 8)
    return {
        "terminal": (sde, Terminal(), 16, "trajectory"),
        "terminal, window of 2": (plans.window(times, KERNEL, 0, 2), Terminal(), 16, "window"),
        "gain, n = remaining": (plans.complete(sde, first), Gain(), 16, "steps"),
        "gain, n = 2": (plans.complete(sde, first, 2), Gain(), 16, "steps"),
        "gain, n = 1": (plans.complete(sde, first, 1), Gain(), 16, "steps"),
        "branch, 8 children": (branch, Branch(), 2, "trunk"),
    }


def estimate(plan: Plan, credit: Credit, starts: int, seed: int) -> tuple[Tensor, int]:
    """The gradient of the expected reward (up to a factor) from one batch, and the forwards it took."""
    flow = GaussianFlow(SHAPE)
    draw = lambda *key: gaussian(SHAPE, seed_of("draw", seed, *key))  # noqa: E731
    start = torch.stack([gaussian(SHAPE, seed_of("start", seed, i)) for i in range(starts)])
    cond, index = flow.encode(["0.0"]), torch.zeros(starts, dtype=torch.long)
    paths = sample(flow.velocity, start, cond, index, plan, draw, batch=10**6)
    judged = Judgement(paths.tree.at_states(reward(paths.finals)), {})
    replay = Surrogate(flow, cond, paths.kernel, paths.t_max, Clipped(1.0))
    batch = transitions(paths, credit(paths.tree, judged, RAW))
    update(
        flow.parameters(), torch.optim.SGD(flow.parameters(), 0.0), batch, replay, epochs=1, minibatches=1,
        micro_batch=AdaptiveBatch(10**6), max_grad_norm=1e9, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    return -flow.shift.grad.flatten(), flow.counts["forwards"]


def exact(what: str, times: Tensor, starts: int = 20_000) -> Tensor:
    """The exact gradient with respect to the flow's shift: of the "ode", of the noisy "trajectory" or its "window" of
    two steps, or of single noisy "steps" from states of the trajectory or of the ODE "trunk"."""
    flow, g = GaussianFlow(SHAPE), torch.Generator().manual_seed(1)
    cond, index = flow.encode(["0.0"]), torch.zeros(starts, dtype=torch.long)
    x = torch.randn(starts, *SHAPE, generator=g)

    def advance(x, k, noisy):
        v = flow.velocity(x, times[k].expand(starts), cond, index)
        if not noisy:
            return kernels.ode(x, v, times[k], times[k + 1])[0]
        mean, std = kernels.flow_sde(x, v, times[k], times[k + 1], KERNEL.noise, plans.t_max_of(times))
        return mean + std[:, None, None, None] * torch.randn(x.shape, generator=g)

    if what in ("ode", "trajectory", "window"):
        noisy = {"ode": 0, "trajectory": STEPS - 1, "window": 2}[what]
        for k in range(STEPS):
            x = advance(x, k, k < noisy)
        reward(x).mean().backward()
        return flow.shift.grad.flatten()
    for k in range(STEPS - 1):
        y = advance(x, k, True)
        with flow.reference():  # the same velocity, not differentiated
            for j in range(k + 1, STEPS):
                y = advance(y, j, False)
            reward(y).mean().backward()
            x = advance(x, k, what == "steps").detach()
    return flow.shift.grad.flatten()


def measure(plan: Plan, credit: Credit, starts: int, repeats: int) -> tuple[Tensor, float, int]:
    """Mean of many estimates, the relative variance of one, and its forwards."""
    estimates = [estimate(plan, credit, starts, seed) for seed in range(repeats)]
    gradients = torch.stack([gradient for gradient, _ in estimates])
    mean = gradients.mean(0)
    noise = gradients.var(0).sum() / repeats
    signal = mean.square().sum() - noise  # the mean's own noise is not signal
    return mean, float(gradients.var(0).sum() / signal), estimates[0][1]


def main(repeats: int = 400) -> None:
    times, cosine = GaussianFlow(SHAPE).times(STEPS), partial(torch.cosine_similarity, dim=0)
    goals = {what: exact(what, times) for what in ("ode", "trajectory", "window", "steps", "trunk")}
    print("| credit | forwards of one estimate | cosine with its exact gradient | with the ODE's | noise |")
    print("|---|---|---|---|---|")
    for name, (plan, credit, starts, what) in variants(times).items():
        mean, variance, forwards = measure(plan, credit, starts, repeats)
        print(
            f"| {name} | {forwards} | {cosine(mean, goals[what]):.3f} | {cosine(mean, goals['ode']):.3f} | "
            f"{variance * forwards / 1000:.2f} |"
        )


if __name__ == "__main__":
    typer.run(main)
