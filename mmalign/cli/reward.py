"""Train reward models from preferences, and measure how well scorers agree with preferences."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from mmalign.activity import counted
from mmalign.cli import output, tables
from mmalign.cli.inputs import load_scorers
from mmalign.cli.options import (
    Allow,
    Aspect,
    Cache,
    Json,
    MethodSetting,
    Rewards,
    ScorerSettings,
    output_option,
    parse_aspects,
    parse_method_settings,
    parse_names,
    parse_prompt,
    reward_option,
)
from mmalign.errors import BadInput, refusing
from mmalign.runs.outputs import check_file

Source = Annotated[str, typer.Argument(metavar="PAIRS", help="table of pairs or rankings, or a dataset hf:NAME:SPLIT")]
Out = Annotated[Path, output_option(help="folder for the reward model")]
Method = Annotated[
    str, typer.Option("--fit", help="clip_head, vlm_head: heads on a frozen CLIP or VLM; clip, vlm: fine-tuned")
]
MethodSettings = Annotated[
    list[MethodSetting] | None,
    typer.Option(
        "--set",
        parser=str,
        callback=parse_method_settings,
        metavar="KEY=VALUE",
        help="a setting of the method, e.g. hidden=64; may repeat",
    ),
]
PromptOfAll = Annotated[
    str | None, typer.Option("--prompt", callback=parse_prompt, help="prompt of all pairs that have none")
]
HeldOut = Annotated[float, typer.Option(help="share of the prompts that is not trained on")]
Seed = Annotated[int, typer.Option(min=0, help="seed of the split and of the training")]
Device = Annotated[str, typer.Option(help="cpu, cuda, ...")]
Page = Annotated[Path | None, output_option("--html", help="write a page with tables and curves")]
Swap = Annotated[
    bool, typer.Option("--swap", help="let groupwise judges compare each pair in both orders; twice the calls")
]
Fitted = Annotated[Path, typer.Argument(metavar="FOLDER", help="folder that `reward fit` has written")]
Images = Annotated[
    Path | None,
    typer.Option(help="images of the base model: a folder of `collect`, or any folder or table with prompts"),
]
Base = Annotated[str | None, typer.Option(help="folder of the CLIP model below a head, where it was trained on one")]
Collected = Annotated[
    Path | None, typer.Argument(metavar="[IMAGES]", help="folder of `collect`, or its judged_images.jsonl")
]
OfRun = Annotated[Path | None, typer.Option("--run", help="folder of a training run")]
MoreRewards = Annotated[
    Sequence[str] | None,
    reward_option(
        "--rewards", parser=str, callback=parse_names, metavar="NAME,...",
        help="comma-separated scorers that score the images now, beside the scores that they come with",
    ),
]  # fmt: skip
By = Annotated[str, reward_option(help="the reward: scorer.component; default: the first")]
Watch = Annotated[
    Sequence[str] | None,
    reward_option(
        parser=str, callback=parse_names, metavar="NAME,...", help="scorer.component to judge by; default: all others"
    ),
]
Most = Annotated[int | None, reward_option(min=2, help="largest n; default: as many as each prompt has images")]
Mixture = Annotated[Path, output_option(help="safetensors file for the mixture")]
Aspects = Annotated[
    list[Aspect] | None,
    reward_option(
        "--aspect",
        parser=str,
        callback=parse_aspects,
        metavar="ASPECT=NAME,...",
        help="components, scorer.component, of one aspect; may repeat; default: each component is an aspect",
    ),
]
Decay = Annotated[float, reward_option(min=0, help="how strongly weights are pulled to be the same for all prompts")]
Batch = Annotated[int, typer.Option(min=1, help="images scored at once")]


def fit(
    source: Source,
    out: Out,
    method: Method = "clip_head",
    settings: MethodSettings = None,
    prompt: PromptOfAll = None,
    held_out: HeldOut = 0.2,
    seed: Seed = 0,
    device: Device = "cpu",
    page: Page = None,
    as_json: Json = False,
) -> None:
    """Train a reward model from preference pairs. The scorer `fitted` loads the folder."""
    from mmalign.config import paths
    from mmalign.runs import folder
    from reward_models import pairs as preferences
    from reward_models.training import fit as train, folder as folders, page as pages

    check_file(page, "--html", pages.ours)
    with refusing(), folder.failing(out, folder.ROWS_ARE_WHOLE), output.progressing():
        pairs = preferences.read(paths.locate(source), prompt, output.warn)
        card = train(
            pairs, out, method, held_out=held_out, seed=seed, device=device, progress=counted, **dict(settings or [])
        )
        table = pages.of_card(card)
        if page is not None:
            pages.write(page, f"{out.name}: {method}", [table], pages.of_training(folders.points(out)))
    output.show(card, as_json, tables.texts(table), f"{len(pairs)} pairs; the scorer `fitted` loads folder={out}")


def calibrate(
    model: Fitted,
    source: Source,
    images: Images = None,
    base: Base = None,
    prompt: PromptOfAll = None,
    device: Device = "cpu",
    page: Page = None,
    as_json: Json = False,
) -> None:
    """Calibrate a fitted reward model on pairs of other prompts than it was trained on. With images of a base model it
    also gives `better`, the probability that an image is preferred to one of these."""
    from mmalign.config import paths
    from mmalign.runs import folder
    from reward_models import pairs as preferences
    from reward_models.tools import judged
    from reward_models.training import calibrate as measure, page as pages

    check_file(page, "--html", pages.ours)
    with refusing(), folder.failing(model, folder.ROWS_ARE_WHOLE), output.progressing():
        pairs = preferences.read(paths.locate(source), prompt, output.warn)
        base_images = [one.item for one in judged.read(images, prompt, output.warn)] if images else []
        result = measure(model, pairs, base_images, base=base, device=device, progress=counted)
        table = pages.of_calibration(result.figures)
        if page is not None:
            pages.write(page, f"{model.name}: calibration", [table], [])
    line = f"{result.pairs} pairs of {result.prompts} prompts; {result.left_out} left out: ties, or prompts trained on"
    output.show(result.model_dump(exclude={"reference"}), as_json, tables.texts(table), line)


def evaluate(
    source: Source,
    rewards: Rewards = "clip",
    settings: ScorerSettings = None,
    prompt: PromptOfAll = None,
    page: Page = None,
    cache: Cache = None,
    batch: Batch = 64,
    swap: Swap = False,
    allow: Allow = None,
    as_json: Json = False,
) -> None:
    """Measure how well scorers agree with preference pairs: accuracy, by tag and aspect, comparison, calibration."""
    from mmalign.config import paths
    from mmalign.runs import folder
    from reward_models import pairs as preferences
    from reward_models.training import evaluate as measure, page as pages

    check_file(page, "--html", pages.ours)
    with refusing(), output.progressing():
        pairs = preferences.read(paths.locate(source), prompt, output.warn)
        scorers = load_scorers(rewards, settings, cache)
        result = measure(pairs, scorers, batch, counted, swap)
    shown, charts = pages.of_evaluation(result)
    if page is not None:
        with folder.failing(page):
            pages.write(page, f"{len(pairs)} pairs of {result['prompts']} prompts", shown, charts)
    for name, row in result["rewards"].items():
        for reason, count in row["failures"].items():
            output.warn(f"{name}: {count} images have no score: {reason}")
    line = f"{len(pairs)} pairs of {result['prompts']} prompts, {result['ties']} of them ties"
    output.show(result, as_json, *map(tables.texts, shown), line)


def gaming(
    images: Collected = None,
    run: OfRun = None,
    rewards: MoreRewards = None,
    settings: ScorerSettings = None,
    by: By = "",
    watch: Watch = None,
    most: Most = None,
    page: Page = None,
    cache: Cache = None,
    batch: Batch = 64,
    allow: Allow = None,
    as_json: Json = False,
) -> None:
    """Show how gameable a reward is: what other scores do when the best of n images by it is taken, for rising n, and
    along a training run."""
    from mmalign.evaluation import gaming as best_of
    from mmalign.reporting import gaming as report
    from reward_models.tools import judged
    from reward_models.training import page as pages

    if images is None and run is None:
        raise BadInput("give IMAGES, judged images of a base model, or --run FOLDER, or both")
    check_file(page, "--html", pages.ours)
    course = report.course(run) if run else None
    best = None
    if images is not None:
        with refusing(), output.progressing():
            rows = judged.read(images, warn=output.warn)
            scorers = load_scorers(rewards or [], settings, cache)
            scores = best_of.scored(rows, scorers, batch, partial(counted, name="scoring", unit="images"))
            best = best_of.gaming([row.item.prompt.text for row in rows], scores, by, watch, most)
    _show_gaming(best, course, page, as_json)


def experts(
    source: Source,
    out: Mixture,
    rewards: Rewards,
    settings: ScorerSettings = None,
    aspects: Aspects = None,
    weight_decay: Decay = 0.01,
    prompt: PromptOfAll = None,
    held_out: HeldOut = 0.2,
    seed: Seed = 0,
    cache: Cache = None,
    batch: Batch = 64,
    allow: Allow = None,
    as_json: Json = False,
) -> None:
    """Fit a mixture of scorers whose weights depend on the prompt, for `combine: experts`. Fixed weights are written
    where those are not better on held-out prompts."""
    from mmalign.config import paths
    from mmalign.runs import folder
    from reward_models import pairs as preferences
    from reward_models.training import page as pages
    from reward_models.training.experts import ours
    from reward_models.training.fitting_experts import fit_experts

    with refusing(), folder.failing(out, folder.ROWS_ARE_WHOLE), output.progressing():
        ours(out)
        pairs = preferences.read(paths.locate(source), prompt, output.warn)
        scorers = load_scorers(rewards, settings, cache)
        about = fit_experts(
            pairs, scorers, out, dict(aspects or []) or None, weight_decay=weight_decay, held_out=held_out, seed=seed,
            batch=batch, progress=counted,
        )  # fmt: skip
    made = about["made"]
    table = tables.texts(pages.of_experts(made))
    output.show(about, as_json, table, _weights(made), f"combine: {{type: experts, file: {out}}}")


def _weights(made: dict[str, Any]) -> str:
    """What was written, and the fixed weights."""
    weights = ", ".join(f"{name} {weight:.2f}" for name, weight in made["fixed_weights"].items())
    if made["written"] == "fixed":
        return f"weights by prompt do not beat fixed ones on held-out prompts; the fixed ones are written: {weights}"
    return f"weights by prompt beat fixed ones on held-out prompts, and are written; the fixed ones are {weights}"


def _show_gaming(best: Any, course: Any, page: Path | None, as_json: bool) -> None:
    from mmalign.reporting import gaming as report
    from mmalign.runs import folder
    from reward_models.training import page as pages

    parts = [report.of_best(best)] if best else []
    parts += [report.of_course(course)] if course else []
    shown, charts = ([one for part in parts for one in part[k]] for k in (0, 1))
    if page is not None:
        with folder.failing(page):
            pages.write(page, "How gameable the reward is", shown, charts)
    if best and best.left_out:
        output.warn(f"{best.left_out} prompts have fewer scored images than the largest n, and are left out")
    output.show(report.records(best, course), as_json, *map(tables.texts, shown))
