"""GRPO on a two-dimensional Gaussian flow: the whole heart of mmalign in forty lines.

The flow starts as N(0, 1) in two dimensions, and its only parameter is a shift of the mean. The reward is the negative
squared distance from a target, so that the shift must find it. Run it: python examples/gaussian.py
"""

import torch
from torch import Tensor

from mmalign.credit import Terminal
from mmalign.flow.plan import sde
from mmalign.flow.sample import sample
from mmalign.learn.loss import Clipped
from mmalign.learn.update import update
from mmalign.objectives.replay import Surrogate, transitions
from mmalign.policy.gaussian import GaussianFlow
from mmalign.sampling.kernels import FlowSde
from mmalign.seeds import gaussian, seed_of
from mmalign.types import Judgement

TARGET, SIBLINGS, STEPS = torch.tensor([2.0, -1.0]), 32, 6


def train(iterations: int = 60, seed: int = 0) -> Tensor:
    """The learnt mean `[2]` after some iterations, each on its own `SIBLINGS` trajectories."""
    flow = GaussianFlow(shape=(2, 1, 1))
    plan = sde(flow.times(STEPS), FlowSde(noise=0.7))  # every step but the last draws noise
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.1)
    cond, prompt = flow.encode(["0.0"]), torch.zeros(SIBLINGS, dtype=torch.long)
    for iteration in range(iterations):

        def noise(*key, iteration=iteration):  # randomness is an argument: (start, step, draws so far) -> noise
            return gaussian(flow.latent_shape, seed_of(seed, iteration, *key))

        start = torch.stack([noise(i) for i in range(SIBLINGS)])
        paths = sample(flow.velocity, start, cond, prompt, plan, noise)
        reward = -(paths.finals.flatten(1) - TARGET).square().sum(1)
        judged = Judgement(paths.tree.at_states(reward), parts={})
        advantage = Terminal()(paths.tree, judged)
        replay = Surrogate(flow, cond, paths.kernel, paths.t_max, Clipped(clip=0.2))
        update(
            flow.parameters(), optimizer, transitions(paths, advantage), replay, epochs=1, minibatches=1,
            micro_batch=lambda work: work(1024), max_grad_norm=1.0, generator=torch.Generator().manual_seed(iteration),
        )  # fmt: skip
        if iteration % 10 == 9:
            print(f"iteration {iteration + 1}: reward {reward.mean():.2f}, mean {flow.shift.flatten().tolist()}")
    return flow.shift.detach().flatten()


if __name__ == "__main__":
    train()
