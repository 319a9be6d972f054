"""The command `refine`: better images of prompts without training."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from mmalign.activity import counted
from mmalign.cli import output, tables
from mmalign.cli.inputs import load_scorers, read_prompts
from mmalign.cli.options import (
    Adapter,
    Allow,
    Cache,
    Guidance,
    Json,
    Model,
    Prompts,
    PromptTexts,
    ScorerSettings,
    Setting,
    Steps,
    model_option,
    output_option,
    prompt_option,
    reward_option,
    sampling_option,
)  # fmt: skip
from mmalign.errors import BadInput, Failed, refusing
from mmalign.policy.protocol import Policy
from mmalign.runs.inference import load_policy
from mmalign.runs.outputs import check_file, has_rows
from reward_models import Prompt, RewardModel


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
        help="what a round may do, comma-separated: request, seed, guidance, region, keep, cut, strength",
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

progress = partial(counted, name="refining", unit="prompts")


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
    from mmalign.refine.trace import Settings, refine_prompts

    _check_options((prompt, prompts, images), moves, adapter, cut, steps)
    _check_outputs(page, pairs, requests)
    with output.progressing():
        (scorer, by), policy = _load_critic(critic, settings, cache, by), load_policy(model, guidance, adapter)
        wanted, pictures = _read(prompt, prompts, images, policy, scorer)
        rules = Settings(moves, by, good, rounds, forwards, patience, cut, strength, policy.guidance, steps, seed)
        about = _about(critic, scorer, model, adapter, images)
        result = refine_prompts(policy, scorer, wanted, rules, out, batch, pictures, critic, about, progress)
    _report(result, by, out, page, pairs, requests, as_json)


def _check_options(sources: tuple, moves: tuple[str, ...], adapter: Path | None, cut: float, steps: int) -> None:
    from mmalign.refine.loop import MOVES

    if sum(map(bool, sources)) != 1:
        raise BadInput("give prompts in quotes, --prompts SOURCE or --images FOLDER, one of the three")
    unknown = [move for move in moves if move not in MOVES]
    if unknown or not moves:
        raise BadInput(f"--moves {','.join(unknown) or 'none'}: known are {', '.join(MOVES)}")
    if "strength" in moves and adapter is None:
        raise BadInput("--moves strength makes more of an adapter; give --adapter RUN")
    if "cut" in moves and not 0 < cut < 1:
        raise BadInput(f"--cut {cut}: a time between 0 (the image) and 1 (noise) is needed")
    if {"region", "keep"} & set(moves) and steps < 3:
        raise BadInput(f"--steps {steps}: inpainting takes at least 3")


def _check_outputs(page: Path | None, pairs: Path | None, requests: Path | None) -> None:
    from mmalign.refine import page as pages

    check_file(page, "--html", pages.ours)
    check_file(pairs, "--pairs", has_rows("image_a", "image_b", "chosen", "gap"))
    check_file(requests, "--requests", has_rows("id", "prompt", "first"))


def _load_critic(name: str, settings: list[Setting] | None, cache: Path | None, by: str) -> tuple[RewardModel, str]:
    """The critic and the component that decides."""
    scorer = load_scorers([name], settings, cache)[name]
    if by and by not in scorer.names:
        raise BadInput(f"--by {by!r}: {name} gives {', '.join(scorer.names)}")
    return scorer, by or scorer.names[0]


def _read(
    prompt: list[str] | None, prompts: str | None, images: Path | None, policy: Policy, scorer: RewardModel
) -> tuple[list[Prompt], dict[int, Any] | None]:
    """The prompts, and the pictures to begin from by the prompt's id, if there are any."""
    from mmalign.refine.pictures import read_pictures

    if images is None:
        wanted, pictures = read_prompts(prompt, prompts), None
    else:
        with refusing():
            wanted, pictures = read_pictures(images, policy.image_size)
    output.warn_cut((one.text for one in wanted), policy, scorer)
    return wanted, pictures


def _about(critic: str, scorer: RewardModel, model: str, adapter: Path | None, images: Path | None) -> dict[str, str]:
    """The facts that a folder of refinements belongs to, beside the settings."""
    facts = {"critic": critic, "version": scorer.card.version, "model": model}
    return facts | {"adapter": str(adapter or ""), "images_from": str(images or "")}


def _report(
    result: Any, by: str, out: Path, page: Path | None, pairs: Path | None, requests: Path | None, as_json: bool
) -> None:
    """Write the page and the files of pairs and requests, and print the summary. Failed if images have no score."""
    from mmalign.refine import page as pages, trace
    from mmalign.runs import folder

    rows, summary = result.rows, result.summary
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
