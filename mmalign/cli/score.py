"""The commands `score` and `serve`: reward models on images on disk and over HTTP."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from mmalign.activity import counted, doing
from mmalign.cli import output, tables
from mmalign.cli.inputs import load_scorers
from mmalign.cli.options import Allow, Cache, Json, Rewards, ScorerSettings, output_option, parse_prompt
from mmalign.distributed.launched import is_main, launched
from mmalign.errors import BadInput, Failed, refusing
from mmalign.runs.outputs import check_file

Source = Annotated[
    Path,
    typer.Argument(
        help="folder of pictures, a table (JSONL, JSON, CSV, TSV, Parquet) of image and prompt, a tar or folder of "
        "tars, a dataset (hf:NAME:SPLIT)"
    ),
]
Out = Annotated[Path, output_option(help="JSONL, CSV or Parquet; rows already there are not scored again")]
PromptOfAll = Annotated[
    str | None, typer.Option("--prompt", callback=parse_prompt, help="prompt of all images that have none")
]
Page = Annotated[Path | None, output_option("--html", help="write a gallery, best first")]
Batch = Annotated[int, typer.Option(min=1, help="images scored at once")]
Stream = Annotated[
    bool,
    typer.Option("--stream", help="a table, or a folder of Parquet, is read row by row and never held; as tars are"),
]

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
    stream: Stream = False,
    allow: Allow = None,
    as_json: Json = False,
) -> None:
    """Score images on disk. Exit code 1 if any image could not be scored; its row has the reason."""
    from mmalign.config import paths
    from mmalign.runs import folder
    from reward_models.tools import gallery, streams

    check_file(page, "--html", gallery.ours)
    source = Path(paths.locate(str(source)))
    stream = stream or streams.only(source)
    if stream and page is not None:
        raise BadInput("--html shows all images at once; it does not go with a stream")
    scorers = partial(load_scorers, rewards, settings, cache)
    with refusing(), folder.failing(out, folder.ROWS_ARE_WHOLE), output.progressing(), launched() as ranks:
        work = _score_stream if stream else _score_files
        rows, scored, summary = work(source, scorers, out, prompt, batch, ranks)
    if not is_main():
        return
    if page is not None:
        with folder.failing(page, folder.ROWS_ARE_WHOLE):
            gallery.write(rows, summary, source if source.is_dir() else source.parent, page)
    count = summary["images"]
    line = f"{scored} images scored now, {count - scored} before: {out}"
    output.show(summary | {"out": str(out)}, as_json, tables.scores(summary), line, *tables.cache(summary))
    if summary["failed"]:
        raise Failed(f"{summary['failed']} of {count} images could not be scored; see {out}")


Scored = tuple[
    list[dict[str, Any]], int, dict[str, Any]
]  # the rows where they are held, the number scored now, summary


def _score_files(source: Path, scorers: Any, out: Path, prompt: str | None, batch: int, ranks: Any) -> Scored:
    from reward_models.tools.score_files import score_files
    from reward_models.tools.score_parts import score_together

    progress, now = partial(counted, name="scoring", unit="images"), 0
    if ranks is not None:
        loaded = scorers()
        with doing("scoring"):
            now = score_together(source, loaded, out, prompt, batch, _ignored, _processes(ranks))
        now = sum(ranks.all_gather_object(now, "the images scored"))
        if not ranks.main:
            return [], now, {}
        scorers = partial(dict, loaded)
    result = score_files(source, scorers, out, prompt, batch, output.warn, progress, again=ranks is None)
    return result.rows, result.scored + now, result.summary


def _score_stream(source: Path, scorers: Any, out: Path, prompt: str | None, batch: int, ranks: Any) -> Scored:
    from reward_models.tools.score_parts import ALONE, score_stream

    with doing("scoring") as work:
        processes = ALONE if ranks is None else _processes(ranks)

        def shown(count: int) -> None:
            work.name = f"scoring, {count} images so far"

        result = score_stream(source, scorers, out, prompt, batch, output.warn, shown, processes)
    now = result.scored if ranks is None else sum(ranks.all_gather_object(result.scored, "the images scored"))
    return [], now, result.summary


def _processes(ranks: Any) -> Any:
    from reward_models.tools.score_parts import Processes

    return Processes(ranks.rank, ranks.size, ranks.barrier)


def _ignored(count: int) -> None:
    pass


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
