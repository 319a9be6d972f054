"""Train an image-text model to write the critiques that passed the checks, without the label (PARROT's distillation).

The student learns the reply that the scorer `rational` reads, to the question that it asks, and `rational` loads the
folder: `load("rational", model=OUT)`.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from reward_models import files
from reward_models.meaning import clusters
from reward_models.scorers import rational
from reward_models.training import checkpoint, data
from reward_models.training.curves import Point, best, stopped
from reward_models.training.data import Progress, silent
from reward_models.training.fitting import checked
from reward_models.training.folder import CARD, CHECKPOINT, CURVES, Workplace, put
from reward_models.training.parrot import samples as stored, student
from reward_models.training.parrot.samples import Sample
from reward_models.vlm import transformers_model as vlm
from reward_models.vlm.templates import quoted
from reward_models.vlm.types import Question
from reward_models.weights import fingerprint, named

INSTRUCTION = "instruction.txt"
MODEL, CHOSEN = "model", "chosen"  # parts of a checkpoint


@dataclass(frozen=True)
class Distillation:
    """`model`: the student, a folder or hub id of an image-text model. `rank`: of LoRA on the language model; null
    trains the language model itself, as published. `batch`: samples in a step, `together`: those in one forward.
    `warmup`: the share of the steps in which the rate rises; then it falls as a cosine. `patience`: epochs without a
    lower held-out loss before it stops. `tokens`: the longest reply. `instruction`: a file that replaces the
    question, then needed for the scorer too."""

    model: str
    rank: Annotated[int, Ge(1)] | None = 16
    learning_rate: Annotated[float, Gt(0)] = 1e-4
    weight_decay: Annotated[float, Ge(0)] = 0.0
    warmup: Annotated[float, Ge(0), Lt(1)] = 0.05
    epochs: Annotated[int, Ge(1)] = 3
    patience: Annotated[int, Ge(1)] = 1
    batch: Annotated[int, Ge(1)] = 16
    together: Annotated[int, Ge(1)] = 4
    tokens: Annotated[int, Ge(1)] = 2048
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    instruction: str | None = None

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, from 0, of so many."""
        rising = self.warmup * steps
        if step < rising:
            return self.learning_rate * (step + 1) / (rising + 1)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))


def distil(
    source: str | Path,
    out: str | Path,
    *,
    held_out: float = 0.2,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = silent,
    **settings: Any,
) -> dict[str, Any]:
    """Train a student on the rationales of `source`, a folder of `rationalise`, write a complete model to the folder
    `out`, and return its card. `settings` are those of `Distillation`.

    The share `held_out` of the prompts is not trained on: half of it decides when to stop, the other half is only
    measured. The loss is the mean cross-entropy of the tokens of the replies. ValueError, in one line, for rationales,
    settings or a folder that cannot be used; a training that was interrupted continues in its folder after the last
    complete epoch.
    """
    out, method = Path(out), checked(Distillation, "distil", settings)
    if not 0 < held_out < 1:
        raise ValueError(f"held_out {held_out}: a share between 0 and 1 is needed")
    samples = stored.read(source)
    part_of = data.part_of([sample.prompt.text for sample in samples], held_out, seed)
    parts = {part: [s for s, name in zip(samples, part_of, strict=True) if name == part] for part in data.PARTS}
    _check_new(out)
    made_of = {"data": _digest(samples, progress), "held_out": held_out, "seed": seed, "settings": asdict(method)}
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    training = Training(method, Workplace(out, key), device, seed)
    points = training.run(parts["train"], parts["stop"], progress)
    losses = {name: training.loss(part) for name, part in parts.items()}
    if method.instruction is not None:
        files.replace(out / INSTRUCTION, training.template.source.encode())
    student.save(training.model, training.processor, out)
    put(out / CURVES, [point.record() for point in points])
    card = made_of | {
        "samples": {name: len(part) for name, part in parts.items()},
        "prompts": {name: len({*clusters(s.prompt.text for s in part).tolist()}) for name, part in parts.items()},
        "base": {"model": named(method.model), "checkpoint": training.base},
        "licence_of_base": "the model's own",
        "epoch": best(points).epoch,
        "losses": losses,
    }
    put(out / CARD, card)
    (out / CHECKPOINT).unlink(missing_ok=True)
    return card


class Training:
    """The student, its optimiser, and the weights with the least loss on the samples to stop by."""

    def __init__(self, method: Distillation, work: Workplace, device: str, seed: int):
        self.method, self.work, self.device, self.seed = method, work, device, seed
        self.template, self.form = rational.instructions("image", "headings", method.instruction)
        model, self.processor = vlm.load("distil", method.model, device, method.dtype)
        self.base = fingerprint(model)
        self.model = student.trained(model, method.rank, seed)
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), method.learning_rate, weight_decay=method.weight_decay
        )
        self.chosen = self.state()

    def state(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu().clone() for name, value in self.parameters.items()}

    @torch.no_grad()
    def restore(self, weights: dict[str, Tensor]) -> None:
        for name, value in self.parameters.items():
            value.copy_(weights[name])

    def run(self, train: Sequence[Sample], stop: Sequence[Sample], progress: Progress) -> list[Point]:
        """Train from the last checkpoint, if there is one. The model has the weights with the least loss after it."""
        m, points = self.method, self.resume()
        steps = -(-len(train) // m.batch)
        while len(points) < m.epochs and not stopped(points, m.patience):
            epoch = len(points)
            batches = enumerate(self.batches(train, epoch))
            name = f"epoch {epoch + 1} of at most {m.epochs}"
            total = sum(
                self.step(some, m.rate(epoch * steps + k, m.epochs * steps))
                for k, some in progress(batches, 0, steps, name, "steps")
            )
            points.append(Point(0, epoch + 1, total / steps, self.loss(stop), None))
            if best(points) is points[-1]:
                self.chosen = self.state()
            checkpoint.save(self.work, points, {MODEL: self.state(), CHOSEN: self.chosen}, self.optimizer)
        self.restore(self.chosen)
        return points

    def resume(self) -> list[Point]:
        state = checkpoint.resume(self.work)
        if state is None:
            return []
        state.restore(self.optimizer)
        self.restore(state.part(MODEL))
        self.chosen = state.part(CHOSEN)
        return state.points

    def batches(self, samples: Sequence[Sample], epoch: int) -> Iterator[list[Sample]]:
        """The samples in an order that depends on the seed and the epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(samples), generator=generator).tolist()
        for start in range(0, len(order), self.method.batch):
            yield [samples[i] for i in order[start : start + self.method.batch]]

    def step(self, samples: Sequence[Sample], rate: float) -> float:
        """One step of the optimiser; the mean loss of the tokens of all replies before it."""
        replies = self.replies(samples)
        count, total = sum(map(len, replies)), 0.0
        self.optimizer.zero_grad()
        for sums, _ in self.forwards(samples, replies):
            (sums.sum() / count).backward()
            total += sums.sum().item()
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return total / count

    @torch.no_grad()
    def loss(self, samples: Sequence[Sample]) -> float:
        """The mean loss of the tokens of all replies."""
        parts = [*self.forwards(samples, self.replies(samples))]
        return sum(sums.sum().item() for sums, _ in parts) / sum(int(counts.sum()) for _, counts in parts)

    def forwards(self, samples: Sequence[Sample], replies: Sequence[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(samples), self.method.together):
            rows = slice(start, start + self.method.together)
            questions = [self.question(sample) for sample in samples[rows]]
            yield student.token_losses(
                self.model, *student.encode(self.processor, questions, replies[rows], self.device)
            )

    def question(self, sample: Sample) -> Question:
        """What the scorer `rational` asks about the image."""
        image = data.read(sample.image)[0]
        return self.template.fill(image=image, prompt=quoted(sample.prompt.text), reply=self.form)

    def replies(self, samples: Sequence[Sample]) -> list[list[int]]:
        tokens = [student.reply_tokens(self.model, self.processor, sample.reply) for sample in samples]
        for sample, reply in zip(samples, tokens, strict=True):
            if len(reply) > self.method.tokens:
                raise ValueError(
                    f"{sample.image.name}: a reply has {len(reply)} tokens; give tokens={len(reply)} here, and to the "
                    "scorer"
                )
        return tokens


def _digest(samples: Sequence[Sample], progress: Progress) -> str:
    """The SHA-256 of all samples in their order: pixels, prompts and replies."""
    pictures = {sample.image.name: sample.image for sample in samples}
    some = progress(pictures.items(), 0, len(pictures), "reading", "pictures")
    hashes = {name: data.picture_hash(data.read(picture)) for name, picture in some}
    lines = (json.dumps([hashes[sample.image.name], sample.prompt.text, sample.reply]) for sample in samples)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _check_new(out: Path) -> None:
    """Make the folder. ValueError where anything but an unfinished student is there already."""
    if (out / CARD).exists():
        raise ValueError(f"{out}: a model is there already; choose another folder or remove it")
    if out.is_dir() and not (out / CHECKPOINT).exists() and any(out.iterdir()):
        raise ValueError(f"{out}: a folder with other files; choose an empty folder")
    files.make_folder(out)
