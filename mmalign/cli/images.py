"""The commands `sample` and `evaluate`: images of a model, and their scores."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

from mmalign.cli import output, tables
from mmalign.cli.inputs import load_scorers, load_toward, read_prompts, scorers_of
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
    Push,
    Rewards,
    ScorerSettings,
    Seeds,
    Setting,
    Since,
    Steps,
    TowardRewards,
    Weighted,
    adapter_of,
    output_option,
    parse_boxes,
    prompt_option,
    reward_option,
    sampling_option,
)  # fmt: skip
from mmalign.distributed.launched import launched
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
Value = Annotated[
    Path | None,
    reward_option(help="with --keep: a run with credit value, whose value head chooses instead of predicted images"),
]
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
    toward: TowardRewards = None,
    push: Push = None,
    since: Since = None,
    best: BestBy = None,
    settings: ScorerSettings = None,
    keep: Keep = None, after: After = None, value: Value = None,
    out: Folder = Path("samples"),
    batch: Batch = 64,
    allow: Allow = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Sample images by ODE; a seed gives the image the stock pipeline gives for it."""
    from mmalign.api import best_of_n

    wanted = read_prompts(prompt, prompts)
    _check(adapter, strength, boxes, edge, best, len(seeds), keep, after, steps, value)
    scorers, guide = _best_and_toward(best, toward, push, since, settings)
    with output.progressing():
        policy = load_policy(model, guidance, adapter_of(adapter))
        make_folder(out)
        if best is None:
            rows = _sample(policy, wanted, seeds, steps, out, batch, _velocity(policy, strength, boxes, edge), guide)
        else:
            more = {"scorers": scorers, "batch": batch, "toward": guide, "value": value}
            top = best_of_n(policy, wanted, best, seeds, steps, keep, after, **more)
    if best is None:
        output.show(rows, as_json, f"{len(rows)} images in {out}")
    else:
        _show_best(top, top.save(wanted, seeds, out), best, keep, out, as_json)


def _sample(policy: Any, prompts: list[Prompt], *settings: Any) -> list[dict[str, Any]]:
    from mmalign.evaluation.generate import sample_images

    output.warn_cut((prompt.text for prompt in prompts), policy)
    return sample_images(policy, prompts, *settings)


def _velocity(policy: Any, strength: float | None, boxes: list[Box] | None, edge: float) -> Any:
    """The velocity with so much of the adapter, everywhere or in boxes. BadInput."""
    from mmalign.refinement.velocity import guided_in_boxes

    with refusing():
        return guided_in_boxes(policy, 1.0 if strength is None else strength, boxes or [], edge)


def _check(
    adapter: list[Weighted] | None, strength: float | None, boxes: list[Box] | None, edge: float,
    best: str | None, seeds: int, keep: int | None, after: int | None, steps: int,
    value: Path | None,
) -> None:  # fmt: skip
    """BadInput for options that do not go together."""
    if value is not None and keep is None:
        raise BadInput("--value chooses which seeds continue; give --best scorer.component --keep N --after STEPS")
    if adapter is None and (strength is not None or boxes):
        raise BadInput("--strength and --box set how much of an adapter acts, and where; give --adapter RUN")
    if edge and not boxes:
        raise BadInput("--edge softens boxes; give --box left,top,right,bottom")
    if best is None:
        if keep or after:
            raise BadInput("--keep and --after belong to --best scorer.component")
        return
    if "." not in best:
        raise BadInput(f"--best {best!r}: scorer.component is needed, e.g. clip.cosine")
    if (keep is None) != (after is None):
        raise BadInput("--keep N --after STEPS: both or neither")
    if keep is not None and not (keep < seeds and after < steps):
        raise BadInput(f"--keep {keep} --after {after}: fewer than the {seeds} seeds and the {steps} steps are needed")
    if strength is not None or boxes:
        raise BadInput("--best does not go with --strength or --box")


def _best_and_toward(
    best: str | None,
    toward: list[Weighted] | None,
    push: float | None,
    since: float | None,
    settings: list[Setting] | None,
) -> tuple[dict[str, Any], Any]:
    """The scorers of --best and --toward by name, and the guidance. BadInput."""
    from mmalign.config.checks import component

    names = scorers_of(best, *(term.name for term in toward or []))
    if settings and not names:
        raise BadInput("--set belongs to --best or --toward scorer.component")
    scorers = load_scorers(names, settings)
    if best is not None:
        name, part = component(best)
        if part not in scorers[name].names:
            raise BadInput(f"--best {best!r}: that scorer gives {', '.join(scorers[name].names)}")
    return scorers, load_toward(toward, push, since, scorers)


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
    settings: ScorerSettings = None,
    model: Model = "assets/tiny_sd3",
    adapter: Adapter = None,
    members: SeedCount = 2,
    steps: Steps = 10,
    guidance: Guidance = None,
    toward: TowardRewards = None,
    push: Push = None,
    since: Since = None,
    out: ScoresFolder = None,
    layout: FolderLayout = "mmalign",
    reference: Reference = None,
    compare: Compare = False,
    batch: Batch = 256,
    allow: Allow = None,
    as_json: Json = False,
) -> None:
    """Score a model on prompts with fixed seeds, overall and by kind of prompt."""
    from mmalign.evaluation import evaluate as evaluation

    _check_base(adapter, reference, compare, toward)
    wanted = read_prompts(None, prompts)
    _check_out(out, layout, wanted)
    with output.progressing(), launched() as ranks:
        scorers, policy = load_scorers(rewards, settings), load_policy(model, guidance, adapter_of(adapter))
        guide = load_toward(toward, push, since, scorers)
        output.warn_cut((prompt.text for prompt in wanted), policy, *scorers.values())
        evaluator = evaluation.evaluate if ranks is None else partial(evaluation.evaluate_distributed, ranks)
        drawn = partial(evaluator, policy, wanted, members, steps, scorers, batch, guide)
        result, base = drawn(), None
        if compare:
            with policy.reference():
                base = drawn()
    if result is not None:  # the main process has it
        _write(result, wanted, out, layout)
        _save_reference(reference, result, policy, scorers)
        _show(result, base, wanted, steps, as_json)


def _show(result: Any, base: Any, prompts: list[Prompt], steps: int, as_json: bool) -> None:
    from mmalign.evaluation import evaluate as evaluation

    row = {"images": len(result.images), "means": evaluation.means_by_tag(result, prompts)}
    shown = [tables.means(row["means"], f"{row['images']} images, {steps} steps")]
    if base is not None:
        row["rises"] = evaluation.compared(base, result, prompts)
        shown.append(tables.rises(row))
    output.show(row, as_json, *shown)


def _write(result: Any, prompts: list[Prompt], out: Path | None, layout: Layout) -> None:
    from mmalign.evaluation import layouts

    if out is not None:
        layouts.write(result, prompts, out, layout)


def _save_reference(file: Path | None, result: Any, policy: Any, scorers: dict[str, Any]) -> None:
    from mmalign.evaluation import reference as references

    if file is None:
        return
    references.RewardStats.measure(result, policy.fingerprint(), scorers).save(file)
    if len(result.images) < references.ENOUGH:
        output.warn(f"{file} rests on {len(result.images)} images; {references.ENOUGH} are better")


def _check_base(
    adapter: list[Weighted] | None, reference: Path | None, compare: bool, toward: list[Weighted] | None
) -> None:
    from mmalign.evaluation import reference as references

    check_file(reference, "--reference", references.ours)
    if reference is not None and adapter is not None:
        raise BadInput("--reference is of the base model; leave out --adapter")
    if reference is not None and toward:
        raise BadInput("--reference is of the base model's images; leave out --toward")
    if compare and adapter is None:
        raise BadInput("--compare is of an adapter with its base model; give --adapter RUN")


def _check_out(out: Path | None, layout: Layout, prompts: list[Prompt]) -> None:
    from mmalign.evaluation import layouts

    if out is not None:
        layouts.fits(layout, prompts, out)
        check_file(out / "scores.jsonl", "--out", has_rows("image", "prompt", "id", "scores", "places"))
    elif layout != "mmalign":
        raise BadInput(f"--layout {layout} sets how images are written; give --out FOLDER")
