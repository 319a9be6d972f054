"""Train the tiny CLIP model of an embedded world and write it, with its model card, to assets/.

    python scripts/build_tiny_clip.py                      # shapes: everything, resumed where it stopped
    python scripts/build_tiny_clip.py --world things
    python scripts/build_tiny_clip.py --steps 50 --images 2000 --out /tmp/try --work /tmp/work

Three stages: pictures and weights are cached in --work, the measurement is quick. The result depends
only on the arguments and the torch build, not on interruptions. open_clip reads the folder as `local-dir:`; the
tokenizer is the one of the world's tiny Stable Diffusion 3, in which each word is one token.
"""

import json
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from build_tiny_model import cooled, train
from jaxtyping import Float, Int
from open_clip.model import CLIP
from safetensors.torch import save_file
from scipy.stats import mannwhitneyu
from tiny_worlds import MAX_TOKENS, WORLDS, World, build_pictures, console, new_tokenizer, to_uint8, world_of
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTokenizer

from reward_models import files, load
from reward_models.scorers.clip import Clip, clip
from reward_models.shapes_world import GLYPHS
from reward_models.types import Prompt
from reward_models.worlds import OPPOSITE, caption, meaning

MEAN, STD = 0.5, 0.25
LEARNING_RATE = 2e-3


# -------------------------------------------------------------------------------------------------------- training


def architecture(world: World, vocabulary: int) -> dict:
    """The model's part of an open_clip configuration."""
    return {
        "embed_dim": 64,
        "vision_cfg": {"image_size": world.side, "patch_size": 8, "width": 96, "head_width": 24, "layers": 4},
        "text_cfg": {
            "context_length": MAX_TOKENS,
            "vocab_size": vocabulary,
            "hf_tokenizer_name": "tiny_clip",  # any name: open_clip then reads the folder's own tokenizer
            "width": 64,
            "heads": 4,
            "layers": 3,
        },
    }


def contrastive(
    image: Float[Tensor, "B D"], text: Float[Tensor, "B D"], same: Int[Tensor, "B B"], scale: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """CLIP's symmetric cross-entropy (arXiv 2103.00020) of normalised embeddings.

    `same` marks pairs with the same meaning: off the diagonal they are left out, because they are not wrong.
    """
    twins = same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
    logits = (scale * image @ text.T).masked_fill(twins, -torch.inf)
    right = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2


def build_clip(
    world: World,
    pictures: Tensor,
    captions: Tensor,
    tokenizer: CLIPTokenizer,
    work: Path,
    steps: int,
    batch: int,
    device: str,
) -> tuple[CLIP, float]:
    """The trained model and the seconds its training took, interruptions not counted.

    Half of each batch shares one tag, so that captions also compete with near ones. A little noise keeps the model
    from relying on the drawings' perfect flatness, which generated pictures do not have.
    """
    prompts = world.training()
    ids = tokenizer([p.text for p in prompts], padding="max_length", return_tensors="pt").input_ids
    means = {text: number for number, text in enumerate(sorted({meaning(p.wants) for p in prompts}))}
    says = torch.tensor([means[meaning(p.wants)] for p in prompts])
    tag = torch.tensor([world.tags.index(p.wants["tag"]) for p in prompts])[captions]
    members = [(tag == k).nonzero()[:, 0] for k in range(len(world.tags))]
    share = torch.tensor([float(len(m)) for m in members])

    torch.manual_seed(3)
    model = CLIP(**architecture(world, len(tokenizer))).to(device)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))
    clock = nn.Module()
    clock.register_buffer("seconds", torch.zeros((), dtype=torch.float64))

    def step_fn(step: int) -> Tensor:
        began = time.monotonic()
        g = torch.Generator().manual_seed(30_000_000 + step)
        near = members[int(torch.multinomial(share, 1, generator=g))]
        index = torch.cat(
            [
                torch.randint(len(pictures), (batch - batch // 2,), generator=g),
                near[torch.randint(len(near), (batch // 2,), generator=g)],
            ]
        )
        x = pictures[index].float() / 255
        x = x + 0.06 * torch.rand(batch, 1, 1, 1, generator=g) * torch.randn(x.shape, generator=g)
        meaning = says[captions[index]]
        x, text = ((x.clamp(0, 1) - MEAN) / STD).to(device), ids[captions[index]].to(device)
        image, text = model.encode_image(x, normalize=True), model.encode_text(text, normalize=True)
        loss = contrastive(image, text, (meaning[:, None] == meaning).to(device), model.logit_scale.exp())
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * cooled(step, steps, share=0.6)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=np.log(100))
        clock.seconds += time.monotonic() - began
        return loss.detach()

    train("clip", step_fn, {"clip": model, "optimizer": optimizer, "clock": clock}, steps, work)
    return model.eval().cpu(), float(clock.seconds)


def write_model(world: World, out: Path, model: CLIP, tokenizer: CLIPTokenizer) -> None:
    """The folder open_clip reads; weights in half precision, which it widens again on loading."""
    out.mkdir(parents=True, exist_ok=True)
    shown = {"size": world.side, "mean": [MEAN] * 3, "std": [STD] * 3}
    shown |= {"interpolation": "bicubic", "resize_mode": "shortest"}
    config = {"model_cfg": architecture(world, len(tokenizer)), "preprocess_cfg": shown}
    files.write(out / "open_clip_config.json", json.dumps(config, indent=2) + "\n")
    halved = {name: v.half() if v.is_floating_point() else v for name, v in model.state_dict().items()}
    save_file({name: v.contiguous() for name, v in halved.items()}, out / "open_clip_model.safetensors")
    tokenizer.save_pretrained(out)


# ----------------------------------------------------------------------------------------------------- measurement


def changes(world: World, wants: dict, rng: np.random.Generator) -> dict[str, dict]:
    """Requests that differ from this one in one thing asked for, keyed by what was changed."""
    if wants["tag"] == "text":
        at = rng.integers(len(wants["text"]))
        letter = rng.choice([g for g in GLYPHS if g not in wants["text"]])
        return {"letter": wants | {"text": wants["text"][:at] + str(letter) + wants["text"][at + 1 :]}}
    include = wants["include"]
    which = int(rng.integers(len(include)))

    def changed(at: int, **new) -> dict:
        return wants | {"include": [item | new if i == at else item for i, item in enumerate(include)]}

    other = str(rng.choice([s for s in world.nouns if s not in _all(include, "class")]))
    out = {world.noun: changed(which, **{"class": other})}
    coloured = [i for i, item in enumerate(include) if "color" in item]
    if coloured:
        other = str(rng.choice([c for c in world.colours if c not in _all(include, "color")]))
        out["colour"] = changed(int(rng.choice(coloured)), color=other)
    if len(_all(include, "color")) == 2:
        first, second = (item["color"] for item in include)
        swapped = [item | {"color": c} for item, c in zip(include, (second, first), strict=True)]
        out["colours swapped"] = wants | {"include": swapped}
    if wants["tag"] == "counting":
        other = int(rng.choice([n for n in world.counts if n != include[0]["count"]]))
        out["count"] = changed(0, count=other)
    if wants["tag"] == "position":
        relation, anchor = include[0]["position"]
        out["relation"] = changed(0, position=[OPPOSITE[relation], anchor])
    if "size" in include[0]:
        out["size"] = changed(0, size={"small": "large", "large": "small"}[include[0]["size"]])
    if "style" in include[0]:
        out["style"] = changed(0, style={"flat": "shaded", "shaded": "flat"}[include[0]["style"]])
    return out


def _all(include: list[dict], key: str) -> set:
    return {item[key] for item in include if key in item}


def measure(world: World, scorer: Clip, held_out: list[Prompt], repeats: int) -> dict[str, tuple[float, float, int]]:
    """The error of the caption -> (area under the ROC curve, share of pairs in the right order, pairs).

    Every held-out caption is drawn `repeats` times. The wrong captions are another held-out one and each of
    `changes`; the verifier confirms that they are wrong, because a picture of "a red circle" also shows "a circle".
    """
    rng, verifier = np.random.default_rng([2024, 7]), load(world.name)
    pictures, right, wrong = [], [], []
    for prompt in held_out * repeats:
        picture = to_uint8(world.draw(prompt.wants, rng)).astype(np.float32) / 255
        while True:
            other = held_out[rng.integers(len(held_out))]
            if not verifier(torch.from_numpy(picture[None]), [other]).values[0, 0]:
                break
        pictures.append(picture)
        right.append(prompt)
        wrong.append({"another held-out caption": other.wants} | changes(world, prompt.wants, rng))
    images = torch.from_numpy(np.stack(pictures))
    good = scorer(images, right).values[:, 0]
    figures = {}
    for kind in sorted(
        {kind for errors in wrong for kind in errors}, key=lambda k: (k != "another held-out caption", k)
    ):
        index = [i for i, errors in enumerate(wrong) if kind in errors]
        bad = scorer(images[index], [Prompt(caption(wrong[i][kind]), wrong[i][kind]) for i in index]).values[:, 0]
        mine = good[index]
        area = mannwhitneyu(mine.numpy(), bad.numpy()).statistic / len(index) ** 2
        figures[kind] = float(area), float((mine > bad).float().mean()), len(index)
    return figures


CARD = """---
license: apache-2.0
library_name: open_clip
---

# {name}

A CLIP model of the embedded world of {world} (`reward_models/{world}_world.py`): {about} on {side}x{side} pixels. It
lets `clip`, the learned scorer, run anywhere without a download. {parameters:,} parameters, stored in half precision.

## How it was made

<!-- needs: hours -->
```
{command}
```

{images:,} pictures drawn by `reward_models.{world}_world` for {training:,} captions; {steps:,} AdamW steps of {batch}
pairs with CLIP's contrastive loss (arXiv 2103.00020), half of each batch of one kind of caption, pairs with the same
meaning left out of each other's negatives. {minutes:.1f} minutes on {machine}. Vision: transformer on 8x8 patches,
4 layers, width 96. Text: transformer, 3 layers, width 64. The result depends only on the command and the torch build
(here {torch}).

## Figures

{held_out} held-out captions, none with the meaning of a training caption, each drawn {repeats} times independently.
Area under the ROC curve for the cosine with the right caption against that with a wrong one, pooled over captions, and
the share of pictures on which the right caption scores higher.

| what is wrong with the caption | area under ROC | right order | pairs |
|---|---|---|---|
{rows}

## Limits

It knows only the words of `{world}_world.py`, and only clean drawings and mild noise on them. Cosines are
not comparable between captions of different kinds; compare pictures of one caption. Where the table is near 0.5 the
model does not see that attribute: use `{world}` for exact answers. A policy that is trained against it will find its
blind spots, which is its purpose.
"""


def main(
    out: Annotated[Path | None, typer.Option(help="folder the model is written to, by default in assets/")] = None,
    work: Annotated[Path | None, typer.Option(help="intermediate results, kept so that the run can be resumed")] = None,
    name: Annotated[str, typer.Option("--world", help=" or ".join(WORLDS))] = "shapes",
    images: Annotated[int | None, typer.Option(help="pictures drawn")] = None,
    steps: Annotated[int | None, typer.Option(help="training steps")] = None,
    batch: Annotated[int, typer.Option(help="pairs per step")] = 256,
    repeats: Annotated[int, typer.Option(help="fresh drawings of each held-out caption")] = 8,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 1,
) -> None:
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    world = world_of(name)
    out, work = out or Path("assets") / world.clip, work or Path("runs") / f"build_{world.clip}"
    images, steps = images or world.pictures, steps or world.clip_steps
    work.mkdir(parents=True, exist_ok=True)
    tokenizer, held_out = new_tokenizer(world), world.held_out("validation")
    pictures, captions = build_pictures(world, work, images)
    model, seconds = build_clip(world, pictures, captions, tokenizer, work, steps, batch, device)
    write_model(world, out, model, tokenizer)
    figures = measure(world, clip(str(out)), held_out, repeats)
    settings = (
        f"--world {name} --images {images} --steps {steps} --batch {batch} --repeats {repeats} --threads {threads}"
    )
    card = CARD.format(
        name=world.clip,
        world=name,
        about=world.about,
        side=world.side,
        parameters=sum(p.numel() for p in model.parameters()),
        command=f"python scripts/build_tiny_clip.py {settings}",
        images=len(pictures),
        training=len(world.training()),
        steps=steps,
        batch=batch,
        minutes=seconds / 60,
        machine="a GPU" if device == "cuda" else f"{threads} CPU thread{'s' * (threads > 1)}",
        torch=torch.__version__,
        held_out=len(held_out),
        repeats=repeats,
        rows="\n".join(f"| {kind} | {area:.3f} | {order:.3f} | {n} |" for kind, (area, order, n) in figures.items()),
    )
    files.write(out / "README.md", card)
    console.print(card)


if __name__ == "__main__":
    typer.run(main)
