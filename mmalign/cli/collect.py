"""The command `collect`: images, their scores, and preference pairs."""

from pathlib import Path
from typing import Annotated

from mmalign.cli import output, tables
from mmalign.cli.inputs import load_scorers, read_prompts
from mmalign.cli.options import (
    Adapter,
    Allow,
    Batch,
    Cache,
    Guidance,
    Json,
    Model,
    Prompts,
    PromptTexts,
    Rewards,
    ScorerSettings,
    Seeds,
    Steps,
    adapter_of,
    output_option,
    reward_option,
)  # fmt: skip
from mmalign.errors import Failed
from mmalign.evaluation import Choose

By = Annotated[str, reward_option(help="score that decides: scorer.component; default: the first")]
Pairs = Annotated[Choose, output_option(help="the best image of a prompt with the worst, or every two")]
Margin = Annotated[float, output_option(min=0, help="two scores must differ by more than this")]
Ties = Annotated[bool, output_option("--ties", help="write pairs without a preference as ties")]
Out = Annotated[Path, output_option(help="folder; prompts that are done there are not done again")]


def collect(
    prompt: PromptTexts = None,
    prompts: Prompts = None,
    model: Model = "assets/tiny_sd3",
    adapter: Adapter = None,
    seeds: Seeds = "0,1,2,3",
    steps: Steps = 10,
    guidance: Guidance = None,
    rewards: Rewards = "shapes_critic",
    settings: ScorerSettings = None,
    by: By = "",
    pairs: Pairs = "extremes",
    margin: Margin = 0.0,
    ties: Ties = False,
    out: Out = Path("collected"),
    batch: Batch = 64,
    cache: Cache = None,
    allow: Allow = None,
    as_json: Json = False,
) -> None:
    """Draw and score images, and write them as training data: judged images and preference pairs."""
    from mmalign import api

    wanted = read_prompts(prompt, prompts)
    with output.progressing():
        scorers = load_scorers(rewards, settings, cache)
        result = api.collect(
            model, wanted, scorers, seeds=seeds, by=by, out=out, pairs=pairs, margin=margin, ties=ties, steps=steps,
            guidance=guidance, adapter=adapter_of(adapter), batch=batch,
        )  # fmt: skip
    summary = result.summary
    output.show(summary, as_json, tables.collected(summary, by or next(iter(result.rows[0]["scores"]))))
    if summary["unscored"]:
        reason = next((reason for row in result.rows for reason in row["failures"].values()), f"see {out}")
        raise Failed(f"{summary['unscored']} of {summary['images']} images have no score: {reason}")
