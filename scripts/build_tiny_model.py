"""Draw an embedded world, train its tiny Stable Diffusion 3 pipeline, and write it to assets/.

    python scripts/build_tiny_model.py                       # the world of shapes: everything, resumed where it stopped
    python scripts/build_tiny_model.py --world things        # the same for the world of things
    python scripts/build_tiny_model.py --steps 200 --images 2000 --vae-steps 100 --out /tmp/try --work /tmp/work

Four stages, each cached in --work: pictures, VAE, latents, flow. The result depends only on the arguments and the torch
build, not on interruptions. All classes are the stock ones of diffusers and transformers; only the size, the vocabulary
and the pictures are particular to these models (`tiny_worlds.py`).

The flow may be trained for as long as there is time, and ended at any step. The rate is flat until --cool steps before
the end, and what was reached then is kept, so that training can continue:

    python scripts/build_tiny_model.py --world things --steps 1000000           # until it is killed
    python scripts/build_tiny_model.py --world things --look 100                # steps so far, scores, pictures
    python scripts/build_tiny_model.py --world things --steps 25000 --cool 5000 # 20,000 were done: cool and write
    python scripts/build_tiny_model.py --world things --begin assets/tiny_things # from what was written before

With --guided above 1 the flow learns, while its rate falls, the velocities of its own guidance, so that samples need
none.

Processes of one thread share a step of the flow, and are faster on a CPU than threads; the other stages must be done:

    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 scripts/build_tiny_model.py --world things
"""

import copy
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from jaxtyping import Float, Int, UInt8
from PIL import Image
from tiny_worlds import (
    MAX_TOKENS,
    WORLDS,
    World,
    build_names,
    build_pictures,
    console,
    kinds_of,
    new_tokenizer,
    progress,
    world_of,
)
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from mmalign import policy as policies
from mmalign.evaluation.generate import generate
from reward_models import files, load
from reward_models.images import rounded, to_pil

CELL, CHANNELS = 4, 4  # px of a latent, and its channels
WIDTH, PATCH = 192, 2  # of the transformer
MUON, ADAMW = 0.02, 2e-3  # learning rates
GUIDANCE = 1.0, 3.0  # none and some
TEXT_ENCODERS = "text_encoder", "text_encoder_2"
SAMPLER = 10  # steps of the samples that are scored
SAVE_EVERY = 100  # steps of the flow
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # as torchrun sets them

# ------------------------------------------------------------------------------------------------ resumable loop


def train(
    name: str,
    step_fn: Callable[[int], Tensor],
    state: dict[str, nn.Module | torch.optim.Optimizer],
    steps: int,
    work: Path,
    save_every: int = 500,
    since: Path | None = None,
) -> None:
    """Run `step_fn(step)` for `steps` steps, saving all of `state` every so often and starting from the last save, or
    from what another run has saved at `since`."""
    path = work / f"{name}.pt"
    done = 0
    for start in (path, since):
        if start and start.exists():
            saved = torch.load(start, weights_only=True)
            done = saved.pop("done")
            for key, value in saved.items():
                state[key].load_state_dict(value)
            break
    first, began = done, time.monotonic()
    with progress() as bar:
        task = bar.add_task(name, total=steps, completed=done, note="")
        while done < steps:
            loss = step_fn(done)
            done += 1
            if done % 50 == 0:
                note = f"loss {float(loss):.4f}  {(time.monotonic() - began) / (done - first):.3f} s/step"
                bar.update(task, completed=done, note=note)
                if RANK == 0 and not console.is_terminal and done % 250 == 0:
                    console.print(f"{name} {done}/{steps} {note}")
            if RANK == 0 and (done % save_every == 0 or done == steps):
                torch.save(
                    {"done": done} | {key: value.state_dict() for key, value in state.items()}, path.with_suffix(".new")
                )
                path.with_suffix(".new").replace(path)
    if PROCESSES > 1:
        distributed.barrier()  # what is saved last is complete


def cooled(step: int, steps: int, share: float = 0.35, warmup: int = 100) -> float:
    """Learning-rate factor: short warm-up, flat, then linear to zero over the last `share` of the steps."""
    return min(1.0, (step + 1) / warmup, (steps - step) / (share * steps))


class Halved:
    """`module` is the model to compute with: a copy in bfloat16 if `half`, on which a CPU with such instructions is
    about twice as fast, else the model. Its weights stay in float32."""

    def __init__(self, model: nn.Module, half: bool):
        self.model, self.module = model, copy.deepcopy(model).bfloat16() if half else model
        self.dtype = torch.bfloat16 if half else torch.float32

    def attention(self) -> AbstractContextManager[None]:
        """The kernel of attention: in bfloat16, plain matrix products are faster backwards."""
        return nullcontext() if self.module is self.model else sdpa_kernel(SDPBackend.MATH)

    @torch.no_grad()
    def begin(self) -> None:
        """Take over the weights, without gradients."""
        self.model.zero_grad()
        self.module.zero_grad()
        if self.module is not self.model:
            for mine, weight in zip(self.module.parameters(), self.model.parameters(), strict=True):
                mine.copy_(weight)

    def backward(self, loss: Tensor) -> None:
        """The gradients of a loss, at the weights in float32."""
        loss.backward()
        if self.module is not self.model:
            for mine, weight in zip(self.module.parameters(), self.model.parameters(), strict=True):
                weight.grad = None if mine.grad is None else mine.grad.float()
        if PROCESSES > 1:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            joined = torch.cat([g.flatten() for g in gradients]) / PROCESSES
            distributed.all_reduce(joined)
            for gradient, mean in zip(gradients, joined.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(mean.view_as(gradient))
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)


# ----------------------------------------------------------------------------------------------------------- VAE


def new_vae(world: World) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        sample_size=world.side,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build_vae(
    world: World, pictures: UInt8[Tensor, "n 3 S S"], work: Path, steps: int, device: str, batch: int = 32
) -> AutoencoderKL:
    """L1 reconstruction from latents with extra noise, so that imperfect latents still decode to clean shapes."""
    torch.manual_seed(1)
    vae = new_vae(world).to(device)
    fast = Halved(vae, world.half)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)

    def step_fn(step: int) -> Tensor:
        g = torch.Generator().manual_seed(10_000_000 + step)
        index = torch.randint(len(pictures), (batch,), generator=g)
        x = pictures[index]
        if world.crop < world.side:
            top, left = torch.randint(world.side - world.crop + 1, (2,), generator=g).tolist()
            x = x[..., top : top + world.crop, left : left + world.crop]
        x = (x.to(device).float() / 127.5 - 1).to(fast.dtype)
        fast.begin()
        posterior = fast.module.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=g).to(device)
        extra = (
            torch.randn(posterior.mean.shape, generator=g).to(device)
            * 0.2
            * torch.rand(batch, 1, 1, 1, generator=g).to(device)
        )
        latents = posterior.mean + posterior.std * noise + extra
        loss = (fast.module.decode(latents.to(fast.dtype)).sample - x).float().abs().mean()
        loss = loss + 1e-3 * posterior.kl().float().mean() / posterior.mean[0].numel()
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * cooled(step, steps)
        fast.backward(loss)
        optimizer.step()
        return loss.detach()

    train("vae", step_fn, {"vae": vae, "optimizer": optimizer}, steps, work)
    return vae.eval()


@torch.no_grad()
def build_latents(
    vae: AutoencoderKL, pictures: UInt8[Tensor, "n 3 S S"], work: Path, device: str
) -> Float[Tensor, "n C h w"]:
    """Posterior means, standardised; the constants go into the VAE's config, as SD3 has them."""
    path = work / f"latents-{len(pictures)}.pt"
    if not path.exists():
        with progress() as bar:
            task = bar.add_task("encoding", total=len(pictures), note="")
            parts = []
            for part in pictures.split(500):
                parts.append(vae.encode(part.to(device).float() / 127.5 - 1).latent_dist.mean.cpu())
                bar.advance(task, len(part))
        torch.save(torch.cat(parts), path)
    means = torch.load(path, weights_only=True)
    shift, scale = means.mean().item(), 1 / means.std().item()
    vae.register_to_config(scaling_factor=scale, shift_factor=shift)
    return (means - shift) * scale


# ------------------------------------------------------------------------------------------------- the pipeline


def new_text_encoder(tokenizer: CLIPTokenizer, width: int = 64) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_transformer(world: World) -> SD3Transformer2DModel:
    """Zero-gated at the start: diffusers' default initialisation is not, and trains far worse."""
    model = SD3Transformer2DModel(
        sample_size=world.side // CELL,
        patch_size=PATCH,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=world.layers,
        num_attention_heads=4,
        attention_head_dim=WIDTH // 4,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        caption_projection_dim=WIDTH,
        pos_embed_max_size=world.side // CELL // PATCH,
    )
    for name, module in model.named_modules():
        if name.endswith(("norm1.linear", "norm1_context.linear", "norm_out.linear")) or name == "proj_out":
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    for module in model.time_text_embed.timestep_embedder.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
    return model


class TinyFlow(nn.Module):
    """Token ids and noised latents -> velocity: what the pipeline computes, in one module for the optimiser. The
    `heads` that name things are for training alone."""

    def __init__(self, world: World, tokenizer: CLIPTokenizer):
        super().__init__()
        self.text_encoders = nn.ModuleList(new_text_encoder(tokenizer) for _ in range(2))
        self.transformer = new_transformer(world)
        if world.named:
            self.heads = nn.ModuleList(nn.Linear(WIDTH, len(kinds)) for kinds in kinds_of(world))

    def begin(self, folder: Path) -> None:
        """Take over the weights of a pipeline."""
        encoders = (CLIPTextModelWithProjection.from_pretrained(folder / name) for name in TEXT_ENCODERS)
        transformer = SD3Transformer2DModel.from_pretrained(folder / "transformer")
        parts = zip((self.transformer, *self.text_encoders), (transformer, *encoders), strict=True)
        for mine, part in parts:
            mine.load_state_dict(part.state_dict())

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        texts = [encoder(ids, output_hidden_states=True) for encoder in self.text_encoders]
        return self.transformer(
            hidden_states=x,
            timestep=1000 * t,
            encoder_hidden_states=torch.cat([text.hidden_states[-2] for text in texts], -1),
            pooled_projections=torch.cat([text.text_embeds for text in texts], -1),
            return_dict=False,
        )[0]


def build_flow(
    world: World,
    latents: Float[Tensor, "n C h w"],
    ids: Int[Tensor, "n L"],
    names: Int[Tensor, "n 3 c c"] | None,
    tokenizer: CLIPTokenizer,
    begin: Path | None,
    work: Path,
    steps: int,
    cool: int,
    guided: float,
    batch: int,
    device: str,
    compiled: bool,
) -> TinyFlow:
    """Flow matching with a velocity target; Muon on the blocks' matrices, AdamW on the rest, both cooled to zero over
    the last `cool` steps. With `names` the image tokens in the middle of the network also learn to name what their
    place in the finished picture shows, as those of REPA (arXiv 2410.06940) learn the features of another model.
    While it cools, `guided` - 1 times the difference that the caption makes to the flow at the start of cooling is
    added to the target, so that samples need no guidance (model guidance, arXiv 2502.12154). `begin` is a pipeline
    whose weights are the first. Returns the average of the weights."""
    torch.manual_seed(2)
    flow = TinyFlow(world, tokenizer).to(device)
    if begin:
        flow.begin(begin)
    average, fast = copy.deepcopy(flow), Halved(flow, world.half)
    matrices, rest = [], []
    for name, p in flow.named_parameters():
        hidden = ".transformer_blocks." in name and (".attn." in name or ".ff" in name)
        (matrices if hidden and p.ndim == 2 else rest).append(p)
    muon = torch.optim.Muon(matrices, lr=MUON, weight_decay=world.decay)
    adamw = torch.optim.AdamW(rest, lr=ADAMW, betas=(0.9, 0.98), weight_decay=0.0)
    forward = torch.compile(fast.module) if compiled else fast.module
    empty = tokenizer("", padding="max_length", return_tensors="pt").input_ids
    middle: list[Tensor] = []
    if names is not None:
        block = fast.module.transformer.transformer_blocks[world.layers // 2 - 1]
        block.register_forward_hook(lambda module, arguments, output: middle.append(output[1]))

    def naming(index: Int[Tensor, "B"]) -> Float[Tensor, ""]:
        """The cross-entropy of the names of these pictures' cells, summed over noun, colour and style."""
        tokens, target = middle.pop(), names[index].flatten(2).unbind(1)
        scores = [head(tokens).float().transpose(1, 2) for head in fast.module.heads]
        return sum(F.cross_entropy(each, right.to(device)) for each, right in zip(scores, target, strict=True))

    @torch.no_grad()
    def caption_effect(
        x: Float[Tensor, "B C h w"], t: Float[Tensor, "B"], token: Int[Tensor, "B L"]
    ) -> Float[Tensor, "B C h w"]:
        """The difference that these captions make to the teacher's velocity."""
        tokens = torch.cat([token, empty.to(device).expand_as(token)])
        given, none = teacher(torch.cat([x, x]), torch.cat([t, t]), tokens).float().chunk(2)
        return given - none

    def step_fn(step: int) -> Tensor:
        g = torch.Generator().manual_seed(20_000_000 + step)
        index = torch.randint(len(latents), (batch,), generator=g)
        x0, token = latents[index], ids[index]
        token = torch.where(torch.rand(batch, 1, generator=g) < 0.1, empty, token)
        t = torch.sigmoid(0.8 + 1.2 * torch.randn(batch, generator=g))
        noise = torch.randn(x0.shape, generator=g)
        x0, token, t, noise = (a[RANK::PROCESSES].to(device) for a in (x0, token, t, noise))
        at = t[:, None, None, None]
        x = ((1 - at) * x0 + at * noise).to(fast.dtype)
        target = noise - x0
        if guided != 1 and step >= steps - cool:
            target = target + (guided - 1) * caption_effect(x, t, token)
        fast.begin()
        with fast.attention():
            loss = F.mse_loss(forward(x, t, token).float(), target)
            named = 0.0 if names is None else world.named * naming(index[RANK::PROCESSES])
            fast.backward(loss + named)
        factor = min(1.0, (step + 1) / 100, (steps - step) / max(cool, 1))
        muon.param_groups[0]["lr"], adamw.param_groups[0]["lr"] = MUON * factor, ADAMW * factor
        muon.step()
        adamw.step()
        fresh = 1 - min(world.average, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, weight in zip(average.parameters(), flow.parameters(), strict=True):
                mean.lerp_(weight, fresh)
        return loss.detach()

    state = {"flow": flow, "average": average, "muon": muon, "adamw": adamw}
    train("flow", step_fn, state, steps - cool, work, SAVE_EVERY)
    teacher = copy.deepcopy(average).to(fast.dtype)
    train(f"flow-{steps}", step_fn, state, steps, work, SAVE_EVERY, since=work / "flow.pt")
    return average.eval()


def new_pipeline(vae: AutoencoderKL, flow: TinyFlow, tokenizer: CLIPTokenizer) -> StableDiffusion3Pipeline:
    pipeline = StableDiffusion3Pipeline(
        transformer=flow.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0),
        vae=vae,
        text_encoder=flow.text_encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=flow.text_encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    return pipeline.to("cpu", torch.float16)


# ------------------------------------------------------------------------------------------------ how good it is


@torch.no_grad()
def through_vae(world: World, vae: AutoencoderKL, drawings: int) -> dict[float, float]:
    """The share of drawings that the verifier finds right after they were encoded and decoded, by the noise added to
    their latents, in standard deviations of these."""
    rng, verifier, shares = np.random.default_rng([2024, 8]), load(world.name), {}
    training = world.training()
    prompts = [training[i] for i in rng.integers(len(training), size=drawings)]
    images = torch.from_numpy(np.stack([world.draw(prompt.wants, rng) for prompt in prompts]))
    latents = torch.cat([vae.encode(part * 2 - 1).latent_dist.mean for part in images.split(50)])
    for sigma in (0.0, 0.2, 0.3):
        noise = sigma * latents.std() * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
        decoded = torch.cat([vae.decode(part).sample for part in (latents + noise).split(50)])
        shares[sigma] = verifier(rounded((decoded + 1) / 2), prompts).values[:, 0].mean().item()
    return shares


def scores(
    world: World, folder: Path, count: int, steps: int, seeds: int, guidance: float
) -> tuple[Float[Tensor, "n 3 S S"], dict[str, float]]:
    """Images of `count` validation captions, evenly spaced through the list, and the share of right ones, over all and
    by tag."""
    captions = world.held_out("validation")
    prompts = [captions[i] for i in np.linspace(0, len(captions) - 1, min(count, len(captions))).round().astype(int)]
    policy = policies.load(str(folder), dtype="float32", device="cpu", guidance=guidance)
    noise = [[*range(seeds * row, seeds * row + seeds)] for row in range(len(prompts))]
    images, of = generate(policy, prompts, noise, steps, 32)
    right = load(world.name)(rounded(images), [prompts[i] for i in of.tolist()]).values[:, 0]
    tags = np.array([prompts[i].wants["tag"] for i in of.tolist()])
    by_tag = {tag: right[tags == tag].mean().item() for tag in world.tags if tag in tags}
    return images, {"all": right.mean().item()} | by_tag


def look(world: World, pipeline: StableDiffusion3Pipeline, work: Path, count: int, steps: int) -> None:
    """Print how many images of validation captions are right; write the images to `work`."""
    pipeline.save_pretrained(work / "look")
    for guidance in GUIDANCE:
        images, shares = scores(world, work / "look", count, steps, 1, guidance)
        console.print(f"guidance {guidance}:", *(f"{tag} {share:.3f} " for tag, share in shares.items()))
        sheet(images[:64], work / f"look-{guidance}.png")


def sheet(images: Float[Tensor, "n 3 S S"], path: Path, columns: int = 8) -> None:
    side, pictures = images.shape[-1] + 2, to_pil(images)
    page = Image.new("RGB", (columns * side, -(-len(pictures) // columns) * side), "white")
    for k, picture in enumerate(pictures):
        page.paste(picture, (k % columns * side, k // columns * side))
    page.resize((2 * page.width, 2 * page.height), Image.Resampling.NEAREST).save(path)


def latest(work: Path) -> Path:
    """The checkpoint of the flow that was written last. BadParameter if there is none."""
    made = sorted(work.glob("flow*.pt"), key=lambda path: path.stat().st_mtime)
    if not made:
        raise typer.BadParameter(f"no checkpoint of a flow in {work}")
    return made[-1]


CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# {name}

A `StableDiffusion3Pipeline` of stock diffusers and transformers classes for the embedded world of {world}
(`reward_models/{world}_world.py`): {about} on {side}x{side} pixels. {transformer:.1f} M parameters in the transformer
({layers} layers, width {width}, patch {patch}), two CLIP text encoders of {text:.1f} M (3 layers, width 64), a VAE of
{vae:.1f} M that maps the pixels to {channels}x{cells}x{cells} latents, {size:.0f} MB in fp16. No T5: load it with
`text_encoder_3=None, tokenizer_3=None` (and `dtype=torch.float32` on a CPU) and call it with `max_sequence_length=0`,
or stock diffusers appends 256 zero tokens it was not trained with. The vocabulary is the words of its world; prompts
end after ten tokens.

## How it was made

<!-- needs: hours -->
```
{command}
```

{pictures:,} pictures drawn from {training:,} training captions; VAE {vae_steps:,} steps of 32 pictures, L1 loss with
noise on the latents; flow matching {steps:,} steps of {batch}, Muon on the matrices of the blocks and AdamW on the
rest, {cooling}{named}. {before}The result depends only on the arguments, the number of threads or processes and the
torch build (here {torch}).

## Scores

{captions} validation captions, none with the meaning of a training caption, two seeds each, {sampler} ODE steps, judged
by `{world}`; strict = everything right and nothing else there.

| captions | strict | with guidance {guidance:g} |
|---|---|---|
{rows}

Reconstructions by the VAE alone: {clean:.3f} strict on 400 drawings, {noisy:.3f} with noise of 0.3 standard deviations
on the latents.

## Limits

It knows the words of `{world}_world.py`, one phrasing of each request, and nothing else.
"""


def card(world: World, folder: Path, scored: int, **settings) -> str:
    """The model card of the pipeline in `folder`, with its scores on `scored` validation captions."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    size = lambda module: sum(p.numel() for p in module.parameters()) / 1e6  # noqa: E731
    columns = [scores(world, folder, scored, SAMPLER, 2, guidance)[1] for guidance in GUIDANCE]
    shares = through_vae(world, pipeline.vae.float(), min(scored, 400))
    return CARD.format(
        name=world.model,
        world=world.name,
        about=world.about,
        side=world.side,
        transformer=size(pipeline.transformer),
        layers=world.layers,
        width=WIDTH,
        patch=PATCH,
        text=size(pipeline.text_encoder),
        vae=size(pipeline.vae),
        channels=CHANNELS,
        cells=world.side // CELL,
        size=sum(file.stat().st_size for file in folder.rglob("*.safetensors")) / 1e6,
        training=len(world.training()),
        captions=min(scored, len(world.held_out("validation"))),
        sampler=SAMPLER,
        guidance=GUIDANCE[1],
        rows="\n".join(f"| {tag} | {plain:.3f} | {columns[1][tag]:.3f} |" for tag, plain in columns[0].items()),
        clean=shares[0.0],
        noisy=shares[0.3],
        torch=torch.__version__,
        **settings,
    )


def main(
    out: Annotated[Path, typer.Option(help="where the pipeline's folder is written")] = Path("assets"),
    work: Annotated[Path | None, typer.Option(help="intermediate results, kept so that the run can be resumed")] = None,
    name: Annotated[str, typer.Option("--world", help=" or ".join(WORLDS))] = "shapes",
    images: Annotated[int | None, typer.Option(help="pictures drawn")] = None,
    vae_steps: Annotated[int | None, typer.Option(help="steps of 32 pictures")] = None,
    steps: Annotated[int | None, typer.Option(help="flow-matching steps")] = None,
    cool: Annotated[
        int | None, typer.Option(help="last steps, over which the rate falls to zero; by default 35 %")
    ] = None,
    guided: Annotated[
        float | None, typer.Option(help="guidance that the flow learns over the last steps; by default the world's")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="pictures per flow-matching step")] = None,
    begin: Annotated[Path | None, typer.Option(help="a pipeline to continue from: its VAE, and its flow")] = None,
    compiled: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="torch.compile the flow; 1.3x faster on CPU; by default shapes'"),
    ] = None,
    looked: Annotated[
        int, typer.Option("--look", help="only score images of so many validation captions, by the last checkpoint")
    ] = 0,
    scored: Annotated[int, typer.Option(help="at most so many validation captions are scored for the card")] = 1000,
) -> None:
    world = world_of(name)
    torch.set_flush_denormal(True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if PROCESSES > 1:
        distributed.init_process_group("gloo")
    work = work or Path("runs") / f"build_{world.model}"
    work.mkdir(parents=True, exist_ok=True)
    images, vae_steps = images or world.pictures, vae_steps or world.vae_steps
    steps = world.steps if steps is None else steps
    cool, batch = round(0.35 * steps) if cool is None else cool, batch or world.batch
    guided = world.guided if guided is None else guided
    compiled = not world.half if compiled is None else compiled  # its code for bfloat16 on CPU does not compile
    checkpoint = latest(work) if looked else None
    pictures, captions = build_pictures(world, work, images)
    if begin:
        vae = AutoencoderKL.from_pretrained(begin / "vae", torch_dtype=torch.float32).to(device)
    else:
        vae = build_vae(world, pictures, work, vae_steps, device)
    latents = build_latents(vae, pictures, work, device)
    tokenizer = new_tokenizer(world)
    if checkpoint:
        flow = TinyFlow(world, tokenizer)
        saved = torch.load(checkpoint, weights_only=True)
        flow.load_state_dict(saved["average"])
        console.print(
            f"{checkpoint}: {saved['done']:,} steps; decoded drawings right: {through_vae(world, vae, looked)}"
        )
        look(world, new_pipeline(vae, flow, tokenizer), work, looked, SAMPLER)
        return
    ids = tokenizer([p.text for p in world.training()], padding="max_length", return_tensors="pt").input_ids[captions]
    names = build_names(world, pictures, work, world.side // CELL // PATCH) if world.named else None
    flow = build_flow(world, latents, ids, names, tokenizer, begin, work, steps, cool, guided, batch, device, compiled)
    if RANK:
        return
    folder = out / world.model
    new_pipeline(vae, flow, tokenizer).save_pretrained(folder)
    arguments = (
        f"--world {name} --images {images} --vae-steps {vae_steps} --steps {steps} --cool {cool} --guided {guided:g} "
        f"--batch {batch}"
    )
    before = "" if begin is None else "It began from the weights of an earlier build, and has its VAE. "
    cooling = f"linear cool-down over the last {cool:,} steps" if cool else "at a flat rate"
    if cool and guided != 1:
        cooling += f", in which it also learns its own guidance of {guided:g} (arXiv 2502.12154)"
    named = ", while the middle of the network learns to name what each cell shows" if world.named else ""
    settings = dict(vae_steps=vae_steps, steps=steps, batch=batch, pictures=len(pictures), before=before)
    settings |= dict(cooling=cooling, named=named)
    command = f"python scripts/build_tiny_model.py {arguments}" + (f" --begin {begin}" if begin else "")
    files.write(folder / "README.md", card(world, folder, scored, command=command, **settings))
    console.print(f"written: {folder}")


if __name__ == "__main__":
    typer.run(main)
