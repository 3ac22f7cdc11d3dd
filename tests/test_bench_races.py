"""The benchmark of language models and vision transformers: rows of the right form, at small sizes."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from studio import bench, language_race, vision_race
from studio.bench import ENTRIES
from tests.test_bench import hold_to_form

SESSION = SimpleNamespace(threads=1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The entries set one thread."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("race", ["trace_race", "knockout_race"])
def test_a_language_race_is_one_row(race: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    monkeypatch.setattr(language_race, "LLAMA", language_race.LLAMA | size | {"num_key_value_heads": 4})
    monkeypatch.setattr(language_race, "SAMPLED", 3)
    where = {"subject": (3, 4)} if race == "trace_race" else {}
    for bar in (1e-9, 1e9):
        rows = bench._language(race, bar, tokens=9, repeats=1, **where)(SESSION, None, print)
        hold_to_form(rows)
        assert len(rows) == 1 and rows[0]["holds"] is (bar < 1) and "9 tokens" in rows[0]["name"]


def test_the_cost_of_a_decomposition_is_four_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        "ratios": {"heads": 1.01, "tokens": 1.2, "adjoint": 1.3},
        "memory": 0.2,
        "how": "told",
        "error": 1e-7,
    }
    monkeypatch.setattr(vision_race, "race", lambda *args, **options: found)
    rows = bench.decomposition_cost(SESSION, None, print)
    hold_to_form(rows)
    assert [r["holds"] for r in rows] == [True, False, True, True]


def test_every_figure_that_was_asked_for_has_an_entry() -> None:
    names = {e.name for e in ENTRIES}
    assert {"language-trace-40", "language-trace-late", "language-trace-240"} <= names
    assert {"knockout-40", "knockout-240", "decompose-cost", "solver-sd1", "solver-sdxl"} <= names
