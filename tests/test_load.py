"""The load test itself, small: two clients for some seconds, so that it can be trusted with 32."""

from __future__ import annotations

import pytest

from tests.load import Options, load


@pytest.mark.slow
def test_two_clients_get_their_own_answers() -> None:
    found = load(Options(clients=2, minutes=0.5))
    slow = {"memory flat", "healthz within 1 s", "fair turns"}  # 15 s a batch are too few to tell
    assert {what: found["holds"][what] for what in found["holds"] if what not in slow} == {
        "no result to the wrong person": True,
        "no lost run": True,
        "nothing refused": True,
        "weights untouched": True,
    }
    assert not found["tracebacks"] and found["healthz_missed"] == 0
    assert found["different_runs"] >= 2 and sum(found["done"].values()) >= 4
