"""Memory and direction of each way of back-propagating a reward, on the embedded model with the reward `clip`.

    python scripts/backprop_memory.py --batches 24

The adapter is new, as at the first update of a run. Memory is the size of all tensors that the graph of one image saves
for its backward pass, each storage once and without parameters: of the velocities alone, and with decoder and scorer.
The cosine is that of a batch's gradient with the one of back-propagation through all steps on the same images, mean
over batches, with its standard error; "of means" is between the means over all batches, in which noise is smaller.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mmalign import policy as policies
from mmalign.config import load as configs
from mmalign.objectives.backprop import Backprop
from mmalign.objectives.ways import Jump, Last, LowVariance, Sparse, Way
from mmalign.training.rollout import Rollout, judged, sample_and_score
from mmalign.training.session import Session
from mmalign.training.setup import open_session

WAYS = {
    "all steps": lambda steps: Last(steps=steps),
    "last, K = 1": lambda steps: Last(steps=1),
    "last, K = 3": lambda steps: Last(steps=3),
    "sparse, K = 1": lambda steps: Sparse(steps=1),
    "sparse, K = 3": lambda steps: Sparse(steps=3),
    "sparse, K = 3, even": lambda steps: Sparse(steps=3, power=0.0, correct=1.0),
    "sparse, all steps": lambda steps: Sparse(steps=steps),
    "jump": lambda steps: Jump(),
    "low_variance, 2 copies": lambda steps: LowVariance(copies=2),
}


@contextmanager
def saved(run: Session) -> Iterator[dict[int, int]]:
    """Bytes that graphs made inside save, by the address of the storage; parameters are left out."""
    modules = [run.policy.pipe.transformer, run.policy.pipe.vae, *(s.model for s in run.rewards.scorers.values())]
    weights = {p.untyped_storage().data_ptr() for module in modules for p in module.parameters()}
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield sizes


def memory(run: Session, rollout: Rollout, way: Way) -> tuple[int, int]:
    """Bytes saved for one image: by the velocities, and by all."""
    judgement = judged(run, rollout, 0)
    batch = Backprop(way, pull=0.0).batch(run, rollout, judgement, None, 0)
    row = batch.rows[:1]
    with saved(run) as of_velocities:
        latents, _ = way.latents(lambda x, t, index: run.policy.velocity(x, t, rollout.cond, index).float(), row)
    del latents
    with saved(run) as of_all:
        loss, _ = batch.replay(row)
    del loss
    return sum(of_velocities.values()), sum(of_all.values())


def gradient(run: Session, rollout: Rollout, way: Way, iteration: int) -> Tensor:
    batch = Backprop(way, pull=0.0).batch(run, rollout, judged(run, rollout, iteration), None, iteration)
    for p in run.policy.parameters():
        p.grad = None
    for k in range(0, len(batch.rows), 4):
        (batch.replay(batch.rows[k : k + 4])[0].sum() / len(batch.rows)).backward()
    return torch.cat([p.grad.flatten() for p in run.policy.parameters()])


def main(
    batches: Annotated[int, typer.Option(min=2, help="batches of eight prompts, an image each")] = 24,
    steps: Annotated[int, typer.Option(min=3, help="T")] = 10,
) -> None:
    torch.set_num_threads(1)
    policies.quiet()
    c = configs.load(
        "configs/quickstart.yaml",
        ["objective=backprop", "advantage=null", "rewards={clip.cosine: 1.0}", "watch=[]", f"steps={steps}", "seeds=1",
         "out=runs/backprop_memory"],
    )  # fmt: skip
    run = open_session(c)
    ways = {name: make(steps) for name, make in WAYS.items()}
    gradients: dict[str, list[Tensor]] = {name: [] for name in ways}
    sizes = {}
    for i in range(batches):
        rollout = sample_and_score(run, run.prompts(i), i)
        sizes = sizes or {name: memory(run, rollout, way) for name, way in ways.items()}
        for name, way in ways.items():
            gradients[name].append(gradient(run, rollout, way, i))
    full, *_ = gradients
    table = Table("way", "velocities, MB", "share", "with decoder and clip, MB", "cosine", "of means")
    for name in ways:
        each = torch.stack(
            [torch.cosine_similarity(*pair, 0) for pair in zip(gradients[name], gradients[full], strict=True)]
        )
        means = [torch.stack(gradients[which]).mean(0) for which in (name, full)]
        alone, every = sizes[name]
        table.add_row(
            name, f"{alone / 1e6:.2f}", f"{alone / sizes[full][0]:.2f}", f"{every / 1e6:.2f}",
            f"{float(each.mean()):.3f} ± {float(each.std()) / batches**0.5:.3f}",
            f"{float(torch.cosine_similarity(*means, 0)):.3f}",
        )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
