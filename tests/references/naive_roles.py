"""Scores of components for a feature in the slow, obvious way: from the contributions of every image."""

from __future__ import annotations

import numpy as np


def naive_roles(
    contributions: dict[str, np.ndarray], basis: np.ndarray
) -> dict[str, tuple[float, float, float]]:
    """{component: (score, mean correlation, share within the feature)} of contributions (images, dim) by
    component, which sum to the representation, and orthonormal rows (k, dim), float64."""
    total = sum(contributions.values())
    z = (total - total.mean(0)) @ basis.T
    found = {}
    for name, c in contributions.items():
        c = c - c.mean(0)
        inside = c @ basis.T
        score = (inside * z).sum() / (z * z).sum()
        flat = c.var(0).sum() < 1e-12 * total.var(0).sum()
        axes = [np.corrcoef(inside[:, k], z[:, k])[0, 1] for k in range(len(basis))] if not flat else [0.0]
        found[name] = (score, float(np.mean(axes)), 0.0 if flat else inside.var(0).sum() / c.var(0).sum())
    return found
