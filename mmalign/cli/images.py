"""The commands `sample` and `evaluate`: images of a model, and their scores."""

from pathlib import Path
from typing import Annotated, Any

from mmalign.cli import output, tables
from mmalign.cli.inputs import load_scorers, read_prompts
from mmalign.cli.options import (
    PROMPTS,
    Adapter,
    Allow,
    Batch,
    Box,
    Guidance,
    Json,
    Model,
    Prompts,
    PromptTexts,
    Rewards,
    ScorerSettings,
    Seeds,
    Setting,
    Steps,
    output_option,
    parse_boxes,
    prompt_option,
    reward_option,
    sampling_option,
)  # fmt: skip
from mmalign.errors import BadInput, Failed, refusing
from mmalign.evaluation import Layout
from mmalign.runs.inference import load_policy
from mmalign.runs.outputs import check_file, has_rows, make_folder
from reward_models import Prompt

Strength = Annotated[
    float | None, sampling_option(min=0, help="how much of the adapter acts: 0 none, 1 all, more goes beyond it")
]
Boxes = Annotated[
    list[Box] | None,
    sampling_option(
        "--box",
        parser=str,
        callback=parse_boxes,
        metavar="LEFT,TOP,RIGHT,BOTTOM",
        help="where the adapter acts, in pixels; may repeat",
    ),
]
Edge = Annotated[float, sampling_option(min=0, help="softness of the boxes' edges in pixels")]
BestBy = Annotated[
    str | None, reward_option("--best", help="keep of each prompt the seed with the best score: scorer.component")
]
Keep = Annotated[
    int | None, reward_option(min=1, help="with --best: how many seeds of a prompt continue after --after steps")
]
After = Annotated[int | None, reward_option(min=1, help="with --keep: steps before the other seeds are pruned")]
Folder = Annotated[Path, output_option(help="folder for the PNG files")]

HeldOut = Annotated[str, prompt_option(help=PROMPTS)]
SeedCount = Annotated[int, sampling_option("--seeds", min=1, max=10_000, help="images per prompt")]
ScoresFolder = Annotated[Path | None, output_option(help="folder for the images and scores")]
FolderLayout = Annotated[
    Layout,
    output_option(help="of that folder: mmalign's own, or as GenEval's or T2I-CompBench's scripts read it"),
]
Reference = Annotated[Path | None, output_option(help="file for mean and spread of each score, a config's `reference`")]
Compare = Annotated[
    bool, output_option("--compare", help="with --adapter: score the base model too, and show the rise over it")
]


def sample(
    prompt: PromptTexts = None,
    prompts: Prompts = None,
    model: Model = "assets/tiny_sd3",
    adapter: Adapter = None,
    seeds: Seeds = "0",
    steps: Steps = 10,
    guidance: Guidance = None,
    strength: Strength = None,
    boxes: Boxes = None,
    edge: Edge = 0.0,
    best: BestBy = None,
    settings: ScorerSettings = None,
    keep: Keep = None,
    after: After = None,
    out: Folder = Path("samples"),
    batch: Batch = 64,
    allow: Allow = None,
    as_json: Json = False,
) -> None:
    """Sample images by ODE; a seed gives the image the stock pipeline gives for it."""
    from mmalign import api
    from mmalign.evaluation import generate

    wanted = read_prompts(prompt, prompts)
    _check_adapter(adapter, strength, boxes, edge)
    scorers = _best_scorer(best, len(seeds), keep, after, steps, settings, strength is not None or bool(boxes))
    with output.progressing():
        policy = load_policy(model, guidance, adapter)
        make_folder(out)
        if scorers:
            result = api.best_of_n(policy, wanted, best, seeds, steps, keep, after, scorers=scorers, batch=batch)
        else:
            output.warn_cut((one.text for one in wanted), policy)
            velocity = _velocity(policy, strength, boxes, edge)
            rows = generate.sample_images(policy, wanted, seeds, steps, out, batch, velocity)
    if scorers:
        _show_best(result, result.save(wanted, seeds, out), best, keep, out, as_json)
    else:
        output.show(rows, as_json, f"{len(rows)} images in {out}")


def _velocity(policy: Any, strength: float | None, boxes: list[Box] | None, edge: float) -> Any:
    """The velocity with so much of the adapter, everywhere or in boxes. BadInput."""
    from mmalign.refinement.velocity import guided_in_boxes

    with refusing():
        return guided_in_boxes(policy, 1.0 if strength is None else strength, boxes or [], edge)


def _check_adapter(adapter: Path | None, strength: float | None, boxes: list[Box] | None, edge: float) -> None:
    if adapter is None and (strength is not None or boxes):
        raise BadInput("--strength and --box set how much of an adapter acts, and where; give --adapter RUN")
    if edge and not boxes:
        raise BadInput("--edge softens boxes; give --box left,top,right,bottom")


def _best_scorer(
    best: str | None,
    seeds: int,
    keep: int | None,
    after: int | None,
    steps: int,
    settings: list[Setting] | None,
    guided: bool,
) -> dict[str, Any] | None:
    """The scorer of --best by name, None without it. BadInput for options that do not go together."""
    from mmalign.config.checks import component

    if best is None:
        if keep or after or settings:
            raise BadInput("--keep, --after and --set belong to --best scorer.component")
        return None
    if "." not in best:
        raise BadInput(f"--best {best!r}: scorer.component is needed, e.g. clip.cosine")
    if (keep is None) != (after is None):
        raise BadInput("--keep N --after STEPS: both or neither")
    if keep is not None and not (keep < seeds and after < steps):
        raise BadInput(f"--keep {keep} --after {after}: fewer than the {seeds} seeds and the {steps} steps are needed")
    if guided:
        raise BadInput("--best does not go with --strength or --box")
    with refusing():
        name, output_name = component(best)
    scorers = load_scorers([name], settings)
    if output_name not in scorers[name].names:
        raise BadInput(f"--best {best!r}: that scorer gives {', '.join(scorers[name].names)}")
    return scorers


def _show_best(result: Any, rows: list[dict[str, Any]], best: str, keep: int | None, out: Path, as_json: bool) -> None:
    from mmalign.evaluation.best_of_n import curve

    expected = curve(result.scores)
    counts = {"forwards": result.forwards, "judgements": result.judgements}
    over = f"the {keep} that were sampled to the end" if keep else "all"
    output.show(
        {"images": rows, "expected_best": expected, "failures": dict(result.failures), **counts},
        as_json,
        f"{len(rows)} images in {out}: {result.forwards} forwards, {result.judgements} judgements",
        f"expected best {best} of k of {over}: {', '.join(f'{value:.3f}' for value in expected)}",
    )
    if result.failures:
        reason = next(iter(result.failures.values()))
        raise Failed(f"{len(result.failures)} images could not be scored: {reason}")


def evaluate(
    prompts: HeldOut = "assets/prompts/validation.jsonl",
    rewards: Rewards = "shapes",
    model: Model = "assets/tiny_sd3",
    adapter: Adapter = None,
    members: SeedCount = 2,
    steps: Steps = 10,
    guidance: Guidance = None,
    out: ScoresFolder = None,
    layout: FolderLayout = "mmalign",
    reference: Reference = None,
    compare: Compare = False,
    batch: Batch = 256,
    allow: Allow = None,
    as_json: Json = False,
) -> None:
    """Score a model on prompts with fixed seeds, overall and by kind of prompt."""
    from mmalign import api
    from mmalign.evaluation import evaluate as evaluation, layouts, reference as references

    _check_base(adapter, reference, compare)
    wanted = read_prompts(None, prompts)
    _check_out(out, layout, wanted)
    check_file(reference, "--reference", references.ours)
    with output.progressing():
        scorers, policy = load_scorers(rewards), load_policy(model, guidance, adapter)
        result = api.evaluate(policy, wanted, scorers, seeds=members, steps=steps, batch=batch)
    if out is not None:
        layouts.write(result, wanted, out, layout)
    if reference is not None:
        _save_reference(reference, result, policy, scorers)
    row = {"images": len(result.images), "means": evaluation.means_by_tag(result, wanted)}
    shown = [tables.means(row["means"], f"{row['images']} images, {steps} steps")]
    if compare:
        with output.progressing(), policy.reference():
            before = api.evaluate(policy, wanted, scorers, seeds=members, steps=steps, batch=batch)
        row["rises"] = evaluation.compared(before, result, wanted)
        shown.append(tables.rises(row))
    output.show(row, as_json, *shown)


def _save_reference(file: Path, result: Any, policy: Any, scorers: dict[str, Any]) -> None:
    from mmalign.evaluation import reference as references

    references.RewardStats.measure(result, policy.fingerprint(), scorers).save(file)
    if len(result.images) < references.ENOUGH:
        output.warn(f"{file} rests on {len(result.images)} images; {references.ENOUGH} are better")


def _check_base(adapter: Path | None, reference: Path | None, compare: bool) -> None:
    if reference is not None and adapter is not None:
        raise BadInput("--reference is of the base model; leave out --adapter")
    if compare and adapter is None:
        raise BadInput("--compare is of an adapter with its base model; give --adapter RUN")


def _check_out(out: Path | None, layout: Layout, prompts: list[Prompt]) -> None:
    from mmalign.evaluation import layouts

    if out is not None:
        layouts.fits(layout, prompts, out)
        check_file(out / "scores.jsonl", "--out", has_rows("image", "prompt", "id", "scores", "places"))
    elif layout != "mmalign":
        raise BadInput(f"--layout {layout} sets how images are written; give --out FOLDER")
