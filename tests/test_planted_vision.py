"""Planted heads: what is laid into the weights is what the decomposition finds, and rankings are counted."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from studio import bench
from studio.planted import Answer, Trial
from studio.planted_vision import FAMILIES, Grown, _rows, heads_of, measure_vision, rankings


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@cache
def grown(family: str, planted: bool = True) -> tuple[Grown, dict[str, np.ndarray], str]:
    head = heads_of(family)[-2]
    made = Grown(family, head, planted, 5)
    parts = made.whole.run(made.pixels).components
    return made, {k: v.double().numpy() for k, v in parts.items()}, head


@pytest.mark.parametrize("family", FAMILIES)
def test_every_head_does_what_its_role_says(family: str) -> None:
    made, parts, head = grown(family)
    d = made.direction.double().numpy()
    assert made.roles[head].kind == "plant"
    for name, role in made.roles.items():
        x = parts[name]
        along = x @ d
        if role.kind == "plant":
            assert along.std() > 0.9 * np.sqrt(x.var(0).sum())
        if role.kind == "off":
            assert np.abs(along).max() < 1e-4 * np.linalg.norm(x, axis=1).max()
        if role.twin is not None:
            block = name.rsplit(".", 1)[0]
            assert np.allclose(x, -parts[f"{block}.{role.twin}"], atol=1e-4 * np.abs(x).max())


def test_a_constant_head_varies_with_the_norm_alone() -> None:
    made, parts, _ = grown("class token")
    constants = [k for k, r in made.roles.items() if r.kind == "constant"]
    assert constants
    for name in constants:
        sizes = np.linalg.svd(parts[name], compute_uv=False)
        assert sizes[1] < 1e-4 * sizes[0]  # one vector, times a number of the image


def test_without_a_plant_the_head_writes_elsewhere() -> None:
    made, parts, head = grown("class token", False)
    assert made.roles[head].kind == "off" and "plant" not in {r.kind for r in made.roles.values()}
    assert np.abs(parts[head] @ made.direction.double().numpy()).max() < 1e-3


def test_the_share_sets_a_plant_before_constants_and_heads_that_write_elsewhere() -> None:
    made, _, head = grown("class token")
    order = rankings(made)["share"].ranked
    others = [k for k, r in made.roles.items() if r.kind in ("constant", "off")]
    assert others and all(order.index(head) < order.index(k) for k in others)


def test_the_net_share_names_the_plant_and_nothing_where_there_is_none() -> None:
    """Of each family alike; over many models it is the benchmark that counts."""
    found = {family: rankings(grown(family)[0])["net share"] for family in FAMILIES if family != "Swin"}
    assert all(a.ranked[0] == grown(f)[2] for f, a in found.items()) and any(a.found for a in found.values())
    none = [rankings(grown(f, False)[0])["net share"].found for f in found]
    assert sum(none) <= 1


def test_rows_count_hits_and_alarms() -> None:
    def trial(layers: tuple[str, ...], first: str, found: bool) -> Trial:
        return Trial(layers, {"share": Answer((first, "z"), found)}, ("a",))

    trials = [
        trial(("a",), "a", True),
        trial(("a",), "a", False),
        trial(("a",), "b", True),
        trial((), "a", True),
    ]
    values = {r["name"]: r["value"] for r in _rows("t", trials)}
    assert values == {
        "t, share: hits": pytest.approx(2 / 3),
        "t, share: sure hits": pytest.approx(1 / 3),
        "t, share: false alarms": 1.0,
        "t, share: right by habit": 1.0,
    }


def test_the_benchmark_has_the_experiment() -> None:
    said: list[str] = []
    entry = next(e for e in bench.ENTRIES if e.name == "planted-vision")
    assert entry.group == "planted"
    rows = measure_vision(said.append, 1, ("class token",))
    assert said == ["planted vision, class token: 24 models"] and len(rows) == 16
    assert all(0 <= r["value"] <= 1 and "Wilson" in r["how"] for r in rows)
