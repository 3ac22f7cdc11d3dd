"""The solver against the textbook form, at real sizes with random weights: what the benchmark calls.

Textbook (as public code has it): for every matrix W' = (lambda W + V K^T)(lambda I + K K^T)^-1 in float32,
with an inverse of d x d of its own. Ours: one factor for all matrices, then every delta W' - W in float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable
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

    draw: a random float32 tensor of that many rows and columns. keys: columns of K. Each form is timed
    `repeats` times and the best counts, since other programs disturb. Ours is timed on all matrices (a random
    one of each width stands for the others), the textbook form on one of each width, times their number.
    """
    width, shapes = LAYOUTS[layout]
    k, guides = draw(width, keys), draw(width, keys)
    matrices = {m: draw(m, width) / width**0.5 for m, _ in shapes}
    whole = [matrices[m] for m, count in shapes for _ in range(count)]
    slow, theirs = 0.0, None
    for m, count in shapes:
        seconds, theirs = _best(lambda m=m: textbook(matrices[m], k, guides, regularization), repeats)
        slow += seconds * count
    fast, ours = _best(lambda: deltas(whole, k, guides, regularization), repeats)
    last = whole[-1]
    exact = textbook(last.double(), k.double(), guides.double(), regularization) - last
    return {
        "matrices": len(whole),
        "seconds": fast,
        "textbook_seconds": slow,
        "ratio": slow / fast,
        "error": _error(ours[-1], exact),
        "textbook_error": _error(theirs - last, exact),
        "how": f"best of {repeats}, {keys} keys; textbook: one matrix of each width, times their number",
    }


def _best(call: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """(seconds of the quickest call, what the last one gave)."""
    seconds, found = [], None
    for _ in range(repeats):
        found = None  # the memory of the last round is free before the next
        started = time.perf_counter()
        found = call()
        seconds.append(time.perf_counter() - started)
    return min(seconds), found


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
