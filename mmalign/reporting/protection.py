"""What the served page of a run demands of visitors, and what it forbids browsers to do with it.

Every response has a content policy: no script runs but that of the pages themselves, which has a nonce, so that a page
or script among the run's files cannot act. A token, where there is one, is the password of HTTP's basic
authentication, with any user name: browsers ask for it, and it is in no URL. Programs may send it as a bearer token.
"""

import base64
import secrets
from urllib.parse import urlsplit

from fastapi import HTTPException, Request
from fastapi.responses import HTMLResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmalign.pages import render
from reward_models.service.server import CLOSE, admits, refusal

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
CHALLENGE = {"WWW-Authenticate": 'Basic realm="mmalign", charset="UTF-8"'}


def policy(script: str = "'none'") -> str:
    """The content policy of a response. Styles are inline: those of the pages and of their SVGs."""
    return (
        f"default-src 'none'; script-src {script}; style-src 'unsafe-inline'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def page(template: str, **values: object) -> HTMLResponse:
    """A page whose scripts, marked with the template's `nonce`, may run."""
    nonce = secrets.token_urlsafe(16)
    text = render(template, nonce=nonce, **values)
    return HTMLResponse(text, headers={"Content-Security-Policy": policy(f"'nonce-{nonce}'")})


class Guard:
    """The outermost middleware: requires the token, if there is one, and adds the headers of every response."""

    def __init__(self, app: ASGIApp, token: str | None):
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers.setdefault("Content-Security-Policy", policy())
            await send(message)

        authorization = Headers(scope=scope).get("authorization", "") if scope["type"] == "http" else ""
        if scope["type"] == "http" and self.token and not admits(_bearer(authorization), self.token):
            advice = "a token is needed: the password, with any user name"
            await refusal(401, advice, CHALLENGE | CLOSE)(scope, receive, guarded)
        else:
            await self.app(scope, receive, guarded)


def _bearer(authorization: str) -> str:
    """The password of basic authentication as a bearer token; anything else is returned unchanged."""
    scheme, _, given = authorization.partition(" ")
    if scheme.lower() != "basic":
        return authorization
    try:
        return f"Bearer {base64.b64decode(given, validate=True).decode().partition(':')[2]}"
    except ValueError:
        return ""


def same_site(request: Request) -> None:
    """Refuses a request to change something unless a page of this server sent it: it has JSON, which other sites cannot
    send without a permission that is never given, and the header Origin names the host it was sent to."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPException(415, "JSON is needed: Content-Type: application/json", CLOSE)
    origin = urlsplit(request.headers.get("origin", ""))
    if origin.scheme not in ("http", "https") or origin.netloc.lower() != request.headers.get("host", "").lower():
        raise HTTPException(403, "the header Origin names another site", CLOSE)
