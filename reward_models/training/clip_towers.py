"""`clip`: both towers of a CLIP model, fine-tuned as PickScore does (arXiv 2305.01569): the score is the logit scale
times the cosine of image and text.

The folder is also one of open_clip's `local-dir` layout. After each epoch a checkpoint is written, from which an
interrupted training continues to the bit.
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt
from jaxtyping import Float
from torch import Tensor, nn

from reward_models import files, limits
from reward_models.images import rounded
from reward_models.pairs import Pair
from reward_models.scorers.clip import TINY, Clip
from reward_models.training import base as bases, checkpoint, data
from reward_models.training.checkpoint import Checkpoint
from reward_models.training.curves import Point, accuracy, best, stopped
from reward_models.training.data import Progress, Split
from reward_models.training.folder import Model, Workplace
from reward_models.training.losses import LOSSES, weighted_mean
from reward_models.training.statistics import temperature
from reward_models.weights import fingerprint

WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
WIDTH = "log_width"  # of ties, beside the model's weights in a checkpoint
HIGHEST = math.log(100)  # of the logarithm of the logit scale, as in CLIP


@dataclass(frozen=True)
class ClipTowers:
    """`base`, `pretrained`, `loss`, `margin`: as for `clip_head`. `towers`: those that are trained, beside the logit
    scale; the text tower can learn its few prompts by heart. `rescale`: begin with the logit scale that fits the
    pairs most closely, because that of a contrastive model is too sure of small differences. `batch`: pairs in a step.
    `patience`: epochs without a lower held-out loss before it stops."""

    base: str = ""
    pretrained: str = ""
    loss: Literal["bradley_terry", "rao_kupper", "davidson"] = "bradley_terry"
    margin: Annotated[float, Ge(0)] = 0.0
    towers: Literal["both", "image"] = "both"
    rescale: bool = True
    learning_rate: Annotated[float, Gt(0)] = 1e-4
    weight_decay: Annotated[float, Ge(0)] = 0.01
    epochs: Annotated[int, Ge(1)] = 10
    batch: Annotated[int, Ge(1)] = 32
    patience: Annotated[int, Ge(1)] = 2

    type = "clip"

    def __call__(self, parts: Split, work: Workplace, device: str, seed: int, progress: Progress) -> Model:
        """The model trained on `parts.train` and stopped by `parts.stop`. Its files are written to `work.folder`."""
        base = bases.opened(self.base, self.pretrained, device, self.batch)
        config = _config(self.base, base)
        training = Training(self, base, work)
        points = training.run(parts, seed, progress)
        _write(work.folder, config, self.base, training.chosen)
        return Model(
            {},
            {
                "base": {"model": self.base, "pretrained": self.pretrained, "checkpoint": base.card.checkpoint},
                "licence": base.card.licence,
                "components": ["score"],
                "members": 0,
                "hidden": 0,
                "weights": fingerprint(training.chosen),
                "loss": self.loss,
            },
            points,
        )


class Training:
    """Towers, optimiser, and the weights with the least loss on the pairs to stop by."""

    def __init__(self, method: ClipTowers, base: Clip, work: Workplace):
        self.method, self.base, self.loss, self.work = method, base, LOSSES[method.loss], work
        self.log_width = nn.Parameter(torch.zeros((), device=base.device))
        trained = [*base.model.visual.parameters()] if method.towers == "image" else [*base.model.parameters()]
        self.parameters = list({id(p): p for p in (*trained, base.model.logit_scale, self.log_width)}.values())
        matrices = [p for p in self.parameters if p.ndim > 1]
        others = [p for p in self.parameters if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": method.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=method.learning_rate,
        )
        self.chosen = self.state()

    def state(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu().clone() for name, value in self.base.model.state_dict().items()}

    def losses(self, pairs: Sequence[Pair]) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"]]:
        """The loss of each pair, and the difference of its scores."""
        row = {text: i for i, text in enumerate(dict.fromkeys(pair.prompt.text for pair in pairs))}
        text = self.base.model.encode_text(self.base.tokenizer([*row]).to(self.base.device), normalize=True)
        text = text[[row[pair.prompt.text] for pair in pairs]]
        pictures = [picture for pair in pairs for picture in (pair.a, pair.b)]
        pixels = torch.cat([self.base.prepared(rounded(data.read(picture))) for picture in pictures])
        image = self.base.model.encode_image(pixels, normalize=True).unflatten(0, (-1, 2))
        scores = self.base.model.logit_scale.exp() * (image * text[:, None]).sum(-1)
        a, b = scores[:, :1], scores[:, 1:]
        preference = data.preferences(pairs).to(a)
        margin = data.margins(pairs, self.method.margin).to(a)
        return self.loss(a, b, preference, margin, self.log_width), (a - b)[:, 0]

    def run(self, parts: Split, seed: int, progress: Progress) -> list[Point]:
        """Train from the last checkpoint, if there is one."""
        m = self.method
        train = _selected(parts.train)
        stop = _selected(parts.stop)
        points = self.resume()
        if not points and m.rescale:
            self.rescale(train)
        steps = -(-len(train) // m.batch)
        while len(points) < m.epochs and not stopped(points, m.patience):
            epoch = len(points) + 1
            name = f"epoch {epoch} of at most {m.epochs}"
            losses = [
                self.step(some) for some in progress(_batches(train, m.batch, seed, epoch), 0, steps, name, "steps")
            ]
            points.append(Point(0, epoch, sum(losses) / len(losses), *self.measured(stop)))
            if best(points) is points[-1]:
                self.chosen = self.state()
            self.save(points)
        return points

    @torch.no_grad()
    def rescale(self, pairs: Sequence[Pair]) -> None:
        """Divide the logit scale by the temperature with the least loss on the pairs."""
        differences = torch.cat([self.losses(some)[1] for some in _in_order(pairs, self.method.batch)]).cpu()
        preference = data.preferences(pairs)
        decided = preference != 0.5
        if decided.any():
            truth = (preference[decided] > 0.5).double().numpy()
            factor = temperature(differences[decided].double().numpy(), truth)
            self.base.model.logit_scale -= math.log(factor)
            self.base.model.logit_scale.clamp_(max=HIGHEST)

    def step(self, pairs: Sequence[Pair]) -> float:
        self.optimizer.zero_grad()
        losses, _ = self.losses(pairs)
        loss = weighted_mean(losses, torch.ones_like(losses))
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            self.base.model.logit_scale.clamp_(max=HIGHEST)
        return loss.item()

    @torch.no_grad()
    def measured(self, pairs: Sequence[Pair]) -> tuple[float, float]:
        """The mean loss and the accuracy."""
        parts = [self.losses(some) for some in _in_order(pairs, self.method.batch)]
        losses, differences = (torch.cat([part[k] for part in parts]).cpu() for k in (0, 1))
        return float(losses.mean()), accuracy(differences, data.preferences(pairs))

    def save(self, points: list[Point]) -> None:
        """Replace the checkpoint: weights, the selected weights, moments, and the course so far."""
        weights = self.state() | {WIDTH: self.log_width.detach().cpu().clone()}
        checkpoint.save(self.work, Checkpoint(points, weights, self.chosen), self.optimizer)

    def resume(self) -> list[Point]:
        """The course of an interrupted training, whose state is restored. ValueError if it was of other data or
        settings."""
        state = checkpoint.resume(self.work, self.optimizer)
        if state is None:
            return []
        self.log_width.data.copy_(state.weights.pop(WIDTH))
        self.base.model.load_state_dict(state.weights)
        self.chosen = state.chosen
        return state.points


def _in_order(pairs: Sequence[Pair], batch: int) -> Iterator[Sequence[Pair]]:
    return (pairs[start : start + batch] for start in range(0, len(pairs), batch))


def _selected(pairs: Sequence[Pair]) -> list[Pair]:
    return [pair for pair, used in zip(pairs, data.overall(pairs).tolist(), strict=True) if used]


def _batches(pairs: Sequence[Pair], batch: int, seed: int, epoch: int) -> Iterator[list[Pair]]:
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
    for start in range(0, len(order), batch):
        yield [pairs[i] for i in order[start : start + batch]]


def _config(source: str, base: Clip) -> dict[str, Any]:
    """open_clip's config of the base model."""
    import open_clip

    folder = Path(source or TINY)
    if folder.is_dir():
        return files.parsed(files.text(folder / CONFIG, limits.CONFIG))
    preprocess = open_clip.get_model_preprocess_cfg(base.model)
    quick = {"quick_gelu": True} if base.card.settings.get("quick_gelu") else {}
    return {
        "model_cfg": open_clip.get_model_config(source.replace("/", "-")) | quick,
        "preprocess_cfg": {key: preprocess[key] for key in ("size", "mean", "std", "interpolation", "resize_mode")},
    }


def _write(folder: Path, config: Mapping[str, Any], source: str, weights: Mapping[str, Tensor]) -> None:
    """open_clip's files; the tokenizer's are copied from a base that has its tokenizer in its folder."""
    from safetensors.torch import save

    files.replace(folder / WEIGHTS, save({name: value.contiguous() for name, value in weights.items()}))
    files.replace(folder / CONFIG, (json.dumps(config, indent=1) + "\n").encode())
    place = Path(source or TINY)
    for name in TOKENIZER:
        if (place / name).is_file():
            shutil.copyfile(place / name, folder / name)
