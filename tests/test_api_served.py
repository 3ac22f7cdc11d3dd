"""The API as it is served: plain HTTP, turns and stopping, tools for assistants, and the same from Python."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

from panels import server
from panels.api_parameters import parameters
from studio.errors import RequestError
from studio.models.catalog import ASSETS
from studio.registry import find_method, load_methods
from studio.session import Session
from studio.types import Recipe
from tests.browser.studio import serving

METHODS = sorted(load_methods())
STAR = {"prompt": ["a red star"], "steps": 1}


@pytest.fixture(scope="module")
def url(session: Session, atlas: Any) -> Iterator[str]:
    with serving(session) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Client]:
    opened = Client(url, verbose=False, analytics_enabled=False)
    yield opened
    opened.close()


# ---- plain HTTP ------------------------------------------------------------------------------------------


def events(url: str, name: str, event: str) -> list[tuple[str, Any]]:
    """(kind, data) of every event of a call."""
    with httpx.stream("GET", f"{url}gradio_api/call/{name}/{event}", timeout=60) as stream:
        lines = [line for line in stream.iter_lines() if line]
    kinds = [line.removeprefix("event: ") for line in lines[::2]]
    return list(zip(kinds, (json.loads(line.removeprefix("data: ")) for line in lines[1::2]), strict=True))


def test_plain_http_by_name(url: str) -> None:
    asked = httpx.post(f"{url}gradio_api/call/v2/generate", json=STAR)
    kind, (run, files) = events(url, "generate", asked.json()["event_id"])[-1]
    assert kind == "complete" and run["status"] == "done"
    figure = next(f for f in files if f["orig_name"] == "figure.png")
    assert httpx.get(figure["url"]).content.startswith(b"\x89PNG")


PLAIN_WRONG = {
    "no endpoint": ("v2/nothing", {}, "There is no endpoint of that name"),
    "missing": ("v2/generate", {}, "No value provided for required argument: prompt"),
    "unknown": ("v2/generate", {"prompt": ["a"], "stepz": 1}, "Parameter `stepz` is not a valid"),
    "no list": ("generate", {"data": {}}, "list"),
    "unknown by place": ("nothing", {"data": []}, "There is no endpoint of that name"),
}


@pytest.mark.parametrize("case", PLAIN_WRONG)
def test_wrong_plain_calls_get_a_sentence(case: str, url: str) -> None:
    path, body, sentence = PLAIN_WRONG[case]
    answer = httpx.post(f"{url}gradio_api/call/{path}", json=body)
    assert answer.status_code in (400, 422) and sentence in answer.text
    assert "Traceback" not in answer.text


@pytest.mark.parametrize("values", ([], ["a"], [None] * 40))
def test_a_wrong_number_of_values_gets_a_sentence(values: list, url: str) -> None:
    asked = httpx.post(f"{url}gradio_api/call/generate", json={"data": values})
    kind, told = events(url, "generate", asked.json()["event_id"])[-1]
    count = len(parameters(find_method("generate")))
    assert (kind, told["error"]) == (
        "error",
        f"/generate takes {count} values, one for each parameter, and {len(values)} came.",
    )


def test_not_a_number_gets_a_sentence(url: str) -> None:
    body = '{"prompt": ["a star"], "guidance": NaN}'
    asked = httpx.post(
        f"{url}gradio_api/call/v2/generate", content=body, headers={"Content-Type": "application/json"}
    )
    kind, told = events(url, "generate", asked.json()["event_id"])[-1]
    assert kind == "error" and told["error"].startswith("guidance must be a number, not 'nan'")


# ---- turns -----------------------------------------------------------------------------------------------


@pytest.fixture
def held(session: Session) -> Iterator[None]:
    """The device is taken for as long as the test lasts."""
    go = threading.Event()
    session.queue.submit(Recipe("", "atlas-sd"), "holder", call=lambda m: go.wait(60), kind="diffusion")
    while session.queue.running is None:
        time.sleep(0.01)
    yield
    go.set()
    while session.queue.running is not None:
        time.sleep(0.01)


def waiting(session: Session) -> int:
    return sum(len(jobs) for jobs in session.queue._waiting.values())


def until(what: Any, seconds: float = 20.0) -> None:
    """Waits until what() holds."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


def test_a_full_queue_says_so(client: Client, session: Session, held: None) -> None:
    jobs = [
        session.submit(Recipe("generate", "atlas-sd", {"prompt": ["a"]}), user=f"u{n}") for n in range(64)
    ]
    try:
        with pytest.raises(AppError, match="64 jobs are waiting already; try again when some are done"):
            client.predict(**STAR, api_name="/generate")
    finally:
        for job in jobs:
            job.cancel()


def test_one_client_may_not_take_all_places(client: Client, url: str, session: Session, held: None) -> None:
    jobs = [client.submit(prompt=["a"], steps=1, seeds=[n], api_name="/generate") for n in range(16)]
    until(lambda: waiting(session) == 16)
    with pytest.raises(AppError, match="16 of your jobs are waiting already"):
        client.predict(prompt=["a"], steps=1, seeds=[16], api_name="/generate")
    other = Client(url, verbose=False, analytics_enabled=False)
    try:
        jobs.append(other.submit(prompt=["b"], steps=1, api_name="/generate"))
        until(lambda: waiting(session) == 17)
    finally:
        for job in jobs:
            job.cancel()
        until(lambda: waiting(session) == 0)
        other.close()


def test_whoever_cancels_stops_the_run(client: Client, session: Session) -> None:
    job = client.submit(prompt=["a red tree"], steps=1000, seeds=[5, 6, 7, 8], api_name="/generate")
    until(lambda: session.queue.running is not None and session.queue.running.done > 0)
    running = session.queue.running
    job.cancel()
    until(lambda: running.over)
    assert running.state == "stopped"


def test_whoever_goes_away_stops_the_run(url: str, session: Session) -> None:
    asked = {"prompt": ["a green tree"], "steps": 1000, "seeds": [5, 6, 7, 8]}
    event = httpx.post(f"{url}gradio_api/call/v2/generate", json=asked).json()["event_id"]
    with httpx.stream("GET", f"{url}gradio_api/call/generate/{event}", timeout=30) as stream:
        until(lambda: session.queue.running is not None and session.queue.running.done > 0)
        running = session.queue.running
        next(stream.iter_lines())
    until(lambda: running.over)
    assert running.state == "stopped"


def test_healthz_answers_while_a_job_runs(client: Client, url: str, session: Session) -> None:
    job = client.submit(prompt=["a house"], steps=1000, seeds=[5, 6], api_name="/generate")
    until(lambda: session.queue.running is not None and session.queue.running.done > 0)
    waits = []
    for _ in range(5):
        begun = time.monotonic()
        told = httpx.get(f"{url}healthz").json()
        waits.append(time.monotonic() - begun)
    job.cancel()
    assert told == {"status": "ok", "device": "cpu", "running": "generate"}
    assert min(waits) < 1.0, waits


# ---- MCP -------------------------------------------------------------------------------------------------


def test_tools_for_assistants(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mcp")
    whole = server.new_app
    monkeypatch.setattr(server, "new_app", lambda session: whole(session, mcp=True))
    with serving(session) as address:
        tools, made, refused = asyncio.run(_talk(f"{address}gradio_api/mcp/"))
    assert {t.name for t in tools} == {name.replace("-", "_") for name in METHODS}
    generate = next(t for t in tools if t.name == "generate")
    assert generate.inputSchema["required"] == ["prompt"]
    assert generate.inputSchema["properties"]["steps"]["description"].startswith("denoising steps")
    decompose = next(t for t in tools if t.name == "decompose")
    assert decompose.inputSchema["properties"]["images"]["items"] == {"type": "string"}
    run = json.loads(made.content[0].text)
    assert run["status"] == "done" and run["recipe"]["inputs"]["prompt"] == ["a red star"]
    assert any(c.type == "image" and base64.b64decode(c.data).startswith(b"\x89PNG") for c in made.content)
    assert any(c.type == "text" and c.text.startswith("arrays.npz: http://127.0.0.1") for c in made.content)
    assert refused.isError and "steps must be from 1 to 1000, not 0" in refused.content[0].text


async def _talk(address: str) -> tuple[list, Any, Any]:
    """(the tools, the answer to a right call, the answer to a wrong one)."""
    from mcp import ClientSession
    from mcp.client.streamable_http import streamable_http_client

    async with streamable_http_client(address) as (read, write, _), ClientSession(read, write) as talk:
        await talk.initialize()
        tools = (await talk.list_tools()).tools
        made = await talk.call_tool("generate", STAR)
        return tools, made, await talk.call_tool("generate", {"prompt": ["a star"], "steps": 0})


def test_mcp_without_its_library_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise server.PackageNotFoundError(name)

    monkeypatch.setattr(server, "version", absent)
    with pytest.raises(RequestError, match=r"needs the library mcp below version 2, and it is not installed"):
        server.check_mcp(None)
    monkeypatch.setattr(server, "version", lambda name: "2.3.0")
    with pytest.raises(RequestError, match=r"and version 2\.3\.0 of it is installed: pip install"):
        server.check_mcp(None)
    monkeypatch.setattr(server, "version", lambda name: "1.30.0")
    server.check_mcp(None)


def test_mcp_and_a_login_exclude_each_other() -> None:
    with pytest.raises(RequestError, match="--mcp has no login, so it can't be used together with --auth"):
        server.check_mcp(("user", "word"))


# ---- Python ----------------------------------------------------------------------------------------------


def test_the_readme_s_lines_of_python_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    readme = (ASSETS.parent / "README.md").read_text("utf-8")
    block = next(b for b in readme.split("```python\n")[1:] if b.startswith("from studio import")).split(
        "```"
    )[0]
    assert len([line for line in block.splitlines() if line.strip()]) <= 20
    monkeypatch.setenv("LOCUS_HOME", str(tmp_path))
    small = {"Session()": "Session(device='cpu', threads=1)", "(0, 1, 2)": "(0,)"}
    small |= {'["cross-attention"]}': '["cross-attention"], "steps": 1, "hint": False}'}
    for said, quick in small.items():
        assert said in block
        block = block.replace(said, quick)
    exec(compile(block, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_the_notebook_s_cells_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = json.loads((ASSETS / "docs" / "studio.ipynb").read_text("utf-8"))
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    assert len(cells) >= 5
    monkeypatch.setenv("LOCUS_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    for number, cell in enumerate(cells):
        exec(compile(cell, f"cell {number}", "exec"), scope)
