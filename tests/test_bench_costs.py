"""The benchmark of costs: starts, growth, floors, shares, memory, slow ways; at small sizes."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from panels import server
from studio import bench, growth_race, naive_image_race, naive_race, share_race, start_race
from studio import naive_vision_race as vision
from studio.bench import ENTRIES
from studio.bench_cover import LEFT_OUT, MEASURED
from studio.errors import StudioError
from studio.registry import load_methods
from tests import layouts
from tests.test_bench import KEYS

SERVER = """
import http.server, sys
class Page(http.server.BaseHTTPRequestHandler):
    def say(self, text):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())
    def do_GET(self):
        self.say("event: %s" % sys.argv[1] if "generate" in self.path else "ok")
    def do_POST(self):
        assert self.path == "/gradio_api/call/v2/generate"
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        assert b'"steps": 3' in sent and b"a red star" in sent
        self.say('{"event_id": "7"}')
    def log_message(self, *words):
        pass
opened = http.server.HTTPServer(("127.0.0.1", 0), Page)
print(f"Locus is at http://127.0.0.1:{opened.server_port}  (Ctrl+C ends it)", flush=True)
opened.serve_forever()
"""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The entries set one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny() -> Any:
    return layouts.model("sd1")


def numbers() -> Any:
    generator = torch.Generator("cpu").manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator)


def hold(rows: list[dict[str, Any]], *names: str) -> None:
    """Rows of the contract's form, with a finite value and no bar; of these names."""
    assert [r["name"] for r in rows] == list(names)
    for found in rows:
        assert list(found) == KEYS and found["how"] and found["unit"]
        assert math.isfinite(found["value"]) and found["bar"] is None and found["holds"] is None


def covers(section: str, rows: Iterable[str]) -> None:
    """The rows of a section, by their names behind the colon, are of every method that the registry has but
    those that the page names as left out, each with its reason."""
    found = {row.split(" in ")[0] for row in rows}
    assert found == set(MEASURED[section])
    assert found.isdisjoint(LEFT_OUT[section]) and all(LEFT_OUT[section].values())
    assert found | set(LEFT_OUT[section]) == set(load_methods())


# ---- starts -----------------------------------------------------------------------------------------------


def fake(monkeypatch: pytest.MonkeyPatch, *words: str) -> list[list[str]]:
    """Another program in the place of the server; the commands that were asked for."""
    asked, real = [], start_race.started

    def started(command: list[str]) -> Any:
        asked.append(command)
        return real([sys.executable, "-c", *words])

    monkeypatch.setattr(start_race, "started", started)
    return asked


def test_a_server_is_timed_from_its_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = fake(monkeypatch, SERVER, "complete")
    ready, image = start_race.server_start(tmp_path, 1, rounds=2, steps=3)
    assert len(asked) == 2 and asked[0][1:4] == ["-m", "studio.cli", "serve"]
    assert asked[0][-6:] == ["--port", "0", "--runs", str(tmp_path), "--threads", "1"]
    assert ready["bar"] == 8 and ready["holds"] is True and 0 < ready["value"] < image["value"]
    hold([image], "server's first image")
    monkeypatch.setattr(start_race, "READY_BAR", 1e-9)
    assert start_race.server_start(tmp_path, 1, rounds=1, steps=3)[0]["holds"] is False


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("raise SystemExit(3)",), "ended with status 3; run `locus serve --port 0`"),
        ((SERVER, "error"), "drew no image .status 200, 'event: error'.; run `locus generate`"),
        (("print('http://127.0.0.1:1', flush=True); raise SystemExit(4)",), "ended with status 4"),
    ],
)
def test_a_server_that_fails_is_said(
    words: tuple, sentence: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake(monkeypatch, *words)
    with pytest.raises(StudioError, match=sentence):
        start_race.one_start(tmp_path, 1, 3)


def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake(monkeypatch, "import time; print('http://127.0.0.1:1', flush=True); time.sleep(60)")
    monkeypatch.setattr(start_race, "PATIENCE", 0.2)
    started = time.perf_counter()
    with pytest.raises(StudioError, match="did not answer within 0.2 s"):
        start_race.one_start(tmp_path, 1, 3)
    assert time.perf_counter() - started < 30  # ended, not waited for


def modules_after(code: str) -> set[str]:
    """The modules that a new process has imported after some code."""
    code += "; import sys; print('\\n' + ' '.join(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(done.stdout.splitlines()[-1].split())


def test_the_server_starts_without_what_is_heavy_and_not_needed(tmp_path: Path) -> None:
    code = "from panels import server; from studio.session import Session; "
    code += f"server.new_app(Session(runs={str(tmp_path)!r}, device='cpu'))"
    found = modules_after(code)
    assert {"gradio", "fastapi"} <= found
    heavy = {"torch", "transformers", "diffusers", "open_clip", "timm", "scipy", "matplotlib", "sklearn"}
    assert not heavy & found


def test_help_imports_nothing_heavy() -> None:
    found = modules_after("from studio.cli import main; main(['--help'])")
    assert "studio" in found and not {"torch", "gradio", "pandas", "matplotlib"} & found


def test_the_model_is_loaded_once_the_server_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    import uvicorn

    order: list[str] = []

    async def startup(self: Any, sockets: Any = None) -> None:
        order.append("answers")
        self.should_exit = len(order) > 2

    monkeypatch.setattr(uvicorn.Server, "startup", startup)
    loaded = threading.Event()
    made = server._server(None, lambda: (order.append("loads"), loaded.set()))
    asyncio.run(made.startup())
    assert loaded.wait(10) and order == ["answers", "loads"]
    asyncio.run(made.startup())  # it could not be started: nothing is loaded
    time.sleep(0.1)
    assert order == ["answers", "loads", "answers"]


# ---- growth and floors ------------------------------------------------------------------------------------


def test_exponents_and_operations() -> None:
    assert growth_race.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert growth_race.exponent([10, 20], [5, 5]) == pytest.approx(0)
    left, right = torch.ones(3, 5), torch.ones(5, 7)
    assert growth_race.operations(lambda: left @ right) == 2 * 3 * 5 * 7


def test_growth_is_fitted_to_seconds_with_operations_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"2": 1.0, "4": 8.0, "8": 64.0}
    monkeypatch.setattr(growth_race, "quickest", lambda calls, rounds, cpu: {n: seconds[n] for n in calls})
    case = growth_race.Growth(
        "x in n", (2, 4, 8), lambda n: lambda: torch.ones(n, n) @ torch.ones(n, 1), 2, "w"
    )
    found = growth_race.grown(case, 1)
    hold([found], "growth: x in n")
    assert found["value"] == pytest.approx(3) and "operations 2.00; theory 2: w" in found["how"]
    uncounted = growth_race.Growth("y in n", (2, 4, 8), lambda n: lambda: None, 1, "w")
    assert "; done by NumPy; theory 1: w" in growth_race.grown(uncounted, 1)["how"]


def test_every_growth_runs(monkeypatch: pytest.MonkeyPatch, tiny: Any) -> None:
    made: list[str] = []

    def grown(case: Any, rounds: int) -> dict[str, Any]:
        assert len(case.sizes) == 3
        made.append(case.name)
        size = {"in layers": 2, "in tokens": 8, " in texts": 30, "in images": 2, "n prompts": 2}.get(
            case.name[-9:], 1
        )
        assert growth_race.operations(case.make(size)) > 0 or case.name == "text-span in texts"  # NumPy
        return {}

    monkeypatch.setattr(growth_race, "grown", grown)
    monkeypatch.setattr(growth_race, "SMALL", {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 90})
    growth_race.language_growth(numbers())
    growth_race.image_growth(tiny, numbers())
    growth_race.vision_growth(numbers())
    kinds = {"tokens", "layers", "seeds", "steps", "concepts", "prompts", "texts", "images"}
    assert {n.rsplit(" ", 1)[1] for n in made} == kinds and len(made) == len(set(made)) == 16
    covers("growth", made)


def test_operations_of_language_methods_are_near_their_floor_and_never_below() -> None:
    found = growth_race.language_floor(numbers(), tokens=12, layers=4)
    hold(found, "operations: contributions", "operations: trace-language", "operations: knockout")
    assert all(1 <= f["value"] < 2 for f in found[1:]) and 0.5 < found[0]["value"] < 2


def test_the_floor_of_a_small_trace_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers, one token after the subject's first: each cell is one last layer without its queries, keys
    and values."""
    monkeypatch.setattr(growth_race, "SMALL", {"hidden_size": 16, "intermediate_size": 8, "vocab_size": 50})
    monkeypatch.setattr(growth_race, "SUBJECT", (1, 1))
    out_and_mlp = 2 * (16 * 16 + 3 * 16 * 8)
    cells = growth_race.SAMPLES * 2
    assert growth_race.trace_floor(numbers(), 3, 2) == cells * (out_and_mlp + 2 * 16 * 50)
    every = 2 * 4 * 16 * 16 + 2 * 3 * 16 * 8  # windows of three layers start at 0, 0, 1
    knockouts = 3 * (3 * every + 3 * every + 2 * every - 3 * 2 * 3 * 16 * 16 + 3 * 2 * 16 * 50)
    assert growth_race.knockout_floor(numbers(), 3, 3) == knockouts


def test_rows_of_image_methods_are_those_of_their_images(tiny: Any) -> None:
    found = growth_race.image_floor(tiny, numbers(), steps=2, rows=4)
    names = ["trace-unet", "word-maps", "generate", "lens", "localize", "attribute", "decompose"]
    hold(found, *(f"operations: {name}" for name in names))
    value = {name: row["value"] for name, row in zip(names, found, strict=True)}
    assert 1 <= value["trace-unet"] < 1.5 and 1 <= value["localize"] < 2 and 1 < value["decompose"] < 1.1
    assert value["word-maps"] == value["generate"] == value["lens"] == value["attribute"] == 1
    covers("operations", [*names, "contributions", "trace-language", "knockout"])


# ---- entries ----------------------------------------------------------------------------------------------


def test_entries_hand_their_models_over(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, tuple] = {}
    races = {
        start_race: ("server_start",),
        growth_race: ("language_growth", "image_growth", "vision_growth", "language_floor", "image_floor"),
        share_race: ("image_shares", "vision_shares", "language_shares", "counted_shares", "memory_growth"),
        naive_race: ("text_span", "align", "contributions", "context_use", "trace_unet", "localize"),
        naive_image_race: ("generate", "trace_text_encoder", "lens", "neurons", "attribute", "edit", "audit"),
        vision: ("decompose", "retrieve_images", "rank_components", "ablate_components"),
    }
    races[naive_race] += ("word_maps", "fisher")
    for module, names in races.items():
        for name in names:
            monkeypatch.setattr(
                module, name, lambda *a, name=f"{module.__name__}.{name}": given.setdefault(name, a) and []
            )
    names = ("server-start", "slow-ways", "forward-shares", "operations", "memory", "growth")
    mine = [e for e in ENTRIES if e.name in names]
    assert len(mine) == 6 and all(list(e.run(session, None, print)) == [] for e in mine)
    assert len(given) == sum(map(len, races.values()))
    image, language = session.model("atlas-sd", "diffusion"), session.model("atlas-llama", "language")
    assert given["studio.growth_race.image_growth"][0] is image
    assert given["studio.naive_race.context_use"] == (language,)
    assert given["studio.naive_image_race.audit"] == (image,)
    assert given["studio.share_race.counted_shares"] == (image, language)
    assert given["studio.share_race.vision_shares"][0].provides >= {"components"}
    folder, threads = given["studio.start_race.server_start"]
    assert threads == session.threads and not folder.exists()  # gone after the measurement
    assert given["studio.growth_race.language_floor"][0](2, 3).shape == (2, 3)


def test_every_figure_of_issue_7_has_an_entry() -> None:
    names = {e.name for e in bench.ENTRIES}
    assert {"help", "server-start", "slow-ways", "forward-shares", "operations", "memory", "growth"} <= names
