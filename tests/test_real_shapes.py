"""The benchmark at real sizes: the same code at tiny ones, what is asked for before anything is made, and
what is said where it does not fit."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from studio import real_shapes, switch_race
from studio.bench import ENTRIES, chosen, run_bench
from studio.errors import RequestError, StudioError
from studio.models.device import RowMemory
from studio.real_shapes import Settings, needed, real_shape
from studio.session import Session
from tests import layouts

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
        else ["weights", "UNet, one row", "UNet, full batch", "plain images", "trace of", "edit (uce)"]
    )
    assert len(rows) == len(asked) and said
    for row, part in zip(rows, asked, strict=True):
        assert row["name"].startswith(layout) and part in row["name"] and row["value"] > 0, row
    if layout != "llama-7b":
        assert rows[2]["how"].startswith("4 rows, ") and "that a matrix product reaches" in rows[2]["how"]


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
    rows = list(real_shape("sd1")(session, tiny("sd1", longest=0.0), print))
    assert [r["value"] is None for r in rows] == [False, False, True, True, True, True]


def test_rows_are_those_asked_for_or_those_that_fit(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = layouts.model("sd1")
    memory = RowMemory("cpu", free=lambda: 1000, measure=lambda call: call() or 100)
    monkeypatch.setattr(session, "row_memory", memory)
    assert real_shapes.rows_of(session, model) == 8
    monkeypatch.setattr(session, "_given", True)
    assert real_shapes.rows_of(session, model) == session.batch


# ---- switches ---------------------------------------------------------------------------------------------


def test_switches_need_a_gpu_and_say_so(session: Any) -> None:
    rows = list(switch_race.switches(session, None, print))
    assert [r["name"] for r in rows] == [f"switches, {name}" for name in switch_race.NAMES]
    assert all(r["value"] is None and r["how"].startswith("needs a GPU: locus bench --only") for r in rows)
    assert set(switch_race.sides_of(None, 1)) == set(switch_race.NAMES)


def test_a_switch_is_measured_on_and_off_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    seconds = iter([2.0, 8.0, 1.0, 9.0, *[5.0, 10.0] * 3])
    watch = SimpleNamespace(seconds=lambda call: call() or next(seconds))
    sides = [(lambda s=s: order.append(f"set {s}"), lambda s=s: order.append(s)) for s in ("on", "off")]
    row = switch_race.compared("x", *sides, watch, 4)
    assert order == ["set on", "on", "set off", "off"] * 6  # the first round is not timed
    assert (
        row["value"] == 8.0 and "on 1 s, off 8 s, in turn, best of 5; SD 1, a forward of 4 rows" == row["how"]
    )


def test_both_sides_of_a_switch_give_the_same_output() -> None:
    model, outputs = layouts.model("sd1"), []
    for sides in (switch_race.memory_formats(model, 2), switch_race.compilers(model, 2, "eager")):
        for prepare, call in sides:
            prepare()
            outputs.append(call())
    assert model.compiled is None and len(outputs) == 4
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], atol=1e-4, rtol=1e-3)


def test_a_model_that_returns_is_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = layouts.model("sd1")
    before = [p.clone() for p in model.unet.parameters()]
    _, (park, fetch) = switch_race.returns(model)
    park()
    assert fetch() is model
    assert all(torch.equal(a, b) for a, b in zip(before, model.unet.parameters(), strict=True))


def test_a_switch_that_fails_is_named_and_the_others_are_measured(
    session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Any:
        raise ValueError("no graph")

    same = (lambda: None, lambda: None)
    monkeypatch.setattr(session, "device", "cuda")
    monkeypatch.setattr(switch_race, "random_model", lambda *_: None)
    monkeypatch.setattr(switch_race, "release", lambda device: None)
    monkeypatch.setattr(switch_race, "Stopwatch", lambda d: SimpleNamespace(seconds=lambda call: 1.0))
    monkeypatch.setattr(switch_race, "sides_of", lambda *_: {"a": broken, "b": lambda: (same, same)})
    found = switch_race.switches(session, Settings(rows=2), print)
    assert next(found)["name"] == "switches, b"
    with pytest.raises(StudioError, match="a: ValueError: no graph"):
        next(found)


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
    """The command of the docs, at tiny sizes: nothing fails, the real shapes come first, and everything else
    is left out with its reason."""
    with closing(Session(runs=tmp_path / "runs", device="cpu", threads=1, dtype="bfloat16")) as half:
        entries = chosen(["real-shapes"], [])
        assert [e.name.startswith("real-") for e in entries] == [True] * 4 + [False] * (len(entries) - 4)
        settings = {f"real-{layout}": tiny(layout) for layout in TINY}
        record = run_bench(half, entries, settings, tmp_path / "b.json", print)
    others = [r for r in record["results"] if r["how"].startswith("left out on cpu in bfloat16: its figure")]
    assert len(others) == len(entries) - 4
    told = [r for r in record["results"] if r not in others]
    measured = [r for r in told if not r["name"].startswith("switches, ")]
    assert record["failed"] == [] and len(measured) == 16 and all(r["value"] for r in measured)
    (edit,) = [r for r in measured if r["name"] == "sd1, edit (uce)"]
    assert "on weights in bfloat16 as they are" in edit["how"]
    assert "in bfloat16" in record["results"][0]["how"] and record["host"]["dtype"] == "bfloat16"


def test_the_benchmark_has_them_in_a_group_of_their_own(session: Any, tmp_path: Path) -> None:
    names = {"real-switches", *(f"real-{layout}" for layout in real_shapes.LAYOUTS)}
    assert {e.name for e in ENTRIES if e.group == "real-shapes"} == names
    assert names & {e.name for e in chosen([], [])} == set()
    assert names == {e.name for e in chosen(["real-shapes"], [])[:4]}
    settings = {"real-llama-7b": tiny("llama-7b")}
    record = run_bench(session, chosen([], ["real-llama-7b"]), settings, tmp_path / "b.json", print)
    assert json.loads((tmp_path / "b.json").read_text())["results"] == record["results"] != []
    with pytest.raises(RequestError, match="There is no layout 'sd9'; known: sd1, sdxl, llama-7b"):
        real_shape("sd9")
