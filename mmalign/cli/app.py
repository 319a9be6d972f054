"""The command line. Exit code 0: done; 2: bad input, reported in one line; 1: a failure while running; 143 or 130: a
run that SIGTERM or Ctrl-C stopped and that is saved."""

import logging
import os
import sys
from pathlib import Path
from typing import Any

import typer

from mmalign.cli import checks, images, output, refine, runs, score, train
from mmalign.errors import BadInput, Failed, Orphaned, refusing
from mmalign.runs.signals import Stopped
from reward_models import files

COMMANDS = (
    train.train, train.calibrate, checks.estimate, images.sample, images.evaluate, score.score, refine.refine,
    checks.doctor, score.serve, runs.export, runs.report,
)  # fmt: skip


class _Command(typer.core.TyperCommand):
    """A command whose paths may begin with `~`, the home folder."""

    def invoke(self, ctx: Any) -> Any:
        with refusing():
            ctx.params |= {
                name: Path(files.home(str(path))) for name, path in ctx.params.items() if isinstance(path, Path)
            }
        return super().invoke(ctx)


<<<<<<< HEAD
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
for command in COMMANDS:
    app.command(cls=_Command)(command)
=======
class _Commands(typer.Typer):
    def command(self, *names, **settings):
        return super().command(*names, **{"cls": _Command} | settings)


app = _Commands(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
console = Console(markup=False)  # names and words from files are shown as they are


def _allow(names: list[str] | None) -> None:
    with refusing():
        allow_modules(names or [])


ConfigFile = Annotated[Path, typer.Argument(help="YAML file, see configs/")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, each replacing one key of the file")]
Form = Literal["diffusers", "comfyui", "peft", "merged"]
AdapterOf = Annotated[
    Path | None,
    typer.Option(
        help="folder of a run or of one of its checkpoints, whose model and averaged adapter are used; or a LoRA file, "
        "or folder of one, of diffusers, ComfyUI or peft, for --model"
    ),
]
Run = Annotated[Path, typer.Argument(help="folder of a run")]
Allow = Annotated[
    list[str] | None,
    typer.Option(
        "--allow", callback=_allow, help="module whose code a config, run or model may name and so run; may repeat"
    ),
]
Json = Annotated[bool, typer.Option("--json", help="print the result as JSON")]


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the newest whole checkpoint of the run")] = False,
    allow: Allow = None,
    as_json: Json = False,
) -> None:
    """Fine-tune a text-to-image model from a config; evaluate before and after; write a report."""
    from mmalign import policy as policies, run as runs
    from mmalign.config import load as configs
    from mmalign.distributed import processes as ranks
    from mmalign.reporting import report as reports
    from mmalign.runs import folder

    policies.quiet()
    c = configs.load(config, overrides or [])
    quiet = Console(stderr=True, markup=False) if as_json else console
    out = runs.train(c, resume, quiet)
    if not ranks.main():
        return
    with folder.failing(out):
        page = reports.write(out)
    summary = reports.summary(out)
    if as_json:
        print(json.dumps(summary | {"report": str(page)}))
        return
    if summary["rises"]:
        console.print(_rises(summary))
    console.print(f"report: {page}")


@app.command()
def calibrate(
    config: ConfigFile,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="file for the noise of each step; a plot is written beside it")] = Path(
        "noise.json"
    ),
    rounds: Annotated[int, typer.Option(min=2, help="rounds of rollouts")] = 40,
    rule: Annotated[Rule, typer.Option(help="when noise rises: paper (counts) or z (robust)")] = "z",
    step: Annotated[float, typer.Option(min=0, help="change of the noise per round")] = 0.02,
    floor: Annotated[float, typer.Option(min=0, help="least noise of a step")] = 0.05,
    ceiling: Annotated[float, typer.Option(min=0, help="noise of a step above which none rises")] = 3.0,
    allow: Allow = None,
) -> None:
    """Find the noise each step bears (DenseGRPO), for `kernel: scheduled, noise: FILE`, on a config's prompts."""
    from mmalign import policy as policies
    from mmalign.config import load as configs
    from mmalign.training import noise_calibration as calibration, rollout, setup

    policies.quiet()
    if out.suffix != ".json" or not out.parent.is_dir():
        raise BadInput(f"--out {out}: a .json file in a folder that exists is needed")
    _may_write(out, "--out", calibration.ours)
    if not out.exists():  # the plot of a file of ours is ours
        _may_write(out.with_suffix(".png"), "--out")
    if not 0 <= floor <= ceiling or not 0 <= step < math.inf:
        raise BadInput(
            f"--floor {floor:g}, --ceiling {ceiling:g}, --step {step:g}: a floor of at most the ceiling and a finite "
            "step are needed"
        )
    c = configs.load(config, [*(overrides or []), *CALIBRATION])
    run = setup.open_session(c)
    if run.ranks.size > 1:
        raise BadInput(f"started as {run.ranks.size} processes; a calibration runs in one")
    rows = []
    levels = calibration.start_levels(run.times)
    for row in calibration.run(partial(rollout.step_gains, run), levels, rounds, rule, step, floor, ceiling):
        rows.append(row)
        share = sum(row["better"]) / max(1, sum(row["better"]) + sum(row["worse"]))
        console.print(
            f"round {len(rows)}: gains above 0 {share:.0%}, noise {' '.join(f'{g:.2f}' for g in row['noise'])}"
        )
    calibration.save(out, c, run.times, rows, rule)
    calibration.plot(out.with_suffix(".png"), out)
    console.print(f"{out}, {out.with_suffix('.png')}")


@app.command()
def estimate(
    config: ConfigFile,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="processes, one a GPU; prompts are dealt to them in turn")] = 1,
    timed: Annotated[
        bool,
        typer.Option("--calibrate", help="load the model and the rewards here and time them, for seconds of a run"),
    ] = False,
    allow: Allow = None,
    as_json: Json = False,
) -> None:
    """Say what a run will take: forwards, decodes, scores, parameters, memory, disk. No weights are needed."""
    from mmalign import policy as policies

    policies.quiet()  # before what follows imports peft, which would warn
    from mmalign.checks import estimate as estimates
    from mmalign.config import load as configs
    from mmalign.training import setup

    c = configs.load(config, overrides or [])
    found = estimates.estimate(c, gpus)
    if timed:
        run = setup.open_session(c)
        found["seconds"] = estimates.durations(run.config, found, estimates.measure(run))
    if as_json:
        print(json.dumps(found))
        return
    console.print(f"{found['model']}, {' x '.join(map(str, found['size']))} pixels: {found['plan']}", soft_wrap=True)
    for table in _estimated(found):
        console.print(table)
    for note in found["bounds"]:
        console.print(f"at most: {note}", soft_wrap=True, highlight=False)


def _estimated(found: dict) -> list[Table]:
    """Counts; then what memory and disk hold, and seconds if they were measured."""
    ranks, iteration = found["ranks"], found["iteration"]
    columns = {"iteration": iteration}
    if len(ranks) > 1:
        columns |= {"largest rank": ranks[0], "smallest": ranks[-1]}
    columns |= {"run": found["run"], "evaluations": found["evaluations"]}
    counted = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for heading in ("", *columns):
        counted.add_column(heading, justify="right" if heading else "left")
    for name in iteration:
        counted.add_row(name.replace("_", " "), *(f"{own[name]:,}" if name in own else "" for own in columns.values()))
    sized = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for heading in ("", "parameters", "GiB of the largest rank"):
        sized.add_column(heading, justify="right" if heading else "left")
    for name, count in found["memory"]["device"].items():
        own = found["parameters"].get(name)
        sized.add_row(
            name, f"{own:,}" if own else "", f"{count / 2**30:.3f}", end_section=name in ("latents", "replay")
        )
    sized.add_row("main memory: images", "", f"{found['memory']['main']['images'] / 2**30:.3f}")
    disk = found["disk"]
    kept = f"disk: {disk['checkpoints']} x checkpoint of {disk['checkpoint'] / 2**30:.3f}, images"
    sized.add_row(kept, "", f"{disk['total'] / 2**30:.3f}")
    tables = [counted, sized]
    if "seconds" in found:
        tables.append(Table(box=box.SIMPLE, padding=(0, 1, 0, 0)))
        for heading in ("timed here", "seconds"):
            tables[-1].add_column(heading, justify="right" if heading == "seconds" else "left")
        for name, taken in found["seconds"].items():
            tables[-1].add_row(name, f"{taken:.3g}" if taken < 100 else f"{taken:,.0f}")
    return tables


def _rises(summary: dict) -> Table:
    table = Table(title=f"held-out prompts, {summary['images']} images a side, same seeds before and after")
    for heading in ("score", "before", "after", "rise", "p (paired)"):
        table.add_column(heading, justify="left" if heading == "score" else "right")
    for name, row in summary["rises"].items():
        table.add_row(name, f"{row['before']:.3f}", f"{row['after']:.3f}", f"{row['rise']:+.3f}", f"{row['p']:.2g}")
    return table


def _policy(model: str, guidance: float | None, adapter: Path | None):
    """A policy for inference: a model as it is, or with an adapter (`mmalign.runs.adapters`), which may name the
    model, and has a guidance of its own."""
    import torch

    from mmalign import errors, policy as policies
    from mmalign.config import paths

    policies.quiet()
    from mmalign.runs import adapters

    chosen = None if adapter is None else adapters.read(adapter)
    if chosen is not None:
        model, guidance = chosen.model or model, chosen.guidance if guidance is None else guidance
    with errors.refusing():
        policy = policies.load(
            paths.locate(model),
            dtype=chosen.precision if chosen else "float32",
            device="cuda" if torch.cuda.is_available() else "cpu",
            guidance=1.0 if guidance is None else guidance,
            size=chosen.size if chosen else None,
        )
        if chosen is not None:
            chosen.attach(policy)
    return policy


@app.command()
def sample(
    prompt: Annotated[list[str] | None, typer.Argument(help="prompts, each in quotes")] = None,
    prompts: Annotated[str | None, typer.Option(help=PROMPTS)] = None,
    model: Annotated[str, typer.Option(help="folder or hub id of a diffusers pipeline")] = "assets/tiny_sd3",
    adapter: AdapterOf = None,
    seeds: Annotated[str, typer.Option(help="comma-separated, one image per prompt and seed")] = "0",
    steps: Annotated[int, typer.Option(min=1, max=1000, help="ODE steps")] = 10,
    guidance: Annotated[
        float | None, typer.Option(help="classifier-free guidance; default: the run's, or none")
    ] = None,
    strength: Annotated[
        float | None, typer.Option(min=0, help="how much of the adapter acts: 0 none, 1 all, more goes beyond it")
    ] = None,
    boxes: Annotated[
        list[str] | None,
        typer.Option("--box", help="where the adapter acts: left,top,right,bottom in pixels; may repeat"),
    ] = None,
    edge: Annotated[float, typer.Option(min=0, help="softness of the boxes' edges in pixels")] = 0.0,
    best: Annotated[
        str | None, typer.Option("--best", help="keep of each prompt the seed with the best score: scorer.component")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="that scorer's setting, e.g. clip.model=ViT-B-32; may repeat")
    ] = None,
    keep: Annotated[
        int | None, typer.Option(min=1, help="with --best: how many seeds of a prompt go on after --after steps")
    ] = None,
    after: Annotated[int | None, typer.Option(min=1, help="with --keep: steps before the others are given up")] = None,
    out: Annotated[Path, typer.Option(help="folder for the PNG files")] = Path("samples"),
    batch: Annotated[int, typer.Option(min=1, help="images per forward")] = 64,
    allow: Allow = None,
    as_json: Json = False,
) -> None:
    """Sample images by ODE; a seed gives the image the stock pipeline gives for it."""
    from torchvision.utils import save_image

    from mmalign import errors
    from mmalign.config import paths
    from mmalign.data import prompts as prompt_files
    from mmalign.evaluation import generate
    from reward_models import Prompt

    if bool(prompt) == bool(prompts):
        raise BadInput("give prompts in quotes or --prompts SOURCE, one of the two")
    wanted = (
        prompt_files.read(paths.locate(prompts))
        if prompts
        else [Prompt(_worded(text), {}, i) for i, text in enumerate(prompt)]
    )
    numbers = _seeds(seeds)
    if adapter is None and (strength is not None or boxes):
        raise BadInput("--strength and --box say how much of an adapter acts, and where; give --adapter RUN")
    if edge and not boxes:
        raise BadInput("--edge softens boxes; give --box left,top,right,bottom")
    if best is not None:
        _best_settings(best, len(numbers), keep, after, steps, strength, boxes)
        with errors.refusing():
            name, _ = component(best)
            scorer = _scorers(name, settings or [], None)[name]
            _has_component(scorer, best)
    elif keep or after or settings:
        raise BadInput("--keep, --after and --set belong to --best scorer.component")
    policy = _policy(model, guidance, adapter)
    _say_cut([own.text for own in wanted], policy, *([scorer] if best is not None else []))
    if best is not None:
        _sample_best(policy, wanted, numbers, steps, scorer, best, batch, keep, after, out, as_json)
        return
    velocity = _guided(policy, 1.0 if strength is None else strength, boxes or [], edge) if adapter else None
    _writable(out)
    images, of = generate.generate(policy, wanted, [numbers] * len(wanted), steps, batch, velocity)
    files = []
    for image, p, seed in zip(images, of.tolist(), numbers * len(wanted), strict=True):
        files.append({"image": str(out / f"{wanted[p].id:05d}-{seed}.png"), "prompt": wanted[p].text, "seed": seed})
        save_image(image, files[-1]["image"])
    if as_json:
        print(json.dumps(files))
    else:
        console.print(f"{len(files)} images in {out}", soft_wrap=True)


def _seeds(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    numbers = [int(word) for word in words if re.fullmatch(r"[0-9]{1,19}", word)]
    if len(numbers) < len(words) or max(numbers) >= 2**63:
        raise BadInput(f"--seeds {text[:60]!r}: whole numbers from 0 to 2**63 - 1 are needed, separated by commas")
    if len(set(numbers)) < len(numbers):
        raise BadInput(f"--seeds {text[:60]!r}: a seed is there twice, and would give the same image")
    return numbers


def _worded(text: str) -> str:
    """A prompt of the command line: UTF-8 where its bytes are, whatever the locale."""
    from reward_models import tables

    with suppress(UnicodeError):
        text = os.fsencode(text).decode()
    with refusing():
        return tables.wording(text)


def _best_settings(best: str, seeds: int, keep: int | None, after: int | None, steps: int, strength, boxes) -> None:
    if "." not in best:
        raise BadInput(f"--best {best!r}: scorer.component is needed, e.g. clip.cosine")
    if (keep is None) != (after is None):
        raise BadInput("--keep N --after STEPS: both or neither")
    if keep is not None and not (keep < seeds and after < steps):
        raise BadInput(f"--keep {keep} --after {after}: fewer than the {seeds} seeds and the {steps} steps are needed")
    if strength is not None or boxes:
        raise BadInput("--best does not go with --strength or --box")


def _has_component(scorer, name: str) -> None:
    if component(name)[1] not in scorer.names:
        raise BadInput(f"--best {name!r}: that scorer gives {', '.join(scorer.names)}")


def _sample_best(policy, wanted, numbers, steps, scorer, best, batch, keep, after, out, as_json) -> None:
    from torchvision.utils import save_image

    from mmalign.evaluation import best_of_n as bestof

    _writable(out)
    seeds, part = [numbers] * len(wanted), component(best)[1]
    found = bestof.best_of(policy, wanted, seeds, steps, scorer, part, batch, keep, after)
    rows = []
    for i, own in enumerate(wanted):
        value, seed = float(found.score[i]), numbers[int(found.member[i])]
        rows.append({"image": str(out / f"{own.id:05d}-{seed}.png"), "prompt": own.text, "seed": seed})
        rows[-1]["score"] = None if value != value else value
        save_image(found.images[i], rows[-1]["image"])
    curve = bestof.curve(found.scores)
    if as_json:
        spent = {"forwards": found.forwards, "judgements": found.judgements}
        print(json.dumps({"images": rows, "expected_best": curve, "failures": found.failures, **spent}))
    else:
        console.print(f"{len(rows)} images in {out}: {found.forwards} forwards, {found.judgements} judgements")
        of = f"the {keep} that were walked to the end" if keep else "all"
        console.print(f"expected best {best} of k of {of}: {', '.join(f'{v:.3f}' for v in curve)}")
    if found.failures:
        why = next(iter(found.failures.values()))
        print(f"mmalign: {len(found.failures)} images could not be scored: {why}", file=sys.stderr)
        raise typer.Exit(1)


def _guided(policy, strength: float, boxes: list[str], edge: float):
    """The velocity of the adapter at a strength and place; None where that is the policy as it is."""
    import torch

    from mmalign import errors
    from mmalign.refine import velocity as guide

    if strength == 1 and not boxes:
        return None
    try:
        corners = [tuple(float(number) for number in box.split(",")) for box in boxes]
        if any(len(box) != 4 for box in corners):
            raise ValueError
    except ValueError:
        raise BadInput(f"--box {' '.join(boxes)!r}: left,top,right,bottom in pixels are needed") from None
    latent = policy.latent_shape[1:]
    with errors.refusing():
        mask = guide.masked(corners, policy.image_size, latent, edge) if boxes else torch.ones(latent)
    return guide.guided(policy, mask.to(policy.device), strength)


@app.command()
def evaluate(
    prompts: Annotated[str, typer.Option(help=PROMPTS)] = "assets/prompts/held_out.jsonl",
    rewards: Annotated[str, typer.Option(help="comma-separated scorers")] = "shapes",
    model: Annotated[str, typer.Option(help="folder or hub id of a diffusers pipeline")] = "assets/tiny_sd3",
    adapter: AdapterOf = None,
    members: Annotated[int, typer.Option("--seeds", min=1, max=10_000, help="images per prompt")] = 2,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="ODE steps")] = 10,
    guidance: Annotated[
        float | None, typer.Option(help="classifier-free guidance; default: the run's, or none")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder for the images and scores")] = None,
    layout: Annotated[
        Layout, typer.Option(help="of that folder: mmalign's own, or as GenEval's or T2I-CompBench's scripts read it")
    ] = "mmalign",
    reference: Annotated[
        Path | None,
        typer.Option(help="file for mean and spread of each score, a config's `reference`"),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="images per forward")] = 256,
    allow: Allow = None,
    as_json: Json = False,
) -> None:
    """Score a model on prompts with fixed seeds, overall and by kind of prompt."""
    from mmalign import errors
    from mmalign.config import paths
    from mmalign.data import prompts as prompt_files
    from mmalign.evaluation import evaluate as evaluation, layouts, reference as references
    from reward_models import load as load_scorer

    if reference is not None and adapter is not None:
        raise BadInput("--reference is of the base model; leave out --adapter")
    if layout != "mmalign" and out is None:
        raise BadInput(f"--layout {layout} says how images are written; give --out FOLDER")

    wanted = prompt_files.read(paths.locate(prompts))
    if out is not None:
        layouts.fits(layout, wanted, out)
    with errors.refusing():
        scorers = {name: load_scorer(name) for name in rewards.split(",")}
    policy = _policy(model, guidance, adapter)
    _say_cut([own.text for own in wanted], policy, *scorers.values())
    if out is not None:
        _may_write(out / "scores.jsonl", "--out", _rows_of("image", "prompt", "id", "scores", "places"))
    if reference is not None:
        _may_write(reference, "--reference", references.ours)
    result = evaluation.evaluate(policy, wanted, members, steps, scorers, batch)
    if out is not None:
        layouts.write(result, wanted, out, layout)
    if reference is not None:
        references.save(reference, policy.fingerprint(), result, scorers)
        if len(result.images) < references.ENOUGH:
            print(
                f"mmalign: {reference} rests on {len(result.images)} images; {references.ENOUGH} are better",
                file=sys.stderr,
            )
    tags = [wanted[p].wants.get("tag", "") for p in result.prompt.tolist()]
    table = {"all": result.means()}
    for tag in dict.fromkeys(tags):
        rows = [i for i, own in enumerate(tags) if own == tag]
        table[tag] = {name: float(values[rows].nanmean()) for name, values in result.parts.items()}
    if as_json:
        print(json.dumps({"images": len(result.images), "means": table}))
        return
    view = Table(title=f"{len(result.images)} images, {steps} steps")
    for heading in ("prompts", *result.parts):
        view.add_column(heading)
    for tag, row in table.items():
        view.add_row(tag, *(f"{row[name]:.3f}" for name in result.parts))
    console.print(view)


@app.command()
def score(
    source: Annotated[
        Path,
        typer.Argument(help="folder of pictures, or a table (JSONL, JSON, CSV, TSV, Parquet) of image and prompt"),
    ],
    rewards: Annotated[str, typer.Option(help="comma-separated scorers")] = "clip",
    out: Annotated[Path, typer.Option(help="JSONL, CSV or Parquet; rows already there are not scored again")] = Path(
        "scores.jsonl"
    ),
    prompt: Annotated[str | None, typer.Option(help="prompt of all images that have none")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="a scorer's setting, e.g. clip.model=ViT-B-32; may repeat")
    ] = None,
    page: Annotated[Path | None, typer.Option("--html", help="write a gallery, best first")] = None,
    cache: Annotated[Path | None, typer.Option(help="file of scores had before; made if it is not there")] = None,
    batch: Annotated[int, typer.Option(min=1, help="images scored at once")] = 64,
    allow: Allow = None,
    as_json: Json = False,
) -> None:
    """Score images on disk. Exit code 1 if any image could not be scored; its row says why."""
    from rich.progress import track

    from mmalign import errors
    from mmalign.runs import folder
    from reward_models.tools import gallery, score_files as batches

    ending = out.suffix.lower()
    if ending not in batches.OUTPUTS:
        raise BadInput(f"--out {out}: a name that ends in {', '.join(batches.OUTPUTS)} is needed")
    record = Path(os.path.realpath(out if ending == ".jsonl" else out.with_suffix(".partial.jsonl")))
    if ending != ".jsonl" and os.path.lexists(out):
        raise BadInput(f"--out {out} is there already; choose another name or remove it")
    with errors.refusing():
        items, choices = batches.read(source, prompt and _worded(prompt), out)
        scorers = _scorers(rewards, settings or [], cache)
        if any(item.prompt is None for item in items) and (blind := batches.needs_prompts(scorers)):
            raise BadInput(f"{blind[0]} looks at the prompt, and {source} has none for some images; give --prompt TEXT")
        if page is not None:
            _may_write(page, "--html", gallery.ours)
        _writable(out.parent)
        with folder.failing(out, folder.ROWS_ARE_WHOLE):
            done, left = batches.resume(record, items, scorers)
    if aside := batches.left_out(source, items):
        print(f"mmalign: left out of {source}: {aside}", file=sys.stderr)
    _say_cut([item.prompt.text for item in items if item.prompt], *scorers.values())
    if count := batches.animations(left):
        print(f"mmalign: {count} of {len(left)} pictures are animated; the first frame is scored", file=sys.stderr)
    scored = batches.score(left, scorers, batch)
    for row in track(scored, "scoring", len(left), console=Console(stderr=True), disable=not left):
        with folder.failing(out, folder.ROWS_ARE_WHOLE):
            files.append(record, row)
        done[row["image"], row["prompt"]] = row
    rows = [done[item.key] for item in items]
    if ending != ".jsonl":
        with folder.failing(out, folder.ROWS_ARE_WHOLE):
            batches.write(rows, out)
        record.unlink()
    summary = batches.summarise(rows, choices)
    if cache is not None:
        summary["cache"] = {name: {"asked": own.asked, "hits": own.hits} for name, own in scorers.items()}
    if page is not None:
        with folder.failing(page, folder.ROWS_ARE_WHOLE):
            gallery.write(rows, summary, source if source.is_dir() else source.parent, page)
    if as_json:
        print(json.dumps(summary | {"out": str(out)}))
    else:
        console.print(_scores(summary))
        console.print(f"{len(left)} images scored now, {len(rows) - len(left)} before: {out}")
        for name, own in summary.get("cache", {}).items():
            console.print(f"cache: {own['hits']} of {own['asked']} scores of {name} were there")
    if summary["failed"]:
        print(f"mmalign: {summary['failed']} of {len(rows)} images could not be scored; see {out}", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def refine(
    prompt: Annotated[list[str] | None, typer.Argument(help="prompts, each in quotes")] = None,
    prompts: Annotated[str | None, typer.Option(help=PROMPTS)] = None,
    images: Annotated[
        Path | None, typer.Option(help="pictures to begin from, with their prompts: a folder or table, as for `score`")
    ] = None,
    critic: Annotated[str, typer.Option(help="scorer that criticises; the embedded world's by default")] = (
        "shapes_critic"
    ),
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="the critic's setting, e.g. rational.model=NAME; may repeat")
    ] = None,
    moves: Annotated[
        str,
        typer.Option(help="what a round may do, comma-separated: request, seed, guidance, region, keep, cut, strength"),
    ] = "request,seed",
    by: Annotated[str, typer.Option(help="component that decides; default: the critic's first")] = "",
    good: Annotated[float, typer.Option(help="what every component must reach for an image to be done with")] = 1.0,
    rounds: Annotated[int, typer.Option(min=1, help="most images of a prompt, the first included")] = 4,
    forwards: Annotated[float | None, typer.Option(min=0, help="most network forwards for a prompt")] = None,
    patience: Annotated[int | None, typer.Option(min=1, help="give up after so many rounds without a gain")] = None,
    cut: Annotated[float, typer.Option(help="time in (0, 1) that the move `cut` begins from")] = 0.9,
    strength: Annotated[float, typer.Option(min=0, help="of the adapter, for the move `strength`")] = 1.5,
    model: Annotated[str, typer.Option(help="folder or hub id of a diffusers pipeline")] = "assets/tiny_sd3",
    adapter: AdapterOf = None,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="ODE steps")] = 10,
    guidance: Annotated[
        float | None, typer.Option(help="classifier-free guidance; default: the run's, or none")
    ] = None,
    seed: Annotated[int, typer.Option(help="of all noise")] = 0,
    out: Annotated[Path, typer.Option(help="folder; prompts that are done there are not done again")] = Path("refined"),
    batch: Annotated[int, typer.Option(min=1, help="images per forward, and prompts at once")] = 64,
    page: Annotated[Path | None, typer.Option("--html", help="write a page of all rounds")] = None,
    pairs: Annotated[Path | None, typer.Option(help="JSONL for the best against the worst image of a prompt")] = None,
    requests: Annotated[Path | None, typer.Option(help="JSONL for the revised requests that gained")] = None,
    cache: Annotated[Path | None, typer.Option(help="file of scores had before; made if it is not there")] = None,
    allow: Allow = None,
    as_json: Json = False,
) -> None:
    """Draw, have it criticised, draw again; keep the best image of each prompt. No training."""
    from dataclasses import asdict

    from rich.progress import track

    from mmalign import errors
    from mmalign.refine import loop as refining, page as rounds_page, trace as stories
    from mmalign.runs import folder

    if sum(map(bool, (prompt, prompts, images))) != 1:
        raise BadInput("give prompts in quotes, --prompts SOURCE or --images FOLDER, one of the three")
    given = tuple(own.strip() for own in moves.split(",") if own.strip())
    _check_moves(given, adapter, cut, steps)
    outputs = {
        "--html": (page, rounds_page.ours),
        "--pairs": (pairs, _rows_of("image_a", "image_b", "chosen", "gap")),
        "--requests": (requests, _rows_of("id", "prompt", "first")),
    }
    for option, (file, ours) in outputs.items():
        if file is not None:
            _may_write(file, option, ours)
    with errors.refusing():
        scorer = _scorers(critic, settings or [], cache)[critic]
    if by and by not in scorer.names:
        raise BadInput(f"--by {by!r}: {critic} gives {', '.join(scorer.names)}")
    policy = _policy(model, guidance, adapter)
    wanted, begin = _begun(prompt, prompts, images, policy.image_size)
    _say_cut([own.text for own in wanted], policy, scorer)
    asked = refining.Settings(
        given, by or scorer.names[0], good, rounds, forwards, patience, cut, strength, policy.guidance, steps, seed
    )
    _writable(out)
    about = {"critic": critic, "version": scorer.card.version, "model": str(model), "adapter": str(adapter or "")}
    with folder.failing(out, folder.ROWS_ARE_WHOLE):
        rows = stories.opened(out, asdict(asked) | about | {"images_from": str(images or "")}, wanted)
    left = [own for own in wanted if own.id not in rows]

    def refined(some):
        shown = None if begin is None else begin(some)
        return refining.refine(policy, scorer, some, asked, batch, shown, critic)

    done = track(
        stories.run(left, batch, refined, out), "refining", len(left), console=Console(stderr=True), disable=not left
    )
    for row in done:
        rows[row["id"]] = row
    ordered = [rows[own.id] for own in wanted]
    result = stories.summary(ordered, asked.by) | {"before": len(wanted) - len(left), "out": str(out)}
    usage = getattr(getattr(scorer, "judge", None), "usage", None)
    if usage is not None:
        result["judge"] = dict(usage)
    with folder.failing(out, folder.ROWS_ARE_WHOLE):
        if page is not None:
            rounds_page.write(ordered, result, asked.by, out, page)
        if pairs is not None:
            stories.export(stories.pairs(ordered, asked.by, os.path.relpath(out, pairs.parent)), pairs)
        if requests is not None:
            stories.export(stories.requests(ordered, asked.by), requests)
    if as_json:
        print(json.dumps(result))
    else:
        console.print(_refined(result, asked.by))
    if result["unscored"]:
        print(f"mmalign: {result['unscored']} of {len(wanted)} prompts have an image without a score", file=sys.stderr)
        raise typer.Exit(1)


def _check_moves(given: tuple[str, ...], adapter: Path | None, cut: float, steps: int) -> None:
    from mmalign.refine.loop import MOVES

    unknown = [own for own in given if own not in MOVES]
    if unknown or not given:
        raise BadInput(f"--moves {','.join(unknown) or 'none'}: known are {', '.join(MOVES)}")
    if "strength" in given and adapter is None:
        raise BadInput("--moves strength makes more of an adapter; give --adapter RUN")
    if "cut" in given and not 0 < cut < 1:
        raise BadInput(f"--cut {cut}: a time between 0 (the image) and 1 (noise) is needed")
    if {"region", "keep"} & set(given) and steps < 3:
        raise BadInput(f"--steps {steps}: redrawing a part of an image takes at least 3")


def _begun(prompt: list[str] | None, prompts: str | None, images: Path | None, size: tuple[int, int]):
    """The prompts, and what gives the pictures of some of them, if there are any."""
    import torch

    from mmalign import errors
    from mmalign.config import paths
    from mmalign.data import prompts as prompt_files
    from reward_models import Prompt
    from reward_models.tools import score_files as batches

    if prompts:
        return prompt_files.read(paths.locate(prompts)), None
    if prompt:
        return [Prompt(_worded(text), {}, i) for i, text in enumerate(prompt)], None
    with errors.refusing():
        items, _ = batches.read(images, None)
        if any(item.prompt is None for item in items):
            raise BadInput(f"{images} has no prompt for {next(item.name for item in items if item.prompt is None)}")
        pictures = {}
        for number, item in enumerate(items):
            try:
                pictures[number] = batches.picture(item)
            except ValueError as error:
                raise BadInput(f"{item.name} {error}") from None
            if tuple(pictures[number].shape[2:]) != size:
                had, needed = (f"{wide} x {high}" for high, wide in (pictures[number].shape[2:], size))
                raise BadInput(f"{item.name} has {had} pixels; the model draws {needed}")
    wanted = [Prompt(item.prompt.text, item.prompt.wants, number) for number, item in enumerate(items)]
    return wanted, lambda some: torch.cat([pictures[own.id] for own in some])


def _refined(result: dict, by: str) -> Table:
    table = Table(title=f"{result['prompts']} prompts, images in {result['out']}", box=box.SIMPLE, show_header=False)
    first, best = (_short(result[key]) or "none" for key in ("first", "best"))
    rows = {f"{by}, first image": first, f"{by}, image kept": best, "prompts with a better image": result["gained"]}
    rows |= {"images": result["images"], "network forwards": result["forwards"]}
    rows |= {"ended": ", ".join(f"{why} {count}" for why, count in result["stopped"].items())}
    rows |= {f"judge, {name}": count for name, count in result.get("judge", {}).items()}
    rows |= {"done before": result["before"]} if result["before"] else {}
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


@app.command()
def doctor(
    source: Annotated[
        Path,
        typer.Argument(
            help="a config: is the run sound? Or with --rewards pictures with prompts, as for `score`, in which pairs "
            "with a choice are labels: is the judge?"
        ),
    ] = Path("assets/pictures"),
    overrides: Overrides = None,
    rewards: Annotated[str | None, typer.Option(help="comma-separated scorers to examine")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="a scorer's setting, e.g. rational.model=NAME; may repeat")
    ] = None,
    most: Annotated[int, typer.Option(min=2, help="pictures used at most")] = 32,
    out: Annotated[Path | None, typer.Option(help="Markdown file for the report")] = None,
    allow: Allow = None,
    as_json: Json = False,
) -> None:
    """Is a run sound, before time is spent on it; is a judge fit to be a reward? Exit code 1 if not; each red line says
    what to do."""
    from dataclasses import asdict

    from mmalign import errors
    from mmalign.config import paths
    from reward_models.tools import examine as health

    if out is not None:
        _may_write(out, "--out", lambda text: health.HEADING in text)
    if rewards is None:
        _doctor_of_run(source, overrides or [], settings, out, as_json)
        return
    if overrides:
        raise BadInput(f"{overrides[0]!r}: key=value changes a config; with --rewards use --set scorer.key=value")
    with errors.refusing():
        images, prompts, pairs = health.material(Path(paths.locate(str(source))), most)
        scorers = _scorers(rewards, settings or [], None)
    reports = {
        name: health.examine(scorer, images, prompts, health.chosen(scorer, pairs)) for name, scorer in scorers.items()
    }
    if out is not None:
        files.write(out, health.markdown(reports, len(images)))
    if as_json:
        print(json.dumps({name: [asdict(own) for own in rows] for name, rows in reports.items()}))
    else:
        for name, rows in reports.items():
            console.print(_examined(name, rows))
    if any(own.good is False for rows in reports.values() for own in rows):
        raise typer.Exit(1)


def _doctor_of_run(config: Path, overrides: list[str], settings: list[str] | None, out: Path | None, as_json: bool):
    from dataclasses import asdict

    from mmalign import policy as policies
    from mmalign.checks import doctor as doctors
    from mmalign.config import load as configs

    if config.suffix not in (".yaml", ".yml"):
        raise BadInput(f"{config}: a config (.yaml) is needed, or --rewards SCORER to examine judges on pictures")
    if settings:
        raise BadInput("--set belongs to --rewards; a config names its scorers' settings itself")
    policies.quiet()
    c, found = configs.load(config, overrides), []
    with console.status("examining") as status:
        for own in doctors.examine(c):
            found.append(own)
            status.update(f"{own.check} done")
    if out is not None:
        files.write(out, doctors.page(c, found))
    if as_json:
        print(json.dumps([asdict(own) for own in found]))
    else:
        console.print(_examined(str(config), found))
    if any(own.good is False for own in found):
        raise typer.Exit(1)


def _examined(name: str, rows) -> Table:
    table = Table(title=name, box=box.SIMPLE, title_justify="left")
    for heading in ("check", "", "seen", "what to do"):
        table.add_column(heading)
    for own in rows:
        mark = {True: Text("good", "green"), False: Text("bad", "red"), None: "unknown"}[own.good]
        table.add_row(own.check, mark, own.result, "" if own.good else own.advice)
    return table


@app.command()
def serve(
    rewards: Annotated[str, typer.Option(help="comma-separated scorers")] = "clip",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="a scorer's setting, e.g. clip.model=ViT-B-32; may repeat")
    ] = None,
    host: Annotated[str, typer.Option(help="address to listen on; one that others reach needs a token")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one")] = 8000,
    token: Annotated[str | None, typer.Option(envvar="MMALIGN_TOKEN", help="what callers must show")] = None,
    cache: Annotated[Path | None, typer.Option(help="file of scores had before; made if it is not there")] = None,
    batch: Annotated[int, typer.Option(min=1, help="images scored together at most, whoever sent them")] = 64,
    queue: Annotated[int, typer.Option(min=1, help="images that may wait; more are refused with 503")] = 512,
    body: Annotated[int, typer.Option(min=1, help="largest request in bytes; more is refused with 413")] = 2**27,
    allow: Allow = None,
) -> None:
    """Serve scorers over HTTP until SIGTERM or Ctrl-C; the client is the scorer `remote`. /docs describes it."""
    from mmalign import errors

    with errors.refusing():
        from reward_models.service import server as service

        scorers = _scorers(rewards, settings or [], cache)
        for scorer in scorers.values():
            console.print(str(scorer.card), highlight=False, soft_wrap=True)
        service.serve(scorers, host, port, token=token, batch=batch, queue=queue, body=body)


def _scorers(rewards: str, settings: list[str], cache: Path | None) -> dict:
    from reward_models import load as load_scorer
    from reward_models.cache import Cached

    own = _settings(settings, rewards.split(","))
    scorers = {name: load_scorer(name, **own[name]) for name in own}
    return {name: Cached(scorer, cache) for name, scorer in scorers.items()} if cache else scorers


def _settings(given: list[str], names: list[str]) -> dict[str, dict]:
    from mmalign.config.load import parse

    own: dict[str, dict] = {name: {} for name in names}
    for setting in given:
        where, equals, value = setting.partition("=")
        name, _, key = where.rpartition(".")
        if not equals or name not in own:
            raise BadInput(f"--set {setting!r} must look like scorer.key=value, with one of {', '.join(own)}")
        own[name][key] = parse(value, f"--set {setting!r}")
    return own


def _scores(summary: dict) -> Table:
    columns = ("count", "missing", "mean", "std", "min", "max", "best", "agrees")
    used = [column for column in columns if any(own.get(column) not in (None, 0) for own in summary["scores"].values())]
    table = Table(title=f"{summary['images']} images", box=box.SIMPLE, padding=(0, 1, 0, 0), collapse_padding=True)
    for heading in ("score", *used):
        table.add_column(heading, justify="left" if heading == "score" else "right", no_wrap=heading == "score")
    for name, own in summary["scores"].items():
        table.add_row(name, *(_short(own.get(column)) for column in used))
    return table


def _short(value: int | float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"


@app.command()
def export(
    run: Run,
    out: Annotated[Path, typer.Option(help="folder for the files, or for the folder `merged`")] = Path("lora"),
    form: Annotated[
        Form,
        typer.Option(
            "--format",
            help="diffusers: LoRA for load_lora_weights; comfyui: one LoRA file; peft: LoRA for "
            "PeftModel.from_pretrained; merged: the whole pipeline with it",
        ),
    ] = "diffusers",
    allow: Allow = None,
) -> None:
    """Write a run's averaged adapter for other programs, and read it back once to be sure."""
    from mmalign import errors, policy as policies

    policies.quiet()
    from mmalign.runs import adapters, state as states

    c, newest = adapters.saved(run)
    policy, state = _policy("", None, newest), states.read(newest)[1]
    if not c.quantize and state.made["model"] != policy.fingerprint():  # weights are exported unquantised
        raise BadInput(f"the weights of {c.model} are not those that {run} was trained on")
    _writable(out)
    with errors.refusing():
        path = policy.export(out, form, _about(c, policy, state))
    try:
        policy.check_export(out, form)
    except ValueError as error:
        print(f"mmalign: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    console.print(f"{path}: read back, and it gives the same velocity", highlight=False, soft_wrap=True)


def _about(c, policy, state) -> dict[str, str]:
    """What the header of an exported file says of the run."""
    from importlib.metadata import version

    from mmalign.config import secrets

    own = secrets.public(c.model_dump(mode="json"))
    lists = {"sigmas": policy.times(c.steps).tolist(), "config": own}
    return {
        "version": version("mmalign"), "base_model": own["model"], "iteration": str(state.iteration),
        "steps": str(c.steps), "precision": c.precision,
    } | {name: json.dumps(value) for name, value in lists.items()}  # fmt: skip


@app.command()
def report(
    run: Run,
    serve: Annotated[bool, typer.Option("--serve", help="serve the page until Ctrl-C; it follows the run")] = False,
    host: Annotated[
        str | None, typer.Option(help="--serve: address to listen on; who reaches it can read the run [127.0.0.1]")
    ] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="--serve: 0 is any free one [8001]")] = None,
) -> None:
    """Write a run's report.html again, or serve a page that follows the run while it goes on."""
    from mmalign import errors
    from mmalign.reporting import report as reports
    from mmalign.runs import adapters

    adapters.config_of(run)
    given = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    if serve:
        with errors.refusing():
            from mmalign.reporting import live

            live.serve(run, **given)
    elif given:
        raise BadInput(f"--{next(iter(given))} acts only with --serve")
    else:
        with refusing():
            try:
                page = reports.write(run)
            except OSError as error:
                raise BadInput(f"{error.filename}: {error.strerror}") from None
        console.print(f"report: {page}")


def _writable(folder: Path) -> None:
    """Make a folder; BadInput where nothing can be written in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise BadInput(f"cannot write in {folder}: {error.strerror}") from None


def _say_cut(texts, *models) -> None:
    """Say once how many prompts are longer than what a model or scorer reads."""
    from reward_models.lengths import cut

    for line in cut(models, texts):
        print(f"mmalign: {_line(line)}", file=sys.stderr)


def _may_write(file: Path, option: str, ours: Callable[[str], bool] = lambda text: False) -> None:
    """Make the folder of a file that is to be written. BadInput where it cannot be, or holds a text that is not `ours`,
    which would be lost."""
    _writable(file.parent)
    if not os.path.lexists(file):
        return
    try:
        if file.stat().st_size and not ours(files.text(file)):
            raise ValueError(f"{file}: another file is there")
    except (OSError, ValueError) as error:
        why = f"{file}: {error.strerror}" if isinstance(error, OSError) else error
        raise BadInput(f"{option} {why}; it is not overwritten, choose another name or remove it") from None


def _rows_of(*names: str) -> Callable[[str], bool]:
    """Whether a text has a JSON object in each line, with these names."""
    return lambda text: all(files.is_record(line, *names) for line in files.lines(text))


def _line(text: str) -> str:
    """Without line ends and control characters, which a file's name can hold."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class _Output(io.TextIOWrapper):
    """Standard output. What its encoding lacks is escaped; that it takes no more is told in one line, and ends."""

    def write(self, text: str) -> int:
        with _telling(self):
            return super().write(text)

    def flush(self) -> None:
        with _telling(self):
            super().flush()


@contextmanager
def _telling(stream: _Output) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # where what is left of it goes when Python ends
        raise Failed(f"standard output cannot be written: {error.strerror}") from None


@contextmanager
def _speaking() -> Iterator[None]:
    """Standard output as an `_Output`, all of it written when it ends."""
    plain = sys.stdout
    if not isinstance(plain, io.TextIOWrapper):
        yield
        return
    sys.stdout = _Output(plain.buffer, plain.encoding, "backslashreplace", line_buffering=plain.line_buffering)
    try:
        yield
    finally:
        try:
            sys.stdout.flush()
        finally:
            sys.stdout.detach()
            sys.stdout = plain
>>>>>>> helper_A


def main() -> None:
    """Run the command line; a user's mistake becomes one line on standard error."""
    os.environ["PYTHONSAFEPATH"] = "1"  # processes that libraries start import nothing from the current folder either
    for name in ("torch.utils._pytree", "bitsandbytes", "torchao"):  # what they log when a library imports them
        logging.getLogger(name).setLevel(logging.ERROR)
    import torch

    from mmalign.runs.folder import UNWRITABLE

    torch.set_flush_denormal(True)  # tiny activations in the subnormal range make CPU arithmetic many times slower
    try:
        with output.checked():
            app()
    except (BadInput, Failed) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, Orphaned):  # one process of each machine
            output.complain(str(error))
        sys.exit(2 if isinstance(error, BadInput) else 1)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        output.complain(f"cannot write{f' {error.filename}' if error.filename else ''}: {error.strerror}")
        sys.exit(1)
    except Stopped as stopped:
        sys.exit(stopped.code)
