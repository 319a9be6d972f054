"""Distil a critic from preferences: `reward rationalise` and `reward distil`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mmalign.activity import counted
from mmalign.cli import output
from mmalign.cli.options import Json, ScorerSettings, output_option
from mmalign.cli.reward import Device, HeldOut, MethodSettings, PromptOfAll, Seed, Source
from mmalign.errors import BadInput, Failed, refusing

TEACHER = "teacher"  # the name in `--set teacher.key=value`
Rationales = Annotated[Path, typer.Argument(help="folder of `mmalign reward rationalise`")]
Out = Annotated[Path, output_option(help="folder of the rationales; the same command continues in it")]
Folder = Annotated[Path, output_option(help="folder for the model, which the scorer `rational` loads")]
Batch = Annotated[int, typer.Option(min=1, help="rationales in progress at once")]


def rationalise(
    source: Source,
    out: Out,
    settings: ScorerSettings = None,
    prompt: PromptOfAll = None,
    batch: Batch = 16,
    as_json: Json = False,
) -> None:
    """Have a teacher write rationales of preference pairs, and keep those that predict the preference.

    The teacher is given as settings, like the model of a scorer: `--set teacher.model=NAME --set teacher.url=URL`.
    """
    from mmalign.config import paths
    from mmalign.runs import folder
    from reward_models import pairs as preferences
    from reward_models.training import parrot

    given = _of_teacher(settings or [])
    with refusing(), folder.failing(out, folder.ROWS_ARE_WHOLE), output.progressing():
        pairs = preferences.read(paths.locate(source), prompt, output.warn)
        summary = parrot.rationalise(pairs, parrot.teacher(**given), out, batch=batch, progress=counted)
    refused = ", ".join(f"{step} {count}" for step, count in summary["refused"].items()) or "none"
    line = f"{summary['kept']} of {summary['candidates']} rationales kept, of {summary['pairs_kept']} of "
    output.show(summary, as_json, f"{line}{summary['pairs']} pairs; refused: {refused}")
    if failed := summary["refused"].get("call"):
        raise Failed(f"{failed} rationales are missing because calls failed; the same command asks again")


def _of_teacher(settings: ScorerSettings) -> dict[str, Any]:
    for setting in settings:
        if setting.scorer != TEACHER:
            raise BadInput(f"--set {setting.text!r} must look like {TEACHER}.key=value")
    given = {setting.key: setting.value for setting in settings}
    if "model" not in given:
        raise BadInput(f"no teacher; give --set {TEACHER}.model=NAME, and --set {TEACHER}.url=URL for one on a server")
    return given


def distil(
    source: Rationales,
    out: Folder,
    settings: MethodSettings = None,
    held_out: HeldOut = 0.2,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Train an image-text model to write such rationales. The scorer `rational` loads the folder."""
    from mmalign.runs import folder
    from reward_models.training import parrot

    with refusing(), folder.failing(out, folder.ROWS_ARE_WHOLE), output.progressing():
        given = dict(settings or [])
        card = parrot.distil(source, out, held_out=held_out, seed=seed, device=device, progress=counted, **given)
    losses = ", ".join(f"{part} {loss:.4g}" for part, loss in card["losses"].items())
    line = f"{sum(card['samples'].values())} samples; epoch {card['epoch']}; loss of a token: {losses}"
    question = f" and instruction={out}/instruction.txt" if card["settings"]["instruction"] else ""
    output.show(card, as_json, line, f"the scorer `rational` loads model={out}{question}")
