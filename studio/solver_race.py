"""The solver against the textbook form, at real sizes with random weights: what the benchmark calls.

Textbook (as public code has it): for every matrix W' = (lambda W + V K^T)(lambda I + K K^T)^-1 in float32,
with an inverse of d x d of its own. Ours: one factor for all matrices, then every delta W' - W in float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

LAYOUTS = {  # input width d, and (output width, how many matrices) of attn2.to_k and to_v
    "sd1": (768, ((320, 10), (640, 10), (1280, 12))),
    "sdxl": (2048, ((640, 20), (1280, 120))),
}


def race(
    layout: str,
    draw: Callable[[int, int], Any],
    *,
    keys: int = 4,
    regularization: float = 0.5,
    repeats: int = 3,
) -> dict[str, Any]:
    """Seconds of both forms for all matrices of a layout, and their largest errors against float64.

    draw: a random float32 tensor of that many rows and columns. keys: columns of K. Both forms run in turn,
    `repeats` times, and the best of each counts, since other programs disturb. Ours is timed on all matrices
    (a random one of each width stands for the others), the textbook form on one of each width, times their
    number.
    """
    width, shapes = LAYOUTS[layout]
    k, guides = draw(width, keys), draw(width, keys)
    matrices = {m: draw(m, width) / width**0.5 for m, _ in shapes}
    whole = [matrices[m] for m, count in shapes for _ in range(count)]
    calls: dict[int, Callable[[], Any]] = {0: lambda: deltas(whole, k, guides, regularization)}
    calls |= {m: partial(textbook, matrices[m], k, guides, regularization) for m, _ in shapes}
    best, found = _in_turn(calls, repeats)
    fast, slow = best[0], sum(best[m] * count for m, count in shapes)
    last = whole[-1]
    exact = textbook(last.double(), k.double(), guides.double(), regularization) - last
    return {
        "matrices": len(whole),
        "seconds": fast,
        "textbook_seconds": slow,
        "ratio": slow / fast,
        "error": _error(found[0], exact),
        "textbook_error": _error(found[shapes[-1][0]] - last, exact),
        "how": f"in turn, best of {repeats}, {keys} keys; textbook: one matrix a width, times their number",
    }


def _in_turn(calls: Mapping[int, Callable[[], Any]], repeats: int) -> tuple[dict[int, float], dict[int, Any]]:
    """(seconds of the quickest run of each call, the last matrix it gave); every round runs each once."""
    best, found = dict.fromkeys(calls, float("inf")), {}
    for _ in range(repeats):
        for name, call in calls.items():
            started = time.perf_counter()
            made = call()
            best[name] = min(best[name], time.perf_counter() - started)
            found[name] = made[-1] if isinstance(made, list) else made
            del made  # the memory of one form is free before the next
    return best, found


def textbook(weight: Any, keys: Any, guides: Any, regularization: float) -> Any:
    """W' (m, d) of one matrix by the inverse of a d x d matrix; values are W guides."""
    import torch

    eye = torch.eye(len(keys), dtype=keys.dtype)
    left = regularization * weight + weight @ guides @ keys.T
    return left @ torch.linalg.inv(regularization * eye + keys @ keys.T)


def deltas(matrices: Any, keys: Any, guides: Any, regularization: float) -> list[Any]:
    """The deltas (m, d) float32 of all matrices by the shared factor."""
    import torch

    from studio.edits import Factor, merge_equal, product

    k, (g,), s = merge_equal(keys.double(), [guides.double()], torch.ones(keys.shape[1], dtype=torch.float64))
    factor, step = Factor.of(k, s / regularization), g - k
    return [factor.apply(product(w, step)).dense() for w in matrices]


def _error(found: Any, exact: Any) -> float:
    return float((found - exact).abs().max() / exact.abs().max())
