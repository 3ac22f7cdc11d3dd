"""The benchmark at real sizes: the same code at tiny ones, what is asked for before anything is made, and
what is said where it does not fit."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from studio import real_shapes
from studio.bench import ENTRIES, chosen, run_bench
from studio.errors import RequestError
from studio.real_shapes import Settings, needed, real_shape
from studio.session import Session

_UNET = {"norm_num_groups": 8, "layers_per_block": 1, "sample_size": 8}
_VAE = {"norm_num_groups": 8, "layers_per_block": 1, "sample_size": 64, "block_out_channels": [8] * 4}
_TEXT = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY = {
    "sd1": {
        "unet": {**_UNET, "block_out_channels": [8, 8, 16, 16], "cross_attention_dim": 32},
        "vae": _VAE,
        "text_encoder": {**_TEXT, "projection_dim": 32},
    },
    "sdxl": {
        "unet": {
            **_UNET,
            "block_out_channels": [8, 8, 16],
            "cross_attention_dim": 64,
            "attention_head_dim": [1, 2, 2],
            "transformer_layers_per_block": [1, 1, 2],
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 32,
        },
        "vae": _VAE,
        "text_encoder": {**_TEXT, "projection_dim": 32},
        "text_encoder_2": {**_TEXT, "projection_dim": 32},
    },
    "llama-7b": {
        "lm": {
            "vocab_size": 2048,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
    },
}


def tiny(layout: str, **more: Any) -> Settings:
    """Settings under which a layout takes a moment."""
    return Settings(**{"steps": 2, "rows": 4, "smaller": TINY[layout], **more})


@pytest.mark.parametrize("layout", TINY)
def test_a_trace_and_an_edit_run_at_any_size(session: Any, layout: str) -> None:
    said: list[str] = []
    rows = list(real_shape(layout)(session, tiny(layout), said.append))
    asked = (
        ["weights", "one prompt", "trace-language", "knockout"]
        if layout == "llama-7b"
        else ["weights", "UNet, one row", "plain images", "trace of", "edit (uce)"]
    )
    assert len(rows) == len(asked) and said
    for row, part in zip(rows, asked, strict=True):
        assert row["name"].startswith(layout) and part in row["name"] and row["value"] > 0, row


@pytest.mark.parametrize(
    ("layout", "millions", "gigabytes"), [("sd1", 1066, 2.4), ("sdxl", 3469, 8.6), ("llama-7b", 6738, 13.5)]
)
def test_real_sizes_are_known_without_making_them(layout: str, millions: int, gigabytes: float) -> None:
    count, size = needed(layout, torch.bfloat16, Settings())  # UNet, VAE, text encoders (these in float32)
    assert round(count / 1e6) == millions and round(size / 1e9, 1) == gigabytes


def test_what_does_not_fit_says_what_it_needs(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_shapes, "free_memory", lambda device: 10**4)
    (row,) = real_shape("llama-7b")(session, tiny("llama-7b"), print)
    assert row["value"] is None and row["how"].startswith("not run: 0 million parameters")
    assert row["how"].endswith("GB are free on cpu")


def test_what_would_take_too_long_says_how_long(session: Any) -> None:
    rows = list(real_shape("llama-7b")(session, tiny("llama-7b", longest=0.0), print))
    assert [r["value"] is None for r in rows] == [False, False, True, True]
    assert "not run: about 0 minutes on cpu, by the time of one row" in rows[-1]["how"]


def test_what_fails_does_not_keep_the_rest_from_running(
    session: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One method of one layout fails: its neighbours, and the other layouts, are measured and written."""
    real = real_shapes.run_method

    def broken(name: str, *rest: Any) -> Any:
        if name == "trace-unet":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(name, *rest)

    monkeypatch.setattr(real_shapes, "run_method", broken)
    settings = {f"real-{layout}": tiny(layout) for layout in ("sd1", "llama-7b")}
    out = tmp_path / "b.json"
    record = run_bench(session, chosen([], list(settings)), settings, out, print)
    assert json.loads(out.read_text()) == record
    names = [r["name"] for r in record["results"]]
    assert "sd1, edit (uce)" in names and "llama-7b, knockout" in names
    assert not any("trace of" in n for n in names)
    (failed,) = record["failed"]
    assert failed["name"] == "real-sd1"
    assert failed["error"].endswith("cross-attention layers: OutOfMemoryError: CUDA out of memory.")


def test_half_precision_runs_whole(tmp_path: Path) -> None:
    """The command of the docs, at tiny sizes: nothing fails, nothing but the real shapes is run."""
    with closing(Session(runs=tmp_path / "runs", device="cpu", threads=1, dtype="bfloat16")) as half:
        entries = chosen(["real-shapes"], [])
        assert [e.name for e in entries] == [f"real-{layout}" for layout in real_shapes.LAYOUTS]
        settings = {f"real-{layout}": tiny(layout) for layout in TINY}
        record = run_bench(half, entries, settings, tmp_path / "b.json", print)
    assert record["failed"] == [] and all(r["value"] for r in record["results"])
    assert "in bfloat16" in record["results"][0]["how"] and record["host"]["dtype"] == "bfloat16"


def test_the_benchmark_has_them_in_a_group_of_their_own(session: Any, tmp_path: Path) -> None:
    names = {f"real-{layout}" for layout in real_shapes.LAYOUTS}
    assert {e.name for e in ENTRIES if e.group == "real-shapes"} == names
    assert names & {e.name for e in chosen([], [])} == set()
    assert names == {e.name for e in chosen(["real-shapes"], [])}
    settings = {"real-llama-7b": tiny("llama-7b")}
    record = run_bench(session, chosen([], ["real-llama-7b"]), settings, tmp_path / "b.json", print)
    assert json.loads((tmp_path / "b.json").read_text())["results"] == record["results"] != []
    with pytest.raises(RequestError, match="There is no layout 'sd9'; known: sd1, sdxl, llama-7b"):
        real_shape("sd9")
