"""Scores and statistics against numbers that can be done by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from studio.errors import RequestError
from studio.measure import (
    METRICS,
    Question,
    chance_line,
    nested_bootstrap,
    rank_agreement,
    ratio_of_means,
    score,
    standard_error,
)

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


# ---- intervals and chance --------------------------------------------------------------------------------


def every_resample(values: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(means of all nested resamples (N, *cell), their probabilities): every choice of prompts, and for each
    of them every choice of its seeds."""
    means, chances = [], []
    for prompts in itertools.product(range(len(values)), repeat=len(values)):
        picks = [list(itertools.product(range(len(values[p])), repeat=len(values[p]))) for p in prompts]
        for seeds in itertools.product(*picks):
            rows = [values[p][list(s)].mean(0) for p, s in zip(prompts, seeds, strict=True)]
            means.append(np.mean(rows, axis=0))
            chances.append(1 / np.prod([len(pick) for pick in picks]))
    return np.array(means), np.array(chances) / len(values) ** len(values)


@pytest.mark.parametrize("seeds", [(5,), (4,), (3, 2), (1, 1, 1), (2, 2, 2)])
def test_bootstrap_is_that_of_all_resamples(seeds: tuple[int, ...]) -> None:
    rng = np.random.default_rng(7)
    values = [rng.normal(size=(n, 2, 3)) + p for p, n in enumerate(seeds)]
    low, high = nested_bootstrap(values, level=0.9)
    means, chances = every_resample(values)
    assert chances.sum() == pytest.approx(1) and low.shape == high.shape == (2, 3)
    for bound, share in ((low, 0.05), (high, 0.95)):  # float32 bounds: an atom within 1e-5 counts as reached
        below = ((means < bound - 1e-5) * chances[:, None, None]).sum(0)
        upto = ((means <= bound + 1e-5) * chances[:, None, None]).sum(0)
        assert (below <= share + 0.02).all() and (upto >= share - 0.02).all()


def test_bootstrap_repeats_and_follows_its_seed() -> None:
    values = [np.random.default_rng(0).normal(size=(6, 4))]
    first = nested_bootstrap(values, draws=200)
    np.testing.assert_array_equal(first, nested_bootstrap(values, draws=200))
    assert not np.array_equal(first, nested_bootstrap(values, draws=200, seed=1))


def test_bootstrap_of_what_is_not_measured_is_nan() -> None:
    values = np.ones((3, 2))
    values[1, 0] = NAN
    low, high = nested_bootstrap([values])
    np.testing.assert_array_equal(low, [NAN, 1])
    np.testing.assert_array_equal(high, [NAN, 1])
    assert np.isnan(nested_bootstrap([np.ones((1, 2))])).all()


def test_bootstrap_covers_the_truth_as_often_as_it_says() -> None:
    """400 sets of 12 prompts whose effects differ, 3 seeds each: 95 % asked for, a little less is usual."""
    rng = np.random.default_rng(1)
    sets = rng.normal(size=(12, 1, 400)) + 0.5 * rng.normal(size=(12, 3, 400))  # 400 sets as cells, truth 0
    low, high = nested_bootstrap(list(sets))
    assert 0.87 < ((low < 0) & (high > 0)).mean() < 0.99


@pytest.mark.parametrize("n", [2, 3, 5, 6])
def test_chance_line_is_that_of_all_sign_flips(n: int) -> None:
    effects = np.random.default_rng(n).normal(size=(n, 3, 2)) + 0.3
    largest = sorted(
        max(sum(s * e for s, e in zip(signs, cell, strict=True)) / n for cell in effects.reshape(n, -1).T)
        for signs in itertools.product((1, -1), repeat=n)
    )
    place = math.ceil(0.95 * len(largest)) - 1
    assert chance_line(effects) == pytest.approx(largest[place], rel=1e-12)


def test_chance_line_of_many_seeds_is_near_that_of_all_flips() -> None:
    effects = np.random.default_rng(3).normal(size=(14, 5))
    signs = np.array(list(itertools.product((1, -1), repeat=14)))
    whole = np.quantile((signs @ effects / 14).max(1), 0.95)
    assert chance_line(effects) == pytest.approx(whole, rel=0.05)


def test_chance_is_exceeded_as_rarely_as_it_says() -> None:
    rng = np.random.default_rng(5)
    null = [rng.normal(size=(6, 10)) for _ in range(400)]
    assert np.mean([(e.mean(0) > chance_line(e)).any() for e in null]) <= 0.05 + 0.025
    found = [e + 4 * (np.arange(10) == 3) for e in null[:50]]
    assert np.mean([np.argmax(e.mean(0)) == 3 and e.mean(0)[3] > chance_line(e) for e in found]) > 0.9


def test_under_five_seeds_nothing_lies_above_the_line() -> None:
    for n in (2, 3, 4):
        effects = 1 + 0.01 * np.random.default_rng(n).normal(size=(n, 4))
        assert chance_line(effects) >= effects.mean(0).max() - 1e-12
    assert chance_line(np.ones((5, 4)) * [1, 2, 3, 4]) < 4


def test_there_is_no_line_for_one_seed_or_without_numbers() -> None:
    assert math.isnan(chance_line(np.ones((1, 3)))) and math.isnan(chance_line(np.full((3, 2), NAN)))
    assert chance_line(np.array([[1.0, NAN], [1.0, 2.0]])) == 1.0  # a cell that is not whole is left out


def test_ratio_of_means() -> None:
    np.testing.assert_allclose(ratio_of_means(np.array([1.0, NAN]), 4.0), [0.25, NAN])
    assert np.isnan(ratio_of_means(np.ones(2), 0.0)).all() and np.isnan(ratio_of_means(np.ones(2), NAN)).all()
