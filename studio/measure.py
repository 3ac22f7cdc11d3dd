"""Scores of images, each a small function under its name, and the statistics of repeated scores.

A score takes uint8 images (N, H, W, 3), the clean images they belong to, and a Question; it returns (N,)
float64.
CLIP score: Hessel et al., arXiv 2104.08718 (here the plain cosine, without its factor and without clipping).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from studio.errors import RequestError


class Scorer(Protocol):
    """A model that puts images and texts in one space."""

    id: str
    scale: float

    def image_features(self, images: np.ndarray) -> np.ndarray:
        """Unit vectors (N, D) of images (N, H, W, 3) uint8."""

    def text_features(self, texts: list[str]) -> np.ndarray:
        """Unit vectors (N, D)."""


@dataclass(frozen=True)
class Question:
    """What images are scored for: the text to find, and the text that it is set against."""

    target: str
    against: str | None = None


Score = Callable[[np.ndarray, np.ndarray, Question, Scorer | None], np.ndarray]


def clip(images: np.ndarray, clean: np.ndarray, question: Question, scorer: Scorer | None) -> np.ndarray:
    """Cosine of each image with the target, minus that with `against` where given."""
    texts = [question.target] + ([question.against] if question.against else [])
    cosine = (
        scorer.image_features(images).astype(np.float64) @ scorer.text_features(texts).astype(np.float64).T
    )
    return cosine[:, 0] - cosine[:, 1] if question.against else cosine[:, 0]


def probability(
    images: np.ndarray, clean: np.ndarray, question: Question, scorer: Scorer | None
) -> np.ndarray:
    """Zero-shot probability of the target beside `against` (beside the empty text when there is none)."""
    texts = scorer.text_features([question.target, question.against or ""]).astype(np.float64)
    logits = scorer.scale * scorer.image_features(images).astype(np.float64) @ texts.T
    return 1 / (1 + np.exp(logits[:, 1] - logits[:, 0]))


def distance(images: np.ndarray, clean: np.ndarray, question: Question, scorer: Scorer | None) -> np.ndarray:
    """Minus the root mean square pixel difference (range 0 to 1) to the clean image."""
    difference = (images.astype(np.float64) - clean.astype(np.float64)) / 255
    return 0.0 - np.sqrt((difference**2).mean(axis=(1, 2, 3)))  # never a minus zero


METRICS: dict[str, Score] = {"clip": clip, "distance": distance, "probability": probability}


def score(
    metric: str, images: np.ndarray, clean: np.ndarray, question: Question, scorer: Scorer | None
) -> np.ndarray:
    """The metric of that name, float32 (N,); refuses a metric that needs a scorer when there is none."""
    if metric != "distance" and scorer is None:
        raise RequestError(
            f"The metric {metric} needs a scorer; name one with --scorer, or take --metric distance."
        )
    return METRICS[metric](images, clean, question, scorer).astype(np.float32)


def standard_error(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """Standard error of the mean over `axis` with ddof 1; NaN where there is one value."""
    n = values.shape[axis]
    if n < 2:
        return np.full(np.delete(values.shape, axis), np.nan, np.float32)
    return (values.astype(np.float64).std(axis=axis, ddof=1) / np.sqrt(n)).astype(np.float32)


def rank_agreement(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of two maps, over the entries where both have a number; NaN for under
    three."""
    both = np.isfinite(a) & np.isfinite(b)
    if both.sum() < 3 or np.ptp(a[both]) == 0 or np.ptp(b[both]) == 0:
        return float("nan")
    from scipy.stats import spearmanr

    return float(spearmanr(a[both], b[both]).statistic)


# ---- repeated measurements -------------------------------------------------------------------------------

LEVEL = 0.95
_RESAMPLES = 2000
_FLIPS = 4096
_ALL_FLIPS = 12  # up to so many seeds every sign vector is tried


def nested_bootstrap(
    values: Sequence[np.ndarray], *, level: float = LEVEL, draws: int = _RESAMPLES, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(low, high), the percentile interval of the mean of every cell, float32 in the shape of a cell.

    `values`: one array (seed, *cell) a prompt; noise draws count as seeds. The mean is over prompts of their
    means over seeds. Each draw takes as many prompts as there are, with replacement, and within each of them
    as many seeds as it has: prompts are the unit. One prompt alone has its seeds resampled. A cell with a NaN
    has none, nor has anything when there is one prompt of one seed. Few seeds make it too narrow.
    """
    flat = [np.asarray(v, np.float64).reshape(len(v), -1) for v in values]
    shape, bounds = values[0].shape[1:], np.full((2, flat[0].shape[1]), np.nan, np.float32)
    whole = np.all([np.isfinite(v).all(0) for v in flat], axis=0)
    if whole.any() and (len(flat) > 1 or len(flat[0]) > 1):
        means = np.zeros((draws, int(whole.sum())))
        for slot in range(len(flat)):
            chosen = _drawn(len(flat), (draws,), seed, 2 * slot)
            for p, v in enumerate(flat):
                mine = np.flatnonzero(chosen == p)
                picked = _drawn(len(v), (draws, len(v)), seed, 2 * slot + 1)[mine]
                counts = (picked[:, :, None] == np.arange(len(v))).sum(1)
                means[mine] += counts @ v[:, whole] / len(v)
        bounds[:, whole] = np.quantile(means / len(flat), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return bounds[0].reshape(shape), bounds[1].reshape(shape)


def chance_line(effects: np.ndarray, *, level: float = LEVEL, seed: int = 0) -> float:
    """What chance reaches: the quantile `level` of the largest mean over all cells when the signs of seeds
    are flipped, as they may be where no cell has an effect. NaN for under two seeds.

    `effects` (seed, *cell); a seed's sign is one for all of its cells, so that their correlation stays. All
    2^n sign vectors for up to 12 seeds, else 4,096 drawn ones, the true one among them. A mean above the line
    stands at the level 1 - `level` over all cells together; under five seeds none can.
    """
    flat = np.asarray(effects, np.float64).reshape(len(effects), -1)
    flat, n = flat[:, np.isfinite(flat).all(0)], len(flat)
    if n < 2 or not flat.shape[1]:
        return float("nan")
    if n <= _ALL_FLIPS:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        signs = 1 - 2 * _drawn(2, (_FLIPS, n), seed, 0)
        signs[0] = 1
    return float(np.quantile((signs @ flat / n).max(1), level, method="inverted_cdf"))


def ratio_of_means(effect: np.ndarray, total: float) -> np.ndarray:
    """Mean effects as shares of the mean total effect, float32; NaN where there is no total effect."""
    if not np.isfinite(total) or total == 0:
        return np.full(np.shape(effect), np.nan, np.float32)
    return (np.asarray(effect, np.float64) / total).astype(np.float32)


def _drawn(n: int, shape: tuple[int, ...], seed: int, stream: int) -> np.ndarray:
    """Whole numbers from 0 to n - 1, the same for the same seed and stream on every machine and version of
    NumPy: SplitMix64 (Steele, Lea, Flood 2014) of a counter."""
    x = np.arange(int(np.prod(shape)), dtype=np.uint64) + np.uint64((((seed << 16) + stream) << 32) % 2**64)
    x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return ((x >> np.uint64(11)).astype(np.float64) * 2.0**-53 * n).astype(np.int64).reshape(shape)
