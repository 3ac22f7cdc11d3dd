"""Downloads from a hub that stands here: what is fetched, what a token is for, that it never comes out."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from studio.errors import RequestError, StudioError
from studio.models.catalog import CATALOG
from studio.models.hub import Hub, Offer, local_models
from studio.session import Session
from tests import layouts

TOKEN, COMMIT = "hf_" + "s3cret" * 5, "0" * 39 + "1"
SEEN: list[tuple[str, str]] = []


def files() -> dict[str, bytes]:
    """A whole model, and what is beside it on a hub."""
    root = layouts.saved("sd1")
    own = {f.relative_to(root).as_posix(): f.read_bytes() for f in root.rglob("*") if f.is_file()}
    return own | {"unet/diffusion_pytorch_model.bin": b"pickle", "code.py": b"import os"}


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub as huggingface_hub asks for: x/free is open, x/gated asks for TOKEN."""

    def log_message(self, *_: Any) -> None:
        """Silent."""

    def do_HEAD(self) -> None:  # noqa: N802
        self._answer(False)

    def do_GET(self) -> None:  # noqa: N802
        self._answer(True)

    def _answer(self, body: bool) -> None:
        path, held = self.path.split("?")[0], files()
        SEEN.append((path, self.headers.get("authorization", "")))
        if "gated" in path and TOKEN not in self.headers.get("authorization", ""):
            return self._send(403, b"", {"X-Error-Code": "GatedRepo"}, body)
        if path.startswith("/api/models/"):
            siblings = [{"rfilename": n, "size": len(b)} for n, b in held.items()]
            name = "/".join(path.split("/")[3:5])
            info = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "private": False}
            info |= {"gated": "gated" in path, "cardData": {"license": "openrail"}, "tags": []}
            if "/tree/" in path:
                info = [{"type": "file", "path": n, "size": len(b), "oid": "1"} for n, b in held.items()]
            return self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"}, body)
        name = path.split(f"/{COMMIT}/")[-1] if f"/{COMMIT}/" in path else path.split("/main/")[-1]
        if name not in held:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
        tag = hashlib.sha256(held[name]).hexdigest()
        return self._send(200, held[name], {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}, body)

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A hub on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


ASKED = """
import json, sys
from studio.models.hub import Hub
from studio.models.loading import fingerprint
from studio.errors import Cancelled, StudioError
hub, token, out = Hub(asks=True), sys.argv[1], {}
def tried(what):
    try:
        return str(what())
    except (StudioError, Cancelled) as error:
        return f"{type(error).__name__}: {error}"
out["before"] = tried(lambda: hub.fetch("x/free"))
out["offer"] = tried(lambda: hub.offer("x/free"))
seen = []
def stop(n):
    raise Cancelled
out["stopped"] = tried(lambda: hub.fetch("x/free", agreed=True, report=stop))
out["folder"] = tried(lambda: hub.fetch("x/free", agreed=True, report=seen.append))
out["bytes"], out["print"] = max(seen, default=0), fingerprint(hub.fetch("x/free"))
out["gated"] = tried(lambda: hub.fetch("x/gated", agreed=True))
out["gated offer"] = tried(lambda: hub.offer("x/gated"))
hub.set_token(token)
out["with token"] = tried(lambda: hub.fetch("x/gated", agreed=True))
out["has"], out["text"] = hub.has_token, repr(hub) + str(vars(Hub(asks=True)))
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def told(address: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process of its own got from that hub: huggingface_hub reads its settings at import."""
    home = tmp_path_factory.mktemp("hf")
    env = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, "-W", "error", "-c", ASKED, TOKEN]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    return said | {"stderr": done.stderr, "home": home}


def test_nothing_comes_before_a_person_agrees(told: dict[str, Any]) -> None:
    assert told["before"].startswith(
        "RequestError: x/free is not on this machine yet; download it in the Models"
    )


def test_the_offer_says_size_and_licence(told: dict[str, Any]) -> None:
    wanted = sum(len(b) for n, b in files().items() if n.endswith((".safetensors", ".json", ".txt")))
    assert told["offer"] == f"x/free (x/free): {wanted / 1e9:.1f} GB, licence openrail."
    assert "accept the licence on the hub first" not in told["offer"]


def test_safetensors_come_and_nothing_that_could_run(told: dict[str, Any]) -> None:
    folder = Path(told["folder"])
    assert folder.parent.name == "snapshots" and folder.name == COMMIT
    names = {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}
    assert names == {n for n in files() if not n.endswith((".bin", ".py"))}
    assert told["print"] == layouts.model("sd1").fingerprint and told["bytes"] > 100_000
    assert told["stopped"].startswith("Cancelled")


def test_a_gated_model_comes_with_a_token_alone(told: dict[str, Any]) -> None:
    assert (
        "x/gated is gated: accept its licence on its hub page, then enter a token in the Models"
        in told["gated"]
    )
    assert (
        "is gated" in told["gated offer"] and Path(told["with token"]).name == COMMIT and told["has"] is True
    )


def test_the_token_goes_to_the_hub_alone(told: dict[str, Any]) -> None:
    sent = {path for path, header in SEEN if TOKEN in header}
    assert sent and all("gated" in path for path in sent)
    assert TOKEN not in json.dumps({k: str(v) for k, v in told.items()})
    kept = [f for f in told["home"].rglob("*") if f.is_file() and TOKEN.encode() in f.read_bytes()]
    assert kept == []


# ---- the token --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["secret", "hf_", "hf_" + "x" * 300, "hf_ü" + "x" * 20])
def test_what_is_no_token(text: str) -> None:
    with pytest.raises(RequestError, match="That is no Hugging Face token; it starts with hf_") as caught:
        Hub().set_token(text)
    assert text not in str(caught.value) or text == "hf_"


def test_a_token_is_used_and_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    hub, asked = Hub(), []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **o: asked.append(o) or "/x")
    hub.set_token(f" {TOKEN}\n")
    hub.fetch("x/y")
    assert hub.has_token and asked[-1]["token"] == TOKEN
    hub.set_token("")
    hub.fetch("x/y")
    assert not hub.has_token and "token" not in asked[-1]


def test_keeping_is_asked_of_huggingface_hub_and_faults_hide_the_token(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept: list[str] = []
    monkeypatch.setattr(huggingface_hub, "login", lambda token, **_: kept.append(token))
    hub = Hub()
    hub.set_token(TOKEN)
    assert kept == []
    hub.set_token(TOKEN, keep=True)
    assert kept == [TOKEN]

    def fail(token: str, **_: Any) -> None:
        raise ValueError(f"invalid {token}")

    monkeypatch.setattr(huggingface_hub, "login", fail)
    with caplog.at_level(logging.DEBUG), pytest.raises(StudioError, match="could not be kept") as caught:
        Hub().set_token(TOKEN, keep=True)
    assert TOKEN not in caplog.text + str(caught.value) and caught.value.__cause__ is None


def test_the_token_is_in_no_run(session: Session, atlas: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from studio.store import as_record
    from studio.types import Recipe

    monkeypatch.setattr(session, "hub", Hub())
    session.hub.set_token(TOKEN)
    run = session.run(Recipe("generate", "atlas-sd", {"prompt": ["a star"], "steps": 1}, {}, (7,)))
    assert TOKEN not in json.dumps(as_record(run), default=str)


# ---- before a download ------------------------------------------------------------------------------------


def test_catalogue_offers_need_no_hub() -> None:
    offer = Hub().offer("llama-2-7b")
    assert offer == Offer(
        "llama-2-7b",
        "meta-llama/Llama-2-7b-hf",
        CATALOG["llama-2-7b"].size,
        "Llama 2 Community",
        True,
        offer.note,
    )
    assert str(offer) == (
        "llama-2-7b (meta-llama/Llama-2-7b-hf): 13.5 GB, licence Llama 2 Community; its authors ask you to "
        "accept the licence on the hub first."
    )


def test_an_offer_without_safetensors(monkeypatch: pytest.MonkeyPatch) -> None:
    info = type(
        "Info", (), {"siblings": [type("S", (), {"rfilename": "a.bin", "size": 3})()], "card_data": None}
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: info)
    with pytest.raises(RequestError, match="x/y holds no .safetensors file"):
        Hub().offer("x/y")


def test_an_offer_of_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise errors.OfflineModeIsEnabled("no")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    with pytest.raises(RequestError, match="x/y is not on this machine and the hub can't be reached"):
        Hub().offer("x/y")


def test_a_studio_in_the_browser_names_size_and_licence_instead_of_downloading(tmp_path: Path) -> None:
    session = Session(runs=tmp_path, device="cpu", threads=1)
    session.hub.asks = True
    with pytest.raises(RequestError) as caught:
        session.model("sdxl", "diffusion")
    assert str(caught.value) == (
        "sdxl is not on this machine yet; download it in the Models tab (13.9 GB, licence CreativeML "
        "OpenRAIL++-M), or give a folder."
    )
    session.close()


def test_local_models_are_found(tmp_path: Path) -> None:
    layouts.copy("sd1", tmp_path / "mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "one.safetensors").write_bytes(b"")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "model_index.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("x")
    assert [p.name for p in local_models(tmp_path)] == ["mine", "one.safetensors"]
    assert list(local_models(tmp_path / "gone")) == []
