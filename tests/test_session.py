"""The session: determinism, the store's answer, memory that runs out, faults, base weights, replay."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from studio import Recipe, RequestError, StudioError
from studio.models.device import pick_device
from studio.models.hooks import hook_count
from studio.provenance import versions
from studio.registry import METHODS, find_method
from studio.replay import compare, repeat

GENERATE = Recipe(
    "generate", "atlas-sd", {"prompt": ["a red star", "two blue hearts"]}, {"steps": 2}, (0, 1, 2)
)


def weights(model: Any) -> str:
    """A digest of every weight of a model."""
    digest = hashlib.sha256()
    for _, module in sorted(model.components().items()):
        for _, p in sorted(module.state_dict().items()):
            digest.update(p.cpu().numpy().tobytes())
    return digest.hexdigest()


def method_that(monkeypatch: pytest.MonkeyPatch, run: Any, name: str = "generate") -> None:
    """Lets a method do something else for one test."""
    monkeypatch.setitem(METHODS, name, replace(find_method(name), run=run))


def test_the_same_recipe_gives_the_same_bits(session: Any) -> None:
    one, two = (session.run(GENERATE, fresh=True, save=False) for _ in range(2))
    np.testing.assert_array_equal(one.result.arrays["images"].values, two.result.arrays["images"].values)
    assert one.key == two.key and one.host == two.host


def test_a_finished_run_is_answered_from_the_store(session: Any) -> None:
    first = session.run(GENERATE)
    again = session.run(GENERATE)
    assert again.id == first.id and again.started == first.started
    other = session.run(replace(GENERATE, params={"steps": 3}))
    assert other.id != first.id
    assert session.run(GENERATE, fresh=True).id != first.id


def test_batch_equals_singles(session: Any) -> None:
    whole = session.run(GENERATE, save=False, fresh=True).result.arrays["images"].values[1, 2]
    single = Recipe("generate", "atlas-sd", {"prompt": ["two blue hearts"]}, {"steps": 2}, (2,))
    alone = session.run(single, save=False, fresh=True).result.arrays["images"].values[0, 0]
    assert np.abs(whole.astype(int) - alone.astype(int)).max() <= 1


def test_memory_that_runs_out_halves_the_batch(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine, tried = find_method("generate").run, []

    def hungry(model: Any, inputs: Any, params: Any, seeds: Any, scorer: Any, report: Any) -> Any:
        tried.append(report.rows)
        if report.rows > 4:
            raise torch.OutOfMemoryError("out of memory")
        return genuine(model, inputs, params, seeds, scorer, report)

    method_that(monkeypatch, hungry)
    run = session.run(GENERATE, fresh=True, save=False)
    assert tried == [16, 8, 4] and run.host["batch"] == 4
    assert "halved to 4 rows" in run.result.values["warnings"][-1]


def test_too_little_memory_for_one_row_is_a_sentence(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    method_that(monkeypatch, never)
    with pytest.raises(StudioError, match="not enough memory for one image"):
        session.run(GENERATE, fresh=True, save=False)


@pytest.mark.parametrize("where", ["scheduler", "decoder", "hook", "writer"])
def test_a_fault_leaves_weights_hooks_and_queue_as_they_were(
    session: Any, atlas: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str
) -> None:
    before = weights(atlas)

    def fault(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("injected")

    if where == "scheduler":
        monkeypatch.setattr("studio.models.sampling.predict", fault)
    elif where == "decoder":
        monkeypatch.setattr(type(atlas), "decode", fault)
    elif where == "hook":
        monkeypatch.setattr("studio.models.hooks._apply", fault)
    else:
        monkeypatch.setattr("studio.session.write_run", fault)
    inputs = {"prompt": "a red star", "subject": "star"}
    params = {"steps": 1, "kinds": ["resnet"], "metric": "distance", "hint": False}
    recipe = Recipe("trace-unet", "atlas-sd", inputs, params)
    edit = edit_file(atlas, tmp_path / "edit.safetensors")
    with pytest.raises(ZeroDivisionError):
        session.run(replace(recipe, edits=(str(edit),)), fresh=True, out=tmp_path / "run")
    monkeypatch.undo()
    assert weights(atlas) == before and sum(hook_count(m) for m in atlas.components().values()) == 0
    assert not (tmp_path / "run").exists()
    assert session.run(GENERATE, fresh=True, save=False).status == "done"


def edit_file(atlas: Any, path: Path, fingerprint: str | None = None) -> Path:
    """An edit that shifts one cross-attention value matrix."""
    name = "unet.up_blocks.2.attentions.1.transformer_blocks.0.attn2.to_v.weight"
    shape = dict(atlas.unet.named_parameters())[name.removeprefix("unet.")].shape
    delta = np.random.default_rng(0).normal(0, 0.5, shape).astype(np.float32)
    note = {
        "locus.base_fingerprint": fingerprint or atlas.fingerprint,
        "locus.concepts": json.dumps(["star"]),
    }
    save_file({name: delta}, path, metadata=note)
    return path


def test_an_edit_changes_the_image_and_only_for_its_own_run(session: Any, atlas: Any, tmp_path: Path) -> None:
    before, plain = weights(atlas), session.run(GENERATE, fresh=True, save=False)
    path = edit_file(atlas, tmp_path / "edit.safetensors")
    edited = session.run(replace(GENERATE, edits=(str(path),)), fresh=True, save=False)
    assert edited.key != plain.key
    assert (edited.result.arrays["images"].values != plain.result.arrays["images"].values).mean() > 0.01
    after = session.run(GENERATE, fresh=True, save=False)
    np.testing.assert_array_equal(after.result.arrays["images"].values, plain.result.arrays["images"].values)
    assert weights(atlas) == before


def test_an_edit_of_other_weights_needs_force(session: Any, atlas: Any, tmp_path: Path) -> None:
    path = edit_file(atlas, tmp_path / "edit.safetensors", "0" * 64)
    recipe = replace(GENERATE, edits=(str(path),))
    with pytest.raises(RequestError, match="insist with --force"):
        session.run(recipe, fresh=True, save=False)
    assert session.run(recipe, fresh=True, save=False, force=True).status == "done"


def test_replay_is_equal_bit_for_bit(session: Any, tmp_path: Path) -> None:
    inputs = {"prompt": "a red star", "subject": "star"}
    recipe = Recipe("trace-unet", "atlas-sd", inputs, {"steps": 2, "kinds": ["cross-attention"]}, (3, 4))
    session.run(recipe, fresh=True, out=tmp_path / "run")
    report = compare(*repeat(str(tmp_path / "run"), {"runs": str(tmp_path)}))
    assert report["identical"] and report["agrees"]


def test_replay_says_what_differs(session: Any, tmp_path: Path) -> None:
    run = session.run(GENERATE, fresh=True, save=False)
    images = run.result.arrays["images"]
    changed = replace(images, values=images.values ^ 1)
    other = replace(run, result=replace(run.result, arrays={"images": changed}))
    other = replace(other, host={**run.host, "threads": 9}, model={**run.model, "fingerprint": "x"})
    report = compare(other, run)
    said = " ".join(report["said"])
    assert not report["identical"] and "weights" in said and "threads: 9 then" in said


def test_the_model_stays_and_can_be_let_go(session: Any) -> None:
    session.run(GENERATE, save=False)
    assert [n for n, size in session.loaded() if size > 10**6]
    assert not session.unload("no-such-model")


def test_a_checkout_is_no_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("studio.provenance.version", nowhere)
    found = versions()
    assert found.pop("locus-studio") == "checkout" and found.pop("python")
    assert set(found.values()) == {"absent"}


def test_device_auto_takes_cuda_then_mps_then_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"cuda": True, "mps": True}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there["cuda"])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there["mps"])
    assert pick_device("auto") == "cuda"
    there["cuda"] = False
    assert pick_device("auto") == "mps"
    there["mps"] = False
    assert pick_device("auto") == "cpu"
    with pytest.raises(RequestError, match="no cuda device"):
        pick_device("cuda")
    with pytest.raises(RequestError, match="must be auto, cpu, cuda or mps"):
        pick_device("tpu")
