"""Train reward models from preferences, and measure how well scorers agree with preferences."""

from pathlib import Path
from typing import Annotated

import typer

from mmalign.activity import counted
from mmalign.cli import output, tables
from mmalign.cli.inputs import load_scorers
from mmalign.cli.options import (
    Allow,
    Cache,
    Json,
    MethodSetting,
    Rewards,
    ScorerSettings,
    output_option,
    parse_method_settings,
    parse_prompt,
)
from mmalign.errors import refusing
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


def evaluate(
    source: Source,
    rewards: Rewards = "clip",
    settings: ScorerSettings = None,
    prompt: PromptOfAll = None,
    page: Page = None,
    cache: Cache = None,
    batch: Batch = 64,
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
        result = measure(pairs, scorers, batch, counted)
    shown, charts = pages.of_evaluation(result)
    if page is not None:
        with folder.failing(page):
            pages.write(page, f"{len(pairs)} pairs of {result['prompts']} prompts", shown, charts)
    for name, row in result["rewards"].items():
        for reason, count in row["failures"].items():
            output.warn(f"{name}: {count} images have no score: {reason}")
    line = f"{len(pairs)} pairs of {result['prompts']} prompts, {result['ties']} of them ties"
    output.show(result, as_json, *map(tables.texts, shown), line)
