"""The one least-squares solver against the normal equations, a matrix at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from studio.edits import CLOSED_FORMS, Factor, LowRank, Pairs, joined, merge_equal, product, solve
from studio.errors import RequestError
from studio.solver_race import LAYOUTS, race
from tests.references.naive_edits import textbook, together

SHAPES = [(5, 8, 3), (7, 16, 16), (4, 10, 25), (1, 3, 1), (64, 48, 47), (6, 20, 200)]  # m, d, n


def problem(m: int, d: int, n: int, seed: int = 0, matrices: int = 1) -> tuple:
    """Random W (m, d) each, K (d, n), V (m, n) each, s (n,) in float64."""
    draw = np.random.default_rng(seed)
    weights = [draw.standard_normal((m, d)) for _ in range(matrices)]
    values = [draw.standard_normal((m, n)) for _ in range(matrices)]
    return weights, draw.standard_normal((d, n)), values, draw.uniform(0.2, 3, n)


def solve_numpy(weights: list, keys: np.ndarray, values: list, s: np.ndarray, lam: float) -> list[np.ndarray]:
    """Our deltas, in and out as NumPy."""
    tensors = ([torch.from_numpy(x) for x in group] for group in (weights, values))
    w, v = tensors
    found = solve(w, torch.from_numpy(keys), v, torch.from_numpy(s), lam)
    return [(f.left @ f.right).numpy() for f in found]


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("lam", [0.01, 0.5, 30.0])
@pytest.mark.parametrize(("m", "d", "n"), SHAPES)
def test_equals_the_normal_equations(m: int, d: int, n: int, lam: float) -> None:
    weights, keys, values, s = problem(m, d, n, matrices=2)
    for w, v, delta in zip(weights, values, solve_numpy(weights, keys, values, s, lam), strict=True):
        wanted = textbook(w, keys, v, s, lam) - w
        assert relative(delta, wanted) < 1e-10
        assert np.linalg.matrix_rank(delta) <= min(m, d, n)


def test_is_the_minimum() -> None:
    """Nothing nearby is better, whatever formula says so."""
    (w,), keys, (v,), s = problem(4, 6, 3)

    def cost(delta: np.ndarray) -> float:
        miss = (w + delta) @ keys - v
        return float((s * miss**2).sum() + 0.5 * (delta**2).sum())

    best = solve_numpy([w], keys, [v], s, 0.5)[0]
    draw = np.random.default_rng(1)
    assert all(cost(best) < cost(best + 1e-3 * draw.standard_normal(best.shape)) for _ in range(50))


def test_equal_keys_are_merged_with_their_weights() -> None:
    (w,), keys, (v,), s = problem(5, 12, 6)
    keys[:, 4], keys[:, 5] = keys[:, 1], keys[:, 1]
    wanted = textbook(w, keys, v, s, 0.3) - w
    assert relative(solve_numpy([w], keys, [v], s, 0.3)[0], wanted) < 1e-10
    merged, (values,), sums = merge_equal(torch.from_numpy(keys), [torch.from_numpy(v)], torch.from_numpy(s))
    assert merged.shape == (12, 4) and torch.equal(merged, torch.from_numpy(keys[:, :4]))
    assert np.isclose(sums[1], s[1] + s[4] + s[5])
    assert np.allclose(values[:, 1], (v[:, [1, 4, 5]] * s[[1, 4, 5]]).sum(1) / sums[1].item())
    unweighted = textbook(w, merged.numpy(), values.numpy(), np.ones(4), 0.3) - w
    assert relative(unweighted, wanted) > 0.02


@pytest.mark.parametrize("n", [60, 200])
def test_nearly_equal_keys(n: int) -> None:
    """Keys like those of end-of-text tokens: groups that differ by a thousandth."""
    draw = np.random.default_rng(2)
    keys = np.repeat(draw.standard_normal((96, 4)), n // 4, axis=1) * 3
    keys += 3e-3 * draw.standard_normal(keys.shape)
    w, v = draw.standard_normal((40, 96)), draw.standard_normal((40, n))
    wanted = textbook(w, keys, v, np.ones(n), 0.01) - w
    assert relative(solve_numpy([w], keys, [v], np.ones(n), 0.01)[0], wanted) < 1e-7
    found = solve(
        [torch.from_numpy(w)], torch.from_numpy(keys), [torch.from_numpy(v)], torch.ones(n).double(), 0.01
    )
    assert relative(found[0].dense().double().numpy(), wanted) < 1e-5  # float32 factors, nothing cancels


def test_one_factorization_serves_every_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple] = []
    real = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda a: calls.append(tuple(a.shape)) or real(a))
    weights, keys, values, s = problem(6, 40, 3, matrices=32)
    assert len(solve_numpy(weights, keys, values, s, 0.5)) == 32 and calls == [(3, 3)]


def test_the_smaller_system_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    real = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda a: sizes.append(len(a)) or real(a))
    for n in (5, 12, 40):
        weights, keys, values, s = problem(3, 12, n)
        solve_numpy(weights, keys, values, s, 0.5)
    assert sizes == [5, 12, 12]


def test_keys_that_are_too_much_alike() -> None:
    keys = torch.ones(4, 2, dtype=torch.float64) * 1e200
    with pytest.raises(RequestError, match="raise it"):
        Factor.of(keys, torch.ones(2).double())


def test_products_in_parts() -> None:
    weight, columns = (
        torch.randn(150, 9, generator=torch.Generator().manual_seed(0)),
        torch.eye(9).double()[:, :4],
    )
    assert torch.equal(product(weight, columns), weight.double()[:, :4])
    assert torch.equal(LowRank(columns, columns.T).dense(), (columns @ columns.T).float())


# ---- several edits ----------------------------------------------------------------------------------------


def wishes(name: str, d: int, n: int, seed: int, lam: float) -> tuple[Pairs, tuple]:
    """Pairs of one edit, and the same for the reference once it has the weights."""
    draw = np.random.default_rng(seed)
    k, g, s = draw.standard_normal((d, n)), draw.standard_normal((d, n)), draw.uniform(0.5, 2, n)
    tensors = (torch.from_numpy(x) for x in (k, g, s))
    return Pairs((name,), *tensors, lam), (k, g, s, lam)


@pytest.mark.parametrize("counts", [(2, 3), (5, 9), (1, 1)])
def test_edits_are_solved_together(counts: tuple[int, int]) -> None:
    w = np.random.default_rng(9).standard_normal((6, 10))
    strengths = [0.7, -0.4]
    made = [wishes("w", 10, n, seed, lam) for n, seed, lam in zip(counts, (1, 2), (0.01, 0.5), strict=True)]
    groups = joined([[p] for p, _ in made])
    assert len(groups) == 1
    ((_, delta),) = groups[0].deltas({"w": torch.from_numpy(w)}, torch.tensor(strengths, dtype=torch.float64))
    parts = [(k, w @ g, s, lam) for _, (k, g, s, lam) in made]
    wanted = together(w, parts, strengths) - w
    assert relative((delta.left @ delta.right).numpy(), wanted) < 1e-10
    alone = [textbook(w, k, v, s, lam) - w for k, v, s, lam in parts]
    stacked = sum(g * a for g, a in zip(strengths, alone, strict=True))
    assert relative(stacked, wanted) > 0.01


def test_a_matrix_that_one_edit_touches_is_left_to_it() -> None:
    both, _ = wishes("shared", 8, 2, 1, 0.5)
    first = Pairs(("shared", "first"), both.keys, both.guides, both.weights, 0.5)
    second, (k, g, s, lam) = wishes("shared", 8, 3, 2, 0.1)
    second = Pairs(("shared", "second"), second.keys, second.guides, second.weights, lam)
    groups = joined([[first], [second]])
    assert sorted(g.names for g in groups) == [("first",), ("second",), ("shared",)]
    w = np.random.default_rng(3).standard_normal((4, 8))
    parameters = dict.fromkeys(("shared", "first", "second"), torch.from_numpy(w))
    found = {n: d for g in groups for n, d in g.deltas(parameters, torch.tensor([1.0, 2.0]).double())}
    wanted = 2 * (textbook(w, k, w @ g, s, lam) - w)
    assert relative((found["second"].left @ found["second"].right).numpy(), wanted) < 1e-10


def test_every_method_registers_its_closed_form() -> None:
    from studio.registry import load_methods

    load_methods()
    assert {"quickfix", "locoedit", "uce"} <= set(CLOSED_FORMS)


# ---- speed ------------------------------------------------------------------------------------------------


def test_the_race(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loosely: how much faster the machine makes it is for the benchmark to say."""
    count = {name: sum(c for _, c in shapes) for name, (_, shapes) in LAYOUTS.items()}
    assert count == {"sd1": 32, "sdxl": 140}
    draw = torch.Generator().manual_seed(0)
    found: dict[str, Any] = race("sd1", lambda *shape: torch.randn(shape, generator=draw), repeats=2)
    assert found["matrices"] == 32 and found["ratio"] > 4
    assert found["error"] < 1e-6 < found["textbook_error"]
    assert found["ratio"] == pytest.approx(found["textbook_seconds"] / found["seconds"])
