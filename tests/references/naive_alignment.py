"""The pieces of an aligner's fit in the slow, obvious way: float64, one part, one image after the other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def naive_ridge(x: np.ndarray, z: np.ndarray, weight: float) -> tuple[np.ndarray, np.ndarray]:
    """(maps (F, width), bias (width,)): least squares with F more rows sqrt(lambda) 1, x and z centred.
    lambda is `weight` times the mean sum of squares of a column."""
    centred, target = x - x.mean(0), z - z.mean(0)
    damping = np.sqrt(weight * np.square(centred).sum() / x.shape[1] + 1e-12)
    rows = np.concatenate([centred, damping * np.eye(x.shape[1])])
    maps = np.linalg.lstsq(rows, np.concatenate([target, np.zeros((x.shape[1], z.shape[1]))]), rcond=None)[0]
    return maps, z.mean(0) - x.mean(0) @ maps


def naive_polar(matrix: np.ndarray) -> np.ndarray:
    """M (M'M)^-1/2, or (MM')^-1/2 M for a wide one."""
    if matrix.shape[0] < matrix.shape[1]:
        return naive_polar(matrix.T).T
    sizes, directions = np.linalg.eigh(matrix.T @ matrix)
    return matrix @ (directions / np.sqrt(sizes)) @ directions.T


def naive_loss(
    x: np.ndarray, z: np.ndarray, maps: np.ndarray, bias: np.ndarray, sizes: Sequence[int], weight: float
) -> float:
    """mean(1 - cos) + weight * mean over parts of the squared distance of the Gram from 1, by its size."""
    misses = []
    for row, target in zip(x, z, strict=True):
        y, start = bias.copy(), 0
        for size in sizes:
            y = y + row[start : start + size] @ maps[start : start + size]
            start += size
        misses.append(1 - y @ target / np.linalg.norm(y) / np.linalg.norm(target))
    distances, start = [], 0
    for size in sizes:
        u = maps[start : start + size]
        start += size
        gram = u.T @ u if len(u) >= u.shape[1] else u @ u.T
        distances.append(np.square(gram - np.eye(len(gram))).sum() / len(gram))
    return float(np.mean(misses) + weight * np.mean(distances))
