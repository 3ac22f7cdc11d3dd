"""Ablation by attribution: which weights are taken, every ratio from one array of ranks, and the edit."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from studio import Recipe
from studio.edits import overlay
from studio.errors import RequestError
from studio.methods.component_ablation import (
    SCOPES,
    mask_edit,
    masks,
    nearest_ratio,
    quota,
    ranked_edit,
    ranked_share,
    ranks,
    unpack,
    zeroed,
)
from studio.models.objectives import find_weights
from tests import layouts


def fake_alphas(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random attributions of matrices of unlike shape, no two alike."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"unet.a.weight": (7, 40), "unet.b.weight": (12, 9), "unet.c.weight": (3, 129)}
    return {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}


def model_alphas(model: Any, seed: int = 1) -> dict[str, torch.Tensor]:
    """Random attributions of a model's weights."""
    generator = torch.Generator().manual_seed(seed)
    weights = find_weights(model, ("feed-forward", "to_k", "to_v"))
    return {w.name: torch.randn(w.tensor.shape, generator=generator) for w in weights}


@pytest.mark.parametrize("ratio", [0.0, 0.001, 0.05, 0.2, 1.0])
@pytest.mark.parametrize("scope", SCOPES)
def test_masks_take_the_largest_positive_ones_of_each_group(scope: str, ratio: float) -> None:
    alphas = fake_alphas()
    groups = list(groups_of(alphas, scope))
    want = set()
    for group in groups:
        group = sorted(group, key=lambda place: -float(alphas[place[0]][place[1]]))
        k = min(len(group), int(np.ceil(ratio * len(group) - 1e-9))) or int(ratio > 0)
        want |= {p for p in group[:k] if alphas[p[0]][p[1]] > 0}
    got = {
        (name, tuple(place))
        for name, bits in masks(alphas, ratio, scope).items()
        for place in np.argwhere(unpack(bits, tuple(alphas[name].shape))).tolist()
    }
    assert got == want
    assert ratio == 0 or scope != "row" or len(got) > 0.9 * len(groups)


def groups_of(alphas: dict[str, torch.Tensor], scope: str) -> Iterator[list[tuple[str, tuple[int, int]]]]:
    """The places (name, (row, column)) that compete with each other."""
    places = [(n, (r, c)) for n, a in alphas.items() for r in range(a.shape[0]) for c in range(a.shape[1])]
    key = {"row": lambda p: (p[0], p[1][0]), "matrix": lambda p: p[0], "global": lambda p: 0}[scope]
    for group in dict.fromkeys(map(key, places)):
        yield [p for p in places if key(p) == group]


def test_quotas_are_rounded_up() -> None:
    assert [quota(0.001, n) for n in (1, 320, 1000, 1001, 5120)] == [1, 1, 1, 2, 6]
    assert [quota(r, 100) for r in (0, 1e-12, 0.07, 0.29, 1)] == [0, 1, 7, 29, 100]


@pytest.mark.parametrize("scope", SCOPES)
def test_every_ratio_comes_from_the_ranks(scope: str) -> None:
    model = layouts.model("sd1")
    alphas = model_alphas(model)
    kept = ranks(alphas, scope)
    assert kept.values.dtype == np.uint8 and kept.values.shape[0] == sum(map(len, alphas.values()))
    recipe = Recipe("attribute", "m", {"concept": "x", "base": "y"}, {"scope": scope, "objective": "erase"})
    stored = SimpleNamespace(
        recipe=recipe, result=SimpleNamespace(arrays={"weight_rank": kept}, values={"matrices": list(alphas)})
    )
    for ratio in (1e-5, 0.001, 0.0123, 0.3, 1.0):
        want = mask_edit(model, alphas, nearest_ratio(ratio), scope, "erase", concept="x", base="y")
        got = ranked_edit(model, stored, ratio)
        assert got.deltas.keys() == want.deltas.keys() and len(got.deltas) > 0
        assert all(np.array_equal(d, want.deltas[n]) for n, d in got.deltas.items())
        assert (got.method, got.concepts, got.replacements) == ("cad", ("x",), ("y",))
        assert nearest_ratio(ratio) <= ratio * (1 + 1e-9) and nearest_ratio(ratio) > 0.95 * max(ratio, 8.3e-6)
    for ratio in (0.0, -1.0, 2.0, float("nan")):
        with pytest.raises(RequestError, match="The ratio must be above 0"):
            ranked_edit(model, stored, ratio)
    stored.result.arrays["weight_rank"] = ranks(alphas, scope, 0.02)
    stored.result.values["ranked_to"] = 0.02
    want = mask_edit(model, alphas, nearest_ratio(0.01), scope, "erase", concept="x", base="y")
    got = ranked_edit(model, stored, 0.01)
    assert all(np.array_equal(d, want.deltas[n]) for n, d in got.deltas.items())
    with pytest.raises(RequestError, match="at most 0.02, not 0.03"):
        ranked_edit(model, stored, 0.03)
    stored.result.arrays.clear()
    with pytest.raises(RequestError, match="kept no ranks"):
        ranked_edit(model, stored, 0.1)


def test_a_large_model_keeps_the_ranks_of_a_share() -> None:
    sizes = {1_000: 1.0, 4_000_001: 0.2, 150_000_000: 0.2, 400_000_001: 0.0}
    for n, share in sizes.items():
        assert ranked_share({"a": torch.empty(n, device="meta")}) == share


@pytest.mark.parametrize("objective", ["erase", "amplify"])
def test_the_edit_zeroes_what_the_mask_says(objective: str) -> None:
    model = layouts.model("sd1")
    alphas = model_alphas(model)
    edit = mask_edit(model, alphas, 0.01, "matrix", objective, concept="a red star", base="a star")
    bits = masks(alphas, 0.01, "matrix")
    weights = {n: model.unet.get_parameter(n.removeprefix("unet.")) for n in alphas}
    before = {n: w.clone() for n, w in weights.items()}
    with overlay(model, [edit]):
        for name, w in weights.items():
            mask = torch.from_numpy(unpack(bits[name], tuple(w.shape)))
            assert mask.any() and not w[mask].any() and torch.equal(w[~mask], before[name][~mask])
    assert all(torch.equal(w, before[n]) for n, w in weights.items())
    assert edit.replacements == ("a star" if objective == "erase" else "a red star",)
    assert edit.params == {"ratio": 0.01, "scope": "matrix", "objective": objective}


def test_matrices_of_which_nothing_is_taken_are_left_out() -> None:
    model = layouts.model("sd1")
    alphas = {n: -a.abs() for n, a in model_alphas(model).items()}
    last = list(alphas)[-1]
    alphas[last][2, 3] = 1.0
    edit = mask_edit(model, alphas, 0.001, "row", "erase")
    assert list(edit.deltas) == [last] and np.argwhere(edit.deltas[last]).tolist() == [[2, 3]]


def test_weights_come_back_after_an_error() -> None:
    model = layouts.model("sd1")
    name = next(iter(model_alphas(model)))
    w = model.unet.get_parameter(name.removeprefix("unet."))
    before = w.clone()
    with pytest.raises(ZeroDivisionError), zeroed(model, {name: torch.ones(w.shape) > 0}):
        assert not w.any()
        _ = 1 / 0
    assert torch.equal(w, before)
