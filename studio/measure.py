"""Scores of images, each a small function under its name, and the statistics of repeated scores.

A score takes uint8 images (N, H, W, 3), the clean images they belong to, and a Question; it returns (N,)
float64.
CLIP score: Hessel et al., arXiv 2104.08718 (here the plain cosine, without its factor and without clipping).
"""

from __future__ import annotations

from collections.abc import Callable
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
