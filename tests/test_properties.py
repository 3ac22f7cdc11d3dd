"""What holds for any input: values of any kind, seeds, spans, edits and labels. Whole runs are in
test_properties_runs.py.

A request is answered or refused in a sentence, never with a traceback; and algebra holds.
"""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from studio import figures
from studio.edits import merge_equal, solve
from studio.errors import RequestError, StudioError
from studio.models.tokens import find_span
from studio.registry import find_method, load_methods, parse, parse_seeds, plain
from studio.types import Axis, Trace
from tests.smallest import SMALLEST

QUICK = settings(
    deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck), max_examples=60
)
FEW = settings(QUICK, max_examples=12)

_SCRIPTS = st.sampled_from(
    [
        "שלום עולם",
        "مرحبا بالعالم",
        "日本語の文",
        "👩‍👩‍👧‍👦 🇪🇺",
        "e\u0301\u0323",
        "\u202eright to left",
        "a\x00b\tc\n\nd",
        "${1+1}",
    ]
)
TEXTS = st.one_of(
    st.text(min_size=1, max_size=80),
    _SCRIPTS,
    st.text("ab 界🙂\u200d", min_size=1, max_size=12).map(lambda t: (t * 10_000)[:10_000]),
)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    TEXTS,
    st.lists(st.one_of(st.text(max_size=9), st.integers(-9, 99), st.none()), max_size=4),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)


def told(error: StudioError) -> None:
    """A sentence for a person: of a readable length, on one line, with an end."""
    said = str(error)
    assert 10 < len(said) < 700 and said.strip() == said and "Traceback" not in said


# ---- requests ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(load_methods()))
@given(data=st.data())
@settings(QUICK, max_examples=25)
def test_any_value_of_any_knob_is_taken_or_refused_in_a_sentence(name: str, data: Any) -> None:
    method = find_method(name)
    knobs = [f.name for record in (method.inputs, method.params) for f in fields(record)]
    given_ = dict(SMALLEST[name]) | data.draw(st.dictionaries(st.sampled_from(knobs), VALUES, max_size=3))
    try:
        inputs, params, _ = parse(method, given_)
        if method.check:
            method.check(inputs, params, method.seeds)
    except RequestError as error:
        told(error)
    else:  # what was taken means the same when it is read back
        record = {**plain(inputs), **plain(params)}
        again = parse(method, json.loads(json.dumps(record)))
        assert again[:2] == (inputs, params)


@given(st.one_of(VALUES, st.lists(st.integers(-5, 2**33), max_size=5)))
@QUICK
def test_seeds_are_whole_numbers_once_each_or_refused(value: Any) -> None:
    try:
        seeds = parse_seeds(find_method("generate"), value)
    except RequestError as error:
        told(error)
    else:
        assert seeds and len(set(seeds)) == len(seeds) and all(0 <= s < 2**32 for s in seeds)
        assert parse_seeds(find_method("generate"), ",".join(map(str, seeds))) == seeds


@given(st.text(max_size=60), st.text(max_size=8), st.one_of(st.none(), st.integers(-2, 9)))
@QUICK
def test_a_span_is_what_was_asked_for_or_refused(text: str, part: str, occurrence: int | None) -> None:
    try:
        start, end = find_span(text, part, occurrence, "subject")
    except RequestError as error:
        told(error)
    else:
        found, asked = text[start:end], part.strip()
        assert re.fullmatch(re.escape(asked), found, re.IGNORECASE)


# ---- algebra of edits -------------------------------------------------------------------------------------

SIZES = st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 12), st.integers(0, 2**31))


def drawn(sizes: tuple[int, int, int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys (d, n), values (m, n), weights (n,) and a matrix (m, d), float64."""
    m, d, n, seed = sizes
    rng = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(rows, n, generator=rng, dtype=torch.float64) for rows in (d, m))
    weights = torch.rand(n, generator=rng, dtype=torch.float64) + 0.1
    return keys, values, weights, torch.randn(m, d, generator=rng, dtype=torch.float64)


def delta(keys: Any, values: Any, weights: Any, matrix: Any) -> torch.Tensor:
    """The edit of one matrix, (m, d) float64."""
    found = solve([matrix], keys, [values], weights, 1.0)[0]
    return found.left @ found.right


@given(SIZES, st.randoms(use_true_random=False))
@QUICK
def test_an_edit_does_not_depend_on_the_order_of_its_concepts(sizes: Any, shuffle: Any) -> None:
    keys, values, weights, matrix = drawn(sizes)
    order = list(range(keys.shape[1]))
    shuffle.shuffle(order)
    one, other = (
        delta(keys, values, weights, matrix),
        delta(keys[:, order], values[:, order], weights[order], matrix),
    )
    assert torch.allclose(one, other, atol=1e-9, rtol=1e-9)


@given(SIZES)
@QUICK
def test_a_concept_given_twice_is_one_of_twice_the_weight(sizes: Any) -> None:
    keys, values, weights, matrix = drawn(sizes)
    twice = (torch.cat([keys, keys], 1), torch.cat([values, values], 1), torch.cat([weights, weights]))
    merged, (values_,), summed = merge_equal(twice[0], [twice[1]], twice[2])
    assert merged.shape[1] <= keys.shape[1] and torch.isclose(summed.sum(), 2 * weights.sum())
    expected = delta(keys, values, 2 * weights, matrix)
    assert torch.allclose(delta(merged, values_, summed, matrix), expected, atol=1e-8)


@given(SIZES)
@QUICK
def test_keys_that_give_what_is_asked_already_change_nothing(sizes: Any) -> None:
    keys, _, weights, matrix = drawn(sizes)
    assert delta(keys, matrix @ keys, weights, matrix).abs().max() < 1e-9


@given(SIZES)
@QUICK
def test_an_edit_never_misses_by_more_than_before(sizes: Any) -> None:
    keys, values, weights, matrix = drawn(sizes)
    missed = ((values - matrix @ keys).square() * weights).sum()
    changed = delta(keys, values, weights, matrix)
    left = ((values - (matrix + changed) @ keys).square() * weights).sum() + changed.square().sum()
    assert left <= missed * (1 + 1e-9) + 1e-12


# ---- figures ----------------------------------------------------------------------------------------------


@given(st.lists(st.text(max_size=30), min_size=1, max_size=5, unique=True), st.data())
@settings(FEW, max_examples=10)
def test_numbers_with_labels_of_any_script_leave_as_csv_and_come_back(labels: list[str], data: Any) -> None:
    assume(not any(c in label for label in labels for c in "\r\x00"))
    numbers = st.floats(width=32)
    values = np.array(data.draw(st.lists(numbers, min_size=len(labels), max_size=len(labels))), np.float32)
    trace = Trace(values, (Axis("layer", tuple(labels)),), "")
    header, *rows = csv.reader(io.StringIO(figures.to_csv({"effect": trace}), newline=""))
    assert [row[1] for row in rows] == [f"layer={label}" for label in labels]
    assert np.allclose([float(row[2]) for row in rows], values, rtol=1e-6, equal_nan=True)
