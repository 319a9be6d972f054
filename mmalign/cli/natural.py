"""Train the scorer `natural` from pictures."""

from pathlib import Path
from typing import Annotated

import typer

from mmalign.activity import counted
from mmalign.cli import output, tables
from mmalign.cli.options import Json, output_option
from mmalign.errors import refusing

Source = Annotated[Path, typer.Argument(metavar="PICTURES", help="folder or table of pictures as they should be")]
Out = Annotated[Path, output_option(help="folder for the head")]
Also = Annotated[Path | None, typer.Option(help="folder or table of further bad pictures, e.g. of a hacked run")]
Base = Annotated[str, typer.Option(help="folder in open_clip's layout, or one of its models; default: embedded")]
Tag = Annotated[str, typer.Option("--pretrained", help="tag of the weights of the model of open_clip")]
Seed = Annotated[int, typer.Option(min=0, help="seed of corruptions, split and training")]
Device = Annotated[str, typer.Option(help="cpu, cuda, ...")]


def natural(
    source: Source,
    out: Out,
    also: Also = None,
    base: Base = "",
    pretrained: Tag = "",
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Train a head that tells pictures from corruptions of them. The scorer `natural` loads the folder."""
    from mmalign.runs import folder
    from reward_models.tools import picture_files
    from reward_models.training import natural as method

    def pictures(place: Path) -> list:
        items = picture_files.read(place)[0]
        if left_out := picture_files.left_out(place, items):
            output.warn(f"{place}: left out {left_out}")
        return [picture_files.picture(item) for item in items]

    with refusing(), folder.failing(out, folder.ROWS_ARE_WHOLE), output.progressing():
        settings = method.Settings(base=base, pretrained=pretrained)
        bad = [] if also is None else pictures(also)
        card = method.train(pictures(source), out, bad, settings, seed=seed, device=device, progress=counted)
    line = f"{card['pictures']} pictures; the scorer `natural` loads folder={out}"
    output.show(card, as_json, tables.corruptions(card), line)
