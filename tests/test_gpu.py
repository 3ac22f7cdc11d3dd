"""On a GPU (marker gpu, run by hand): every method as on the CPU within what its number type allows, memory
given back, weights as they were, rows found by memory, a compiled UNet.

The same functions run on the CPU with `LOCUS_GPU_TESTS=cpu python -m pytest -m gpu tests/test_gpu.py`, in
bfloat16 and float32, so that they are known to run before a GPU is at hand.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from studio import Recipe
from studio.models.compiled import CompiledUNet
from studio.models.device import peak_bytes, release
from studio.real_shapes import matrix_rate, real_shape
from studio.session import Session
from tests.half_precision import an_edit, gaps, recipes
from tests.smallest import SMALLEST
from tests.test_real_shapes import TINY, tiny

DEVICE = os.environ.get("LOCUS_GPU_TESTS", "cuda")
ON_GPU = DEVICE == "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="there is no CUDA device here"),
]
only_gpu = pytest.mark.skipif(not ON_GPU, reason="a CPU's memory is not counted")

GENERATE = Recipe("generate", "atlas-sd", {"prompt": ["a red star"], "steps": 8}, {}, (0, 1))
ALLOWED = {"float32": 0.02, "bfloat16": 0.3, "float16": 0.1}  # of an array's largest value
LEVELS = {"float32": 4, "bfloat16": 60, "float16": 25}  # of 255, the largest difference of a pixel
DISCRETE = {"picks", "rank", "top_token", "weight_rank"}  # places in an order: a tie may fall either way
NOISY = {"z_score", "normalised_effect", "position_share", "relative_change", "control", "variance"}


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float16"])
def card(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """A session on the device, in each number type that it has."""
    if not ON_GPU and request.param == "float16":
        pytest.skip("a CPU computes in no float16")
    opened = Session(runs=tmp_path_factory.mktemp("card"), device=DEVICE, dtype=request.param, threads=1)
    yield opened
    opened.close()
    release(DEVICE)


@pytest.fixture(scope="module")
def asked(session: Session, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Recipe]:
    """The smallest request of every method."""
    folder = tmp_path_factory.mktemp("asked")
    return dict(recipes(SMALLEST, folder, an_edit(session, folder), steps=2))


@pytest.fixture(scope="module")
def truth(session: Session, asked: dict[str, Recipe]) -> dict[str, Any]:
    """Runs on the CPU in float32, made when first asked for."""

    class Kept(dict):
        def __missing__(self, name: str) -> Any:
            self[name] = session.run(asked[name], save=False, fresh=True)
            return self[name]

    return Kept()


@pytest.mark.parametrize("name", SMALLEST)
def test_a_method_gives_what_the_cpu_gives(
    card: Session, asked: dict[str, Recipe], truth: dict[str, Any], name: str
) -> None:
    run = card.run(asked[name], save=False, fresh=True)
    assert run.status == "done" and run.host["device"] == DEVICE
    found = {g.array: g for g in gaps(truth[name], run)}
    assert found and all(np.isfinite(g.largest) for g in found.values()), found
    for array, gap in found.items():
        if array in DISCRETE | NOISY:
            continue
        if gap.unit == "levels of 255":
            assert gap.largest <= LEVELS[card.dtype], gap
        else:
            small = 1e-3 if "cosine" in gap.unit else 1e-6
            if "judge" in gap.unit:  # a probability, which jumps where a picture is hard to read
                small = 1e-3 if card.dtype == "float32" else 0.1
            assert gap.largest <= max(small, ALLOWED[card.dtype] * gap.scale), gap


def test_an_edit_is_undone_bit_for_bit(card: Session, asked: dict[str, Recipe]) -> None:
    file = asked["audit"].edits[0]
    model = card.model("atlas-sd", "diffusion")
    before = {n: p.clone() for n, p in model.unet.named_parameters()}
    plain = card.run(GENERATE, save=False, fresh=True).result.arrays["images"].values
    edited = card.run(replace(GENERATE, edits=(file,)), save=False, fresh=True).result.arrays["images"].values
    assert not np.array_equal(plain, edited)
    assert all(torch.equal(before[n], p) for n, p in model.unet.named_parameters())
    again = card.run(GENERATE, save=False, fresh=True).result.arrays["images"].values
    assert np.abs(plain.astype(int) - again.astype(int)).max() <= 1


def test_injected_out_of_memory_halves_the_rows(card: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    model = card.model("atlas-sd", "diffusion")
    whole = model.run_unet

    def scarce(x: torch.Tensor, *args: Any, **options: Any) -> Any:
        if len(x) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return whole(x, *args, **options)

    monkeypatch.setattr(model, "run_unet", scarce)
    monkeypatch.setattr(card, "_given", True)
    run = card.run(replace(GENERATE, seeds=tuple(range(8))), save=False, fresh=True)
    assert run.host["batch"] <= 2 and run.result.arrays["images"].values.shape[1] == 8
    assert "Memory ran out" in str(run.result.values["warnings"])


@only_gpu
def test_rows_are_found_by_memory(card: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    held = torch.empty(int(torch.cuda.mem_get_info()[0] * 0.97), dtype=torch.uint8, device="cuda")
    try:
        scarce = card.run(GENERATE, save=False, fresh=True).host["batch"]
    finally:
        del held
        release("cuda")
    assert 1 <= scarce <= card.run(GENERATE, save=False, fresh=True).host["batch"] <= 128


@only_gpu
def test_memory_is_given_back_after_unload(card: Session) -> None:
    card.run(GENERATE, save=False, fresh=True)
    taken = torch.cuda.memory_allocated()
    assert taken >= card.model("atlas-sd", "diffusion").nbytes()
    for name, _ in list(card.loaded()):
        card.unload(name)
    release("cuda")
    assert torch.cuda.memory_allocated() < taken - 10**6 and not card.loaded()


def test_an_evicted_model_waits_pinned_and_comes_back(card: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_GPU:
        card.parking._room = lambda: 10**9
    model = card.model("atlas-llama", "language")
    before = {n: t.cpu().clone() for n, t in model.net.state_dict().items()}
    for name, _ in list(card.loaded()):
        if name != "atlas-llama":
            card.unload(name)
    monkeypatch.setattr(card, "_memory", int(model.nbytes() * 1.3))
    card.model("atlas-phi", "language")
    assert len(card.parking) == 1
    assert all(t.is_pinned() == ON_GPU and t.device.type == "cpu" for t in model.net.state_dict().values())
    assert card.model("atlas-llama", "language") is model
    after = model.net.state_dict()
    assert all(t.device.type == DEVICE and torch.equal(t.cpu(), before[n]) for n, t in after.items())


def test_a_compiled_unet_gives_the_same_images(card: Session) -> None:
    plain = card.run(GENERATE, save=False, fresh=True).result.arrays["images"].values.astype(int)
    model = card.model("atlas-sd", "diffusion")
    model.compile("inductor" if ON_GPU else "eager")
    try:
        compiled = card.run(GENERATE, save=False, fresh=True).result.arrays["images"].values.astype(int)
        assert isinstance(model.compiled, CompiledUNet) and model.compiled.used == 8
    finally:
        model.compiled = None
    assert np.abs(plain - compiled).mean() <= {"float32": 0.1, "bfloat16": 3, "float16": 1}[card.dtype]


@pytest.mark.parametrize("layout", TINY)
def test_real_shapes_run_small(card: Session, layout: str) -> None:
    rows = real_shape(layout)(card, tiny(layout), print)
    assert all(r["value"] is not None for r in rows)


@only_gpu
def test_what_the_card_reaches(card: Session) -> None:
    rate = matrix_rate("cuda", getattr(torch, card.dtype), 4096)
    assert rate > 1e12 and peak_bytes(lambda: torch.empty(10**6, device="cuda")) >= 4 * 10**6
