"""The login and open hosts: what a stranger may try before the page."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import httpx
import pytest
from gradio_client import Client

from panels import guards, server
from studio.cli import main
from studio.errors import RequestError
from studio.session import Session
from tests.browser import studio as serving_studio

PAGE_TIMEOUT = httpx.Timeout(60.0)


# ---- the login -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def closed(session: Session) -> Iterator[str]:
    """The address of a studio with a login."""
    whole, patch = server.new_app, pytest.MonkeyPatch()
    patch.setattr(server, "new_app", lambda given: whole(given, auth=("ada", "right word")))
    patch.setattr(guards.Tries, "PATIENCE", 0.5)
    with serving_studio.serving(session) as address:
        yield address
    patch.undo()


def test_without_the_login_nothing_is_told(closed: str) -> None:
    for path in (
        "config",
        "gradio_api/info",
        "gradio_api/queue/status",
        "gradio_api/heartbeat/a",
        "gradio_api/mcp",
    ):
        assert httpx.get(f"{closed}{path}", timeout=10).status_code == 401, path
    for path in ("upload", "cancel", "reset", "queue/join", "call/generate", "stream/x/close"):
        answer = httpx.post(f"{closed}gradio_api/{path}", json={}, timeout=10)
        assert (answer.status_code, answer.json()["detail"]) == (401, "Log in first."), path
    page = httpx.get(closed, timeout=PAGE_TIMEOUT).text
    assert '"auth_required":true' in page and "trace-run" not in page
    forged_cookie = {f"access-token-{kind}x": "x" for kind in ("", "unsecure-")}
    assert httpx.get(f"{closed}config", cookies=forged_cookie).status_code == 401
    assert httpx.get(f"{closed}healthz").status_code == 200


def test_wrong_logins_are_slowed_down(closed: str) -> None:
    with contextlib.closing(
        Client(closed, auth=("ada", "right word"), verbose=False, analytics_enabled=False)
    ) as client:
        assert "/generate" in client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    tries = [
        httpx.post(f"{closed}login", data={"username": "ada", "password": str(n)}, timeout=10)
        for n in range(6)
    ]
    assert [t.status_code for t in tries] == [400, 400, 400, 429, 429, 429]
    assert "Too many wrong logins; try again in" in tries[-1].json()["detail"]
    assert int(tries[-1].headers["retry-after"]) >= 1
    claim = {"X-Forwarded-For": "9.9.9.9", "X-Real-IP": "9.9.9.9"}  # another name for the same address
    told = httpx.post(f"{closed}login", data={"username": "ada", "password": "x"}, headers=claim, timeout=10)
    assert told.status_code == 429
    right = httpx.post(f"{closed}login", data={"username": "ada", "password": "right word"}, timeout=10)
    assert right.status_code == 429  # who guesses right too late learns nothing


def test_each_further_wrong_login_waits_twice_as_long() -> None:
    tries = guards.Tries()
    tries.PATIENCE = 5.0
    assert [tries.wait("a", 0.0) for _ in range(6)] == [0, 0, 0, 1, 3, 7]
    assert tries.wait("b", 0.0) == 0
    assert tries.wait("a", 3.0) == 4.0  # the refused one cost nothing, the fifth is over
    tries.right("a")
    assert tries.wait("a", 3.0) == 0
    for n in range(tries.KNOWN + 10):
        tries.wait(f"address {n}", 0.0)
    assert len(tries._by_address) == tries.KNOWN


@pytest.mark.parametrize("host", ("0.0.0.0", "::", "192.168.1.5", "example.org"))
def test_an_open_host_needs_a_login(host: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["serve", "--host", host, "--port", "0"]) == 2
    assert (
        "can be reached by others, so it needs a login: add --auth user:password" in capsys.readouterr().err
    )
    assert server.check_address(host, "0", "ada:word") == (host, 0, ("ada", "word"))


@pytest.mark.parametrize("auth", ("", "ada", "ada:", ":word"))
def test_a_login_has_two_parts(auth: str) -> None:
    with pytest.raises(RequestError, match="--auth must have the form user:password"):
        server.check_address("127.0.0.1", "0", auth)
