"""Train the classifier of an embedded world and write it, with its card, to assets/.

    python scripts/build_classifier.py                      # shapes: about ten minutes of one core
    python scripts/build_classifier.py --world things --samples 1200 --steps 4500 --repeats 2     # about forty
    python scripts/build_classifier.py --steps 50 --drawings 2000 --samples 100 --out /tmp/try

It learns what the verifier sees on drawings and on images of the world's embedded model, of training captions alone.
The result depends only on the arguments and the torch build. All figures on the card are of captions that were not
trained on.
"""

import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from build_tiny_clip import changes
from build_tiny_model import cooled
from jaxtyping import Bool, Float, Int, UInt8
from rich.progress import track
from safetensors.torch import save
from scipy.stats import mannwhitneyu
from tiny_worlds import WORLDS, World, console, draw_chunk, world_of
from torch import Tensor, nn
from torch.nn import functional as F

from mmalign.config.paths import locate
from mmalign.evaluation.generate import generate
from mmalign.policy import load as load_policy
from reward_models import files, load
from reward_models.classifier import WEIGHTS, Classes, Classifier, Network, Parts
from reward_models.images import rounded
from reward_models.types import Prompt
from reward_models.verdicts import Blob
from reward_models.worlds import RELATIONS, caption

STEPS = 6  # of the sampler
LEARNING_RATE = 2e-3


# ------------------------------------------------------------------------------------------------------------- labels


def labels_of(classes: Classes, rows: list[list[Blob]]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """What the verifier sees in `N` images: counts [N, K+1]; the value of each attribute of each kind, -1 if it is
    absent, [N, K]; its centre and longer side if it is there once, else NaN, [N, K, 3]."""
    kinds = len(classes.kinds)
    counts = torch.zeros(len(rows), kinds + 1, dtype=torch.long)
    attributes = {name: torch.full((len(rows), kinds), -1) for name in classes.attributes}
    places = torch.full((len(rows), kinds, 3), torch.nan)
    for n, blobs in enumerate(rows):
        for blob in blobs:
            kind = classes.kinds.index(blob.name) if blob.name in classes.kinds else classes.surplus
            counts[n, kind] += 1
            if kind != classes.surplus:
                for name, values in attributes.items():
                    value = classes.attributes[name].index({"color": blob.colour, "style": blob.style}[name])
                    values[n, kind] = value if values[n, kind] in (-1, value) else classes.mixed(name)
                places[n, kind] = torch.tensor([*blob.centre, blob.extent])
        places[n, counts[n, :-1] != 1] = torch.nan
    return counts.clamp(max=classes.most), attributes, places


def loss_of(network: Network, parts: Parts, counts: Tensor, attributes: dict[str, Tensor], places: Tensor) -> Tensor:
    """The cross-entropies of all that the network says, and its error of places and sizes in px."""
    once = places[..., 0].isfinite()
    loss = F.cross_entropy(parts.counts.flatten(0, 1), counts.flatten()) * len(network.classes.kinds)
    for name, values in attributes.items():
        loss = loss + F.cross_entropy(parts.attributes[name].flatten(0, 1), values.flatten(), ignore_index=-1)
    if not bool(once.any()):
        return loss
    where = torch.cat([parts.centres, parts.extents[..., None]], -1)
    loss = loss + 0.3 * F.smooth_l1_loss(where[once], places[once])
    classes, sizes, extents = network.classes, places[..., 2][once], parts.extents[once]
    for odds, true in (
        (network.small(extents), sizes <= classes.small),
        (network.large(extents), sizes >= classes.large),
    ):
        loss = loss + F.binary_cross_entropy_with_logits(odds, true.float())
    n, one, two = _pairs(once)
    if len(n):
        first, second = places[n, one, :2], places[n, two, :2]
        odds = network.ordered(parts.centres[n, one], parts.centres[n, two])
        loss = loss + F.binary_cross_entropy_with_logits(odds, (first[:, 0] < second[:, 0]).float())
        for relation in RELATIONS:
            odds = network.related(relation, parts.centres[n, one], parts.centres[n, two])
            loss = loss + F.binary_cross_entropy_with_logits(odds, _holds(classes, relation, first, second).float())
    return loss


def floats(parts: Parts) -> Parts:
    """In single precision, in which the losses are computed."""
    attributes = {name: values.float() for name, values in parts.attributes.items()}
    return Parts(parts.counts.float(), attributes, parts.centres.float(), parts.extents.float())


def _pairs(once: Bool[Tensor, "N K"]) -> tuple[Int[Tensor, "P"], ...]:
    """The image and the kinds of all ordered pairs of objects that are there once."""
    both = once[:, :, None] & once[:, None] & ~torch.eye(once.shape[1], dtype=torch.bool)
    return both.nonzero(as_tuple=True)


def _holds(
    classes: Classes, relation: str, first: Float[Tensor, "P 2"], second: Float[Tensor, "P 2"]
) -> Bool[Tensor, "P"]:
    sign_x, sign_y = RELATIONS[relation]
    x, y = (first - second).unbind(-1)
    along, across = x * sign_x + y * sign_y, (x * sign_y + y * sign_x).abs()
    return (along >= classes.offset) & (along > across)


# ----------------------------------------------------------------------------------------------------------- training


def drawn(world: World, count: int) -> UInt8[Tensor, "n 3 S S"]:
    """`count` drawings of training captions."""
    chunk, parts = 0, []
    while sum(map(len, parts)) < count:
        parts.append(draw_chunk(world.name, chunk)[0])
        chunk += 1
    return torch.from_numpy(np.concatenate(parts))[:count]


def sampled(world: World, prompts: list[Prompt], seeds: list[list[int]]) -> Float[Tensor, "n 3 S S"]:
    """Images of the embedded model, rounded."""
    if not prompts:
        return torch.zeros(0, 3, world.side, world.side)
    with torch.no_grad():
        images, _ = generate(load_policy(locate(f"assets/{world.model}")), prompts, seeds, STEPS, 64)
    return rounded(images)


def trained(
    world: World, drawings: UInt8[Tensor, "n 3 S S"], images: Float[Tensor, "m 3 S S"], steps: int, batch: int
) -> Network:
    """Half of each batch is drawings, half is images of the model if there are any; some noise on a part of both."""
    everything = torch.cat([drawings, (images * 255).round().to(torch.uint8)])
    blobs = []
    for start in track(range(0, len(everything), 256), "verifying", console=console):
        blobs += world.find(everything[start : start + 256].numpy().astype(np.float32) / 255)
    counts, attributes, places = labels_of(world.classes, blobs)
    torch.manual_seed(0)
    network = Network(world.classes)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    first = batch // 2 if len(images) else batch
    for step in track(range(steps), "training", console=console):
        g = torch.Generator().manual_seed(step)
        rows = torch.randint(len(drawings), (first,), generator=g)
        if len(images):
            of_model = torch.randint(len(drawings), len(everything), (batch - first,), generator=g)
            rows = torch.cat([rows, of_model])
        x = everything[rows].float() / 255
        x = x + 0.04 * torch.rand(batch, 1, 1, 1, generator=g).square() * torch.randn(x.shape, generator=g)
        labels = {name: values[rows] for name, values in attributes.items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=world.half):
            parts = network(x)
        loss = loss_of(network, floats(parts), counts[rows], labels, places[rows])
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * cooled(step, steps, share=0.5)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            console.print(f"step {step} loss {loss.item():.3f}")
    return network.eval()


# -------------------------------------------------------------------------------------------------------- measurement


def area(right: Tensor, wrong: Tensor) -> float:
    """The area under the ROC curve."""
    return float(mannwhitneyu(right.numpy(), wrong.numpy()).statistic / (len(right) * len(wrong)))


def on_samples(world: World, scorer: Classifier, part: str) -> str:
    """A row of the card: two images of the model of each prompt, against the verifier."""
    prompts = world.held_out(part)
    images = sampled(world, prompts, [[0, 1]] * len(prompts))
    prompts = [prompt for prompt in prompts for _ in range(2)]
    truth = load(world.name)(images, prompts).values[:, 0]
    values = scorer(images, prompts).values
    right, share = values[:, 0], float(truth.mean())
    logit = values[:, 1]
    agree = float(((right > 0.5) == (truth > 0.5)).float().mean())
    cells = (share, area(logit[truth > 0], logit[truth == 0]), agree, float(right.mean()))
    return f"| {part} | {len(images)} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |"


def on_drawings(world: World, scorer: Classifier, prompts: list[Prompt]) -> list[str]:
    """Rows of the card: drawings of held-out captions with their caption, and with one in which one thing is wrong."""
    rng = np.random.default_rng([2024, 7])
    images = rounded(torch.from_numpy(np.stack([world.draw(prompt.wants, rng) for prompt in prompts])))
    good = scorer(images, prompts).values[:, 1]
    wrong: dict[str, list[tuple[int, Prompt]]] = {}
    for i, prompt in enumerate(prompts):
        for kind, wants in changes(world, prompt.wants, rng).items():
            wrong.setdefault(kind, []).append((i, Prompt(caption(wants), wants)))
    rows = []
    for kind, pairs in sorted(wrong.items()):
        index = [i for i, _ in pairs]
        bad = scorer(images[index], [other for _, other in pairs]).values[:, 1]
        order = float((good[index] > bad).float().mean())
        rows.append(f"| {kind} | {area(good[index], bad):.3f} | {order:.3f} | {len(index)} |")
    return rows


CARD = """---
license: apache-2.0
---

# {name}

A convolutional network that sees in a picture of the embedded world (`reward_models/{world}_world.py`) what the
verifier `{world}` sees, with gradients at the pixels: the scorer `{name}`. {parameters:,} parameters,
stored in half precision.

## How it was made

<!-- needs: hours -->
```
{command}
```

{drawings:,} drawings and {sampled:,} images of `{model}` ({sampler} steps, no guidance), all of training captions,
with the objects that the verifier finds in them; {steps:,} AdamW steps of {batch} images{halves}.
{minutes:.1f} minutes on 1 CPU thread, drawing and sampling included. The result depends only on the command and the
torch build (here {torch}).

## Figures

{samples}Drawings of captions that were not trained on, each with its caption and with one in which one thing is wrong:
the area under the ROC curve of `logit`, pooled, and the share of drawings on which the right caption scores higher.

| what is wrong with the caption | area under ROC | right order | pairs |
|---|---|---|---|
{rows}

## Limits

It knows only the words of `{world}_world.py`, and pictures like those above. The parts of a caption count as
independent, which they are not quite. A policy that is trained against it finds images that it misjudges: judge these
by `{world}`.
"""
SAMPLES = """Images of `{model}` for prompts that were not trained on, two of each, against `{world}.strict`. The area
under the ROC curve is that of `logit` over all images; they agree where `right` is above 0.5 exactly if the image is.

| prompts | images | strict | area under ROC | agree | mean of `right` |
|---|---|---|---|---|---|
{rows}

"""


def main(
    out: Annotated[Path | None, typer.Option(help="folder the model is written to, by default in assets/")] = None,
    name: Annotated[str, typer.Option("--world", help=" or ".join(WORLDS))] = "shapes",
    drawings: Annotated[int, typer.Option(help="drawings to learn from")] = 20_000,
    samples: Annotated[int, typer.Option(help="images of the embedded model to learn from; 0: drawings alone")] = 3_600,
    steps: Annotated[int, typer.Option(help="training steps")] = 1500,
    batch: Annotated[int, typer.Option(help="images per step")] = 96,
    repeats: Annotated[int, typer.Option(help="drawings of each held-out caption")] = 4,
) -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    began, world = time.monotonic(), world_of(name)
    training, out = world.training(), out or Path("assets") / world.classes.name
    chosen = [training[i] for i in np.random.default_rng(2024).integers(len(training), size=samples)]
    images = sampled(world, chosen, [[seed] for seed in range(samples)])
    console.print(f"{samples} images after {time.monotonic() - began:.0f} s")
    network = trained(world, drawn(world, drawings), images, steps, batch)
    minutes = (time.monotonic() - began) / 60
    out.mkdir(parents=True, exist_ok=True)
    files.replace(out / WEIGHTS, save({name: value.half() for name, value in network.state_dict().items()}))
    scorer = Classifier(world.classes, str(out))
    arguments = f"--world {name} --drawings {drawings} --samples {samples} --steps {steps} --batch {batch}"
    of_model = "\n".join(on_samples(world, scorer, part) for part in ("validation", "test")) if samples else ""
    card = CARD.format(
        name=world.classes.name,
        world=name,
        model=world.model,
        parameters=sum(p.numel() for p in network.parameters()),
        command=f"python scripts/build_classifier.py {arguments} --repeats {repeats}",
        drawings=drawings,
        sampled=samples,
        sampler=STEPS,
        steps=steps,
        batch=batch,
        halves=", half of each" if samples else "",
        minutes=minutes,
        torch=torch.__version__,
        samples=SAMPLES.format(model=world.model, world=name, rows=of_model) if samples else "",
        rows="\n".join(on_drawings(world, scorer, world.held_out("validation") * repeats)),
    )
    files.write(out / "README.md", card)
    console.print(card)


if __name__ == "__main__":
    typer.run(main)
