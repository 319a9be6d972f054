"""The options and arguments that several commands share, and the parsers of their values.

A parser is the callback of its option: it takes the text and returns the value, and BadInput names the option. `parser=
str` hands it the text unchanged whatever the annotation, which is the type that the command gets.
"""

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from mmalign.config import paths
from mmalign.errors import BadInput, refusing
from reward_models import allowlist

# the sources that `mmalign.data.prompts.read` takes
PROMPTS = (
    "file (.txt, .jsonl, .json, .csv, .tsv, .parquet) or dataset (hf:NAME:SPLIT, hf:NAME/CONFIG:SPLIT); with :COLUMN, "
    "that alone"
)

prompt_option = partial(typer.Option, rich_help_panel="Prompts")
model_option = partial(typer.Option, rich_help_panel="Model")
sampling_option = partial(typer.Option, rich_help_panel="Sampling")
reward_option = partial(typer.Option, rich_help_panel="Rewards")
output_option = partial(typer.Option, rich_help_panel="Output")


class Box(NamedTuple):
    """A box in pixels."""

    left: float
    top: float
    right: float
    bottom: float


class Setting(NamedTuple):
    """A setting of one scorer, and the text that gave it."""

    text: str
    scorer: str
    key: str
    value: Any


class MethodSetting(NamedTuple):
    """A setting of a method."""

    key: str
    value: Any


class Weighted(NamedTuple):
    """A reward or an adapter by its name, and its weight; None for an adapter alone."""

    name: str
    weight: float | None


class Aspect(NamedTuple):
    """An aspect and its components."""

    name: str
    components: list[str]


# ------------------------------------------------------------------------------------------------------------- parsers


def parse_prompts(texts: list[str] | None) -> list[str] | None:
    return texts and [parse_prompt(text) for text in texts]


def parse_prompt(text: str | None) -> str | None:
    """A prompt of the command line: UTF-8 where its bytes are, whatever the locale."""
    from reward_models import tables

    if text is None:
        return None
    with suppress(UnicodeError):
        text = os.fsencode(text).decode()
    with refusing():
        return tables.wording(text)


def parse_seeds(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    seeds = [int(word) for word in words if re.fullmatch(r"[0-9]{1,19}", word)]
    if len(seeds) < len(words) or max(seeds) >= 2**63:
        raise BadInput(f"--seeds {text[:60]!r}: whole numbers from 0 to 2**63 - 1 are needed, separated by commas")
    if len(set(seeds)) < len(seeds):
        raise BadInput(f"--seeds {text[:60]!r}: a seed is there twice, and would give the same image")
    return seeds


def parse_boxes(texts: list[str] | None) -> list[Box]:
    texts = texts or []
    try:
        return [Box(*map(float, text.split(","))) for text in texts]
    except (TypeError, ValueError):
        raise BadInput(f"--box {' '.join(texts)!r}: left,top,right,bottom in pixels are needed") from None


def parse_adapters(texts: list[str] | None) -> list[Weighted] | None:
    """One adapter, or several with the weight of each."""
    if not texts:
        return None
    if len(texts) == 1 and not _weighted(texts[0]):
        return [Weighted(texts[0], None)]
    for text in texts:
        if not _weighted(text):
            raise BadInput(f"--adapter {text!r}: of several each needs its weight, as in RUN=0.5")
    parts = [text.rpartition("=") for text in texts]
    if len({path for path, *_ in parts}) < len(parts):
        raise BadInput(f"--adapter {' '.join(texts)}: an adapter is there twice")
    return [Weighted(path, float(weight)) for path, _, weight in parts]


def adapter_of(adapters: list[Weighted] | None) -> Path | dict[str, float] | None:
    """The adapter, or several with their weights, as Python has them."""
    if adapters and adapters[0].weight is None:
        return Path(adapters[0].name)
    return {each.name: each.weight for each in adapters} if adapters else None


def _weighted(text: str) -> bool:
    """Whether it ends in a weight, and is not the path of something that has such a name."""
    return re.fullmatch(r".+=-?[0-9]{1,6}(\.[0-9]{1,9})?", text) is not None and not os.path.lexists(text)


def parse_settings(texts: list[str] | None) -> list[Setting]:
    return [parse_setting(text) for text in texts or []]


def parse_setting(text: str) -> Setting:
    from mmalign.config.load import parse

    name, equals, value = text.partition("=")
    scorer, dot, key = name.rpartition(".")
    if not (equals and dot):
        raise BadInput(f"--set {text!r} must look like scorer.key=value")
    return Setting(text, scorer, key, parse(value, f"--set {text!r}"))


def parse_weighted(texts: list[str] | None) -> list[Weighted]:
    from mmalign.config.load import parse

    terms = []
    for text in texts or []:
        reward, equals, number = text.partition("=")
        weight = parse(number, f"--toward {text!r}") if equals else 1.0
        if not reward or isinstance(weight, bool) or not isinstance(weight, int | float):
            raise BadInput(f"--toward {text!r} must look like scorer.component or scorer.component=weight")
        terms.append(Weighted(reward, float(weight)))
    return terms


def parse_method_settings(texts: list[str] | None) -> list[MethodSetting]:
    from mmalign.config.load import parse

    settings: dict[str, Any] = {}
    for text in texts or []:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise BadInput(f"--set {text!r} must look like key=value")
        if key in settings:
            raise BadInput(f"--set {text!r}: {key} is there twice")
        settings[key] = parse(value, f"--set {text!r}")
    return [MethodSetting(key, value) for key, value in settings.items()]


def parse_aspects(texts: list[str] | None) -> list[Aspect]:
    aspects: dict[str, list[str]] = {}
    for text in texts or []:
        name, equals, components = text.partition("=")
        if not (name and equals and components):
            raise BadInput(f"--aspect {text!r} must look like aspect=scorer.component,...")
        if name in aspects:
            raise BadInput(f"--aspect {text!r}: {name} is there twice")
        aspects[name] = components.split(",")
    return [Aspect(name, components) for name, components in aspects.items()]


def parse_names(text: str | None) -> list[str] | None:
    return None if text is None else text.split(",")


def check_config(path: Path) -> Path:
    """BadInput for a misspelt name, before the command imports what it needs."""
    paths.config(path)
    return path


def allow(names: list[str] | None) -> list[str]:
    with refusing():
        allowlist.allow_modules(names or [])
    return names or []


# ------------------------------------------------------------------------------------------------------------- options

ConfigFile = Annotated[
    Path,
    typer.Argument(
        callback=check_config, help="YAML file, or the name of a config that comes with mmalign, e.g. quickstart"
    ),
]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, each replacing one key of the file")]
Run = Annotated[Path, typer.Argument(help="folder of a run")]
Allow = Annotated[
    list[str] | None,
    typer.Option(
        "--allow", callback=allow, help="module whose code a config, run or model may name and so run; may repeat"
    ),
]

PromptTexts = Annotated[list[str] | None, typer.Argument(callback=parse_prompts, help="prompts, each in quotes")]
Prompts = Annotated[str | None, prompt_option(help=PROMPTS)]

Model = Annotated[str, model_option(help="folder or hub id of a diffusers pipeline")]
Adapter = Annotated[
    list[Weighted] | None,
    model_option(
        parser=str,
        callback=parse_adapters,
        metavar="PATH[=WEIGHT]",
        help="folder of a run or of one of its checkpoints, whose model and averaged adapter are used; or a LoRA file, "
        "or folder of one, of diffusers, ComfyUI or peft, for --model; several, with weights, act as a mixture",
    ),
]
Guidance = Annotated[float | None, model_option(help="classifier-free guidance; default: that of the run, or none")]

Seeds = Annotated[
    Sequence[int],
    sampling_option(
        parser=str, callback=parse_seeds, metavar="N,...", help="comma-separated, one image per prompt and seed"
    ),
]
Steps = Annotated[int, sampling_option(min=1, max=1000, help="ODE steps")]
Batch = Annotated[int, sampling_option(min=1, help="images per forward")]

TowardRewards = Annotated[
    list[Weighted] | None,
    sampling_option(
        "--toward",
        parser=str,
        callback=parse_weighted,
        metavar="SCORER[.COMPONENT][=WEIGHT]",
        help="guide images by the gradient of this reward; a scorer alone: its first component; may repeat: their sum",
    ),
]
Push = Annotated[
    float | None,
    sampling_option(help="--toward: length of each move in units of the latent's root mean square, 0 for none [0.05]"),
]
Since = Annotated[
    float | None,
    sampling_option("--from", help="--toward: time from which images are guided, from 1 (noise) to 0 (never) [0.9]"),
]

Rewards = Annotated[
    Sequence[str],
    reward_option(parser=str, callback=parse_names, metavar="NAME,...", help="comma-separated scorers"),
]
ScorerSettings = Annotated[
    list[Setting] | None,
    reward_option(
        "--set",
        parser=str,
        callback=parse_settings,
        metavar="SCORER.KEY=VALUE",
        help="a scorer's setting, e.g. clip.model=ViT-B-32; may repeat",
    ),
]
Cache = Annotated[Path | None, reward_option(help="file of cached scores; made if it is missing")]

Json = Annotated[bool, output_option("--json", help="print the result as JSON")]
