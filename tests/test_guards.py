"""What the web server lets through, over raw sockets: bodies are counted as they come, whatever a request
says of its length."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse

from panels import guards

MIB = 2**20
RECEIVED: list[int] = []
LARGE = "The request is larger than this studio takes."
BOTH = "Send Content-Length or Transfer-Encoding, not both."


async def taking(scope: Any, receive: Any, send: Any) -> None:
    """An application that takes the whole body of a request, however large; it says how large it was."""
    size = 0
    try:
        async for part in Request(scope, receive).stream():
            size += len(part)
    except ClientDisconnect:
        size = -size
    finally:
        RECEIVED.append(size)
    await PlainTextResponse(f"took {size} bytes")(scope, receive, send)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """A server of that application behind the guard."""
    opened = socket.create_server(("127.0.0.1", 0))
    options = {"log_level": "error", "lifespan": "off", "http": "h11", "ws": "none"}
    server = uvicorn.Server(uvicorn.Config(guards.Guard(taking), **options))
    thread = threading.Thread(target=lambda: server.run(sockets=[opened]), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield opened.getsockname()[1]
    server.should_exit = True
    thread.join(10)


@pytest.fixture(autouse=True)
def nothing_yet() -> None:
    """What the application received is counted anew."""
    RECEIVED.clear()


@contextmanager
def asking(port: int, method: str, path: str, *headers: str) -> Iterator[socket.socket]:
    """A connection that has sent the head of a request."""
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", *headers, "", ""]
    with socket.create_connection(("127.0.0.1", port), timeout=30) as opened:
        opened.sendall("\r\n".join(lines).encode())
        yield opened


def chunks(opened: socket.socket, size: int, piece: int = MIB) -> None:
    """Sends a body in chunks, for as long as the server takes it."""
    try:
        for left in range(size, 0, -piece):
            part = b"x" * min(piece, left)
            opened.sendall(b"%x\r\n%s\r\n" % (len(part), part))
        opened.sendall(b"0\r\n\r\n")
    except (BrokenPipeError, ConnectionResetError):
        pass


def told(opened: socket.socket) -> tuple[int, str]:
    """(status, body) of the answer."""
    answer = b""
    while b"\r\n\r\n" not in answer or len(answer.split(b"\r\n\r\n", 1)[1]) < _length(answer):
        part = opened.recv(65536)
        assert part, answer
        answer += part
    return int(answer.split()[1]), answer.split(b"\r\n\r\n", 1)[1].decode()


def _length(answer: bytes) -> int:
    head = answer.split(b"\r\n\r\n")[0].lower()
    return int(head.split(b"content-length:")[1].split()[0])


ANNOUNCED = "Content-Length: 5"
PIECES = "Transfer-Encoding: chunked"


@pytest.mark.parametrize("method", ["POST", "GET", "DELETE"])
@pytest.mark.parametrize("headers", [(ANNOUNCED, PIECES), (PIECES, ANNOUNCED)])
def test_a_length_beside_pieces_is_refused(port: int, method: str, headers: tuple[str, str]) -> None:
    with asking(port, method, "/gradio_api/queue/join", *headers) as opened:
        status, body = told(opened)
        assert (status, RECEIVED) == (400, []) and BOTH in body
        chunks(opened, 40 * MIB)
        opened.settimeout(10)
        try:
            assert opened.recv(1) == b""  # the connection is over
        except ConnectionResetError:
            pass
    assert RECEIVED == []


@pytest.mark.parametrize("method", ["GET", "DELETE", "OPTIONS"])
def test_what_comes_in_pieces_is_counted(port: int, method: str) -> None:
    with asking(port, method, "/gradio_api/queue/join", PIECES) as opened:
        chunks(opened, guards.BODY_LIMIT + 8 * MIB)
        status, body = told(opened)
    assert status == 413 and LARGE in body
    assert len(RECEIVED) == 1 and -guards.BODY_LIMIT <= RECEIVED[0] < 0


@pytest.mark.parametrize(("more", "status"), [(0, 200), (1, 413)])
def test_the_limit_is_met_to_the_byte(
    port: int, monkeypatch: pytest.MonkeyPatch, more: int, status: int
) -> None:
    monkeypatch.setattr(guards, "BODY_LIMIT", 1000)
    with asking(port, "GET", "/x", PIECES) as opened:
        chunks(opened, 1000 + more, 100)
        assert told(opened)[0] == status
    assert RECEIVED == [1000] if status == 200 else -1000 <= RECEIVED[0] <= 0  # pieces may come as one
    with asking(port, "POST", "/x", f"Content-Length: {1000 + more}") as opened:
        opened.sendall(b"x" * (1000 + more))
        assert told(opened)[0] == status
    assert RECEIVED[1:] == ([1000] if status == 200 else [])


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH"])
def test_a_body_of_no_known_length_is_refused(port: int, method: str) -> None:
    with asking(port, method, "/x", PIECES) as opened:
        status, body = told(opened)
    assert (status, RECEIVED) == (413, []) and LARGE in body


@pytest.mark.parametrize("method", ["POST", "GET"])
def test_a_length_above_the_limit_is_refused_before_the_body(port: int, method: str) -> None:
    with asking(port, method, "/x", f"Content-Length: {guards.BODY_LIMIT + 1}") as opened:
        status, body = told(opened)
    assert (status, RECEIVED) == (413, []) and LARGE in body


def test_an_upload_may_be_larger(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "BODY_LIMIT", 10)
    for path, status in (("/gradio_api/upload", 200), ("/gradio_api/upload/", 413), ("/x", 413)):
        with asking(port, "POST", path, "Content-Length: 100") as opened:
            opened.sendall(b"x" * 100)
            assert told(opened)[0] == status
    assert RECEIVED == [100]


def test_an_answer_that_has_begun_goes_on(port: int) -> None:
    """A request without a body, and several on one connection."""
    with asking(port, "GET", "/x") as opened:
        for _ in range(3):
            assert told(opened) == (200, "took 0 bytes")
            opened.sendall(b"GET /x HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert told(opened)[0] == 200
