"""TextSpan in the slow, obvious way: on the contributions of every image, as the paper's algorithm has it."""

from __future__ import annotations

import numpy as np


def naive_text_span(
    contributions: np.ndarray, texts: np.ndarray, length: int, rank: int
) -> tuple[list[int], list[float]]:
    """(picks, shares of variance) of contributions (images, dim) of one head and texts (K, dim) float64."""
    _, sizes, directions = np.linalg.svd(contributions, full_matrices=False)
    directions = directions[: min(rank, int((sizes > 1e-5 * sizes[0]).sum()))]
    texts = texts @ directions.T @ directions
    left = contributions - contributions.mean(0)
    whole = left.var(0).sum()
    picks, shares = [], []
    for _ in range(min(length, len(directions))):
        spread = (left @ texts.T).std(0)
        best = int(spread.argmax())
        unit = texts[best] / np.linalg.norm(texts[best])
        picks.append(best)
        shares.append(float((left @ unit).var() / whole))
        left = left - np.outer(left @ unit, unit)
        texts = texts - np.outer(texts @ unit, unit)
    return picks, shares
