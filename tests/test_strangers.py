"""What a stranger may try against the server: each gets a refusal, nothing secret comes out, nobody outside
is called, and the server answers after it."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import itertools
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import pytest
from gradio_client import Client

import panels
from panels import guards
from studio.errors import RequestError
from studio.models.loading import locate
from studio.session import Session
from studio.types import Recipe
from tests.browser import studio as serving_studio

SECRET = "TOPSECRET-5f1c0a"
FORM = "multipart/form-data; boundary=x"
PAGE_TIMEOUT = httpx.Timeout(60.0)


class Canary(http.server.BaseHTTPRequestHandler):
    """Counts who calls."""

    hits: list[str] = []

    def do_GET(self) -> None:
        self.hits.append(self.path)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"called")

    do_POST = do_HEAD = do_GET

    def log_message(self, *args: Any) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def canary() -> Iterator[str]:
    """The address of a server that nobody must call."""
    opened = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Canary)
    Canary.hits.clear()
    threading.Thread(target=opened.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{opened.server_address[1]}"
    opened.shutdown()
    opened.server_close()
    assert Canary.hits == []


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Secret files in the working directory, beside it, in the temporary folder and beside the uploads."""
    work = tmp_path_factory.mktemp("work") / "here"
    work.mkdir()
    before = os.getcwd()
    os.chdir(work)
    kept = Path(tempfile.mkdtemp(prefix="locus-secret-"))
    places = {
        "here": work / "secret.txt",
        "hidden": work / ".env",
        "beside": work.parent / "secret.png",
        "temporary": kept / "secret.svg",
    }
    for place in places.values():
        place.write_text(SECRET)
    yield {name: str(place) for name, place in places.items()}
    os.chdir(before)
    shutil.rmtree(kept)


class Stopper:
    """Whether what waits for the device is stopped at once."""

    on = True


def waiting(session: Session) -> list[Any]:
    """The jobs that wait for the device."""
    return [job for jobs in list(session.queue._waiting.values()) for job in list(jobs)]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """A session whose device is taken for as long as this file is tested; what waits is stopped."""
    session = Session(runs=tmp_path_factory.mktemp("runs"), device="cpu", threads=1)
    go, end = threading.Event(), threading.Event()
    session.queue.submit(Recipe("", "atlas-clip"), "holder", call=lambda m: go.wait(300), kind="clip")

    def stop_all() -> None:
        while not end.wait(0.05):
            for job in waiting(session) if Stopper.on else ():
                job.cancel()

    stopper = threading.Thread(target=stop_all, daemon=True)
    stopper.start()
    yield session
    go.set()
    end.set()
    stopper.join()
    session.close()


@pytest.fixture(scope="module")
def pages() -> list[Any]:
    """The pages that were built."""
    return []


@pytest.fixture(scope="module")
def url(own: Session, secrets: dict[str, str], canary: str, pages: list[Any]) -> Iterator[str]:
    build, patch = panels.build, pytest.MonkeyPatch()
    patch.setattr(panels, "build", lambda session: pages.append(build(session)) or pages[-1])
    with serving_studio.serving(own) as address:
        yield address
    patch.undo()


@pytest.fixture(scope="module")
def config(url: str) -> dict[str, Any]:
    return httpx.get(f"{url}config", timeout=PAGE_TIMEOUT).json()


@pytest.fixture(autouse=True)
def alive(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test the server answers."""
    yield
    if "url" in request.fixturenames:
        answer = httpx.get(f"{request.getfixturevalue('url')}healthz", timeout=10)
        assert answer.json()["status"] == "ok"


def ask(url: str, method: str, path: str, **options: Any) -> httpx.Response:
    """A request whose path is sent as it stands."""
    base = httpx.URL(url)
    target = base.copy_with(raw_path=path.encode())
    with httpx.Client(timeout=PAGE_TIMEOUT) as client:
        return client.send(client.build_request(method, target, **options))


# ---- paths and addresses ---------------------------------------------------------------------------------

READS = [
    "/gradio_api/file={here}",
    "/gradio_api/file={hidden}",
    "/gradio_api/file={beside}",
    "/gradio_api/file={temporary}",
    "/gradio_api/file/{here}",
    "/gradio_api/file=secret.txt",
    "/gradio_api/file=./secret.txt",
    "/gradio_api/file=../secret.png",
    "/gradio_api/file=..%2Fsecret.png",
    "/gradio_api/file=%2e%2e/secret.png",
    "/gradio_api/file=....//secret.png",
    "/gradio_api/file=file://{here}",
    "/gradio_api/file={here}%00.png",
    "/gradio_api/file=/proc/self/environ",
    "/gradio_api/file=/proc/self/cwd/secret.txt",
    "/static/../../../../../../../..{here}",
    "/static/%2e%2e/%2e%2e/%2e%2e{here}",
    "/assets/../../../../../../../..{here}",
    "/assets/..%2f..%2f..%2f..{here}",
    "/svelte/..%2f..{here}",
    "/{here}",
    "/..%2fsecret.png",
    "/gradio_api/custom_component/x/client/component/..%2f..%2fsecret.txt",
    "/gradio_api/deep_link?session_hash=../../secret",
    "/?deep_link=../../secret.txt",
    "/gradio_api/file={canary}/x.png",
    "/gradio_api/file={canary_encoded}",
    "/gradio_api/file/{canary}/x.png",
    "/gradio_api/proxy={canary}/x.png",
    "/gradio_api/vibe-code",
    "/gradio_api/run-history/records",
    "/gradio_api/monitoring",
    "/monitoring/summary",
    "/gradio_api/profiling/traces",
    "/docs",
    "/openapi.json",
]


@pytest.mark.parametrize("path", READS)
def test_nothing_is_read(path: str, url: str, secrets: dict[str, str], canary: str) -> None:
    encoded = canary.replace(":", "%3A").replace("/", "%2F")
    answer = ask(url, "GET", path.format(**secrets, canary=canary, canary_encoded=encoded))
    assert SECRET not in answer.text and "Traceback" not in answer.text
    if not path.startswith("/?"):
        assert answer.status_code in (400, 403, 404, 405, 422), answer.status_code


LONG = "a" * 300


@pytest.mark.parametrize(
    "path", (f"/static/{LONG}", f"/assets/{LONG}", "/config%0a", "/gradio_api/heartbeat/%00", f"/{LONG}/x")
)
def test_names_that_no_file_can_have(path: str, url: str) -> None:
    answer = ask(url, "GET", path)
    assert answer.status_code == 404 and answer.json()["detail"] == "There is no such page here."


def test_nobody_says_for_himself_who_he_is(url: str) -> None:
    """Without a reverse proxy that the studio was told of, forwarded addresses are dropped."""
    claims = {"X-Forwarded-Host": "evil.example", "X-Forwarded-Proto": "https", "X-Forwarded-For": "9.9.9.9"}
    assert ask(url, "GET", "/config", headers=claims).json()["root"] == url.rstrip("/")
    odd = {"X-Forwarded-Host": b"a\x01b", "X-Forwarded-Proto": b"\xff", "Forwarded": "host=evil.example"}
    answer = ask(url, "GET", "/config", headers=odd)
    assert answer.status_code in (200, 400) and "evil.example" not in answer.text


@pytest.mark.parametrize("path", ("vibe-edit", "undo-vibe-edit", "run-history/connect", "process_recording"))
def test_routes_that_are_not_used_are_closed(path: str, url: str) -> None:
    answer = ask(url, "POST", f"/gradio_api/{path}", json={})
    assert answer.status_code == 404 and answer.json()["detail"] == "There is no such page here."


def forged(secrets: dict[str, str], canary: str) -> list[dict[str, Any]]:
    """Files that nobody uploaded, as a client would name them."""
    meta = {"meta": {"_type": "gradio.FileData"}}
    paths = [*secrets.values(), "secret.txt", "../secret.png", "/proc/self/environ", "/etc/passwd"]
    addresses = [f"{canary}/a.png", canary.replace("127.0.0.1", "localhost"), "file:///etc/passwd"]
    return [{"path": p, **meta} for p in [*paths, *addresses]] + [
        {"path": "x.png", "url": f"{canary}/b.png", **meta},
        {"path": secrets["here"], "is_stream": True, **meta},
        {"path": "\0", **meta},
        {"path": None, **meta},
    ]


def test_forged_files_are_refused(url: str, secrets: dict[str, str], canary: str) -> None:
    for file in forged(secrets, canary):
        given = {"images": [file], "texts": ["a star"]}
        asked = httpx.post(f"{url}gradio_api/call/v2/decompose", json=given, timeout=PAGE_TIMEOUT)
        if asked.status_code == 200:
            told = httpx.get(
                f"{url}gradio_api/call/decompose/{asked.json()['event_id']}", timeout=PAGE_TIMEOUT
            )
            assert "event: error" in told.text, (file, told.text)
            assert SECRET not in told.text and "Traceback" not in told.text
        assert SECRET not in asked.text


def test_an_upload_keeps_no_folder_of_its_name(url: str, secrets: dict[str, str]) -> None:
    for name in ("../../evil.png", "/etc/evil.png", "..\\evil.png", "a\0b.png", "x" * 400 + ".png"):
        files = {"files": (name, b"\x89PNG", "image/png")}
        answer = httpx.post(f"{url}gradio_api/upload", files=files, timeout=PAGE_TIMEOUT)
        assert answer.status_code in (200, 400, 422), (name, answer.status_code, answer.text)
        if answer.status_code == 200:
            kept = Path(answer.json()[0]).resolve()
            assert Path(os.environ["GRADIO_TEMP_DIR"]).resolve() in kept.parents
    assert (
        httpx.post(f"{url}gradio_api/upload", content=b"x", headers={"content-type": FORM}).status_code < 500
    )


def test_an_uploaded_page_is_not_shown_as_one(url: str) -> None:
    for name, content in (("a.html", b"<script>1</script>"), ("a.svg", b"<svg onload='1'/>")):
        path = httpx.post(f"{url}gradio_api/upload", files={"files": (name, content)}).json()[0]
        answer = httpx.get(f"{url}gradio_api/file={path}")
        assert answer.headers["content-disposition"].startswith("attachment")
        assert answer.headers["x-content-type-options"] == "nosniff"


# ---- hosts, other sites, sizes ---------------------------------------------------------------------------


@pytest.mark.parametrize("host", ("evil.example", "evil.example:7860", "127.0.0.1.evil.example", ""))
def test_other_hosts_are_refused(host: str, url: str) -> None:
    assert ask(url, "GET", "/config", headers={"Host": host}).status_code == 400


@pytest.mark.parametrize("origin", ("http://evil.example", "null", "http://127.0.0.1:1", "http://localhost"))
def test_other_sites_are_refused(origin: str, url: str) -> None:
    headers = {"Origin": origin}
    for path in ("upload", "queue/join", "call/generate", "cancel"):
        answer = ask(url, "POST", f"/gradio_api/{path}", json={}, headers=headers)
        assert answer.status_code == 403
        assert answer.json()["detail"] == "Requests from other sites are refused."
    told = ask(url, "GET", "/config", headers=headers)
    assert told.headers.get("access-control-allow-origin") != origin


def test_bodies_have_a_size(url: str) -> None:
    whole = {"content-length": str(guards.BODY_LIMIT + 1)}
    for path in ("/gradio_api/call/generate", "/gradio_api/call/upload", "/login", "/gradio_api/upload/"):
        with _raw(url, path, whole) as answer:
            assert answer.startswith("HTTP/1.1 413"), (path, answer)
    with _raw(url, "/gradio_api/upload", {"content-length": str(guards.UPLOAD_LIMIT + 1)}) as answer:
        assert answer.startswith("HTTP/1.1 413")
    with _raw(url, "/gradio_api/queue/join", {"transfer-encoding": "chunked"}) as answer:
        assert answer.startswith("HTTP/1.1 413") and "larger than this studio takes" in answer


@contextlib.contextmanager
def _raw(url: str, path: str, headers: dict[str, str]) -> Iterator[str]:
    """The answer to a POST whose body never comes."""
    import socket

    base = httpx.URL(url)
    lines = [f"POST {path} HTTP/1.1", f"Host: {base.host}:{base.port}", "Content-Type: application/json"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    with socket.create_connection((base.host, base.port), timeout=10) as opened:
        opened.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        answer = ""
        while "larger than" not in answer and (part := opened.recv(4096)):
            answer += part.decode()
        yield answer


def test_answers_say_what_a_browser_may_do(url: str) -> None:
    for path in ("", "config", "healthz", "nothing"):
        answer = httpx.get(f"{url}{path}", timeout=PAGE_TIMEOUT)
        assert {k: answer.headers.get(k) for k in guards.HEADERS} == guards.HEADERS


BODIES = {
    "no JSON": b"{",
    "empty": b"",
    "a list": b"[]",
    "deep": b'{"data":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "a long number": b'{"data":[' + b"9" * 10_000 + b"]}",
    "no UTF-8": b'{"data":["\xff"]}',
    "half a character in a list": b'{"data":[["\\ud800"],{"a":"\\udfff"}]}',
    "half a character": b'{"data":["\\ud800"]}',
    "no function": b'{"data":[],"fn_index":99999,"session_hash":"a"}',
    "a function below": b'{"data":[],"fn_index":-1,"session_hash":"a"}',
    "a function by text": b'{"data":[],"fn_index":"x","session_hash":"a"}',
    "no session": b'{"data":[],"fn_index":0}',
    "an odd session": b'{"data":[],"fn_index":0,"session_hash":{"a":1}}',
    "odd events": b'{"data":[],"fn_index":0,"session_hash":"a","event_data":[[[]]],"trigger_id":"x"}',
}


@pytest.mark.parametrize(
    "path", ("queue/join", "call/generate", "call/v2/generate", "run/generate", "cancel")
)
def test_odd_bodies_get_a_short_answer(path: str, url: str) -> None:
    for name, body in BODIES.items():
        headers = {"content-type": "application/json"}
        answer = ask(url, "POST", f"/gradio_api/{path}", content=body, headers=headers)
        assert "Traceback" not in answer.text and SECRET not in answer.text
        assert answer.status_code < 500 or "log has the details" in answer.text, (name, answer.text)


# ---- every function of the page --------------------------------------------------------------------------


def told(url: str, session_hash: str) -> list[dict[str, Any]]:
    """What every function that a session asked has answered at last."""
    found = []
    with httpx.stream(
        "GET", f"{url}gradio_api/queue/data", params={"session_hash": session_hash}, timeout=PAGE_TIMEOUT
    ) as stream:
        for line in stream.iter_lines():
            assert "Traceback" not in line and SECRET not in line, line[:500]
            message = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
            if message.get("msg") == "process_completed":
                found.append(message)
    return found


def join(url: str, config: dict[str, Any], session_hash: str, values: Any) -> tuple[int, list[dict]]:
    """Asks every function with values(n, count); (how many were let in, their answers)."""
    asked = 0
    with httpx.Client(timeout=PAGE_TIMEOUT) as client:
        for n, function in enumerate(config["dependencies"]):
            body = json.dumps(
                {
                    "fn_index": function["id"],
                    "data": values(n, len(function["inputs"])),
                    "session_hash": session_hash,
                    "event_data": {"row": 10**9, "col": "x", "index": [None], "value": {"a": 1}},
                }
            )
            headers = {"content-type": "application/json"}
            answer = client.post(f"{url}gradio_api/queue/join", content=body, headers=headers)
            assert answer.status_code in (200, 400, 422, 503), answer.text
            asked += answer.status_code == 200
    return asked, told(url, session_hash) if asked else []


ODD = (float("nan"), "x" * 25_000, {"a": [1]}, 10**30, True, [[]], -1e308, "${alert(1)}{{value}}<img src=x>")
VALUES = {
    "nothing": lambda n, count: [None] * count,
    "odd": lambda n, count: list(itertools.islice(itertools.cycle(ODD), n % 8, n % 8 + count)),
}


@pytest.mark.parametrize("case", VALUES)
def test_every_function_survives(case: str, url: str, config: dict[str, Any]) -> None:
    asked, answers = join(url, config, f"fuzz {case}", VALUES[case])
    assert asked > 100 and len(answers) >= asked
    wrong = [a["output"].get("error") for a in answers if not a["success"]]
    assert [w for w in wrong if not isinstance(w, str) or not 5 < len(w) < 1000] == []
    assert [a for a in answers if "wrong inside" in json.dumps(a)] == []  # every fault has its own sentence


def test_every_function_counts_its_values(url: str, pages: list[Any]) -> None:
    functions = pages[0].fns.values()
    assert len(functions) > 100
    for function in functions:
        count = len(function.inputs)
        for values in ([None] * (count + 1), [None] * (count - 1) if count else ["more"]):
            with pytest.raises(
                gr.Error, match=f"takes {count} values, one for each .* and {len(values)} came"
            ):
                pages[0].validate_inputs(function, values)


def test_what_may_be_refused_goes_through_the_queue(pages: list[Any]) -> None:
    """Outside it the page shows no notice of an error."""
    refusing = [f for f in pages[0].fns.values() if getattr(f.fn, "may_refuse", False)]
    assert len(refusing) > 8 and [f.name for f in refusing if not f.queue] == []


def test_a_wrong_number_of_values_is_told(url: str, config: dict[str, Any]) -> None:
    some = {**config, "dependencies": config["dependencies"][:60:20]}
    asked, answers = join(url, some, "too many", lambda n, count: [None] * (count + 1))
    assert asked == len(answers) == 3
    assert all(a["output"]["error"].endswith("came.") for a in answers)


def test_every_function_keeps_secrets(url: str, config: dict[str, Any], secrets: dict[str, str]) -> None:
    """A path as a text, and as a file, in every field: no answer hands the file over."""
    files = [{"path": secrets["here"], "meta": {"_type": "gradio.FileData"}}, secrets["temporary"]]
    _, answers = join(url, config, "paths", lambda n, count: [files[(n + k) % 2] for k in range(count)])
    found = [f for a in answers for f in _files(a["output"])]
    for file in found:
        assert SECRET not in httpx.get(f"{url}gradio_api/file={file}", timeout=PAGE_TIMEOUT).text


def _files(value: Any) -> Iterator[str]:
    """Paths of all files in an answer."""
    if isinstance(value, dict):
        if isinstance(value.get("path"), str):
            yield value["path"]
        for part in value.values():
            yield from _files(part)
    elif isinstance(value, list):
        for part in value:
            yield from _files(part)


def test_no_answer_is_shown_through_a_template_or_markdown(config: dict[str, Any]) -> None:
    """A template runs what a text holds as script; Markdown calls the hosts of its pictures."""
    kinds = {c["id"]: c for c in config["components"]}
    for function in config["dependencies"]:
        for part in (kinds[i] for i in function["outputs"] if i in kinds):
            template = str(part["props"].get("html_template") or "")
            assert not {"{{", "${"} & {template[i : i + 2] for i in range(len(template))}, part["props"]
            assert part["type"] not in ("markdown", "chatbot"), part["props"].get("elem_id")


def test_addresses_in_texts_are_texts(url: str, canary: str, own: Session) -> None:
    with contextlib.closing(Client(url, verbose=False, analytics_enabled=False)) as client:
        for given in ({"model": f"{canary}/m"}, {"scorer": canary, "metric": "clip"}):
            with pytest.raises(Exception, match="a call names a model of the catalogue"):
                client.predict(prompt=[f"![x]({canary}/x.png) {canary}"], **given, api_name="/generate")
    for name in (f"{canary}/m", canary, "https://huggingface.co/a/b", "file:///etc"):
        with pytest.raises(RequestError, match="There is no model"):
            locate(name)


def test_a_flood_is_turned_away_and_passes(url: str, own: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stopper, "on", False)

    async def flood() -> list[str]:
        async with httpx.AsyncClient(timeout=PAGE_TIMEOUT) as client:
            given = {"prompt": ["a"], "steps": 1}
            asked = [client.post(f"{url}gradio_api/call/v2/generate", json=given) for _ in range(40)]
            events = [a.json()["event_id"] for a in await asyncio.gather(*asked)]
            while len(waiting(own)) < 16:
                await asyncio.sleep(0.05)
            assert (await client.get(f"{url}healthz")).json()["status"] == "ok"
            monkeypatch.setattr(Stopper, "on", True)
            told = [client.get(f"{url}gradio_api/call/generate/{event}") for event in events]
            return [a.text for a in await asyncio.gather(*told)]

    told = asyncio.run(flood())
    turned_away = [t for t in told if "16 of your jobs are waiting already, the most for one user" in t]
    assert len(turned_away) >= 20
    assert waiting(own) == []


@pytest.mark.parametrize("value", (10**30, -(2**63), ["\ud800"], {"a": {"b": "x\udfff"}}))
def test_what_json_can_not_tell_is_refused(value: Any, url: str, pages: list[Any]) -> None:
    """Repeated in an answer it would end all answers to that page."""
    function = next(f for f in pages[0].fns.values() if len(f.inputs) == 1)
    with pytest.raises(gr.Error, match="of this request is (no UTF-8|too large); send another"):
        pages[0].validate_inputs(function, [value])
    pages[0].validate_inputs(function, [{"a": ["ü", 2**63 - 1, True, None]}])
