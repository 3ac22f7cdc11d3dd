"""Number types: what runs in half precision and what does not, how far the halves are off, models that wait
in the host's memory, and rows found by memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from studio.models.device import MOST_ROWS, RowMemory, set_precision
from studio.models.parking import Parking
from studio.models.precision import computed_in, held_as
from studio.registry import load_methods
from studio.session import Session
from studio.types import Recipe
from tests.half_precision import measured, recipes
from tests.smallest import SMALLEST

# what assets/docs/gpu.md measures, with room: the largest difference of an array, in its own unit
TOLERANCES = {
    "generate": {"images": 25, "scores": 0.02},
    "localize": {"direct_effect": 0.02, "replaced": 0.02},
    "knockout": {"probability": 0.005, "relative_change": 0.02},
    "trace-language": {"restored": 0.03, "clean": 0.005},
}


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """A session in bfloat16 on the CPU."""
    opened = Session(runs=tmp_path_factory.mktemp("half"), device="cpu", dtype="bfloat16", threads=1)
    yield opened
    opened.close()


@pytest.mark.parametrize("name", TOLERANCES)
def test_bfloat16_stays_within_what_the_page_states(
    session: Session, half: Session, tmp_path: Path, name: str
) -> None:
    found, run = measured(recipes([name], tmp_path, "", steps=2)[name], session, half)
    apart = {g.array: g.largest for g in found}
    assert run.host["dtype"] == "bfloat16" and max(apart.values()) > 0
    assert {a: apart[a] <= most for a, most in TOLERANCES[name].items()} == dict.fromkeys(
        TOLERANCES[name], True
    )


@pytest.mark.parametrize("name", ["decompose", "edit"])
def test_what_needs_float32_gets_it_and_says_so(
    session: Session, half: Session, tmp_path: Path, name: str
) -> None:
    found, run = measured(recipes([name], tmp_path, "", steps=2)[name], session, half)
    assert run.host["dtype"] == "float32" and all(g.largest == 0 for g in found)
    assert "was computed in float32, not in bfloat16" in str(run.result.values["warnings"])


def test_every_method_has_its_number_type() -> None:
    kept = {m.name for m in load_methods().values() if computed_in(m, "bfloat16")[0] == "float32"}
    vision = {"decompose", "text-span", "rank-components", "retrieve-images", "ablate-components", "align"}
    assert kept == vision | {"edit", "attribute", "neurons", "passport"} and kept < set(SMALLEST)
    for name in load_methods().values():
        assert computed_in(name, "float32") == ("float32", "") and computed_in(name, "int8") == ("int8", "")
    assert held_as("clip", "float16") == "float32" and held_as("language", "float16") == "float16"


def test_islands_of_a_half_pipeline(half: Session) -> None:
    model = half.model("atlas-sd", "diffusion")
    assert {n: m.dtype for n, m in model.components().items()} == {
        "unet": torch.bfloat16,
        "vae": torch.bfloat16,
        "text_encoder": torch.float32,
    }
    assert model.encode(["a star"])[0].states.dtype == torch.float32


def test_a_half_head_gives_whole_logits(half: Session) -> None:
    model = half.model("atlas-llama", "language")
    logits = model.logits([model.encode("The capital of Arvonia is")])
    assert model.head.weight.dtype == torch.bfloat16 and model.net.get_output_embeddings() is model.head
    assert not torch.equal(logits, logits.bfloat16().float())


def test_a_gpu_gets_whole_float32() -> None:
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolutions.allow_tf32, products.allow_tf32
    try:
        convolutions.allow_tf32 = products.allow_tf32 = True
        set_precision("cpu")
        assert convolutions.allow_tf32 and products.allow_tf32
        set_precision("cuda")
        assert not convolutions.allow_tf32 and not products.allow_tf32
        assert not products.allow_bf16_reduced_precision_reduction
    finally:
        convolutions.allow_tf32, products.allow_tf32 = before


# ---- models that wait -------------------------------------------------------------------------------------


def a_model(name: str = "m") -> Any:
    """Two layers that share a matrix, and a buffer: 2 x 64 + 8 + 3 floats, 556 bytes."""
    first, second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
    net = nn.Sequential(first, nn.Linear(8, 8, bias=False), second)
    net[1].weight = first.weight
    net.register_buffer("seen", torch.arange(3.0))
    parts = {"": net}
    size = sum(t.numel() * 4 for t in [*net.parameters(), *net.buffers()])
    return SimpleNamespace(
        id=name, net=net, device=torch.device("cpu"), components=lambda: parts, nbytes=lambda: size
    )


def test_a_parked_model_comes_back_bit_for_bit_in_storage_of_its_own() -> None:
    model, parking = a_model(), Parking("cpu", room=lambda: 10**6)
    before = {n: t.clone() for n, t in model.net.state_dict().items()}
    places = {n: t.data_ptr() for n, t in model.net.state_dict().items()}
    assert parking.park("k", model) and "k" in parking and parking.nbytes() == model.nbytes() == 556
    assert all(t.data_ptr() != places[n] for n, t in model.net.state_dict().items())
    assert parking.fetch("k") is model and "k" not in parking and len(parking) == 0
    assert all(torch.equal(t, before[n]) for n, t in model.net.state_dict().items())
    assert model.net[0].weight is model.net[1].weight


def test_the_oldest_leaves_and_what_does_not_fit_stays_out() -> None:
    rooms = iter([600, 100, 700, 100, 100])
    parking = Parking("cpu", room=lambda: next(rooms))
    assert parking.park("a", a_model("a"))
    assert parking.park("b", a_model("b")) and "a" not in parking and "b" in parking
    assert not parking.park("c", a_model("c")) and "c" not in parking


def test_packed_weights_are_let_go() -> None:
    model, parking = a_model(), Parking("cpu", room=lambda: 10**6)
    model.net.is_quantized = True
    assert not parking.park("k", model)
    assert not Parking("cpu").park("k", a_model())  # a CPU's models are in the host's memory already


def test_a_session_takes_an_evicted_model_back_without_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Session(runs=tmp_path, device="cpu", threads=1, memory=8_000_000)) as opened:
        opened.parking = Parking("cpu", room=lambda: 10**9)
        first = opened.model("atlas-llama", "language")
        before = first.net.model.embed_tokens.weight.clone()
        opened.model("atlas-phi", "language")
        assert [n for n, _ in opened.loaded()] == ["atlas-phi"] and len(opened.parking) == 1
        monkeypatch.setattr("studio.session.load", lambda *a: pytest.fail("read from disk again"))
        assert opened.model("atlas-llama", "language") is first
        assert torch.equal(first.net.model.embed_tokens.weight, before)
        assert opened.unload("atlas-phi") and len(opened.parking) == 0


# ---- rows -------------------------------------------------------------------------------------------------


def test_rows_are_found_by_memory_and_measured_once() -> None:
    asked: list[int] = []
    memory = RowMemory("cpu", free=lambda: 1000, measure=lambda call: call() or 80)
    assert memory.rows("k", lambda: asked.append(1), 64) == 10  # 0.8 * 1000 / 80
    assert memory.rows("k", lambda: asked.append(1), 64) == 10 and asked == [1]
    assert RowMemory("cpu", lambda: 10, lambda call: 80).rows("k", lambda: None, 64) == 1
    assert RowMemory("cpu", lambda: 10**9, lambda call: 0).rows("k", lambda: None, 64) == MOST_ROWS
    assert RowMemory("cpu").rows("k", lambda: pytest.fail("on a CPU"), 16) == 16
    assert memory.rows("other", None, 16) == 16


def test_a_run_takes_the_rows_that_fit(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe("generate", "atlas-sd", {"prompt": ["a star"], "steps": 1}, {}, (0, 1))
    memory = RowMemory("cpu", free=lambda: 1000, measure=lambda call: call() or 400)
    monkeypatch.setattr(session, "row_memory", memory)
    assert session.run(recipe, save=False, fresh=True).host["batch"] == 2
    monkeypatch.setattr(session, "_given", True)
    assert session.run(recipe, save=False, fresh=True).host["batch"] == session.batch
