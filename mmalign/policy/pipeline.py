"""A stock diffusers pipeline as a policy: what all model families share. Nothing of a pipeline's own loop is copied."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmalign.policy import export as exports, loading, lora
from mmalign.policy.family import Family, ragged
from mmalign.policy.gradients import clamped
from mmalign.seeds import gaussian
from mmalign.types import Latents
from reward_models import model_folders
from reward_models.weights import fingerprint


@dataclass(frozen=True)
class Conditioning:
    """Text embeddings by name: `prompts`, a row for each of P prompts, and `empty`, one row of the empty prompt, of
    the same length. Where a family's texts differ in length, `mask` [P, L] is 1 where there is text."""

    prompts: dict[str, Tensor]
    empty: dict[str, Tensor]


class PipelinePolicy(Family):
    """A policy from a stock pipeline of a family. `counts` holds the network forwards (one row of one batch each), the
    decoded images and the embedded texts."""

    def __init__(self, pipe: DiffusionPipeline, guidance: float = 1.0, size: tuple[int, int] | None = None):
        super().__init__(pipe, guidance, size)
        self.counts: Counter[str] = Counter()
        self.offload = False
        self._mixture: dict[str, float] | None = None  # weights of adapters; None: one acts
        self._embedded: OrderedDict[str, dict[str, Tensor]] = OrderedDict()  # embeddings by text, in order of last use
        self._embedded_most = 1000

    @classmethod
    def load(
        cls,
        model: str,
        *,
        dtype: torch.dtype,
        device: str,
        guidance: float,
        size: tuple[int, int] | None = None,
        quantize: str | None = None,
        offload: bool = False,
    ) -> "PipelinePolicy":
        """The policy of a folder or hub id, as `mmalign.policy.load`. ValueError where it cannot be used."""
        if offload and device == "cpu":
            raise ValueError("offload: the model is on the CPU, where there is nothing to make room on; remove it")
        empty = loading.skeleton(cls, model, torch.float32)
        cls(empty, guidance, size)  # a size or guidance that does not fit is refused before weights are read
        policy = cls(loading.pipeline(cls, model, empty, dtype, device, quantize, offload), guidance, size)
        policy.offload = offload
        with model_folders.loading(f"model {model!r}", "it"):
            policy.check_numbers()
        return policy

    def check_numbers(self) -> None:
        """ValueError unless latents can be scaled and scaled back, and the embeddings of a text are finite and of the
        width that the transformer takes."""
        for name, component in self.pipe.components.items():
            most = getattr(component, "model_max_length", 1)
            if not isinstance(most, int) or most < 1:
                raise ValueError(f"its {name} reads {str(most)[:40]!r} tokens of a text; an integer from 1 is needed")
        x = torch.zeros(1, *self.latent_shape, device=self.device)
        try:
            units = [torch.as_tensor(value, dtype=torch.float32) for value in self.units(x)]
            shape = self.unscaled(x).shape
        except (TypeError, ArithmeticError) as error:
            raise ValueError(f"its autoencoder's shift and scale are not numbers: {error}") from None
        if not all(value.isfinite().all() for value in (*units, 1 / units[1])):
            raise ValueError(f"its autoencoder's shift and scale are {units[0].tolist()} and {units[1].tolist()}")
        if shape != x.shape:
            raise ValueError(f"its autoencoder's shift and scale are not those of {len(x[0])} channels")
        shapes = {} if type(self).text_shapes is Family.text_shapes else self.text_shapes()
        for name, value in self.encode([""]).empty.items():
            if name in shapes and name != "mask" and value.shape[-1] != shapes[name][-1]:
                raise ValueError(f"{name} are {value.shape[-1]} wide, the transformer takes {shapes[name][-1]}")
            if not value.isfinite().all():
                raise ValueError(f"{name} of a text are not finite")
        self._embedded.clear()
        self.counts.clear()

    @property
    def device(self) -> torch.device:
        return next(self.pipe.transformer.parameters()).device  # the `device` of diffusers visits all modules for hooks

    def to(self, device: str) -> None:
        """Move the pipeline to a device, where it stays."""
        self.pipe.to(device)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Conditioning:
        """Embeddings do not depend on the other texts: texts are embedded alone, or in batches of one size, which is
        filled up with the empty text. They are cached (LRU)."""
        wanted = dict.fromkeys([*texts, ""])
        missing, size = [text for text in wanted if text not in self._embedded], self.together
        with self._awake(*(name for name in self.pipe.components if name.startswith("text_encoder") and missing)):
            for first in range(0, len(missing), size):
                part = missing[first : first + size]
                embeds = self.texts([*part, *[""] * (size - len(part))])
                for i, text in enumerate(part):
                    self._embedded[text] = {name: v[i : i + 1].clone().cpu() for name, v in embeds.items()}
        self.counts["texts"] += len(missing)
        for text in wanted:
            self._embedded.move_to_end(text)
        rows = [self._embedded[text] for text in (*texts, "")]
        if "mask" in rows[0]:
            embeds = ragged([row["tokens"][0] for row in rows])
        else:
            embeds = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        while len(self._embedded) > self._embedded_most:
            self._embedded.popitem(last=False)
        embeds = {name: values.to(self.device) for name, values in embeds.items()}
        prompts, empty = ({name: v[rows] for name, v in embeds.items()} for rows in (slice(-1), slice(-1, None)))
        return Conditioning(prompts, empty)

    @contextmanager
    def _awake(self, *names: str) -> Iterator[None]:
        """With `offload`, the named components of the pipeline are on the device within the block alone."""
        modules = [module for name in names if isinstance(module := getattr(self.pipe, name), nn.Module)]
        for module in modules if self.offload else ():
            module.to(self.device)
        try:
            yield
        finally:
            for module in modules if self.offload else ():
                module.to("cpu")

    def velocity(self, x: Latents, t: Float[Tensor, "M"], cond: Conditioning, index: Int[Tensor, "M"]) -> Latents:
        if self._mixture is not None:
            return self._mixed(self._mixture, x, t, cond, index)
        if not self.true_guidance:
            self.counts["forwards"] += len(x)
            return self.network(x, t, {name: value[index] for name, value in cond.prompts.items()})
        return self.guided(*self.velocities(x, t, cond, index))

    @torch.no_grad()
    def prompt_effect(
        self, x: Latents, t: Float[Tensor, "M"], cond: Conditioning, index: Int[Tensor, "M"]
    ) -> Float[Tensor, "M h w"]:
        """How far the prompt moves the velocity at each position: its distance from that of the empty prompt."""
        empty, wanted = self.velocities(x, t, cond, index)
        return (wanted - empty).float().norm(dim=1)

    @contextmanager
    def observed(self, blocks: Sequence[int] | None = None) -> Iterator[Callable[[int], Float[Tensor, "M F"]]]:
        """Within the block, the features of the rows of the last velocity: mean and standard deviation of the image's
        tokens, and the mean of the text's, after these `blocks` of the network (the middle one by default). With true
        guidance they are those of the forward with the prompt."""
        every = self.blocks()
        numbers = [len(every) // 2] if blocks is None else [*blocks]
        if not numbers or not all(0 <= number < len(every) for number in numbers):
            raise ValueError(f"blocks: {numbers}; the network has blocks 0 to {len(every) - 1}")
        pooled: dict[int, Tensor] = {}

        def note(number: int, _: nn.Module, __: Any, output: Any) -> None:
            image, *text = (tokens.float() for tokens in self.tokens(output))
            parts = [image.mean(1), image.std(1, correction=0), *(tokens.mean(1) for tokens in text)]
            pooled[number] = torch.cat(parts, 1)

        hooks = [every[number].register_forward_hook(partial(note, number)) for number in numbers]
        try:
            yield lambda rows: torch.cat([pooled[number][-rows:] for number in numbers], 1)
        finally:
            for hook in hooks:
                hook.remove()

    def velocities(self, x: Latents, t: Tensor, cond: Conditioning, index: Tensor) -> tuple[Tensor, Tensor]:
        """The velocities of the empty prompt and of the prompt, at two forwards a row."""
        self.counts["forwards"] += 2 * len(x)
        rows = {name: value[index] for name, value in cond.prompts.items()}
        both = {name: torch.cat([cond.empty[name].expand_as(value), value]) for name, value in rows.items()}
        return self.network(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)

    @torch.no_grad()
    def decode(self, x: Latents) -> Float[Tensor, "M 3 H W"]:
        """Images in [0, 1], float32."""
        self.counts["decodes"] += len(x)
        with self._awake("vae"):
            image = self.pixels(self.unscaled(x.to(self.pipe.vae.dtype)))
        return (image.float() / 2 + 0.5).clamp(0, 1)

    def decode_in_graph(self, x: Latents, recompute: bool = False) -> Float[Tensor, "M 3 H W"]:
        """The images of `decode` with gradients to the latents; `recompute` holds the activations of one image."""
        self.counts["decodes"] += len(x)
        self.pipe.vae.requires_grad_(False)
        with self._awake("vae"):
            latents = self.unscaled(x.to(self.pipe.vae.dtype))
            if recompute:
                each = [checkpoint(self.pixels, one[None], use_reentrant=False) for one in latents]
                image = torch.cat(each)
            else:
                image = self.pixels(latents)
        return clamped(image.float() / 2 + 0.5)

    @torch.no_grad()
    def stock_images(self, texts: Sequence[str], seeds: Sequence[int], steps: int) -> Float[Tensor, "M 3 H W"]:
        """The images of the stock pipeline's own loop, one per text from the noise of its seed, which ODE sampling must
        reproduce. Its scheduler then holds the times that the loop used. The noise is given: the pipeline would draw it
        in the type of the embeddings, and some versions of torch draw other numbers in bfloat16 than in float32."""
        height, width = self.image_size
        noise = torch.stack([gaussian(self.latent_shape, seed) for seed in seeds])
        with self._awake(*(name for name in self.pipe.components if name != "transformer")):
            return self.pipe(
                prompt=[*texts], height=height, width=width, num_inference_steps=steps,
                sigmas=np.linspace(1.0, 1 / steps, steps).tolist(), output_type="pt",
                latents=self.stock_noise(noise), **self.stock_settings(len(texts)),
            ).images.float().cpu()  # fmt: skip

    @torch.no_grad()
    def encode_images(self, images: Float[Tensor, "M 3 H W"]) -> Latents:
        """The latents of images in [0, 1], float32: the mode of the encoder's distribution."""
        with self._awake("vae"):
            return self.scaled(self.compressed((2 * images - 1).to(self.pipe.vae.dtype)).float())

    def fingerprint(self) -> str:
        """A hash of the transformer's and autoencoder's weights, without the adapter: 16 hexadecimal digits."""
        weights = {f"transformer.{name}": w for name, w in lora.base(self.pipe.transformer).items()}
        weights |= {f"vae.{name}": w for name, w in self.pipe.vae.state_dict().items()}
        plain = {f"{name}{k or ''}": w for name, value in weights.items() for k, w in enumerate(stored(value))}
        return fingerprint(plain, digits=16)

    def attach_lora(
        self, rank: int, alpha: float, targets: Sequence[str] | None, seed: int, name: str = lora.DEFAULT
    ) -> None:
        lora.attach(self.pipe.transformer, rank, alpha, targets or self.targets, seed, name)

    def insert_lora(self, matrices: lora.Matrices, name: str = lora.DEFAULT) -> None:
        """An adapter of these matrices. ValueError where they do not fit the model."""
        lora.insert(self.pipe.transformer, matrices, name)

    def save_memory(self, gradients: bool = False, tiling: bool = False, texts: int = 1000) -> None:
        """With `gradients` (gradient checkpointing), activations are recomputed in the backward pass; with `tiling`
        images are decoded tile by tile; the embeddings of the last `texts` prompts are cached in main memory."""
        self._embedded_most = texts
        if gradients:
            self.pipe.transformer.enable_gradient_checkpointing()
        if tiling and not hasattr(self.pipe.vae, "enable_tiling"):
            raise ValueError(f"vae_tiling: a {type(self.pipe.vae).__name__} cannot decode tile by tile; remove it")
        if tiling:
            self.pipe.vae.enable_tiling()

    def attend(self, backend: str) -> None:
        """Let the transformer compute attention by one of diffusers' back ends. One velocity is tried; raises
        ValueError where the back end is not installed, does not run here or would be ignored."""
        try:
            self.set_attention(backend)
            x = torch.zeros(1, *self.latent_shape, device=self.device)
            with torch.no_grad():
                self.network(x, torch.ones(1, device=self.device), self.encode([""]).prompts)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise ValueError(f"attention: {backend}: {error}") from None

    def set_attention(self, backend: str) -> None:
        """`attend` without a trial. diffusers passes over layers that know no back ends, as SD3's."""
        transformer = self.pipe.transformer
        transformer.set_attention_backend(backend)
        processors = [getattr(module, "processor", None) for module in transformer.modules()]
        if backend != "native" and not any(getattr(p, "_attention_backend", None) for p in processors):
            raise ValueError(f"{type(transformer).__name__} computes attention by torch's native one alone; remove it")

    def compile(self) -> None:
        """Compile the repeated blocks of the transformer in place: blocks of one kind share their code, so the first
        batches wait for one of each kind, not for all."""
        # each kind has code for weights with and without gradients, for the adapter on, off and merged
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        for blocks in self.pipe.transformer.children():
            if isinstance(blocks, nn.ModuleList):
                for block in blocks:
                    block.compile()

    def adapters(self) -> list[str]:
        return lora.adapters(self.pipe.transformer)

    def parameters(self, name: str = lora.DEFAULT) -> list[nn.Parameter]:
        return lora.parameters(self.pipe.transformer, name)

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
        adapter = {id(p) for p in self.parameters()}
        modules = {name: module for name, module in self.pipe.components.items() if isinstance(module, nn.Module)}
        parameters = ((f"{name}.{n}", p) for name, module in modules.items() for n, p in module.named_parameters())
        return [
            name
            for name, p in parameters
            if (p.requires_grad and ("lora_" not in name or id(p) not in adapter))
            or (p.grad is not None and id(p) not in adapter)
        ]

    @contextmanager
    def acting(self, name: str | None) -> Iterator[None]:
        mixture, self._mixture = self._mixture, None
        try:
            with lora.acting(self.pipe.transformer, name):
                yield
        finally:
            self._mixture = mixture

    def mix(self, weights: Mapping[str, float]) -> None:
        """From now on its velocity is `v_base + sum_k w_k (v_k - v_base)` over the adapters of these names (MAH-DPO):
        exactly linear in the weights. To the bit the base at weights of 0, and one adapter at its 1 and others' 0."""
        self._mixture = {name: float(weight) for name, weight in weights.items() if weight}

    def merge(self, weights: Mapping[str, float]) -> None:
        """From now on it has one adapter, whose change of weights is the weighted sum of those of these names. This is
        linear in the weights of the model, and not in its velocity: another model than that of `mix`. ValueError where
        all weights are 0."""
        network = self.pipe.transformer
        matrices = lora.summed([(lora.folded(network, name), weight) for name, weight in weights.items()])
        if not matrices:
            raise ValueError("all weights are 0, which leaves no adapter")
        for name in self.adapters():
            lora.remove(network, name)
        self._mixture = None
        self.insert_lora(matrices)

    @property
    def evaluations(self) -> int:
        """How often a velocity evaluates the network, as one adapter or a mixture."""
        weights = [] if self._mixture is None else [*self._mixture.values()]
        return 1 if weights in ([], [1.0]) else 1 + len(weights)

    def _mixed(self, weights: Mapping[str, float], *row: Any) -> Latents:
        def of(name: str | None) -> Latents:
            with self.acting(name):
                return self.velocity(*row)

        if [*weights.values()] == [1.0]:
            return of(next(iter(weights)))
        base = of(None)
        if not weights:
            return base
        base, each = base.float(), {name: of(name).float() for name in weights}
        if len(each) == 1:
            [(name, v)] = each.items()
            return torch.lerp(base, v, weights[name])
        return base + sum(weights[name] * (v - base) for name, v in each.items())

    def reference(self) -> AbstractContextManager:
        return self.acting(None)

    def fused(self) -> AbstractContextManager:
        return nullcontext() if self._mixture is not None else lora.fused(self.pipe.transformer)

    def adapter(self, name: str = lora.DEFAULT) -> dict[str, Tensor]:
        return lora.state(self.pipe.transformer, name)

    def load_adapter(self, values: dict[str, Tensor], name: str = lora.DEFAULT) -> None:
        lora.load_state(self.pipe.transformer, values, name)

    def export(self, folder: Path, form: str = "diffusers", about: Mapping[str, str] | None = None) -> Path:
        """Write the adapter, or the merged model, for other programs (`mmalign.policy.export`)."""
        return exports.export(self, folder, form, about or {})

    def check_export(self, folder: Path, form: str = "diffusers") -> None:
        """Read an export back and compare its velocity with the policy's. ValueError where they differ."""
        exports.check(self, folder, form)


def stored(value: Tensor) -> list[Tensor]:
    """The plain tensors that store a tensor: itself, or the components of a quantised one."""
    if not hasattr(value, "__tensor_flatten__"):
        return [value]
    return [plain for name in value.__tensor_flatten__()[0] for plain in stored(getattr(value, name))]
