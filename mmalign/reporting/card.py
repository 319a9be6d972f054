"""The model card of an export: a README.md with the metadata that the Hugging Face hub reads, and its pictures."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from markupsafe import Markup

from mmalign.config import secrets, yaml12
from mmalign.config.schema import Config
from mmalign.evaluation.comparison import cells
from mmalign.pages import markdown
from mmalign.reporting import base_model, report
from mmalign.reporting.report import Picture
from mmalign.runs import reader
from mmalign.runs.machine import LIBRARIES
from reward_models import files, images
from reward_models.combine import Ramp

MARK = "<!-- Written by `mmalign export`, which replaces it. -->"
PROMPTS = 4  # with pictures
IMPORT = "import torch\nfrom diffusers import {pipeline}\n"
OPEN = "\npipe = {pipeline}.from_pretrained({base!r}, {opening})\n"
DRAW = "image = pipe(\n    {drawing},\n).images[0]\nimage.save('image.png')\n"
CODE = {  # by format; ComfyUI needs none
    "diffusers": IMPORT + OPEN + "pipe.load_lora_weights({folder!r})\n" + DRAW,
    "comfyui": "",
    "peft": IMPORT + "from peft import PeftModel\n" + OPEN
    + "pipe.transformer = PeftModel.from_pretrained(pipe.transformer, {folder!r}).base_model.model\n" + DRAW,
    "merged": IMPORT + OPEN.replace("base", "folder") + DRAW,
}  # fmt: skip

Pairs = Sequence[Mapping[str, Any]]  # of mmalign.reporting.report.pairs


@dataclass(frozen=True)
class Exported:
    """What was exported, in the format `form` and into `file`: the checkpoint after an `iteration` of a `run`, which
    was `named` or is the newest. `machine` is that of the training, if it is recorded. A stock `pipeline`, opened
    without its `absent` parts and called with `settings`, draws as the policy does; `tag` is that of its family."""

    form: str
    file: Path
    run: Path
    config: Config
    iteration: int
    named: bool
    machine: Mapping[str, Any] | None
    pipeline: str
    absent: Mapping[str, None]
    settings: Mapping[str, Any]
    tag: str | None

    @property
    def folder(self) -> Path:
        """Of the card."""
        return self.file if self.form == "merged" else self.file.parent


def ours(text: str) -> bool:
    """Whether a text is a card that was written here."""
    return MARK in text


def pictures(folder: Path) -> list[Path]:
    """The pictures of the card in a folder."""
    return sorted(folder.glob("images/before-[0-9].png")) + sorted(folder.glob("images/after-[0-9].png"))


def write(exported: Exported) -> None:
    """Write README.md and its pictures beside the weights; the pictures of an earlier card are removed."""
    c, record = exported.config, reader.read(exported.run)
    ended = next((row["iteration"] for row in record.evaluations if row["name"] == "after"), None)
    scores = record.scores if ended == exported.iteration else {side: [] for side in reader.SIDES}
    for old in pictures(exported.folder):
        old.unlink()
    pairs = [
        _copied(pair, exported.folder, n) for n, pair in enumerate(report.pairs(exported.run, scores, str, PROMPTS), 1)
    ]
    count, rises = report.comparison(scores)
    base, licence = base_model.name(c.model), base_model.licence(c.model)
    example = next(((pair["prompt"], pair["seed"]) for pair in pairs if pair["seed"] is not None), None)
    body = markdown.render(
        "card.md", mark=Markup(MARK), exported=exported, c=c, base=base, ended=ended,
        folder=exported.folder.resolve().name, code=_code(exported, base, *(example or ("a prompt", 0))),
        exact=example is not None and c.precision == "float32" and c.quantize is None, pairs=pairs, images=count,
        rises=[(name, *cells(row)) for name, row in rises.items()], lacking=record.lacking, rewards=_rewards(c),
        config=yaml12.written(secrets.public(c.model_dump(mode="json"))), versions=_versions(exported.machine or {}),
        licence=None if licence == base_model.UNKNOWN else licence.get("license_name", licence["license"]),
    )  # fmt: skip
    front = _metadata(exported, base, licence, pairs).to_yaml()
    files.write(exported.folder / base_model.CARD, str(ModelCard(f"---\n{front}\n---\n\n{body}")))


def _metadata(exported: Exported, base: str, licence: Mapping[str, str], pairs: Pairs) -> ModelCardData:
    merged, origin = exported.form == "merged", {}
    with suppress(ValueError):  # the name of a folder may be no name on the hub
        validate_repo_id(base)
        origin = {"base_model": base, "base_model_relation": "finetune" if merged else "adapter"}
    drawn = [(pair["prompt"], pair["pictures"][-1]) for pair in pairs]
    return ModelCardData(
        library_name="peft" if exported.form == "peft" else "diffusers",
        pipeline_tag="text-to-image",
        tags=[*([] if merged else ["lora"]), "diffusers", "text-to-image", "mmalign", *filter(None, [exported.tag])],
        widget=[{"text": prompt, "output": {"url": after.source}} for prompt, after in drawn if not after.problem]
        or None,
        **origin,
        **licence,
    )


def _copied(pair: Mapping[str, Any], folder: Path, number: int) -> dict[str, Any]:
    """A pair of the report, with its pictures copied into the folder's `images`."""

    def copied(picture: Picture) -> Picture:
        if picture.problem:
            return picture
        name = f"images/{picture.caption}-{number}.png"
        try:
            pixels = images.from_file(picture.source)
        except ValueError:
            return replace(picture, problem=f"{Path(picture.source).name} is damaged")
        (folder / name).parent.mkdir(exist_ok=True)
        images.to_pil(pixels)[0].save(folder / name)
        return replace(picture, source=name)

    return {**pair, "pictures": [copied(picture) for picture in pair["pictures"]]}


def _code(exported: Exported, base: str, prompt: str, seed: int) -> str:
    """Python that draws an image with the export by stock libraries, at the times of the run's own evaluation."""
    c, steps = exported.config, exported.config.eval_steps
    opening = {"dtype": f"torch.{c.precision}"} | dict.fromkeys(exported.absent, "None")
    drawing = {name: repr(value) for name, value in {"prompt": prompt, **exported.settings}.items()} | {
        "num_inference_steps": steps, "sigmas": f"[1 - i / {steps} for i in range({steps})]",
        "generator": f"torch.Generator().manual_seed({seed})",
    }  # fmt: skip
    return CODE[exported.form].format(
        pipeline=exported.pipeline, base=base, folder=exported.folder.resolve().name,
        opening=", ".join(f"{name}={value}" for name, value in opening.items()),
        drawing=",\n    ".join(f"{name}={value}" for name, value in drawing.items()),
    )  # fmt: skip


def _rewards(c: Config) -> list[tuple[str, str]]:
    """What was trained on, with its weight, and what was only evaluated."""
    evaluated = [*(c.rewards if c.records else ()), *c.watch]
    weights = {
        name: f"{weight.start:g} to {weight.end:g}, {weight.over}" if isinstance(weight, Ramp) else f"{weight:g}"
        for name, weight in c.weights.items()
        if name not in evaluated
    }
    bounds = [(name, f"constraint: at least {limit.bound:g}") for name, limit in c.at_least.items()]
    return [*weights.items(), *bounds, *((name, "evaluated only") for name in evaluated)]


def _versions(training: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    return [(name, str(training.get(name, "not recorded")), version(name)) for name in ("mmalign", *LIBRARIES)]
