"""Whether one component carries a feature at all: net shares beside those for random directions.

K: covariances of the components' contributions along the feature's axes E, summed over the axes, after what
the final norm's scale explains is taken out (biases are the same vectors for every image up to that scale, so
their lengths tell it: a constant is no evidence). Net share of component i: sum_j K_ij / tr Cov(z); a
component and the one that undoes it count together, so that both have what is left of them. Placebo: the same
for random orthonormal axes, as many as E has. The line is the 95 % quantile, over such draws, of the largest
net share of any component; only what is above it is evidence that a component writes this feature.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from studio.errors import RequestError

DRAWS = 100
LEVEL = 0.95
CANCELS = 0.1  # a pair whose sum varies less than this part of the larger one counts as one
MOST_NUMBERS = 2**27  # float64 of all covariances: 1 GiB
_SCALES = re.compile(r"block\.\d+\.bias")


class Contributions:
    """Running moments of all components along several sets of axes (k, dim), over images in batches."""

    def __init__(self, bases: Sequence[np.ndarray]) -> None:
        self.bases = [np.asarray(b, float) for b in bases]
        self.labels: tuple[str, ...] = ()
        self.count = 0

    def add(self, components: Mapping[str, np.ndarray]) -> None:
        """One batch: all components (N, dim) of the representation, in the same order every time."""
        x = np.stack([np.asarray(c, float) for c in components.values()], 1)  # (N, C, dim)
        scales = [np.linalg.norm(c, axis=1) for k, c in components.items() if _SCALES.fullmatch(k)]
        scale = np.stack([np.ones(len(x)), *scales], 1)  # (N, q)
        if not self.count:
            self._start(tuple(components), x, scale)
        scale = scale / self.unit
        z = x.sum(1) - self.shift.sum(0)
        self.z, self.zz = self.z + z.sum(0), self.zz + np.square(z).sum()
        x = x - self.shift
        self.scales += scale.T @ scale
        for n, basis in enumerate(self.bases):
            along = (x @ basis.T).transpose(1, 0, 2)  # (C, N, k)
            self.squares[n] += along.reshape(len(along), -1) @ along.reshape(len(along), -1).T
            self.crosses[n] += np.einsum("cik,iq->ckq", along, scale)
        self.count += len(z)

    def _start(self, labels: tuple[str, ...], x: np.ndarray, scale: np.ndarray) -> None:
        need = len(self.bases) * len(labels) ** 2
        if need > MOST_NUMBERS:
            raise RequestError(
                f"The placebo would hold {need:,} numbers for these {len(labels)} components, and at most "
                f"{MOST_NUMBERS:,} are kept; leave it out, or give fewer features."
            )
        self.labels, self.shift = labels, x.mean(0)
        self.unit = np.maximum(scale.mean(0), 1e-30)  # so that rounding is told from a small bias
        self.z, self.zz, self.scales = np.zeros(x.shape[2]), 0.0, np.zeros((scale.shape[1],) * 2)
        self.squares = [np.zeros((len(labels),) * 2) for _ in self.bases]
        self.crosses = [np.zeros((len(labels), len(b), scale.shape[1])) for b in self.bases]

    def net_shares(self) -> np.ndarray:
        """(bases, components): net shares of the representation's variance."""
        variance = self.zz / self.count - np.square(self.z / self.count).sum()
        if not variance > 0:
            raise RequestError("The representation does not vary over these images; take images that differ.")
        inverse = np.linalg.pinv(self.scales, rcond=1e-9, hermitian=True)
        found = []
        for squares, crosses in zip(self.squares, self.crosses, strict=True):
            explained = np.einsum("akq,qr,bkr->ab", crosses, inverse, crosses)
            found.append(net((squares - explained) / self.count) / variance)
        return np.array(found)


def net(covariance: np.ndarray) -> np.ndarray:
    """(C,) covariances with the sum of all, from those among components (C, C); with that of the component
    which undoes it, where there is one."""
    rows, own = covariance.sum(1), np.maximum(np.diag(covariance), 1e-300)
    left = (own[:, None] + own + 2 * covariance) / np.maximum(
        own[:, None], own
    )  # of what a pair's sum varies
    other = left.argmin(1)
    return np.where(left.min(1) < CANCELS, rows + rows[other], rows)


def random_axes(sizes: Sequence[int], dim: int, draws: int = DRAWS, seed: int = 0) -> list[np.ndarray]:
    """For every size k, `draws` sets of random orthonormal axes (k, dim), the same for the same seed."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    found = []
    for k in sizes:
        for _ in range(draws):
            drawn = torch.randn(dim, k, generator=generator, dtype=torch.float64)
            found.append(torch.linalg.qr(drawn)[0].T.numpy())
    return found


class Placebo:
    """The net shares of features' bases, and the line that random axes of as many dimensions reach."""

    def __init__(self, bases: Mapping[str, np.ndarray], dim: int, draws: int = DRAWS) -> None:
        self.names, self.draws = tuple(bases), draws
        self.sizes = [len(b) for b in bases.values()]
        self.distinct = sorted(set(self.sizes))
        self.moments = Contributions([*bases.values(), *random_axes(self.distinct, dim, draws)])

    def add(self, components: Mapping[str, Any]) -> None:
        """One batch of components (N, dim)."""
        self.moments.add(components)

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """(net shares (features, components), lines (features,))."""
        shares = self.moments.net_shares()
        random = shares[len(self.names) :].max(1).reshape(len(self.distinct), self.draws)
        lines = np.quantile(random, LEVEL, axis=1)
        return shares[: len(self.names)], np.array([lines[self.distinct.index(k)] for k in self.sizes])
