"""The Models panel's handlers and lists, without a browser: what fits, downloads, the token."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from panels import models
from panels.models_view import Shown, as_value, memory_line, offer_text, size_text
from studio.errors import Cancelled, StudioError
from studio.models.catalog import CATALOG
from studio.models.hub import Hub, Offer
from studio.models.listing import Known, Room, catalogue_row, known_models, own_row
from studio.session import Session
from tests import layouts

GB = 10**9
TOKEN = "hf_" + "s3cret" * 5
REQUEST = SimpleNamespace(session_hash="a person")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder of one's own models: a whole one and a broken one."""
    layouts.copy("sd1", tmp_path / "models" / "mine")
    (tmp_path / "models" / "broken").mkdir()
    (tmp_path / "models" / "broken" / "model_index.json").write_text("{")
    return tmp_path / "models"


@pytest.fixture
def session_(tmp_path: Path, own: Path) -> Iterator[Session]:
    made = Session(runs=tmp_path / "runs", models=own, device="cpu", threads=1)
    made.hub.asks = True
    yield made
    made.close()


@pytest.fixture
def panel(session_: Session) -> Any:
    """The panel's handlers; outputs stand by their names."""
    names = "memory status confirm offer agree refuse stop list name look token keep use forget chosen"
    return models._Panel(session_, {name: name for name in names.split()})


def act(panel: Any, what: str, name: str = "") -> list[dict]:
    return list(panel.act(REQUEST, SimpleNamespace(act=what, name=name)))


def rows(panel: Any, update: dict) -> dict[str, dict]:
    return {r["name"]: r for r in update[panel.out["list"]]["rows"]}


def status(panel: Any, updates: list[dict]) -> str:
    return [u[panel.out["status"]] for u in updates if panel.out["status"] in u][-1]


# ---- what there is ----------------------------------------------------------------------------------------


def test_the_list_holds_the_catalogue_and_ones_own(own: Path) -> None:
    found = known_models(own, "float32")
    names = [r.name for r in found]
    assert {*CATALOG, "mine", "broken"} == set(names) and [r.ready for r in found] == sorted(
        (r.ready for r in found), reverse=True
    )
    by = {r.name: r for r in found}
    assert (by["mine"].kind, by["mine"].ready, by["mine"].note) == ("diffusion", True, "sd1, a folder")
    assert by["mine"].need == sum(
        p.nelement() * 4 for m in layouts.model("sd1").components().values() for p in m.parameters()
    )
    assert "can't be read as JSON" in by["broken"].fault and not by["broken"].ready


def test_memory_depends_on_the_number_type() -> None:
    """Catalogue sizes are bytes to download: diffusion models in 32 bits, language models in 16."""
    llama, sdxl = CATALOG["llama-2-7b"], CATALOG["sdxl"]
    assert catalogue_row(llama, "float32").need == 2 * llama.size
    assert catalogue_row(llama, "bfloat16").need == llama.size
    assert (
        catalogue_row(llama, "int8").need < 0.6 * llama.size
        and catalogue_row(llama, "int4").need < 0.4 * llama.size
    )
    assert catalogue_row(sdxl, "bfloat16").need == sdxl.size // 2
    assert catalogue_row(sdxl, "int4").need == sdxl.size  # only language models are held in 4 bits
    assert catalogue_row(CATALOG["gpt2-xl"], "float32").need == CATALOG["gpt2-xl"].size


def test_what_fits() -> None:
    room = Room(budget=6 * GB, free=8 * GB, whole=16 * GB)
    assert [room.fits(n * GB) for n in (6, 7, 12, 13)] == ["fits", "tight", "tight", "too large"]


def test_the_view() -> None:
    here = Known("a", "language", "MIT", 2 * GB, 4 * GB, True, "assets/a", "small")
    away = Known("b", "diffusion", "Apache-2.0", 13_900_000_000, 20 * GB, False, "hub: x/b", "large")
    mine = Known("c", "clip", "yours", 5_000_000, 5_000_000, True, "/models/c", "clip, a folder")
    shown = Shown(
        [here, away, mine], {"a": 4 * GB, "/models/c": 6_000_000}, Room(6 * GB, 8 * GB, 16 * GB), "", {"b"}
    )
    a, b, c = as_value(shown)["rows"]
    assert (a["held"], a["need"]) == ("in memory, 4.0 GB", "needs 4.0 GB: fits")
    assert (b["held"], b["size"], b["coming"], b["fits"]) == ("", "13.9 GB", True, "too large")
    assert (c["ask"], c["held"], a["ask"]) == ("/models/c", "in memory, 6.0 MB", "a")
    assert size_text(25_000_000) == "25 MB"
    line = memory_line("cuda", "int8", {"a": 4 * GB}, shown.room)
    assert line.startswith(
        "In memory: a 4.0 GB. Models may take 6.0 GB in all; 8.0 GB of 16.0 GB of GPU memory"
    )
    offer = Offer("b", "x/b", 3 * GB, "MIT", True)
    assert "Enter your token below first." in offer_text(offer, 2 * GB, shown.room, False)
    assert "token" not in offer_text(offer, 2 * GB, shown.room, True)


# ---- load and unload --------------------------------------------------------------------------------------


def test_load_see_unload(panel: Any, session_: Session, own: Path) -> None:
    name = str(own / "mine")
    done = act(panel, "load", name)
    assert status(panel, done).startswith(f"{name} is in memory: ")
    (seen,) = act(panel, "see")
    assert rows(panel, seen)["mine"]["held"].startswith("in memory, ")
    assert f"In memory: {name}" in seen[panel.out["memory"]] and [n for n, _ in session_.loaded()] == [name]
    gone = act(panel, "unload", name)
    assert "left memory" in status(panel, gone) and session_.loaded() == []
    assert status(panel, act(panel, "unload", name)) == f"{name} is not loaded."


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("sdxl", "sdxl is not on this machine yet; download it in the Models tab (13.9 GB"),
        ("no such thing", "There is no model 'no such thing'"),
        ("", "empty"),
        ("x" * 9000, "There is no model"),
    ],
)
def test_loading_what_is_not_there(panel: Any, name: str, says: str) -> None:
    assert says in status(panel, act(panel, "load", name))


def test_a_broken_model_says_so(panel: Any, own: Path) -> None:
    assert "can't be read as JSON" in status(panel, act(panel, "load", str(own / "broken")))
    assert status(panel, act(panel, "nonsense")).startswith("Load a model")


# ---- looking and downloading ------------------------------------------------------------------------------


def test_looking_at_a_folder_and_at_nothing(panel: Any, own: Path) -> None:
    assert "text to image, sd1, needs" in status(panel, list(panel.look(str(own / "mine"))))
    assert "Type a folder" in status(panel, list(panel.look("  ")))
    assert "can't be read as JSON" in status(panel, list(panel.look(str(own / "broken"))))
    assert "is a pickle" in status(panel, list(panel.look(str(_pickle(own)))))


def _pickle(folder: Path) -> Path:
    (folder / "x.ckpt").write_bytes(b"\x80")
    return folder / "x.ckpt"


def test_nothing_is_fetched_before_a_yes(
    panel: Any, session_: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []
    monkeypatch.setattr(Hub, "fetch", lambda self, hub_id, *a, **o: fetched.append(hub_id))
    monkeypatch.setattr(Hub, "has_token", False)
    (asked,) = act(panel, "fetch", "llama-2-7b")
    assert asked[panel.out["confirm"]].visible and asked[panel.out["chosen"]] == "llama-2-7b" and not fetched
    text = asked[panel.out["offer"]]
    assert (
        "13.5 GB, licence Llama 2 Community" in text
        and "accept the licence" in text
        and "token below" in text
    )
    done = list(panel.agree("llama-2-7b"))
    assert (
        fetched == ["meta-llama/Llama-2-7b-hf"]
        and status(panel, done) == "llama-2-7b is here and ready offline."
    )
    assert panel._downloads == {}


def test_a_download_is_watched_and_stopped(panel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = threading.Event()

    def slow(self: Hub, hub_id: str, *_: Any, report: Any, **__: Any) -> None:
        while True:
            report(10**9)
            begun.set()
            threading.Event().wait(0.01)

    monkeypatch.setattr(Hub, "fetch", slow)
    said = []
    for update in panel.agree("sdxl"):
        said.append(update.get(panel.out["status"], ""))
        if begun.is_set() and "sdxl" in panel._downloads:
            assert panel.stop("sdxl") == "Stopping …"
    assert any(s.startswith("Downloading sdxl: ") and "of 13.9 GB" in s for s in said)
    assert (
        said[-1] == "Stopped; finished files are kept."
        and panel.stop("sdxl") == "Nothing is being downloaded."
    )


@pytest.mark.parametrize(
    ("error", "says"), [(StudioError("It is gated."), "It is gated."), (Cancelled(), "Stopped")]
)
def test_a_download_that_fails(
    panel: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, says: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(Hub, "fetch", fail)
    assert status(panel, list(panel.agree("sdxl"))).startswith(says)


def test_an_id_of_the_hub_that_cannot_be_reached(panel: Any) -> None:
    assert "the hub can't be reached" in status(panel, list(panel.look("someone/not-cached-here")))


# ---- the token --------------------------------------------------------------------------------------------


def test_the_field_is_emptied_whatever_comes(panel: Any, session_: Session) -> None:
    assert panel.use_token(TOKEN, False) == ("", "The token is used until the studio ends.")
    assert session_.hub.has_token
    field, said = panel.use_token("nonsense", False)
    assert field == "" and "no Hugging Face token" in said and "nonsense" not in said
    assert panel.use_token("", True)[1] == "Paste a token first."
    assert panel.forget_token()[0] == "" and TOKEN not in str(vars(session_.hub))


def test_the_token_is_in_no_update(panel: Any) -> None:
    panel.use_token(TOKEN, False)
    told = str([act(panel, "see"), act(panel, "fetch", "llama-2-7b"), list(panel.look("llama-2-7b"))])
    assert TOKEN not in told


def test_own_rows_say_what_they_are(own: Path) -> None:
    assert own_row(own / "mine", "float32").licence == "yours"
    assert own_row(own / "broken", "float32").fault
