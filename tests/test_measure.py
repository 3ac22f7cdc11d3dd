"""Scores and statistics against numbers that can be done by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from studio.errors import RequestError
from studio.measure import METRICS, Question, rank_agreement, score, standard_error

NAN = math.nan


class FlatScorer:
    """A scorer of two axes: images by their brightness (dark: first axis), texts by a table."""

    id, scale = "flat", 2.0
    words = {"dark": (1.0, 0.0), "light": (0.0, 1.0), "grey": (0.6, 0.8), "": (0.0, 1.0)}

    def image_features(self, images: np.ndarray) -> np.ndarray:
        """(1, 0) of a black image, (0, 1) of any other."""
        bright = images.mean(axis=(1, 2, 3)) > 0
        return np.stack([~bright, bright], axis=1).astype(np.float32)

    def text_features(self, texts: list[str]) -> np.ndarray:
        """The table's rows."""
        return np.array([self.words[t] for t in texts], np.float32)


def images(*greys: int) -> np.ndarray:
    """One image of 2 x 2 pixels for each grey."""
    return np.stack([np.full((2, 2, 3), g, np.uint8) for g in greys])


def ask(metric: str, target: str, against: str | None = None) -> list[float]:
    """Scores of a black and a white image."""
    both = images(0, 255)
    return score(metric, both, both, Question(target, against), FlatScorer()).tolist()


def test_clip_is_the_cosine() -> None:
    assert ask("clip", "grey") == pytest.approx([0.6, 0.8])


def test_clip_subtracts_the_other_text() -> None:
    assert ask("clip", "grey", "dark") == pytest.approx([-0.4, 0.8])


def test_probability_is_a_softmax_of_two() -> None:
    high = 1 / (1 + math.exp(-2))  # logits 2 and 0 at a scale of 2
    assert ask("probability", "dark", "light") == pytest.approx([high, 1 - high])
    assert ask("probability", "dark") == ask("probability", "dark", "light")  # "" points where "light" does


def test_distance_is_minus_the_root_mean_square() -> None:
    question = Question("ignored")
    found = score("distance", images(0, 255, 51), images(0, 0, 0), question, None)
    assert found.tolist() == pytest.approx([0.0, -1.0, -0.2])
    assert found.dtype == np.float32


def test_distance_of_one_pixel() -> None:
    changed = images(0)
    changed[0, 0, 0, :] = 255  # 3 of 12 numbers are off by 1: sqrt(3 / 12)
    assert score("distance", changed, images(0), Question(""), None)[0] == pytest.approx(-0.5)


@pytest.mark.parametrize("metric", sorted(set(METRICS) - {"distance"}))
def test_other_metrics_need_a_scorer(metric: str) -> None:
    with pytest.raises(RequestError, match=f"{metric} needs a scorer"):
        score(metric, images(0), images(0), Question("dark"), None)


def test_standard_error_has_one_degree_less() -> None:
    found = standard_error(np.array([[1.0, 5.0], [3.0, 5.0]], np.float32))
    assert found.tolist() == pytest.approx([1.0, 0.0])  # sd sqrt(2), over sqrt(2)


def test_standard_error_over_another_axis() -> None:
    assert standard_error(np.array([[0.0, 2.0, 4.0]]), axis=1).tolist() == pytest.approx([2 / math.sqrt(3)])


def test_standard_error_of_one_value_is_nan() -> None:
    found = standard_error(np.zeros((1, 2, 3)))
    assert found.shape == (2, 3) and np.isnan(found).all()


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1, 2, 3], [10, 20, 30], 1.0),
        ([1, 2, 3], [9, 4, 1], -1.0),
        ([1, 2, 3, 4], [1, 2, 4, 3], 0.8),  # 1 - 6 * 2 / (4 * 15)
        ([1, NAN, 2, 3, 9], [1, 5, 2, 3, NAN], 1.0),
        ([1, 2, NAN], [1, 2, 3], NAN),
        ([5, 5, 5], [1, 2, 3], NAN),
    ],
)
def test_rank_agreement(a: list[float], b: list[float], expected: float) -> None:
    found = rank_agreement(np.array(a, float), np.array(b, float))
    assert found == pytest.approx(expected, nan_ok=True)
