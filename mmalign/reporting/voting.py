"""The page for votes: two images of one prompt side by side, and a key or button for each answer.

    GET /votes    the page                GET /votes/next    the pair that a session gets next, as JSON
    POST /votes   `Vote`

The server stores nothing of a session: a page draws its name and counts its pairs.
"""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, ConfigDict, ValidationError

from mmalign.reporting import votes
from mmalign.reporting.protection import page, same_site
from mmalign.reporting.votes import Pair
from reward_models import files, limits, pages
from reward_models.errors import first_problem
from reward_models.service.server import CLOSE

LONGEST = 2**14  # bytes of a vote

Session = Annotated[str, Query(pattern=r"^[0-9a-f]{16}$")]
Number = Annotated[int, Query(ge=0, le=10**9)]


class Vote(BaseModel):
    """The left and the right image on the page, named as in a `Pair`, and the answer."""

    model_config = ConfigDict(strict=True, extra="forbid")

    left: str
    right: str
    choice: votes.Choice


def routes(run: Path, command: str, offered: Callable[[], Sequence[Pair]]) -> APIRouter:
    """The page of the run in a folder, with the pairs that are `offered`."""
    router = APIRouter()

    @router.get("/votes", response_class=HTMLResponse)
    def ballot() -> HTMLResponse:
        return page("votes.html", command=command, title=run.name)

    @router.get("/votes/next")
    def following(session: Session, number: Number) -> dict[str, Any]:
        pairs = _pairs(offered)
        if not pairs:
            return {"pairs": 0}
        pair = votes.turn(pairs, session, number)
        sources = {f"{side}_source": f"files/{pages.url(getattr(pair, side))}" for side in ("left", "right")}
        shown = {"left": pair.left, "right": pair.right, "prompt": pair.about["prompt"]} | sources
        return shown | {"pairs": len(pairs)}

    @router.post("/votes", status_code=204, dependencies=[Depends(same_site)])
    async def vote(request: Request) -> Response:
        given = _parsed(await _body(request))
        await run_in_threadpool(_record, run, offered, given)
        return Response(status_code=204)

    return router


async def _body(request: Request) -> bytes:
    """The body of a request, of at most `LONGEST` bytes, within `limits.HEAD` seconds."""
    body = b""
    try:
        async with asyncio.timeout(limits.HEAD):
            async for part in request.stream():
                body += part
                if len(body) > LONGEST:
                    raise HTTPException(413, f"a vote has at most {LONGEST} bytes", CLOSE)
    except TimeoutError:
        raise HTTPException(408, f"the vote did not arrive within {limits.HEAD} s", CLOSE) from None
    return body


def _parsed(body: bytes) -> Vote:
    try:
        return Vote.model_validate(files.parsed(body))
    except ValidationError as error:
        detail = first_problem(error.errors())
    except ValueError as error:
        detail = str(error)
    raise HTTPException(422, detail.encode("ascii", "backslashreplace").decode())


def _record(run: Path, offered: Callable[[], Sequence[Pair]], vote: Vote) -> None:
    images = frozenset((vote.left, vote.right))
    pair = next((pair for pair in _pairs(offered) if pair.images == images), None)
    if pair is None:
        raise HTTPException(422, "this pair is not among those to vote on")
    try:
        votes.record(run, Pair(vote.left, vote.right, pair.about), vote.choice)
    except OSError as error:
        raise HTTPException(500, f"the vote is not recorded: {votes.FILE}: {error.strerror}") from None


def _pairs(offered: Callable[[], Sequence[Pair]]) -> Sequence[Pair]:
    try:
        return offered()
    except ValueError as error:  # a name that leads out of the run's folder
        raise HTTPException(409, str(error)) from None
