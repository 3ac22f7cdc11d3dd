"""Edits are overlays: added, felt, and undone to the last bit whatever happens inside."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from studio.edit_files import read_edit
from studio.edits import overlay
from studio.errors import RequestError, StudioError
from studio.models.sampling import Plan, denoise
from studio.types import Edit
from tests import layouts

KEY = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
BIAS = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.bias"
TEXT = "text_encoder.encoder.layers.0.self_attn.out_proj.weight"


@pytest.fixture
def model() -> Any:
    """The random SD 1 layout, whose weights must be as they were at the end of each test."""
    model = layouts.model("sd1")
    before = weights_hash(model)
    yield model
    assert weights_hash(model) == before


def weights_hash(model: Any) -> str:
    """SHA-256 over all parameters in memory."""
    digest = hashlib.sha256()
    for module in model.components().values():
        for parameter in module.parameters():
            digest.update(parameter.numpy().tobytes())
    return digest.hexdigest()


def parameter(model: Any, name: str) -> torch.Tensor:
    """A parameter by the name that edit files use."""
    part, rest = name.split(".", 1)
    return model.components()[part].get_parameter(rest)


def delta(model: Any, name: str, seed: int = 0, scale: float = 0.3) -> np.ndarray:
    """A random delta for a parameter; not a multiple of anything, so that adding and subtracting would
    round."""
    draw = np.random.default_rng(seed).standard_normal(tuple(parameter(model, name).shape)) * scale
    return draw.astype(np.float32)


def edit(model: Any, *names: str, seed: int = 0) -> Edit:
    """An edit of the model's own weights."""
    return Edit({n: delta(model, n, seed) for n in names}, model.fingerprint)


# ---- adding -----------------------------------------------------------------------------------------------


def test_deltas_are_added(model: Any) -> None:
    one = edit(model, KEY, BIAS, TEXT)
    before = {n: parameter(model, n).clone() for n in one.deltas}
    with overlay(model, [one]):
        for name, change in one.deltas.items():
            assert torch.equal(parameter(model, name), before[name] + torch.from_numpy(change))
    assert all(torch.equal(parameter(model, n), before[n]) for n in before)


def test_several_edits_of_one_parameter_add_up(model: Any) -> None:
    first, second = edit(model, KEY, seed=1), edit(model, KEY, BIAS, seed=2)
    before = parameter(model, KEY).clone()
    with overlay(model, [first, second]):
        want = before + torch.from_numpy(first.deltas[KEY]) + torch.from_numpy(second.deltas[KEY])
        assert torch.equal(parameter(model, KEY), want)


def test_overlays_nest(model: Any) -> None:
    before = parameter(model, KEY).clone()
    with overlay(model, [edit(model, KEY, seed=1)]):
        outer = parameter(model, KEY).clone()
        with overlay(model, [edit(model, KEY, seed=2)]):
            assert not torch.equal(parameter(model, KEY), outer)
        assert torch.equal(parameter(model, KEY), outer)
    assert torch.equal(parameter(model, KEY), before)


def test_the_image_feels_the_edit_and_forgets_it(model: Any) -> None:
    plan = Plan(steps=2, guidance=3.0, height=16, width=16)

    def image() -> torch.Tensor:
        cond, _ = model.encode(["a red star"])
        return denoise(model, cond, model.unconditional(1, plan), [0], plan)

    before = image()
    for name in (BIAS, TEXT):
        with overlay(model, [edit(model, name)]):
            assert (image() - before).abs().max() > 1e-3
    assert torch.equal(image(), before)


def test_no_edit_changes_nothing(model: Any) -> None:
    before = weights_hash(model)
    with overlay(model, []):
        assert weights_hash(model) == before


def test_deltas_that_cannot_be_written_to_are_taken(model: Any) -> None:
    change = delta(model, KEY)
    change.flags.writeable = False
    with overlay(model, [Edit({KEY: change}, model.fingerprint)]):
        pass
    turned = np.asfortranarray(delta(model, KEY))
    before = parameter(model, KEY).clone()
    with overlay(model, [Edit({KEY: turned}, model.fingerprint)]):
        assert torch.equal(parameter(model, KEY), before + torch.from_numpy(turned.copy(order="C")))


# ---- undone whatever happens ------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("inside"), KeyboardInterrupt("inside"), SystemExit("inside")])
def test_undone_after_an_exception(model: Any, error: BaseException) -> None:
    before = weights_hash(model)
    with pytest.raises(type(error), match="inside"), overlay(model, [edit(model, KEY, TEXT)]):
        assert weights_hash(model) != before
        raise error
    assert weights_hash(model) == before


def test_undone_after_an_edit_that_fails_halfway(model: Any) -> None:
    bad = Edit({KEY: delta(model, KEY), BIAS: delta(model, BIAS).astype(object)}, model.fingerprint)
    before = weights_hash(model)
    with pytest.raises(TypeError), overlay(model, [bad]):
        raise AssertionError("the block must not run")
    assert weights_hash(model) == before


def test_special_values_come_back(model: Any) -> None:
    """Subtracting the delta again would not bring these back; the very same bits are put there."""
    huge = Edit({KEY: np.full_like(delta(model, KEY), np.inf)}, model.fingerprint)
    before = weights_hash(model)
    with overlay(model, [huge]):
        assert torch.isinf(parameter(model, KEY)).all()
    assert weights_hash(model) == before


# ---- refused before anything is touched -------------------------------------------------------------------


def test_other_weights_are_refused_unless_forced(model: Any) -> None:
    other = Edit({KEY: delta(model, KEY)}, "0" * 64)
    before = weights_hash(model)
    with pytest.raises(RequestError, match="made for weights 000000000000.*--force"):
        with overlay(model, [edit(model, BIAS), other]):
            raise AssertionError("the block must not run")
    assert weights_hash(model) == before
    with overlay(model, [other], force=True):
        assert weights_hash(model) != before


@pytest.mark.parametrize(
    "deltas",
    [
        {KEY: np.zeros((3, 3), np.float32)},
        {KEY: np.zeros(32 * 32, np.float32)},
        {"unet.no.such.weight": np.zeros(3, np.float32)},
        {"text_encoder_2.encoder.weight": np.zeros(3, np.float32)},
    ],
)
@pytest.mark.parametrize("force", [False, True])
def test_deltas_that_do_not_fit_are_refused(model: Any, deltas: dict, force: bool) -> None:
    before = weights_hash(model)
    with pytest.raises(RequestError, match=next(iter(deltas)).replace(".", r"\.")):
        good = {BIAS: delta(model, BIAS)}
        with overlay(model, [Edit({**good, **deltas}, model.fingerprint)], force=force):
            raise AssertionError("the block must not run")
    assert weights_hash(model) == before


# ---- files ------------------------------------------------------------------------------------------------


def write(file: Path, deltas: dict[str, np.ndarray], **note: str) -> Path:
    """An edit file as the contract has it."""
    save_file(deltas, file, metadata={f"locus.{k}": v for k, v in note.items()} or None)
    return file


def test_a_file_is_read_as_it_was_written(model: Any, tmp_path: Path) -> None:
    deltas = edit(model, KEY, BIAS, TEXT).deltas
    note = {"concepts": json.dumps(["van gogh"]), "params": json.dumps({"strength": 0.5})}
    file = write(tmp_path / "e.safetensors", deltas, base_fingerprint=model.fingerprint, **note)
    got = read_edit(str(file))
    assert set(got.deltas) == set(deltas) and all(np.array_equal(got.deltas[n], deltas[n]) for n in deltas)
    assert (got.base_fingerprint, got.concepts) == (model.fingerprint, ("van gogh",))
    assert got.params == {"strength": 0.5}
    before = parameter(model, KEY).clone()
    with overlay(model, [got]):
        assert torch.equal(parameter(model, KEY), before + torch.from_numpy(deltas[KEY]))


def test_metadata_may_be_short(model: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "e.safetensors", edit(model, KEY).deltas, base_fingerprint="f")
    assert (read_edit(file).concepts, read_edit(file).params) == ((), {})


def test_no_such_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path, "x" * 5000, "~nobody-of-that-name/e"):
        with pytest.raises(RequestError, match="no edit file"):
            read_edit(path)


@pytest.mark.parametrize("content", [b"", b"\x00" * 8, b"{}", b"PK\x03\x04", bytes(range(256)) * 9])
def test_garbage_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "e.safetensors").write_bytes(content)
    with pytest.raises(RequestError, match="no safetensors file"):
        read_edit(tmp_path / "e.safetensors")


@pytest.mark.parametrize("keep", [4, 100, -1])
def test_files_cut_short(model: Any, tmp_path: Path, keep: int) -> None:
    file = write(tmp_path / "e.safetensors", edit(model, KEY).deltas, base_fingerprint="f")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(RequestError, match="cut short"):
        read_edit(file)


@pytest.mark.parametrize(
    ("name", "note"),
    [
        (KEY, {}),
        (KEY, {"method": "uce"}),
        ("lora_unet.down.weight", {"base_fingerprint": "f"}),
        ("vae.decoder.weight", {"base_fingerprint": "f"}),
        (KEY, {"base_fingerprint": "f", "concepts": "not json"}),
        (KEY, {"base_fingerprint": "f", "concepts": "3"}),
        (KEY, {"base_fingerprint": "f", "concepts": "[3, null]"}),
        (KEY, {"base_fingerprint": "f", "replacements": "[[]]"}),
        (KEY, {"base_fingerprint": "f", "params": "[1"}),
        (KEY, {"base_fingerprint": "f", "params": "[]"}),
    ],
)
def test_files_that_are_no_edits(tmp_path: Path, name: str, note: dict[str, str]) -> None:
    file = write(tmp_path / "e.safetensors", {name: np.zeros(3, np.float32)}, **note)
    with pytest.raises(RequestError, match="no edit file of Locus"):
        read_edit(file)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64])
def test_deltas_that_are_not_float32_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    file = tmp_path / "e.safetensors"
    save_torch({KEY: torch.ones(3, dtype=dtype)}, file, metadata={"locus.base_fingerprint": "f"})
    with pytest.raises(RequestError, match="float32"):
        read_edit(file)


@pytest.mark.parametrize("name", ["strength", "regularization", "ratios"])
@pytest.mark.parametrize("value", [math.nan, 1e308, -1e308, "1", None, [None], True, {}])
def test_numbers_that_no_edit_has_are_refused(model: Any, tmp_path: Path, name: str, value: Any) -> None:
    note = {"base_fingerprint": "f", "params": json.dumps({name: value})}
    file = write(tmp_path / "e.safetensors", edit(model, KEY).deltas, **note)
    with pytest.raises(RequestError, match=rf"e.safetensors: the entry {name} .* must be a number from"):
        read_edit(file)


def test_a_regularization_below_zero_is_refused(model: Any, tmp_path: Path) -> None:
    note = {"base_fingerprint": "f", "params": json.dumps({"regularization": -5})}
    file = write(tmp_path / "e.safetensors", edit(model, KEY).deltas, **note)
    with pytest.raises(RequestError, match="entry regularization .* from 1e-06 to 1e.06, not '-5'"):
        read_edit(file)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_an_image_that_is_no_number_is_no_image(model: Any, broken: float) -> None:
    latents = torch.zeros(2, model.unet.config.in_channels, 2, 2)
    latents[1, 0, 0, 0] = broken
    with pytest.raises(StudioError, match="drew NaN or infinity instead of an image; lower the strength"):
        model.decode(latents)
    assert model.decode(latents[:1]).dtype == np.uint8
