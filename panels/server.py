"""The web server: the page under FastAPI, with the guards that Gradio leaves to its host.

Allowed hosts stop DNS rebinding, the origin check stops requests from other sites, the body cap stops disk
filling.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import tempfile
import webbrowser
from pathlib import Path
from typing import Any

from studio import exports
from studio.errors import RequestError
from studio.models.catalog import ASSETS
from studio.session import Session
from studio.types import Recipe
from studio.uploads import Uploads

BODY_LIMIT = 32 * 2**20
UPLOAD_LIMIT = 2 * 2**30  # an edit file of all cross-attention layers of SDXL
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' "
    "'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' "
    "blob:; "
    "object-src 'none'; base-uri 'self'; frame-ancestors 'self'"
)
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "SAMEORIGIN",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": _POLICY,
}


def check_address(host: str, port: str, auth: str | None) -> tuple[str, int, tuple[str, str] | None]:
    """(host, port, (user, password) or None); RequestError for an open host without a login, or a bad port
    or login."""
    if not str(port).isdecimal() or int(port) > 65535:
        raise RequestError(f"--port must be a whole number from 0 to 65535, not {port!r}.")
    login = None
    if auth is not None:
        user, colon, password = auth.partition(":")
        if not (user and colon and password):
            raise RequestError("--auth must have the form user:password.")
        login = (user, password)
    if login is None and not _is_loopback(host):
        raise RequestError(
            f"--host {host} can be reached by others, so it needs a login: add --auth user:password."
        )
    return host, int(port), login


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def new_app(session: Session, host: str = "127.0.0.1", auth: tuple[str, str] | None = None) -> Any:
    """The FastAPI application with the page mounted at /."""
    os.environ.setdefault("GRADIO_TEMP_DIR", tempfile.mkdtemp(prefix="locus-"))
    from fastapi import FastAPI
    from fastapi.responses import JSONResponse
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.middleware("http")(_guard)

    @app.get("/healthz")
    def healthz() -> Any:
        running = session.queue.running
        method = running.recipe.method if running else None
        return JSONResponse({"status": "ok", "device": session.device, "running": method})

    allowed = ["127.0.0.1", "localhost", "[::1]", "testserver"] if _is_loopback(host) else ["*"]
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=allowed)
    return _with_page(app, session, auth)


async def _guard(request: Any, call_next: Any) -> Any:
    """Refuses what is too large or comes from another site; sets the headers of every other answer."""
    from fastapi.responses import PlainTextResponse

    headers = request.headers
    length = headers.get("content-length", "" if "transfer-encoding" in headers else "0")
    most = UPLOAD_LIMIT if request.url.path.endswith("/upload") else BODY_LIMIT
    if request.method in ("POST", "PUT", "PATCH") and (not length.isdecimal() or int(length) > most):
        return PlainTextResponse("The request is larger than this studio takes.", 413)
    origin, reads = request.headers.get("origin"), request.method in ("GET", "HEAD", "OPTIONS")
    if origin and not reads and origin.split("//")[-1] != request.headers.get("host"):
        return PlainTextResponse("Requests from other sites are refused.", 403)
    response = await call_next(request)
    response.headers.update(_HEADERS)
    return response


def _with_page(app: Any, session: Session, auth: tuple[str, str] | None) -> Any:
    import gradio as gr

    import panels

    page = panels.build(session)
    css = (ASSETS / "css" / "locus.css").read_text()
    shortcuts = (ASSETS / "js" / "shortcuts.js").read_text()
    theme = gr.themes.Soft(
        primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    return gr.mount_gradio_app(
        app,
        page,
        path="/",
        auth=auth,
        run_history=False,
        ssr_mode=False,
        max_file_size=UPLOAD_LIMIT,
        enable_monitoring=False,
        theme=theme,
        css=css,
        head=f"<script>{shortcuts}</script>",
        show_error=True,
        footer_links=[],
        favicon_path=str(ASSETS / "logo.svg"),
        allowed_paths=[],
    )


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; RequestError when the port is taken or the address is not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    opened = socket.socket(family)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind((host, port))
    except OSError as error:
        opened.close()
        raise RequestError(
            f"Can't listen on {host} port {port} ({error.strerror}); is a studio running there already? "
            "Take another --port, or 0 for a free one."
        ) from error
    return opened


def warm_up(session: Session) -> None:
    """Loads the embedded model in the background, so that the first Run starts at once."""
    session.submit(
        Recipe(
            "trace-unet",
            "atlas-sd",
            {"prompt": "a star", "subject": "star"},
            {"steps": 1, "screen": True, "kinds": ["cross-attention"]},
            (0,),
        ),
        user="warm-up",
        save=False,
    )


def serve_forever(
    session: Session, host: str, port: int, auth: tuple[str, str] | None, *, inbrowser: bool = False
) -> int:
    """Serves until interrupted; prints the address when it is ready."""
    import uvicorn

    opened = listen(host, port)
    session.store.sweep_leftovers()
    exports.sweep()
    Uploads(session.store).sweep()
    warm_up(session)
    app = new_app(session, host, auth)
    url = f"http://{'[' + host + ']' if ':' in host else host}:{opened.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3))

    print(f"Locus is at {url}  (Ctrl+C ends it; runs are kept in {Path(session.store.root)})", flush=True)
    if inbrowser:
        webbrowser.open(url)
    try:
        server.run(sockets=[opened])
    except KeyboardInterrupt:
        pass
    return 0
