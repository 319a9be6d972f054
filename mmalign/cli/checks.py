"""The commands `estimate` and `doctor`: the cost of a run, and sanity checks of runs and scorers."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from mmalign.cli import output, tables
from mmalign.cli.inputs import load_scorers
from mmalign.cli.options import (
    Allow,
    ConfigFile,
    Json,
    Overrides,
    ScorerSettings,
    Setting,
    output_option,
    parse_names,
    reward_option,
)
from mmalign.errors import BadInput, refusing
from mmalign.runs.outputs import check_file
from reward_models import files

Gpus = Annotated[int, typer.Option(min=1, help="processes, one a GPU; prompts are sharded over them in turn")]
Timed = Annotated[
    bool, typer.Option("--calibrate", help="load the model and the rewards here and time them, for seconds of a run")
]
Source = Annotated[
    Path | None,
    typer.Argument(
        help="a config, as for `train`: is the run sound? Or with --rewards pictures with prompts, as for `score`, in "
        "which pairs with a choice are labels: is the judge? Default: tiny_branch, or assets/pictures"
    ),
]
Judges = Annotated[
    Sequence[str] | None,
    reward_option(
        "--rewards", parser=str, callback=parse_names, metavar="NAME,...", help="comma-separated scorers to examine"
    ),
]
Most = Annotated[int, typer.Option(min=2, help="pictures used at most")]
Out = Annotated[Path | None, output_option(help="Markdown file for the report")]


def estimate(
    config: ConfigFile,
    overrides: Overrides = None,
    gpus: Gpus = 1,
    timed: Timed = False,
    allow: Allow = None,
    as_json: Json = False,
) -> None:
    """Estimate what a run will take: forwards, decodes, scores, parameters, memory, disk. No weights are needed."""
    from mmalign import policy as policies

    policies.quiet()  # before the imports below, of peft, whose warnings it silences
    with policies.importing():
        from mmalign.checks import estimate as estimates, timing
        from mmalign.config import load as configs
        from mmalign.training import setup

    c = configs.load(config, overrides or [])
    result = estimates.estimate(c, gpus)
    if timed:
        run = setup.open_session(c)
        result["seconds"] = timing.durations(run.config, result, timing.measure(run))
    head = f"{result['model']}, {' x '.join(map(str, result['size']))} pixels: {result['plan']}"
    output.show(result, as_json, head, *tables.estimates(result), *(f"at most: {note}" for note in result["bounds"]))


def doctor(
    source: Source = None,
    overrides: Overrides = None,
    rewards: Judges = None,
    settings: ScorerSettings = None,
    most: Most = 32,
    out: Out = None,
    allow: Allow = None,
    as_json: Json = False,
) -> None:
    """Sanity checks of a run before time is spent on it, or of scorers as rewards. Exit code 1 if one fails; each red
    line has advice."""
    from reward_models.tools import examine

    check_file(out, "--out", lambda text: examine.HEADING in text)
    source = source or Path("tiny_branch" if rewards is None else "assets/pictures")
    if rewards is None:
        rows, page = _check_run(source, overrides or [], settings)
        reports, result = {str(source): rows}, [asdict(row) for row in rows]
    else:
        reports, page = _check_scorers(source, overrides or [], rewards, settings, most)
        result = {name: [asdict(row) for row in rows] for name, rows in reports.items()}
    if out is not None:
        files.write(out, page)
    output.show(result, as_json, *(tables.checks(name, rows) for name, rows in reports.items()))
    if any(row.good is False for rows in reports.values() for row in rows):
        raise typer.Exit(1)


def _check_run(config: Path, overrides: list[str], settings: list[Setting] | None) -> tuple[list[Any], str]:
    """The checks of a run, and its report."""
    from mmalign import policy as policies
    from mmalign.checks import doctor as doctors
    from mmalign.config import load as configs, paths

    if paths.config(config).suffix not in (".yaml", ".yml"):
        raise BadInput(f"{config}: a config (.yaml) is needed, or --rewards SCORER to examine judges on pictures")
    if settings:
        raise BadInput("--set belongs to --rewards; a config names its scorers' settings itself")
    policies.quiet()
    c, rows = configs.load(config, overrides), []
    with output.console.status("examining") as status:
        for row in doctors.examine(c):
            rows.append(row)
            status.update(f"{row.check} done")
    return rows, doctors.page(c, rows)


def _check_scorers(
    source: Path, overrides: list[str], names: list[str], settings: list[Setting] | None, most: int
) -> tuple[dict[str, list[Any]], str]:
    """The checks of each scorer, and the report on all of them."""
    from mmalign.config import paths
    from reward_models.tools import examine

    if overrides:
        raise BadInput(f"{overrides[0]!r}: key=value changes a config; with --rewards use --set scorer.key=value")
    with refusing():
        images, prompts, pairs = examine.material(Path(paths.locate(str(source))), most)
    reports = {
        name: examine.examine(scorer, images, prompts, examine.chosen(scorer, pairs))
        for name, scorer in load_scorers(names, settings).items()
    }
    return reports, examine.markdown(reports, len(images))
