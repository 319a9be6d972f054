"""What all model families share: a stock diffusers pipeline as a policy. A family says how its texts become embeddings,
how its transformer is called, and how its latents are scaled; nothing of a pipeline's loop is copied.
"""

from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmalign.policy import export as exports, lora
from mmalign.types import Latents
from reward_models.allowlist import imported
from reward_models.lengths import Reader
from reward_models.limits import PIXELS
from reward_models.model_folders import LIBRARIES, check_size, complete, counted, loading, pinned
from reward_models.weights import fingerprint

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")  # Flow-GRPO's


@dataclass(frozen=True)
class Conditioning:
    """Text embeddings by name: `own`, a row for each of P prompts, and `empty`, one row of the empty prompt, of the
    same length. Where a family's texts differ in length, `mask` [P, L] is 1 where there is text."""

    own: dict[str, Tensor]
    empty: dict[str, Tensor]


def _torchao_int8():
    from torchao.quantization import Int8WeightOnlyConfig

    return diffusers.TorchAoConfig(Int8WeightOnlyConfig())


QUANTIZED: dict[
    str, Callable[[torch.dtype], Any]
] = {  # what a transformer's weights are stored as -> diffusers' config
    "int8": lambda dtype: _torchao_int8(),
    "llm_int8": lambda dtype: diffusers.BitsAndBytesConfig(load_in_8bit=True),
    "nf4": lambda dtype: diffusers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    ),
}


class PipelinePolicy(ABC):
    """A policy from a stock pipeline. `guidance` is the guidance scale in rollout and replay; what it means is the
    family's: true classifier-free guidance with the empty prompt (at 1 or less none, at half the forwards), or a number
    the network is told.

    `size`, then `image_size`, is (height, width) in pixels. `spent` counts network forwards (one row of one batch each)
    and decoded images. ValueError for a size the model cannot draw.
    """

    pipeline: ClassVar[str]
    targets: ClassVar[Sequence[str]] = ATTENTION
    packed: ClassVar[bool] = False  # whether the network sees 2 x 2 latent positions as one token's channels

    def __init__(self, pipe, guidance: float = 1.0, size: tuple[int, int] | None = None):
        self.pipe, self.guidance = pipe, guidance
        for module in pipe.components.values():
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval()
        factor = self.pixels_of(pipe)
        height, width = size or self._usual_size(pipe)
        unit = factor * self.grain_of(pipe)
        if height % unit or width % unit:
            raise ValueError(f"size {height}x{width} must be a multiple of {unit} pixels")
        for side, most in zip((height, width), self.positions(pipe) or (), strict=False):
            if side > factor * most:
                raise ValueError(f"size {height}x{width}: the model has positions for {factor * most} pixels a side")
        self.image_size = (height, width)
        self.latent_shape = (self.channels(pipe), height // factor, width // factor)
        self.spent: Counter[str] = Counter()
        self.offload = False
        self._known: OrderedDict[str, dict[str, Tensor]] = OrderedDict()  # embeddings by text, the last used at the end
        self._kept = 1000

    @classmethod
    def load(
        cls,
        model: str,
        *,
        dtype: torch.dtype,
        device: str,
        guidance: float,
        size=None,
        quantize: str | None = None,
        offload: bool = False,
    ):
        if offload and device == "cpu":
            raise ValueError("offload: the model is on the CPU, where there is nothing to make room on; remove it")
        from mmalign.policy import meta

        what, kind = f"model {model!r}", getattr(diffusers, cls.pipeline)
        empty = meta.of(cls, model, torch.float32, guidance, size)
        with loading(what, "it"):
            same = pinned(model, what)
            folder = Path(kind.download(model, use_safetensors=True, **same)) if same else Path(model)
            index = kind.load_config(folder)
            parts = dict(cls.absent(index))
        for name, own in index.items():
            if is_part(kind, name, own) and own and own[0] and name not in parts and not (folder / name).is_dir():
                raise ValueError(f"{what}: it has no folder {name!r}")  # diffusers would look for the part beside it
        for name, part in empty.pipe.components.items():
            if isinstance(part, nn.Module) and index[name][0] in LIBRARIES:
                config = QUANTIZED[quantize](dtype) if quantize and name == "transformer" else None
                check_size(counted(part), folder / name, what)
                with loading(what if config is None else f"quantize: {quantize}", f"its {name}"):
                    parts[name] = _loaded(class_of(name, index[name]), folder, name, dtype, config, what)
        with loading(what, "its tokenizers and scheduler"):
            pipe = kind.from_pretrained(folder, dtype=dtype, use_safetensors=True, **parts)
        pipe.set_progress_bar_config(disable=True)
        for name, part in pipe.components.items():
            placed = name == "transformer" and quantize in ("llm_int8", "nf4")  # bitsandbytes loads to the GPU
            if isinstance(part, nn.Module) and not placed and (name == "transformer" or not offload):
                part.to(device)
        policy = cls(pipe, guidance, size)
        policy.offload = offload
        with loading(what, "it"):
            policy.check_numbers()
        return policy

    @staticmethod
    def _usual_size(pipe) -> tuple[int, int]:
        """Of the images that the model was trained on. ValueError if its config has no size that can be drawn."""
        sample = pipe.default_sample_size
        if not isinstance(sample, int) or not 0 < (sample * pipe.vae_scale_factor) ** 2 <= PIXELS:
            raise ValueError(f"the model's config has sample_size {sample!r}, which is no size of images; give a size")
        return (sample * pipe.vae_scale_factor,) * 2

    @classmethod
    def absent(cls, index: dict[str, Any]) -> dict[str, None]:
        """Parts of the pipeline that were saved without; by default all are there."""
        return {}

    def check_numbers(self) -> None:
        """ValueError unless latents can be scaled and back, and the embeddings of a text are finite and of the width
        that the transformer takes."""
        for name, part in self.pipe.components.items():
            most = getattr(part, "model_max_length", 1)
            if not isinstance(most, int) or most < 1:
                raise ValueError(
                    f"its {name} reads {str(most)[:40]!r} tokens of a text; a whole number from 1 is needed"
                )
        x = torch.zeros(1, *self.latent_shape, device=self.device)
        try:
            units = [torch.as_tensor(value, dtype=torch.float32) for value in self.units(x)]
            shape = self.unscaled(x).shape
        except (TypeError, ArithmeticError) as error:
            raise ValueError(f"its autoencoder's shift and scale are no numbers: {error}") from None
        if not all(value.isfinite().all() for value in (*units, 1 / units[1])):
            raise ValueError(f"its autoencoder's shift and scale are {units[0].tolist()} and {units[1].tolist()}")
        if shape != x.shape:
            raise ValueError(f"its autoencoder's shift and scale are not those of {len(x[0])} channels")
        shapes = {} if type(self).text_shapes is PipelinePolicy.text_shapes else self.text_shapes()
        for name, value in self.encode([""]).empty.items():
            if name in shapes and name != "mask" and value.shape[-1] != shapes[name][-1]:
                raise ValueError(f"{name} are {value.shape[-1]} wide, the transformer takes {shapes[name][-1]}")
            if not value.isfinite().all():
                raise ValueError(f"{name} of a text are not finite")
        self._known.clear()
        self.spent.clear()

    # -------------------------------------------------------------------------------- what a family says of itself

    @classmethod
    def channels(cls, pipe) -> int:
        """Channels of a latent."""
        return pipe.transformer.config.in_channels // (4 if cls.packed else 1)

    @staticmethod
    def pixels_of(pipe) -> int:
        """Pixels of a latent position's side."""
        return pipe.vae_scale_factor

    @classmethod
    def grain_of(cls, pipe) -> int:
        """Latent positions that a side must be a multiple of."""
        return 2 if cls.packed else pipe.transformer.config.patch_size

    @classmethod
    def positions(cls, pipe) -> tuple[int, int] | None:
        """Latent positions that the network knows, in height and width; None where it has no table of them."""
        return None

    @abstractmethod
    def texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Embeddings of texts by name, a row each."""

    def readers(self) -> list[Reader]:
        """The text encoders that read a text of a limited length."""
        return []

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each of `texts`' embeddings, of one text of the greatest length. Asked where there are no
        weights to embed one with (`mmalign.policy.meta`)."""
        raise ValueError(f"{type(self).__name__} does not say what shape its texts' embeddings have")

    @abstractmethod
    def network(self, x: Tensor, t: Tensor, own: dict[str, Tensor]) -> Tensor:
        """The velocity at latents `x [M, C, h, w]` and times `t [M]` in [0, 1], with a row of embeddings each."""

    @property
    def true_guidance(self) -> bool:
        """Whether guidance asks the network twice."""
        return self.guidance > 1

    def guided(self, empty: Latents, wanted: Latents) -> Latents:
        """The velocity of true guidance, from that of the empty prompt and of the prompt."""
        return empty + self.guidance * (wanted - empty)

    def pixels(self, latents: Latents) -> Tensor:
        """The autoencoder's image in [-1, 1]."""
        return self.pipe.vae.decode(latents, return_dict=False)[0]

    def compressed(self, images: Tensor) -> Latents:
        """The autoencoder's latents of images in [-1, 1]: the mode of their distribution."""
        return self.pipe.vae.encode(images).latent_dist.mode()

    def units(self, x: Latents) -> tuple[Any, Any]:
        """Mean, and one over spread, of the autoencoder's latents, as numbers or for each channel of `x`."""
        config = self.pipe.vae.config
        return config.shift_factor or 0, config.scaling_factor

    def scaled(self, x: Latents) -> Latents:
        """Latents as the network has them, from the autoencoder's."""
        mean, factor = self.units(x)
        return (x - mean) * factor

    def unscaled(self, x: Latents) -> Latents:
        """The reverse of `scaled`."""
        mean, factor = self.units(x)
        return x / factor + mean

    # ---------------------------------------------------------------------------------------------------- the policy

    @property
    def device(self) -> torch.device:
        return next(self.pipe.transformer.parameters()).device  # diffusers' own `device` walks all modules for hooks

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Conditioning:
        """Each text is embedded alone, so that its embeddings are the same beside any others, and once while it is
        remembered."""
        wanted = dict.fromkeys([*texts, ""])
        missing = [text for text in wanted if text not in self._known]
        with self._awake(*(name for name in self.pipe.components if name.startswith("text_encoder") and missing)):
            self._known |= {text: {name: v.cpu() for name, v in self.texts([text]).items()} for text in missing}
        self.spent["texts"] += len(missing)
        for text in wanted:
            self._known.move_to_end(text)
        rows = [self._known[text] for text in (*texts, "")]
        if "mask" in rows[0]:
            all_ = ragged([row["tokens"][0] for row in rows])
        else:
            all_ = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        while len(self._known) > self._kept:
            self._known.popitem(last=False)
        all_ = {name: values.to(self.device) for name, values in all_.items()}
        return Conditioning(*({name: v[part] for name, v in all_.items()} for part in (slice(-1), slice(-1, None))))

    @contextmanager
    def _awake(self, *names: str) -> Iterator[None]:
        """The named parts of the pipeline beside its transformer; with `offload`, only as long."""
        parts = [part for name in names if isinstance(part := getattr(self.pipe, name), nn.Module)]
        for part in parts if self.offload else ():
            part.to(self.device)
        try:
            yield
        finally:
            for part in parts if self.offload else ():
                part.to("cpu")

    def times(self, steps: int) -> Float[Tensor, "states"]:
        """`[steps + 1]`: linear from 1 to 1/steps, shifted once by the pipeline's scheduler (for the image's size where
        it shifts by size), then 0.

        The stock pipelines walk the same times when they are given `sigmas=linspace(1, 1/steps, steps)`.
        """
        scheduler, more = self.pipe.scheduler, {}
        if scheduler.config.get("use_dynamic_shifting"):
            tokens = self.latent_shape[1] * self.latent_shape[2] // self.grain_of(self.pipe) ** 2
            more["mu"] = self.shift(tokens, steps)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist(), device="cpu", **more)
        return scheduler.sigmas.float().cpu()

    def shift(self, tokens: int, steps: int) -> float:
        """The scheduler's shift for an image of so many tokens: linear between two sizes."""
        config = self.pipe.scheduler.config
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        base, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        return base + (tokens - low) * (most - base) / (high - low)

    def velocity(self, x: Latents, t: Float[Tensor, "M"], cond: Conditioning, index: Int[Tensor, "M"]) -> Latents:
        if not self.true_guidance:
            self.spent["forwards"] += len(x)
            return self.network(x, t, {name: value[index] for name, value in cond.own.items()})
        return self.guided(*self._both(x, t, cond, index))

    @torch.no_grad()
    def prompt_effect(
        self, x: Latents, t: Float[Tensor, "M"], cond: Conditioning, index: Int[Tensor, "M"]
    ) -> Float[Tensor, "M h w"]:
        """How far the prompt moves the velocity at each position: its distance from that of the empty prompt."""
        empty, wanted = self._both(x, t, cond, index)
        return (wanted - empty).float().norm(dim=1)

    def _both(self, x: Latents, t: Tensor, cond: Conditioning, index: Tensor) -> tuple[Tensor, Tensor]:
        """The velocities of the empty prompt and of the prompt, at two forwards a row."""
        self.spent["forwards"] += 2 * len(x)
        rows = {name: value[index] for name, value in cond.own.items()}
        both = {name: torch.cat([cond.empty[name].expand_as(value), value]) for name, value in rows.items()}
        return self.network(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)

    @torch.no_grad()
    def decode(self, x: Latents) -> Float[Tensor, "M 3 H W"]:
        """Images in [0, 1], float32."""
        self.spent["decodes"] += len(x)
        with self._awake("vae"):
            image = self.pixels(self.unscaled(x.to(self.pipe.vae.dtype)))
        return (image.float() / 2 + 0.5).clamp(0, 1)

    def stock_settings(self, count: int) -> dict[str, Any]:
        """What the stock pipeline's `__call__` is given, beside what all families have, to draw `count` images as we
        do."""
        return {"guidance_scale": self.guidance}

    @torch.no_grad()
    def stock_images(self, texts: Sequence[str], seeds: Sequence[int], steps: int) -> Float[Tensor, "M 3 H W"]:
        """What the stock pipeline's own loop draws of each text from the noise of its seed: what ODE sampling must
        give. Its scheduler then has the times it walked."""
        height, width = self.image_size
        with self._awake(*(name for name in self.pipe.components if name != "transformer")):
            return self.pipe(
                prompt=[*texts], height=height, width=width, num_inference_steps=steps,
                sigmas=np.linspace(1.0, 1 / steps, steps).tolist(), output_type="pt",
                generator=[torch.Generator().manual_seed(seed) for seed in seeds], **self.stock_settings(len(texts)),
            ).images.float().cpu()  # fmt: skip

    @torch.no_grad()
    def encode_images(self, images: Float[Tensor, "M 3 H W"]) -> Latents:
        """The latents of images in [0, 1], float32: the mode of the encoder's distribution."""
        with self._awake("vae"):
            return self.scaled(self.compressed((2 * images - 1).to(self.pipe.vae.dtype)).float())

    def fingerprint(self) -> str:
        """Names the weights that make images of embeddings, as they are without an adapter."""
        own = {f"transformer.{name}": w for name, w in lora.base(self.pipe.transformer).items()}
        own |= {f"vae.{name}": w for name, w in self.pipe.vae.state_dict().items()}
        plain = {f"{name}{k or ''}": w for name, value in own.items() for k, w in enumerate(stored(value))}
        return fingerprint(plain, digits=16)

    def attach_lora(self, rank: int, alpha: float, targets: Sequence[str] | None, seed: int) -> None:
        lora.attach(self.pipe.transformer, rank, alpha, targets or self.targets, seed)

    def insert_lora(self, matrices: lora.Matrices) -> None:
        """An adapter of these matrices. ValueError where they do not fit the model."""
        lora.insert(self.pipe.transformer, matrices)

    def save_memory(self, gradients: bool = False, tiling: bool = False, texts: int = 1000) -> None:
        """With `gradients` (gradient checkpointing), activations are computed again in the backward pass; with `tiling`
        images are decoded tile by tile; the embeddings of the last `texts` prompts are kept, in main memory."""
        self._kept = texts
        if gradients:
            self.pipe.transformer.enable_gradient_checkpointing()
        if tiling and not hasattr(self.pipe.vae, "enable_tiling"):
            raise ValueError(f"vae_tiling: a {type(self.pipe.vae).__name__} cannot decode tile by tile; remove it")
        if tiling:
            self.pipe.vae.enable_tiling()

    def attend(self, backend: str) -> None:
        """Let the transformer compute attention by one of diffusers' back ends. One velocity is tried; raises
        ValueError where the back end is not installed or does not run here."""
        try:
            self.pipe.transformer.set_attention_backend(backend)
            x = torch.zeros(1, *self.latent_shape, device=self.device)
            with torch.no_grad():
                self.network(x, torch.ones(1, device=self.device), self.encode([""]).own)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise ValueError(f"attention: {backend}: {error}") from None

    def compile(self) -> None:
        """Compile the transformer in place; worth it for long runs only (a minute or more at the first batch)."""
        self.pipe.transformer.compile()

    def parameters(self) -> list[nn.Parameter]:
        return lora.parameters(self.pipe.transformer)

    def adapter_names(self) -> list[str]:
        """Names of `parameters()`, in their order; each begins with the layer's."""
        return lora.names(self.pipe.transformer)

    def unused(self, x: Latents, cond: Conditioning) -> list[str]:
        """Adapted layers that the velocity at a latent `x [1, C, h, w]` does not depend on."""
        index = torch.zeros(len(x), dtype=torch.long, device=x.device)
        t = torch.full((len(x),), 0.5, device=x.device)
        return lora.unused(self.pipe.transformer, lambda: self.velocity(x, t, cond, index).float().square().mean())

    def trained_besides(self) -> list[str]:
        """Parameters that would be trained and are not the adapter's; there must be none."""
        own = {id(p) for p in self.parameters()}
        parts = {name: part for name, part in self.pipe.components.items() if isinstance(part, nn.Module)}
        every = ((f"{name}.{n}", p) for name, part in parts.items() for n, p in part.named_parameters())
        return [name for name, p in every if (p.requires_grad and ("lora_" not in name or id(p) not in own)) or (
            p.grad is not None and id(p) not in own)]  # fmt: skip

    def reference(self) -> AbstractContextManager:
        return lora.disabled(self.pipe.transformer)

    def adapter(self) -> dict[str, Tensor]:
        return lora.state(self.pipe.transformer)

    def load_adapter(self, values: dict[str, Tensor]) -> None:
        lora.load_state(self.pipe.transformer, values)

    def export(self, folder: Path, form: str = "diffusers", about: Mapping[str, str] | None = None) -> Path:
        """Write the adapter, or the model with it, for other programs (`mmalign.policy.export`)."""
        return exports.export(self, folder, form, about or {})

    def check_export(self, folder: Path, form: str = "diffusers") -> None:
        """Read what `export` wrote and compare one velocity with ours; raises ValueError."""
        exports.check(self, folder, form)


def is_part(kind: type, name: str, own: Any) -> bool:
    """Whether a name in a pipeline's index is that of a part, which it then gives by library and class. ValueError if
    it does not."""
    if name not in kind._get_signature_keys(kind)[0]:
        return False
    if own is not None and not (
        isinstance(own, list | tuple) and len(own) == 2 and all(part is None or isinstance(part, str) for part in own)
    ):
        raise ValueError(f"model_index.json: {name}: {str(own)[:100]!r} is not the library and the class of a part")
    return True


def class_of(name: str, own: Sequence[str]) -> type:
    """The class that a pipeline's index names for a part. ValueError if there is none such, or it is none of a part."""
    kind = imported(f"{own[0]}:{own[1]}", name, ours=own[0] in LIBRARIES)
    if not isinstance(kind, type) or not hasattr(kind, "from_pretrained"):
        raise ValueError(f"model_index.json: {name}: {own[1]!r} is no class of a part")
    return kind


def _loaded(kind: type, folder: Path, name: str, dtype: torch.dtype, quantization: Any, what: str) -> nn.Module:
    """A part of a pipeline with all of its weights. transformers would make up what is missing."""
    more = {} if quantization is None else {"quantization_config": quantization}
    try:
        part, info = kind.from_pretrained(
            folder, subfolder=name, dtype=dtype, use_safetensors=True, output_loading_info=True, **more
        )
    except OSError as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{what}: its weights are needed as safetensors: {name}: {why}") from None
    complete(part, info)
    return part


def stored(value: Tensor) -> list[Tensor]:
    """The plain tensors that a tensor is made of: itself, or of a quantised one the parts."""
    if not hasattr(value, "__tensor_flatten__"):
        return [value]
    return [plain for name in value.__tensor_flatten__()[0] for plain in stored(getattr(value, name))]


def chat(tokenizer, thinking: bool) -> Callable[[str], str]:
    """The message in which some families' text encoders are given a text."""

    def worded(text: str) -> str:
        message = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )

    return worded


def ragged(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """Embeddings of texts of unlike length, [L, D] each, as `tokens` [P, L, D] and their `mask`."""
    tokens = nn.utils.rnn.pad_sequence([*rows], batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(row), device=row.device) for row in rows], batch_first=True)
    return {"tokens": tokens, "mask": mask.long()}
