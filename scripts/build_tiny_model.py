"""Draw the embedded world, train the tiny Stable Diffusion 3 pipeline on it, and write it to assets/.

    python scripts/build_tiny_model.py                       # everything, resumed where it stopped
    python scripts/build_tiny_model.py --steps 200 --images 2000 --vae-steps 100 --out /tmp/try --work /tmp/work

Four stages, each cached in --work: pictures, VAE, latents, flow. The result depends only on the arguments and the torch
build, not on interruptions. All classes are the stock ones of diffusers and transformers; only the size, the vocabulary
and the pictures are particular to this model.
"""

import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from reward_models import files
from reward_models.shapes_world import TAGS, caption, draw, requests, split
from reward_models.types import Prompt

HELD_OUT = dict(one_object=3, two_objects=50, colors=30, counting=36, position=90, color_attr=80, text=24)
SHARE = dict(one_object=1, two_objects=3, colors=2, counting=4, position=5, color_attr=4, text=4)  # of the pictures
MAX_TOKENS = 10
CHUNK = 2000
console = Console()


def progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console)


# ---------------------------------------------------------------------------------------------------- pictures


def draw_chunk(chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """`CHUNK` pictures as uint8 [n, 3, 32, 32] and the index of each one's caption in the training split."""
    rng = np.random.default_rng([2024, chunk])
    train, _ = split(HELD_OUT)
    by_tag = {tag: [i for i, p in enumerate(train) if p.wants["tag"] == tag] for tag in TAGS}
    weights = np.array([SHARE[tag] for tag in TAGS]) / sum(SHARE.values())
    captions = np.array([rng.choice(by_tag[TAGS[k]]) for k in rng.choice(len(TAGS), CHUNK, p=weights)])
    return np.stack([to_uint8(draw(train[i].wants, rng)) for i in captions]), captions


def to_uint8(image: np.ndarray) -> np.ndarray:
    return (image * 255).round().astype(np.uint8)


def build_pictures(work: Path, images: int) -> tuple[Tensor, Tensor]:
    path = work / f"pictures-{images}.npz"
    if not path.exists():
        with ProcessPoolExecutor() as pool, progress() as bar:
            task = bar.add_task("drawing", total=math.ceil(images / CHUNK), note="")
            chunks = []
            for chunk in pool.map(draw_chunk, range(math.ceil(images / CHUNK))):
                chunks.append(chunk)
                bar.advance(task)
        np.savez(path, pictures=np.concatenate([c[0] for c in chunks]), captions=np.concatenate([c[1] for c in chunks]))
    stored = np.load(path)
    return torch.from_numpy(stored["pictures"]), torch.from_numpy(stored["captions"])


# ------------------------------------------------------------------------------------------------ resumable loop


def train(
    name: str,
    step_fn: Callable[[int], Tensor],
    state: dict[str, nn.Module | torch.optim.Optimizer],
    steps: int,
    work: Path,
    save_every: int = 500,
) -> None:
    """Run `step_fn(step)` for `steps` steps, saving all of `state` every so often and starting from the last save."""
    path = work / f"{name}.pt"
    done = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        done = saved.pop("done")
        for key, value in saved.items():
            state[key].load_state_dict(value)
    start, began = done, time.monotonic()
    with progress() as bar:
        task = bar.add_task(name, total=steps, completed=done, note="")
        while done < steps:
            loss = step_fn(done)
            done += 1
            if done % 50 == 0:
                note = f"loss {float(loss):.4f}  {(time.monotonic() - began) / (done - start):.3f} s/step"
                bar.update(task, completed=done, note=note)
                if not console.is_terminal and done % 250 == 0:
                    console.print(f"{name} {done}/{steps} {note}")
            if done % save_every == 0 or done == steps:
                torch.save(
                    {"done": done} | {key: value.state_dict() for key, value in state.items()}, path.with_suffix(".new")
                )
                path.with_suffix(".new").replace(path)


def cooled(step: int, steps: int, share: float = 0.35, warmup: int = 100) -> float:
    """Learning-rate factor: short warm-up, flat, then linear to zero over the last `share` of the steps."""
    return min(1.0, (step + 1) / warmup, (steps - step) / (share * steps))


# ----------------------------------------------------------------------------------------------------------- VAE


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build_vae(pictures: Tensor, work: Path, steps: int, device: str, batch: int = 32) -> AutoencoderKL:
    """L1 reconstruction from latents with extra noise, so that imperfect latents still decode to clean shapes."""
    torch.manual_seed(1)
    vae = new_vae().to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)

    def step_fn(step: int) -> Tensor:
        g = torch.Generator().manual_seed(10_000_000 + step)
        index = torch.randint(len(pictures), (batch,), generator=g)
        x = pictures[index].to(device).float() / 127.5 - 1
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=g).to(device)
        extra = (
            torch.randn(posterior.mean.shape, generator=g).to(device)
            * 0.2
            * torch.rand(batch, 1, 1, 1, generator=g).to(device)
        )
        loss = (vae.decode(posterior.mean + posterior.std * noise + extra).sample - x).abs().mean()
        loss = loss + 1e-3 * posterior.kl().mean() / posterior.mean[0].numel()
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * cooled(step, steps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    train("vae", step_fn, {"vae": vae, "optimizer": optimizer}, steps, work)
    return vae.eval()


@torch.no_grad()
def build_latents(vae: AutoencoderKL, pictures: Tensor, work: Path, device: str) -> Tensor:
    """Posterior means [n, 4, 8, 8], standardised; the constants go into the VAE's config, as SD3 has them."""
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


def new_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with a vocabulary in which each word of the world is one token."""
    words = sorted({word for wants in requests() for word in caption(wants).lower().replace('"', ' " ').split()})
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|startoftext|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=5000, min_frequency=1, initial_alphabet=alphabet, end_of_word_suffix="</w>", special_tokens=special
    )
    bpe.train_from_iterator(words, trainer)
    learned = json.loads(bpe.to_str())["model"]
    vocab = list(dict.fromkeys([*sorted(alphabet), *(a + "</w>" for a in sorted(alphabet)), *learned["vocab"]]))
    vocab = [token for token in vocab if token not in special] + special
    merges = [tuple(m) for m in learned["merges"]]
    tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(vocab)}, merges=merges, model_max_length=MAX_TOKENS)
    broken = [word for word in words if len(tokenizer(word).input_ids) != 3]
    if broken:
        raise RuntimeError(f"words that are not one token: {broken}")
    return tokenizer


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


def new_transformer(width: int = 192, layers: int = 5) -> SD3Transformer2DModel:
    """Zero-gated at the start: diffusers' default initialisation is not, and trains far worse."""
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        num_attention_heads=4,
        attention_head_dim=width // 4,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        caption_projection_dim=width,
        pos_embed_max_size=4,
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
    """Token ids and noised latents -> velocity: what the pipeline computes, in one module for the optimiser."""

    def __init__(self, text_encoders: list[nn.Module], transformer: SD3Transformer2DModel):
        super().__init__()
        self.text_encoders, self.transformer = nn.ModuleList(text_encoders), transformer

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        texts = [encoder(ids, output_hidden_states=True) for encoder in self.text_encoders]
        return self.transformer(
            hidden_states=x,
            timestep=1000 * t,
            encoder_hidden_states=torch.cat([text.hidden_states[-2] for text in texts], -1),
            pooled_projections=torch.cat([text.text_embeds for text in texts], -1),
            return_dict=False,
        )[0]


def build_flow(latents, captions, ids, tokenizer, work, steps, batch, device, compiled) -> TinyFlow:
    """Flow matching with a velocity target; Muon on the blocks' matrices, AdamW on the rest, both cooled to zero."""
    torch.manual_seed(2)
    flow = TinyFlow([new_text_encoder(tokenizer) for _ in range(2)], new_transformer()).to(device)
    matrices, rest = [], []
    for name, p in flow.named_parameters():
        hidden = ".transformer_blocks." in name and (".attn." in name or ".ff" in name)
        (matrices if hidden and p.ndim == 2 else rest).append(p)
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0)
    adamw = torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)
    forward = torch.compile(flow) if compiled else flow
    empty = tokenizer("", padding="max_length", return_tensors="pt").input_ids

    def step_fn(step: int) -> Tensor:
        g = torch.Generator().manual_seed(20_000_000 + step)
        index = torch.randint(len(latents), (batch,), generator=g)
        x0, token = latents[index], ids[captions[index]]
        token = torch.where(torch.rand(batch, 1, generator=g) < 0.1, empty, token)
        t = torch.sigmoid(0.8 + 1.2 * torch.randn(batch, generator=g))
        noise = torch.randn(x0.shape, generator=g)
        x0, token, t, noise = (a.to(device) for a in (x0, token, t, noise))
        at = t[:, None, None, None]
        loss = F.mse_loss(forward((1 - at) * x0 + at * noise, t, token), noise - x0)
        factor = cooled(step, steps)
        muon.param_groups[0]["lr"], adamw.param_groups[0]["lr"] = 0.02 * factor, 2e-3 * factor
        muon.zero_grad()
        adamw.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        muon.step()
        adamw.step()
        return loss.detach()

    train("flow", step_fn, {"flow": flow, "muon": muon, "adamw": adamw}, steps, work)
    return flow.eval()


def balanced(training: list[Prompt]) -> list[Prompt]:
    """Prompts for RL: at most twice as many of each tag as are held out, in the mix that is held out."""
    selected: list[Prompt] = []
    for tag in TAGS:
        tagged = [p for p in training if p.wants["tag"] == tag]
        selected += [tagged[i] for i in np.random.default_rng(3).permutation(len(tagged))[: 2 * HELD_OUT[tag]]]
    return sorted(selected, key=lambda p: p.id)


def write_prompts(out: Path, name: str, prompts: list[Prompt]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"prompt": p.text, "id": p.id} | p.wants) for p in prompts]
    files.write(out / f"{name}.jsonl", "\n".join(lines) + "\n")


def main(
    out: Annotated[Path, typer.Option(help="where tiny_sd3/ and prompts/ are written")] = Path("assets"),
    work: Annotated[Path, typer.Option(help="intermediate results, kept so that the run can be resumed")] = Path(
        "runs/build_tiny_model"
    ),
    images: Annotated[int, typer.Option(help="pictures drawn")] = 160_000,
    vae_steps: Annotated[int, typer.Option(help="steps of 32 pictures")] = 1_800,
    steps: Annotated[int, typer.Option(help="flow-matching steps")] = 2_200,
    batch: Annotated[int, typer.Option(help="pictures per flow-matching step")] = 192,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="torch.compile the flow; 1.3x faster on CPU")
    ] = True,
) -> None:
    torch.set_flush_denormal(True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    work.mkdir(parents=True, exist_ok=True)
    training, held_out = split(HELD_OUT)
    write_prompts(out / "prompts", "train", balanced(training))
    write_prompts(out / "prompts", "validation", held_out)
    pictures, captions = build_pictures(work, images)
    vae = build_vae(pictures, work, vae_steps, device)
    latents = build_latents(vae, pictures, work, device)
    tokenizer = new_tokenizer()
    ids = tokenizer([p.text for p in training], padding="max_length", return_tensors="pt").input_ids
    flow = build_flow(latents, captions, ids, tokenizer, work, steps, batch, device, compiled)
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
    pipeline.to("cpu", torch.float16).save_pretrained(out / "tiny_sd3")
    console.print(f"written: {out / 'tiny_sd3'}")


if __name__ == "__main__":
    typer.run(main)
