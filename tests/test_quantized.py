"""Language models in 8 and 4 bits: a sentence without the library, the same findings with it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from studio.errors import RequestError
from studio.models.loaded import QUANTIZED, needed_bytes
from studio.models.loading import locate
from studio.models.sites import written_matrix
from studio.session import Session
from studio.types import Recipe

HAVE = importlib.util.find_spec("bitsandbytes") is not None
PROMPT = "The capital of Arvonia is"
with_library = pytest.mark.skipif(not HAVE, reason="bitsandbytes is not installed")
noise = pytest.mark.filterwarnings("ignore")  # of that library


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_without_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=rf"Weights in {dtype[3:]} bits need the library bitsandbytes"):
        Session(runs=tmp_path, device="cpu", dtype=dtype)


def test_memory_is_foretold() -> None:
    source = locate("atlas-llama")
    whole, eight, four = (needed_bytes(source, d) for d in ("float32", "int8", "int4"))
    assert whole == 4 * eight and four < eight
    assert needed_bytes(locate("atlas-sd"), "int4") == needed_bytes(locate("atlas-sd"), "float32")


def test_a_packed_matrix_is_unpacked_by_its_module() -> None:
    """Of any library: what it does to the unit vectors is what it holds."""

    class Packed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            draw = torch.Generator().manual_seed(0)
            self.weight = torch.nn.Parameter(torch.randint(0, 9, (6, 2), generator=draw), requires_grad=False)
            self.hidden = torch.randn(3, 4, generator=draw)
            self.bias, self.in_features = torch.randn(3, generator=draw), 4

        def forward(self, x: Any) -> Any:
            return x @ self.hidden.T + self.bias

    module = Packed()
    weight, bias = written_matrix(module)
    torch.testing.assert_close(weight, module.hidden)
    assert bias is module.bias


@pytest.fixture(scope="module", params=QUANTIZED)
def quantized(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """A session whose language models are held in 8 or in 4 bits."""
    made = Session(runs=tmp_path_factory.mktemp("runs"), device="cpu", threads=1, dtype=request.param)
    yield made
    made.close()


@with_library
@noise
def test_the_model_is_smaller_and_says_the_same(quantized: Session, session: Session) -> None:
    small, whole = (s.model("atlas-llama", "language") for s in (quantized, session))
    assert small.nbytes() < whole.nbytes() / 2.5
    said = [m.logits([m.encode(PROMPT)])[0].softmax(-1) for m in (small, whole)]
    assert said[0].argmax() == said[1].argmax() and (said[0] - said[1]).abs().max() < 0.05
    for layer in range(2):
        ours, theirs = small.attention_out(layer)[0], whole.attention_out(layer)[0]
        assert (ours - theirs).norm() < 0.15 * theirs.norm()


@with_library
@noise
@pytest.mark.parametrize("method", ["contributions", "knockout", "trace-language"])
def test_methods_run_on_it(quantized: Session, session: Session, method: str) -> None:
    asked = {"prompt": PROMPT, "subject": "Arvonia"}
    runs = [s.run(Recipe(method, "atlas-llama", asked, {})) for s in (quantized, session)]
    name = {"contributions": "contribution", "knockout": "knocked_out"}.get(method, "restored")
    ours, theirs = (np.nan_to_num(r.result.arrays[name].values) for r in runs)
    assert ours.shape == theirs.shape and np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.9
    assert runs[0].host["dtype"] == quantized.dtype and runs[0].key != runs[1].key
