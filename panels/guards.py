"""What the web server lets through: no route that the studio does not use, no body that is too large, nothing
from another site, nothing without the login where there is one, and few wrong logins."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

from gradio.route_utils import FnIndexInferError
from gradio.utils import get_upload_folder
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse

from studio.exports import sweep_broken_uploads

BODY_LIMIT = 8 * 2**20  # to read so much JSON takes two seconds in which nobody else is answered
UPLOAD_LIMIT = 2 * 2**30  # an edit file of all cross-attention layers of SDXL
_CLOSED = re.compile(
    r"/(gradio_api/)?(undo-)?(vibe-|run-history|runs\b|process_recording|monitoring|profiling|dev/|deep_link"
    r"|proxy=|custom_component|component_server|file[=/]+\s*[a-z]+:)",
    re.IGNORECASE,
)
_OPEN = frozenset(
    "/ /login /login/ /logout /healthz /favicon.ico /manifest.json /robots.txt /theme.css "
    "/gradio_api/theme.css /gradio_api/login_check /gradio_api/user".split()
)  # what a person without the login may ask for
_OPEN_FOLDERS = ("/static/", "/assets/", "/svelte/")
_ODD = re.compile(r"[\x00-\x1f\x7f]|[^/]{256}")  # no file of any system has such a name
_FORWARDED = re.compile(rb"forwarded|x-forwarded-.*|x-real-ip", re.IGNORECASE)
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' "
    "'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; frame-ancestors 'self'"
)
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "SAMEORIGIN",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": _POLICY,
}
_TOO_LARGE = "The request is larger than this studio takes."
_log = logging.getLogger("locus")
_WRONG = (LookupError, TypeError, ValueError, RecursionError, AttributeError, FnIndexInferError)


class Tries:
    """Logins by address: the first FREE are answered at once, each further one waits twice as long as the one
    before, and one that would wait longer than PATIENCE is refused. A right one starts anew."""

    FREE, PATIENCE, LONGEST, KNOWN = 3, 5.0, 120.0, 4096

    def __init__(self) -> None:
        self._by_address: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def wait(self, address: str, now: float) -> float:
        """Seconds until this try may be answered; it is counted, also when many come at once."""
        count, free_at = self._by_address.pop(address, (0, now))
        delay = min(2.0 ** (count - self.FREE), self.LONGEST) if count >= self.FREE else 0.0
        at = max(now, free_at) + delay
        if at - now <= self.PATIENCE:
            count, free_at = count + 1, at
        self._by_address[address] = (count, free_at)
        while len(self._by_address) > self.KNOWN:
            self._by_address.popitem(last=False)
        return at - now

    def right(self, address: str) -> None:
        """The login was right."""
        self._by_address.pop(address, None)


class Guard:
    """An ASGI middleware around everything. `inside`: Gradio's application, which knows who is logged in;
    None without a login. proxied: a reverse proxy says who asks; otherwise what anybody says of it is
    dropped."""

    def __init__(self, app: Any, inside: Any = None, proxied: bool = False) -> None:
        self._app, self._inside, self._tries, self._proxied = app, inside, Tries(), proxied

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers in a sentence what is refused, and sets the headers of every answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if not self._proxied:
            kept = [pair for pair in scope["headers"] if not _FORWARDED.fullmatch(pair[0])]
            scope = {**scope, "headers": kept}
        request, status = Request(scope), 0

        async def with_headers(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                answered = MutableHeaders(scope=message)
                answered.update(HEADERS)
                if not _same_site(request):
                    del answered["access-control-allow-origin"]
            await send(message)

        refusal, body = self._refused(request), Body(receive, with_headers, _most(request))
        trying = self._inside is not None and request.method == "POST" and _is_login(request)
        if refusal is None and trying:
            refusal = await self._slowed(request)
        if refusal is not None:
            await refusal(scope, receive, with_headers)
        else:
            await body.through(self._app, scope)
        if trying and status == 200:
            self._tries.right(_address(request))
        if _is_upload(request):
            sweep_broken_uploads(Path(get_upload_folder()))

    def _refused(self, request: Request) -> Any:
        headers, path = request.headers, request.scope["path"]
        if _CLOSED.match(path) or _ODD.search(path):
            return _said("There is no such page here.", 404)
        if "transfer-encoding" in headers and "content-length" in headers:
            refusal = _said("Send Content-Length or Transfer-Encoding, not both.", 400)
            refusal.headers["Connection"] = "close"  # where the body ends is anybody's guess
            return refusal
        length = headers.get("content-length", "" if "transfer-encoding" in headers else "0")
        unknown = not length.isdecimal() and request.method in ("POST", "PUT", "PATCH")
        if unknown or (length.isdecimal() and int(length) > _most(request)):
            return _said(_TOO_LARGE, 413)
        if request.method not in ("GET", "HEAD", "OPTIONS") and not _same_site(request):
            return _said("Requests from other sites are refused.", 403)
        if self._inside is not None and not self._may(request, path):
            return _said("Log in first.", 401)
        return None

    def _may(self, request: Request, path: str) -> bool:
        if path in _OPEN or path.startswith(_OPEN_FOLDERS):
            return True
        names = (f"access-token-{kind}{self._inside.cookie_id}" for kind in ("", "unsecure-"))
        return any(request.cookies.get(name) in self._inside.tokens for name in names)

    async def _slowed(self, request: Request) -> Any:
        """Waits as long as this login has to; its refusal when that is too long."""
        wait = self._tries.wait(_address(request), time.monotonic())
        if wait > self._tries.PATIENCE:
            _log.warning("many wrong logins from %s", _address(request))
            refusal = _said(f"Too many wrong logins; try again in {wait:.0f} seconds.", 429)
            refusal.headers["Retry-After"] = f"{wait:.0f}"
            return refusal
        await asyncio.sleep(wait)
        return None


class Body:
    """What a request sends, counted as it comes, whatever its headers say of it: past `most` bytes the
    application is told that the client has left, and the client is told why."""

    def __init__(self, receive: Any, send: Any, most: int) -> None:
        self._receive, self._send, self._most = receive, send, most
        self._size, self._begun = 0, False

    async def through(self, app: Any, scope: Any) -> None:
        """Answers the request by `app`, or says that it is too large."""
        try:
            await app(scope, self._counted, self._answered)
        except Exception:
            if self._begun or self._size <= self._most:
                raise
        if not self._begun and self._size > self._most:
            await _said(_TOO_LARGE, 413)(scope, self._receive, self._send)

    async def _counted(self) -> Any:
        if self._size > self._most:
            return {"type": "http.disconnect"}
        message = await self._receive()
        self._size += len(message.get("body", b"")) if message["type"] == "http.request" else 0
        return message if self._size <= self._most else {"type": "http.disconnect"}

    async def _answered(self, message: Any) -> None:
        if self._begun or self._size <= self._most:
            self._begun = True
            await self._send(message)


class Sentences:
    """An ASGI middleware inside Gradio's application: what a request breaks there is one sentence, not a page
    of code."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Passes on; an error before the answer begins becomes status 400 or 500."""
        begun = False

        async def noted(message: Any) -> None:
            nonlocal begun
            begun = begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception as error:
            if begun or scope["type"] != "http":
                raise
            await self._told(error, scope)(scope, receive, send)

    def _told(self, error: Exception, scope: Any) -> Any:
        if isinstance(error, _WRONG):
            _log.info("a request could not be read: %s", " ".join(str(error).split())[:300])
            missing = isinstance(error, (LookupError, FnIndexInferError))
            what = "There is no endpoint of that name" if missing else _first(error)
            return _said(f"{what}; GET /gradio_api/info lists endpoints and parameters.", 400)
        _log.exception("a request failed", exc_info=error)
        return _said("Something went wrong inside; the studio's log has the details.", 500)


def _first(error: Exception) -> str:
    """The first sentence of what Gradio says of wrong arguments; nothing else is repeated."""
    said = str(error).split(". ")[0].strip().rstrip(".")
    known = said.startswith(("No value provided for required", "Parameter `", "Too many arguments"))
    return said[:200] if known else "The request can't be read"


def _is_login(request: Request) -> bool:
    return request.scope["path"].rstrip("/") == "/login"


def _same_site(request: Request) -> bool:
    """Whether a request comes from this studio's own page, or from no page at all."""
    origin = request.headers.get("origin")
    return not origin or origin.split("//")[-1] == request.headers.get("host")


def _address(request: Request) -> str:
    return request.client.host if request.client else ""


def _most(request: Request) -> int:
    """Bytes that the body of a request may have."""
    return UPLOAD_LIMIT if _is_upload(request) else BODY_LIMIT


def _is_upload(request: Request) -> bool:
    return request.scope["path"] == "/gradio_api/upload"


def _said(sentence: str, status: int) -> JSONResponse:
    return JSONResponse({"detail": sentence, "error": sentence}, status)
