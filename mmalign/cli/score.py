"""The commands `score` and `serve`: reward models on images on disk and over HTTP."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mmalign.activity import counted
from mmalign.cli import output, tables
from mmalign.cli.inputs import load_scorers
from mmalign.cli.options import Allow, Cache, Json, Rewards, ScorerSettings, output_option, parse_prompt
from mmalign.errors import Failed, refusing
from mmalign.runs.outputs import check_file

Source = Annotated[
    Path, typer.Argument(help="folder of pictures, or a table (JSONL, JSON, CSV, TSV, Parquet) of image and prompt")
]
Out = Annotated[Path, output_option(help="JSONL, CSV or Parquet; rows already there are not scored again")]
PromptOfAll = Annotated[
    str | None, typer.Option("--prompt", callback=parse_prompt, help="prompt of all images that have none")
]
Page = Annotated[Path | None, output_option("--html", help="write a gallery, best first")]
Batch = Annotated[int, typer.Option(min=1, help="images scored at once")]

Host = Annotated[str, typer.Option(help="address to listen on; one that others reach needs a token")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0: any free one")]
Token = Annotated[str | None, typer.Option(envvar="MMALIGN_TOKEN", help="what callers must show")]
Together = Annotated[int, typer.Option("--batch", min=1, help="images scored together at most, of all callers")]
Queue = Annotated[int, typer.Option(min=1, help="images that may wait; more are refused with 503")]
Body = Annotated[int, typer.Option(min=1, help="largest request in bytes; more is refused with 413")]


def score(
    source: Source,
    rewards: Rewards = "clip",
    out: Out = Path("scores.jsonl"),
    prompt: PromptOfAll = None,
    settings: ScorerSettings = None,
    page: Page = None,
    cache: Cache = None,
    batch: Batch = 64,
    allow: Allow = None,
    as_json: Json = False,
) -> None:
    """Score images on disk. Exit code 1 if any image could not be scored; its row has the reason."""
    from mmalign.config import paths
    from mmalign.runs import folder
    from reward_models.tools import gallery
    from reward_models.tools.score_files import score_files

    check_file(page, "--html", gallery.ours)
    source = Path(paths.locate(str(source)))
    scorers = partial(load_scorers, rewards, settings, cache)
    progress = partial(counted, name="scoring", unit="images")
    with refusing(), folder.failing(out, folder.ROWS_ARE_WHOLE), output.progressing():
        result = score_files(source, scorers, out, prompt, batch, output.warn, progress)
    rows, summary = result.rows, result.summary
    if page is not None:
        with folder.failing(page, folder.ROWS_ARE_WHOLE):
            gallery.write(rows, summary, source if source.is_dir() else source.parent, page)
    line = f"{result.scored} images scored now, {len(rows) - result.scored} before: {out}"
    output.show(summary | {"out": str(out)}, as_json, tables.scores(summary), line, *tables.cache(summary))
    if summary["failed"]:
        raise Failed(f"{summary['failed']} of {len(rows)} images could not be scored; see {out}")


def serve(
    rewards: Rewards = "clip",
    settings: ScorerSettings = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    token: Token = None,
    cache: Cache = None,
    batch: Together = 64,
    queue: Queue = 512,
    body: Body = 2**27,
    allow: Allow = None,
) -> None:
    """Serve scorers over HTTP until SIGTERM or Ctrl-C; the client is the scorer `remote`. /docs describes it."""
    with refusing():
        from reward_models.service import server  # ValueError where an optional package is missing

        scorers = load_scorers(rewards, settings, cache)
        output.print_lines(*(str(scorer.card) for scorer in scorers.values()))
        server.serve(scorers, host, port, token=token, batch=batch, queue=queue, body=body)
