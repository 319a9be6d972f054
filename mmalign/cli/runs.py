"""The commands `export` and `report`: the adapter with its card, and the page of a run."""

from pathlib import Path
from typing import Annotated

import typer

from mmalign.cli import output
from mmalign.cli.options import Allow, Run, Weighted, adapter_of, model_option, output_option, parse_adapters
from mmalign.errors import BadInput, refusing
from mmalign.runs import Form

OneRun = Annotated[Path | None, typer.Argument(help="folder of a run, or of one of its checkpoints")]
Summed = Annotated[
    list[Weighted] | None,
    model_option(
        "--adapter",
        parser=str,
        callback=parse_adapters,
        metavar="PATH=WEIGHT",
        help="instead of a run: several adapters, of runs or LoRA files, as one whose change of the model's weights is "
        "the weighted sum of theirs; linear in weights, not in velocity, so not the mixture that `sample` draws with",
    ),
]
Base = Annotated[str | None, model_option("--model", help="--adapter: base model of LoRA files, which do not name it")]
Out = Annotated[Path, output_option(help="folder for the files, or for the folder `merged`")]
Format = Annotated[
    Form,
    output_option(
        "--format",
        help="diffusers: LoRA for load_lora_weights; comfyui: one LoRA file; peft: LoRA for PeftModel.from_pretrained; "
        "merged: the complete pipeline with it",
    ),
]
Push = Annotated[
    str | None,
    output_option("--push", metavar="OWNER/NAME", help="upload it to this repository of the Hugging Face hub"),
]
Private = Annotated[bool, output_option("--private", help="--push: make a new repository private")]
Serve = Annotated[bool, typer.Option("--serve", help="serve the page until Ctrl-C; it follows the run")]
Host = Annotated[
    str | None,
    typer.Option(help="--serve: address to listen on; anyone who can reach it can read the run [127.0.0.1]"),
]
Port = Annotated[int | None, typer.Option(min=0, max=65535, help="--serve: 0 is any free one [8001]")]
Votes = Annotated[bool, typer.Option("--votes", help="--serve: also take votes on pairs of pictures, at /votes")]
Token = Annotated[
    str | None,
    typer.Option(
        help="--serve: the password that visitors need, with any user name; needed for --votes on a host that others "
        "reach [MMALIGN_TOKEN there]"
    ),
]


def export(
    run: OneRun = None,
    out: Out = Path("lora"),
    form: Format = "diffusers",
    adapter: Summed = None,
    model: Base = None,
    push: Push = None,
    private: Private = False,
    allow: Allow = None,
) -> None:
    """Write a run's averaged adapter for other programs, with a model card, or a weighted sum of adapters, and read it
    back once to be sure."""
    from mmalign.reporting import hub
    from mmalign.reporting.export import export_run

    if (run is None) == (adapter is None):
        raise BadInput("a run or --adapter PATH=WEIGHT is needed, and not both")
    if model is not None and adapter is None:
        raise BadInput("--model acts only with --adapter")
    if push is None and private:
        raise BadInput("--private acts only with --push")
    if adapter is not None:
        _export_sum(adapter, out, form, model, push)
        return
    if push is not None:
        hub.check(push)
    path = export_run(run, out, form)
    folder = path if path.is_dir() else path.parent
    output.print_lines(f"{path}: read back, and it gives the same velocity", f"{folder / 'README.md'}: the model card")
    if push is not None:
        output.print_lines(f"uploaded: {hub.push(folder, push, private)}")


def _export_sum(adapters: list[Weighted], out: Path, form: str, model: str | None, push: str | None) -> None:
    from mmalign.reporting.export import export_sum

    if push is not None:
        raise BadInput("--push needs a model card, which a sum of adapters does not have; export a run")
    if adapters[0].weight is None:
        raise BadInput(f"--adapter {adapters[0].name} needs its weight, as in RUN=0.5; or export the run by its name")
    path = export_sum(adapter_of(adapters), out, form, model or "")
    output.print_lines(f"{path}: read back, and it gives the same velocity")


def report(
    run: Run, serve: Serve = False, host: Host = None, port: Port = None, votes: Votes = False, token: Token = None
) -> None:
    """Write a run's report.html again, or serve a page that follows the run while it continues."""
    from mmalign.reporting import report as reports
    from mmalign.runs import adapters

    adapters.config_of(run)
    given = {"host": host, "port": port, "votes": votes or None, "token": token}
    given = {name: value for name, value in given.items() if value is not None}
    if serve:
        with refusing():
            from mmalign.reporting import live  # ValueError where an optional package is missing

            live.serve(run, **given)
        return
    if given:
        raise BadInput(f"--{next(iter(given))} acts only with --serve")
    with refusing():
        try:
            page = reports.write(run)
        except OSError as error:
            raise BadInput(f"{error.filename}: {error.strerror}") from None
    output.print_lines(f"report: {page}")
