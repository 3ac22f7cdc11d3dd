"""Passports: sets of layers, edits of equal norm, Fisher scores against a slow reference, the same numbers as
an audit of the same edit, verdicts, and refusals."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from studio import Recipe
from studio.audit import Standing, passport_verdict, standing
from studio.errors import Cancelled, RequestError
from studio.methods import passport as method
from studio.methods.layer_map import layer_scores
from studio.methods.text_to_image import Bench
from studio.store import write_edit
from tests import layouts
from tests.references import naive_audit
from tests.test_edits import weights_hash

NEAR = ["a red moon"]
GIVEN = {
    "steps": 2,
    "guidance": 3.0,
    "metric": "distance",
    "second_scorer": "none",
    "templates": ["{}"],
    "held_out": ["a photo of {}"],
    "window": 1,
    "randoms": 0,
}


def passed(session: Any, seeds: Any = (0,), folder: Any = None, **given: Any) -> Any:
    """A finished passport of the random SD 1 layout."""
    inputs = {"concept": "star", "replacement": "circle", "neighbours": NEAR}
    inputs |= {n: given.pop(n) for n in tuple(inputs) if n in given}
    options = {n: given.pop(n) for n in ("report",) if n in given}
    recipe = Recipe("passport", str(folder or layouts.saved("sd1")), inputs, {**GIVEN, **given}, seeds)
    return session.run(recipe, save=False, fresh=True, **options)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    """Small matrices gain nothing from more, and lose much where cores are shared."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def run(session: Any) -> Any:
    """One of windows of two layers, with random sets, two seeds."""
    return passed(session, (0, 1), window=2, randoms=20)


def test_arrays(run: Any) -> None:
    arrays, values = run.result.arrays, run.result.values
    depth = len(arrays["fisher"].values)
    windows = tuple(f"{i}-{i + 1}" for i in range(depth - 1))
    sets = arrays["success"].axis("set").labels
    assert arrays["direct_effect"].axis("window").labels == sets[: depth - 1] == windows
    assert [s.split(":")[0] for s in sets[depth - 1 : depth + 2]] == [
        "Fisher score",
        "weight magnitude",
        "all layers",
    ]
    inside = arrays["layers"].values
    assert (inside[0] == ([1, 1] + [0] * (depth - 2))).all() and inside[depth + 1].sum() == depth
    assert (np.delete(inside, depth + 1, axis=0).sum(1) == 2).all()
    success = arrays["efficacy"].values - arrays["leak"].values
    np.testing.assert_allclose(arrays["success"].values, success, atol=1e-6)
    effect = arrays["direct_effect"].values
    assert values["localized_window"] == windows[int(np.argmax(effect))]
    assert values["best_window"] == windows[int(np.argmax(success[: depth - 1]))]
    assert values["placebo_floor"] == pytest.approx(float(np.abs(arrays["placebo"].values).max()))
    assert np.isfinite(success).all() and values["success_best"] == pytest.approx(
        float(success[: depth - 1].max())
    )
    assert f"it points at {values['localized_window']}" in values["verdict"]
    figure = method.draw(run)
    assert figure.kind == "curve" and figure.data["series"][0]["labels"] == list(windows)
    names = [name for name, _ in figure.data["lines"]]
    assert names[:3] == ["Fisher score", "weight magnitude", "all layers"]


def test_every_edit_has_the_same_norm(run: Any) -> None:
    """The scale and the layers that the run names give back the norm, from the edit that it keeps."""
    made, arrays = run.result.edit, run.result.arrays
    assert method.size(made) == pytest.approx(run.result.values["norm"], rel=1e-5)
    best = arrays["success"].axis("set").labels.index(run.result.values["best_window"])
    layers = [
        n
        for n, i in zip(arrays["layers"].axis("layer").labels, arrays["layers"].values[best], strict=True)
        if i
    ]
    assert made.params["layers"] == layers and made.params["strength"] == pytest.approx(
        float(arrays["scale"].values[best])
    )
    assert sorted(made.deltas) == sorted(f"unet.{x}.{n}.weight" for x in layers for n in ("to_k", "to_v"))
    assert arrays["scale"].values.min() < 1 < arrays["scale"].values.max()


def test_success_is_that_of_an_audit_of_the_same_edit(session: Any, run: Any, tmp_path: Path) -> None:
    write_edit(run.result.edit, tmp_path / "best.safetensors")
    asked = {"concept": "star", "neighbours": NEAR, "paraphrases": ["a photo of {}"], "unrelated": ["a tree"]}
    params = {n: GIVEN[n] for n in ("steps", "guidance", "metric", "second_scorer")} | {
        "templates": ["a photo of {}"]
    }
    folder, files = str(layouts.saved("sd1")), (str(tmp_path / "best.safetensors"),)
    audit = session.run(Recipe("audit", folder, asked, params, (0, 1), files), save=False)
    for name in ("efficacy", "leak"):
        found = run.result.arrays[name].at("set", run.result.values["best_window"]).values
        assert float(found) == pytest.approx(audit.result.values[name], abs=1e-4) and abs(float(found)) > 0


def test_own_norms_are_not_scaled(session: Any) -> None:
    run = passed(session, norm="own")
    assert (run.result.arrays["scale"].values == 1).all()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_fisher_scores_equal_the_naive_reference(guidance: float) -> None:
    model = layouts.model("sd1")
    layers = [str(s.layer) for s in model.unet_sites(["cross-attention"])]
    report = SimpleNamespace(rows=4, plan=lambda *a: None, step=lambda n=1: None)
    params = SimpleNamespace(steps=2, guidance=guidance, scheduler=None, target=None, against=None)
    bench = Bench.of(model, params, "star", None, report)
    fisher, magnitude = layer_scores(bench, ["star", "a red star"], layers, (3,))
    want = naive_audit.fisher(model.pipe, layers, ["star", "a red star"], [3], 2, guidance)
    np.testing.assert_allclose(fisher, want, rtol=1e-3)
    for layer, got in zip(layers, magnitude, strict=True):
        both = [model.unet.get_submodule(f"{layer}.{n}").weight.abs().flatten() for n in ("to_k", "to_v")]
        assert got == pytest.approx(float(torch.cat(both).double().mean()))
    assert not any(p.requires_grad for p in model.unet.parameters())


def test_random_sets() -> None:
    taken = {(0, 1), (1, 2), (0, 1, 2, 3)}
    found = method.random_sets(10, 2, 20, taken)
    assert len(set(found)) == 20 and not taken & set(found) and found == method.random_sets(10, 2, 20, taken)
    assert all(len(c) == 2 and 0 <= c[0] < c[1] < 10 for c in found)
    assert (
        len(method.random_sets(3, 2, 20, {(0, 1), (1, 2)})) == 1
        and method.random_sets(3, 3, 5, {(0, 1, 2)}) == []
    )


def test_too_few_sets_are_said(run: Any) -> None:
    depth = len(run.result.arrays["fisher"].values)
    sets = run.result.arrays["success"].axis("set").labels
    randoms = [s for s in sets if s.startswith("random")]
    assert len(randoms) <= math.comb(depth, 2) - (depth - 1)
    assert f"There are only {len(randoms)} other sets of 2 layers." in run.result.values["warnings"]


# ---- what it comes to -------------------------------------------------------------------------------------


def test_standing() -> None:
    effect, success = np.array([0.1, 0.5, 0.3, 0.2]), np.array([0.0, 0.9, 0.4, 0.2])
    found = standing(effect, success, np.array([0.1, 0.95, 0.3, np.nan]))
    assert found == Standing(1.0, 2 / 24, 0.9, 0.9, 0.3, 1 / 3)
    nothing = standing(effect, np.full(4, np.nan), np.array([]))
    assert math.isnan(nothing.rank_correlation) and math.isnan(nothing.success_best)


LEADS = {
    "The map says where this edit works": Standing(0.9, 0.01, 0.8, 0.8, 0.2, 0.0),
    "The map finds a good place and does not rank the others": Standing(0.2, 0.6, 0.8, 0.82, 0.2, 0.05),
    "The map does not say where this edit works": Standing(0.9, 0.2, 0.4, 0.8, 0.5, 0.6),
}


@pytest.mark.parametrize(("words", "found"), LEADS.items(), ids=LEADS.keys())
def test_verdicts(words: str, found: Standing) -> None:
    said = passport_verdict("star", "3-4", "5-6", [("a CLIP", found, {"3-4": 0.8, "all layers: 0-9": 0.7})])
    assert said.startswith(
        f"{words}: it points at 3-4, where efficacy minus leak is {found.success_localized:.2f}"
    )
    assert "the best window is 5-6" in said and "all layers 0.70" in said and "by a CLIP" in said


def test_no_verdict_without_a_measurement() -> None:
    empty = standing(np.array([0.1, 0.2]), np.full(2, np.nan), np.array([]))
    assert "can't be told" in passport_verdict("star", "0-1", None, [("a CLIP", empty, {})])


# ---- what is left behind, and what is refused -------------------------------------------------------------


def test_stopped_midway_nothing_stays(session: Any) -> None:
    folder = str(layouts.saved("sd1"))
    before = weights_hash(session.model(folder, "diffusion"))

    def stop(job: Any) -> None:
        if job.what.startswith("auditing") and job.latest is not None:
            job.cancel()

    with pytest.raises(Cancelled) as caught:
        passed(session, (0, 1), window=2, randoms=20, steps=3, report=stop)
    arrays = caught.value.partial.result.arrays
    assert np.isfinite(arrays["success"].values[0]) and np.isnan(arrays["success"].values[-1])
    assert method.draw(caught.value.partial).kind == "curve"
    model = session.model(folder, "diffusion")
    assert weights_hash(model) == before and not any(p.requires_grad for p in model.unet.parameters())


WRONG = {
    "itself": ({"replacement": "Star "}, "--replacement is the concept itself"),
    "empty": ({"concept": ""}, "--concept is empty"),
    "neighbours": ({"neighbours": ["two red star"]}, "holds the concept 'star' itself"),
    "held out": (
        {"held_out": ["{}", "a photo of {}"]},
        "is localized and audited with; --held-out must be other",
    ),
    "template": ({"templates": ["star"]}, "--templates: 'star' needs {} once"),
    "window": ({"window": 0}, "--window must be at least 1"),
    "window NaN": ({"window": "nan"}, "--window must be a whole number"),
    "randoms": ({"randoms": -1}, "--randoms must be from 0"),
}


@pytest.mark.parametrize(("given", "part"), WRONG.values(), ids=WRONG.keys())
def test_wrong_requests(session: Any, given: dict, part: str) -> None:
    with pytest.raises(RequestError) as caught:
        session.checked(Recipe("passport", "atlas-sd", {"concept": "star", "replacement": "moon", **given}))
    assert part in str(caught.value)


def test_a_window_larger_than_the_model(session: Any) -> None:
    with pytest.raises(RequestError, match="--window 99 is more than the"):
        passed(session, window=99)


def test_edits_are_not_laid_under_a_passport(session: Any, run: Any, tmp_path: Path) -> None:
    write_edit(run.result.edit, tmp_path / "e.safetensors")
    recipe = Recipe("passport", "atlas-sd", {"concept": "star"}, {}, None, (str(tmp_path / "e.safetensors"),))
    with pytest.raises(RequestError, match="takes no --edit"):
        session.checked(recipe)
