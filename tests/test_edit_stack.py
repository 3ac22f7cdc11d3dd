"""Strengths and stacks: one edit is its file's delta, several closed forms are solved together, the rest is
added, and the base weights come back whatever happens."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from studio import Recipe, cli
from studio.edit_files import Shelf, mark, split_entry
from studio.edits import Active, Composer, compose, overlay
from studio.errors import Cancelled, RequestError
from studio.methods import edit as method
from studio.registry import METHODS, find_method
from studio.store import write_edit
from studio.types import Edit
from tests import layouts
from tests.references import naive_edits
from tests.test_edit_method import asked, changes, relative
from tests.test_edits import KEY, parameter, weights_hash

TEMPLATES = ["{}", "a photo of {}"]


def made(model: Any, concept: str, other: str, **given: Any) -> Edit:
    """A solved edit."""
    return method.solve_edit(model, asked(model, [concept], [other], templates=TEMPLATES, **given))[0]


@pytest.fixture
def model() -> Any:
    """The random SD 1 layout, whose weights must be as they were at the end of each test."""
    model = layouts.model("sd1")
    before = weights_hash(model)
    yield model
    assert weights_hash(model) == before


def parts(model: Any, edits: list[Edit], name: str) -> list[tuple]:
    """(keys, values, weights, lambda) of each edit for one matrix of the UNet, by the slow way."""
    weight = parameter(model, name).detach().double().numpy()
    out = []
    for e in edits:
        found = naive_edits.columns(model.pipe.tokenizer, changes(e), TEMPLATES, False)
        state = {
            p: naive_edits.embedding(model.pipe, p)
            for own, _, gs in found
            for p in (own, *(g[0] for g in gs))
        }
        k = np.stack([state[p][i] for p, i, _ in found], 1)
        g = np.stack([sum(s * state[p][i] for p, i, s in gs) if gs else state[q][j] for q, j, gs in found], 1)
        out.append((k, weight @ g, np.ones(k.shape[1]), e.params["regularization"]))
    return out


# ---- one edit ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["uce", "quickfix"])
def test_one_edit_is_its_own_delta(model: Any, way: str) -> None:
    one = made(model, "star", "circle", method=way)
    assert all(np.array_equal(compose(model, [Active(one)])[n], d) for n, d in one.deltas.items())
    assert compose(model, [Active(one, 0.0)]) == {}
    for strength in (0.6, -2.0):
        found = compose(model, [Active(one, strength)])
        assert all(np.array_equal(found[n], np.float32(strength) * d) for n, d in one.deltas.items())


def test_an_edit_of_other_weights_is_refused_or_added(model: Any) -> None:
    one, two = made(model, "star", "circle"), made(model, "moon", "tree")
    other = replace(one, base_fingerprint="0" * 64)
    with pytest.raises(RequestError, match="made for weights 000000000000"):
        compose(model, [Active(other), Active(two)])
    found = compose(model, [Active(other, 0.5), Active(two)], force=True)
    assert all(np.allclose(found[n], 0.5 * d + two.deltas[n], atol=1e-7) for n, d in one.deltas.items())


# ---- several ----------------------------------------------------------------------------------------------


def test_closed_forms_are_solved_together(model: Any) -> None:
    edits = [
        made(model, "star", "circle"),
        made(model, "red star", "", method="locoedit", layers=["0", "1"], preserve=["moon"]),
    ]
    strengths = [0.8, -0.5]
    found = compose(model, [Active(e, s) for e, s in zip(edits, strengths, strict=True)])
    shared = [n for n in edits[0].deltas if n in edits[1].deltas]
    assert len(shared) == 4 and found.keys() == edits[0].deltas.keys()
    for name in shared[:2]:
        weight = parameter(model, name).detach().double().numpy()
        wanted = naive_edits.together(weight, parts(model, edits, name), strengths) - weight
        assert relative(found[name].numpy(), wanted) < 1e-4
        stacked = 0.8 * edits[0].deltas[name] - 0.5 * edits[1].deltas[name]
        assert relative(stacked, wanted) > 0.01
    for name in set(edits[0].deltas) - set(shared):
        assert relative(found[name].numpy(), 0.8 * edits[0].deltas[name]) < 1e-5


def test_an_edits_own_strength_counts_too(model: Any) -> None:
    one, two = made(model, "star", "circle"), made(model, "moon", "tree")
    half = made(model, "star", "circle", strength=0.5)
    found, wanted = (
        compose(model, a) for a in ([Active(half), Active(two)], [Active(one, 0.5), Active(two)])
    )
    assert all(np.allclose(found[n], wanted[n], atol=1e-7) for n in wanted)


def test_the_order_does_not_matter(model: Any) -> None:
    a, b = Active(made(model, "star", "circle"), 0.7), Active(made(model, "moon", ""), 1.3)
    one, two = compose(model, [a, b]), compose(model, [b, a])
    assert all(np.allclose(one[n], two[n], atol=1e-6) for n in one)


def test_foreign_edits_are_added(model: Any) -> None:
    draw = np.random.default_rng(0).standard_normal(tuple(parameter(model, KEY).shape)).astype(np.float32)
    one, two = made(model, "star", "circle"), made(model, "moon", "tree")
    strange = [
        Edit({KEY: draw}, model.fingerprint, method="neurons"),
        Edit({KEY: draw}, model.fingerprint, ("star",), {"templates": 3}, "uce", ("moon",)),
        replace(one, deltas={KEY: draw}),
        replace(one, deltas={KEY: draw}, params={**one.params, "layers": ["no.such.attn2"]}),
    ]
    both = compose(model, [Active(one), Active(two)])
    for e in strange:
        found = compose(model, [Active(one), Active(e, 2.0), Active(two)])
        assert np.allclose(found[KEY], both[KEY] + 2 * torch.from_numpy(draw), atol=1e-5)


def test_keys_of_the_unet_are_read_under_edits_of_the_text_encoder(model: Any) -> None:
    text, unet = made(model, "star", "circle", method="quickfix"), made(model, "star", "moon")
    found = compose(model, [Active(unet, 0.5), Active(text, 0.9)])
    (name,) = text.deltas
    assert np.array_equal(found[name], np.float32(0.9) * text.deltas[name])
    with overlay(model, [Active(text, 0.9)]):
        wanted, _ = method.solve_edit(model, unet)
    assert all(np.allclose(found[n], 0.5 * d, atol=1e-6) for n, d in wanted.deltas.items())
    assert relative(found[KEY].numpy(), 0.5 * unet.deltas[KEY]) > 0.01


def test_two_edits_of_the_text_encoder(model: Any) -> None:
    edits = [
        made(model, c, o, method="quickfix", positions="last") for c, o in (("star", "moon"), ("a tree", ""))
    ]
    (name,) = edits[0].deltas
    found = compose(model, [Active(e) for e in edits])
    encoder, tokenizer = model.pipe.text_encoder, model.pipe.tokenizer
    both = [c for e in edits for c in changes(e)]
    wanted = naive_edits.text_edit(encoder, tokenizer, both, TEMPLATES, False, 0.01)
    assert found.keys() == {name} and relative(found[name].numpy(), wanted) < 1e-4


# ---- what is remembered -----------------------------------------------------------------------------------


def test_other_strengths_cost_no_text_pass(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = made(model, "star", "circle"), made(model, "moon", "tree")
    composer, passes, real = Composer(), [], model.encode
    monkeypatch.setattr(model, "encode", lambda *a, **k: passes.append(1) or real(*a, **k), raising=False)
    for strength in (0.2, 0.4, 1.0):
        active = [Active(one, strength), Active(two)]
        fresh = compose(model, active)
        count = len(passes)
        with overlay(model, active, composer=composer):
            pass
        assert (len(passes) > count) == (strength == 0.2)
        (layer,) = composer.layers(model, active)
        assert all(torch.equal(layer[n].dense(), fresh[n]) for n in fresh)
    assert len(composer._kept) == 1


def test_a_composer_forgets(model: Any) -> None:
    composer, one = Composer(), made(model, "star", "circle", layers=["0"])
    for concept in "abcdefg":
        composer.layers(model, [Active(one), Active(made(model, concept, "moon", layers=["0"]))])
    assert len(composer._kept) == 4


@pytest.mark.parametrize("error", [ValueError("inside"), KeyboardInterrupt("inside"), Cancelled()])
def test_a_stack_is_undone_whatever_happens(model: Any, error: BaseException) -> None:
    before = weights_hash(model)
    stack = [
        made(model, "star", "circle"),
        made(model, "moon", ""),
        made(model, "star", "", method="quickfix"),
    ]
    with pytest.raises(type(error)), overlay(model, stack):
        assert weights_hash(model) != before
        raise error
    assert weights_hash(model) == before


def test_undone_when_keys_cannot_be_read(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text encoder is edited for a moment while the UNet's keys are built."""
    text, unet = made(model, "star", "circle", method="quickfix"), made(model, "star", "moon")
    before = weights_hash(model)

    def broken(*args: Any, **options: Any) -> Any:
        assert weights_hash(model) != before
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "encode", broken, raising=False)
    with pytest.raises(KeyboardInterrupt), overlay(model, [text, unet]):
        raise AssertionError("the block must not run")
    assert weights_hash(model) == before


# ---- files ------------------------------------------------------------------------------------------------


def test_entries(tmp_path: Path) -> None:
    file = tmp_path / "a@b.safetensors"
    file.write_text("")
    (tmp_path / "c@2").write_text("")
    assert split_entry(str(file)) == (str(file), 1.0)
    assert split_entry(f"{file}@0.6") == (str(file), 0.6) and split_entry(f"{file}@-2e-1") == (
        str(file),
        -0.2,
    )
    assert split_entry(str(tmp_path / "c@2")) == (str(tmp_path / "c@2"), 1.0)
    assert split_entry("none@x.safetensors") == ("none@x.safetensors", 1.0)
    for wrong in ("nan", "inf", "-inf", "1e9", "100.5", "half", ""):
        with pytest.raises(RequestError, match="The strength of an edit must be a number from -100 to 100"):
            split_entry(f"{file}@{wrong}")


def test_the_shelf(model: Any, tmp_path: Path) -> None:
    file, one = tmp_path / "e.safetensors", made(model, "star", "circle", layers=["0"])
    write_edit(one, file)
    shelf = Shelf()
    first, second = shelf.open(str(file)), shelf.open(f"{file}@0.5")
    assert first.edit is second.edit and (first.strength, second.strength) == (1.0, 0.5)
    assert mark(first) == first.digest and mark(second) == f"{first.digest}@0.5" and len(first.digest) == 64
    os.utime(file, (1, 1))
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(file.read_bytes())
    assert shelf.open(str(file)).edit is first.edit and shelf.open(str(copy)).edit is first.edit
    write_edit(replace(one, concepts=("moon",)), file)
    assert shelf.open(str(file)).edit.concepts == ("moon",) and shelf.open(str(file)).digest != first.digest
    file.unlink()
    with pytest.raises(RequestError, match="There is no edit file"):
        shelf.open(f"{file}@0.5")


def test_deltas_that_are_no_numbers_are_refused(model: Any, tmp_path: Path) -> None:
    file, one = tmp_path / "e.safetensors", made(model, "star", "circle", layers=["0"])
    name, delta = next(iter(one.deltas.items()))
    broken = delta.copy()
    broken[0, 0] = math.nan
    write_edit(replace(one, deltas={name: broken}), file)
    with pytest.raises(RequestError, match="holds NaN or infinity in"):
        Shelf().open(str(file))


# ---- through the session and the command ------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(session: Any, atlas: Any, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Edit files of atlas-sd: uce, another uce, quickfix."""
    folder, out = tmp_path_factory.mktemp("edits"), []
    for i, (c, o, way) in enumerate(
        (("star", "circle", "uce"), ("red", "", "uce"), ("star", "moon", "quickfix"))
    ):
        write_edit(made(atlas, c, o, method=way), folder / f"{i}.safetensors")
        out.append(str(folder / f"{i}.safetensors"))
    return out


def generate(session: Any, *edits: str, save: bool = False, **options: Any) -> Any:
    """A run of generate under edits."""
    recipe = Recipe("generate", "atlas-sd", {"prompt": ["a red star"]}, {"steps": 2}, (0,), edits)
    return session.run(recipe, save=save, **options)


def test_strength_is_part_of_a_run(session: Any, atlas: Any, files: list[str]) -> None:
    before = weights_hash(atlas)
    runs = {e: generate(session, e) for e in (files[0], f"{files[0]}@1", f"{files[0]}@0.5", f"{files[0]}@-1")}
    keys = [r.key for r in runs.values()]
    assert keys[0] == keys[1] and len(set(keys)) == 3
    images = [r.result.arrays["images"].values for r in runs.values()]
    assert np.array_equal(images[0], images[1]) and not np.array_equal(images[0], images[2])
    assert runs[f"{files[0]}@0.5"].recipe.edits == (f"{files[0]}@0.5",)
    assert np.array_equal(generate(session, f"{files[0]}@0").result.arrays["images"].values, bare(session))
    assert weights_hash(atlas) == before


def bare(session: Any) -> np.ndarray:
    """The image without edits."""
    return generate(session).result.arrays["images"].values


def test_a_stack_draws_what_compose_gives(session: Any, atlas: Any, files: list[str]) -> None:
    entries = (files[0], f"{files[1]}@0.4", f"{files[2]}@0.7")
    run = generate(session, *entries)
    deltas = compose(atlas, [session.shelf.open(e) for e in entries])
    whole = Edit({n: d.numpy() for n, d in deltas.items()}, atlas.fingerprint)
    with overlay(atlas, [whole]):
        image = bare(session)
    assert np.abs(run.result.arrays["images"].values.astype(int) - image).max() <= 1
    assert generate(session, *entries, fresh=True).key == run.key != generate(session, *entries[::-1]).key


def test_cancelled_under_edits(
    session: Any, atlas: Any, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, during = weights_hash(atlas), []

    def stopped(model: Any, inputs: Any, params: Any, seeds: Any, scorer: Any, report: Any) -> Any:
        during.append(weights_hash(model))
        report.cancel()
        report.step()

    monkeypatch.setitem(METHODS, "generate", replace(find_method("generate"), run=stopped))
    with pytest.raises(Cancelled):
        generate(session, *files, fresh=True)
    assert during and during[0] != before and weights_hash(atlas) == before


def test_wrong_strengths_on_the_command_line(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("nan", "1000", "much"):
        assert cli.main(["generate", "--prompt", "x", "--edit", f"{files[0]}@{wrong}"]) == 2
        said = capsys.readouterr().err
        assert "The strength of an edit must be a number" in said and said.count("\n") == 1
