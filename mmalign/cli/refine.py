"""The command `refine`: better images of prompts without training."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from mmalign.cli import output, tables
from mmalign.cli.inputs import load_scorers, load_toward, read_prompts, scorers_of
from mmalign.cli.options import (
    Adapter,
    Allow,
    Cache,
    Guidance,
    Json,
    Model,
    Prompts,
    PromptTexts,
    Push,
    ScorerSettings,
    Setting,
    Since,
    Steps,
    TowardRewards,
    Weighted,
    adapter_of,
    model_option,
    output_option,
    prompt_option,
    reward_option,
    sampling_option,
)  # fmt: skip
from mmalign.distributed.launched import is_main
from mmalign.errors import BadInput, Failed
from mmalign.runs.outputs import check_file, has_rows
from reward_models import Prompt


def parse_moves(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


Images = Annotated[
    Path | None,
    prompt_option(help="pictures to begin from, with their prompts: a folder or table, as for `score`"),
]
Critic = Annotated[str, reward_option(help="scorer that criticises; the embedded world's by default")]
By = Annotated[str, reward_option(help="component that decides; default: the critic's first")]
Good = Annotated[float, reward_option(help="what every component must reach for a prompt to be finished")]
Moves = Annotated[
    Sequence[str],
    sampling_option(
        parser=str,
        callback=parse_moves,
        metavar="NAME,...",
        help="what a round may do, comma-separated: request, seed, guidance, region, keep, cut, strength, toward",
    ),
]
Rounds = Annotated[int, sampling_option(min=1, help="most images of a prompt, the first included")]
Forwards = Annotated[float | None, sampling_option(min=0, help="most network forwards for a prompt")]
Patience = Annotated[int | None, sampling_option(min=1, help="give up after so many rounds without a gain")]
Cut = Annotated[float, sampling_option(help="time in (0, 1) that the move `cut` begins from")]
Strength = Annotated[float, model_option(min=0, help="of the adapter, for the move `strength`")]
Seed = Annotated[int, sampling_option(help="of all noise")]
Batch = Annotated[int, sampling_option(min=1, help="images per forward, and prompts at once")]
Out = Annotated[Path, output_option(help="folder; prompts that are done there are not done again")]
Page = Annotated[Path | None, output_option("--html", help="write a page of all rounds")]
Pairs = Annotated[Path | None, output_option(help="JSONL for the best against the worst image of a prompt")]
Requests = Annotated[Path | None, output_option(help="JSONL for the revised requests that gained")]


def refine(
    prompt: PromptTexts = None,
    prompts: Prompts = None,
    images: Images = None,
    critic: Critic = "shapes_critic",
    settings: ScorerSettings = None,
    moves: Moves = "request,seed",
    by: By = "",
    good: Good = 1.0,
    rounds: Rounds = 4,
    forwards: Forwards = None,
    patience: Patience = None,
    cut: Cut = 0.9,
    strength: Strength = 1.5,
    toward: TowardRewards = None,
    push: Push = None,
    since: Since = None,
    model: Model = "assets/tiny_sd3",
    adapter: Adapter = None,
    steps: Steps = 10,
    guidance: Guidance = None,
    seed: Seed = 0,
    out: Out = Path("refined"),
    batch: Batch = 64,
    page: Page = None,
    pairs: Pairs = None,
    requests: Requests = None,
    cache: Cache = None,
    allow: Allow = None,
    as_json: Json = False,
) -> None:
    """Draw, have it criticised, draw again; keep the best image of each prompt. No training."""
    _check((prompt, prompts, images), page, pairs, requests)
    rules = dict(
        out=out, images=images, moves=moves, by=by, good=good, rounds=rounds, forwards=forwards, patience=patience,
        cut=cut, strength=strength, steps=steps, guidance=guidance, seed=seed, adapter=adapter_of(adapter), batch=batch,
    )  # fmt: skip
    wanted = None if images else read_prompts(prompt, prompts)
    result, by = _refined(model, wanted, rules, critic, settings, cache, (toward, push, since))
    _report(result, by, out, page, pairs, requests, as_json)


def _refined(
    model: str, prompts: list[Prompt] | None, rules: dict[str, Any], critic: str, settings: list[Setting] | None,
    cache: Path | None, toward: tuple[list[Weighted] | None, float | None, float | None],
) -> tuple[Any, str]:  # fmt: skip
    """What `mmalign.refine` returns by these rules, and the component that decided."""
    from mmalign import api

    with output.progressing():
        guiding = scorers_of(*(term.name for term in toward[0] or []))
        scorers = load_scorers([*dict.fromkeys([critic, *guiding])], settings, cache)
        guide = load_toward(*toward, scorers)
        result = api.refine(model, prompts, {critic: scorers[critic]}, toward=guide, **rules)
    return result, rules["by"] or scorers[critic].names[0]


def _check(sources: tuple[Any, ...], page: Path | None, pairs: Path | None, requests: Path | None) -> None:
    from mmalign.refinement import page as pages

    if sum(map(bool, sources)) != 1:
        raise BadInput("give prompts in quotes, --prompts SOURCE or --images FOLDER, one of the three")
    check_file(page, "--html", pages.ours)
    check_file(pairs, "--pairs", has_rows("image_a", "image_b", "chosen", "gap"))
    check_file(requests, "--requests", has_rows("id", "prompt", "first"))


def _report(
    result: Any, by: str, out: Path, page: Path | None, pairs: Path | None, requests: Path | None, as_json: bool
) -> None:
    """Write the page and the files of pairs and requests, and print the summary. Failed if images have no score."""
    from mmalign.refinement import page as pages, trace
    from mmalign.runs import folder

    rows, summary = result.rows, result.summary
    if not is_main():
        return
    with folder.failing(out, folder.ROWS_ARE_WHOLE):
        if page is not None:
            pages.write(rows, summary, by, out, page)
        if pairs is not None:
            trace.export(trace.pairs(rows, by, os.path.relpath(out, pairs.parent)), pairs)
        if requests is not None:
            trace.export(trace.requests(rows, by), requests)
    output.show(summary, as_json, tables.refined(summary, by))
    if summary["unscored"]:
        raise Failed(f"{summary['unscored']} of {summary['prompts']} prompts have an image without a score")
