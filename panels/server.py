"""The web server: the page under FastAPI, with the guards that Gradio leaves to its host (panels/guards.py).

Allowed hosts stop DNS rebinding, the origin check stops requests from other sites, the body cap stops disk
filling.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import ipaddress
import os
import signal
import socket
import sys
import webbrowser
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from panels.guards import UPLOAD_LIMIT, Guard, Sentences
from studio import exports
from studio.errors import RequestError
from studio.models.catalog import ASSETS
from studio.run_bin import Bin
from studio.run_quota import Watch
from studio.session import Session
from studio.types import Recipe
from studio.uploads import Uploads

_ARENA_MAX = -8  # of glibc's malloc.h


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


def check_mcp(auth: object) -> None:
    """RequestError when tools for assistants can't be offered: with a login, or without their library."""
    if auth:
        raise RequestError(
            "--mcp has no login, so it can't be used together with --auth; serve it on this machine alone."
        )
    try:
        found = version("mcp")
    except PackageNotFoundError:
        found = ""
    if found.partition(".")[0] not in ("0", "1"):
        there = f"version {found} of it is installed" if found else "it is not installed"
        raise RequestError(
            f"--mcp needs the library mcp below version 2, and {there}: pip install 'locus-studio[mcp]'."
        )


def new_app(
    session: Session, host: str = "127.0.0.1", auth: tuple[str, str] | None = None, *, mcp: bool = False
) -> Any:
    """The FastAPI application with the page mounted at /; `mcp`: also tools for assistants."""
    if not os.environ.get("GRADIO_TEMP_DIR"):
        os.environ["GRADIO_TEMP_DIR"] = str(exports.page_folder())
    _share_arenas()
    from fastapi import FastAPI
    from fastapi.responses import JSONResponse
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/healthz")
    async def healthz() -> Any:
        running = session.queue.running
        method = running.recipe.method if running else None
        return JSONResponse({"status": "ok", "device": session.device, "running": method})

    inside = _in_a_loop(lambda: _mount_page(app, session, auth, mcp))
    inside.add_middleware(Sentences)
    app.add_middleware(Guard, inside=inside if auth else None, proxied=_proxied())
    allowed = ["127.0.0.1", "localhost", "[::1]", "testserver"] if _is_loopback(host) else ["*"]
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=allowed)
    return app


def _share_arenas() -> None:
    """Lets all threads of a server share two of glibc's memory arenas: what one of some 40 threads has freed
    in an arena of its own, no other can use."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(_ARENA_MAX, 2)


def _in_a_loop(make: Callable[[], Any]) -> Any:
    """make() where an event loop runs: without one Gradio opens several and never closes them."""

    async def made() -> Any:
        return make()

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(made())
    return make()


def _mount_page(app: Any, session: Session, auth: tuple[str, str] | None, mcp: bool) -> Any:
    """Gradio's application, mounted."""
    import gradio as gr

    import panels
    from panels import api_mcp
    from panels.sessions import lighten

    page = panels.build(session)
    css = (ASSETS / "css" / "locus.css").read_text()
    scripts = "\n".join((ASSETS / "js" / f"{n}.js").read_text() for n in ("theme", "shortcuts", "tour"))
    theme = gr.themes.Soft(
        primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    gr.mount_gradio_app(
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
        head=f"<script>{scripts}</script>",
        show_error=True,
        footer_links=["api"],
        favicon_path=str(ASSETS / "logo.svg"),
        allowed_paths=[],
        mcp_server=mcp,
        app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None},
    )
    lighten(app.routes[-1].app, page)
    if mcp:
        api_mcp.prepare(page.mcp_server_obj, page.mcp_error)
    return app.routes[-1].app


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; RequestError when the port is taken or the address is not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # the protocol by name: without it asyncio leaves Nagle's delay on, 40 ms for each answer
    opened = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
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


def _server(app: Any, ready: Callable[[], Any]) -> Any:
    """uvicorn's server of the application. ready: called in a thread of its own once it answers, so that
    what is loaded then does not keep the page waiting."""
    import threading

    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if not self.should_exit:
                threading.Thread(target=ready, name="warm-up", daemon=True).start()

    return Server(uvicorn_config(app))


def uvicorn_config(app: Any) -> Any:
    """How the application is served."""
    import uvicorn

    options = {"log_level": "warning", "timeout_graceful_shutdown": 3}
    return uvicorn.Config(app, proxy_headers=_proxied(), **options)


def _proxied() -> bool:
    """Whether uvicorn is told of a reverse proxy whose word it may take for who asks."""
    return bool(os.environ.get("FORWARDED_ALLOW_IPS"))


def warm_up(session: Session) -> None:
    """Loads the embedded model in the background, so that the first Run starts at once; then settles."""
    job = session.submit(
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
    while not job.over:
        job.wait(job.version, 60)
    settle()


def _tell_quota(session: Session) -> None:
    """Says on the terminal that the store is over its quota."""
    if said := Watch(session.store).count():
        print(said, flush=True)


def settle() -> None:
    """Leaves what is there for good, libraries and page, out of the garbage collector's rounds: to look
    through some 700,000 objects keeps every request waiting for half a second."""
    gc.collect()
    gc.freeze()


def serve_forever(
    session: Session,
    host: str,
    port: int,
    auth: tuple[str, str] | None,
    *,
    inbrowser: bool = False,
    mcp: bool = False,
) -> int:
    """Serves until interrupted; prints the address when it is ready."""
    opened = listen(host, port)
    with suppress(ValueError):  # in another thread than the main one
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # uvicorn raises it again when it has ended
    session.store.sweep_leftovers()
    Bin(session.store).sweep()
    exports.sweep()
    Uploads(session.store).sweep()
    app = new_app(session, host, auth, mcp=mcp)
    url = f"http://{'[' + host + ']' if ':' in host else host}:{opened.getsockname()[1]}"
    server = _server(app, lambda: (warm_up(session), _tell_quota(session)))
    print(f"Locus is at {url}  (Ctrl+C ends it; runs are kept in {Path(session.store.root)})", flush=True)
    if mcp:
        print(f"Tools for assistants (MCP) are at {url}/gradio_api/mcp/", flush=True)
    if inbrowser:
        webbrowser.open(url)
    try:
        server.run(sockets=[opened])
    except KeyboardInterrupt:
        pass
    finally:
        gc.unfreeze()  # or libraries complain at the end of what nobody could free
    return 0
