"""The benchmark of shares, memory and slow ways, at small sizes."""

from __future__ import annotations

import time
from typing import Any

import psutil
import pytest
import torch

from studio import naive_image_race, naive_race, share_race
from studio import naive_vision_race as vision
from studio.errors import RequestError
from studio.naive_image_race import attribute, audit, edit, generate, lens, neurons, trace_text_encoder
from tests.test_bench_costs import covers, hold, numbers, one_thread, tiny

__all__ = ["one_thread", "tiny"]  # fixtures


# ---- shares and memory ------------------------------------------------------------------------------------


def test_time_in_forwards_is_the_outermost_alone_and_modules_are_left_as_they_were() -> None:
    class Busy(torch.nn.Module):
        def forward(self, inner: Any = None) -> None:
            until = time.process_time() + 0.05
            while time.process_time() < until:
                pass
            if inner:
                inner()

    outer, inner = Busy(), Busy()
    started = time.process_time()
    with share_race.forward_time([outer, inner]) as seconds, pytest.raises(KeyError):
        outer(inner)
        whole = time.process_time() - started
        raise KeyError
    assert 0.1 <= seconds[0] <= whole and not {"forward", "decode"} & set(vars(outer))


def test_shares_of_image_methods(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    names = list(share_race.image_calls(tiny, 2, 4))
    more = ["decompose", "retrieve-images", "trace-language", "knockout", "contributions"]
    covers("share of forwards", [*names, *more, "attribute", "context-use"])
    calls = share_race.image_calls(tiny, 2, 4)
    monkeypatch.setattr(
        share_race,
        "image_calls",
        lambda *_: {"generate": calls["generate"], "none": lambda: sum(range(200_000))},
    )
    found = share_race.image_shares(tiny, steps=2, rows=4, rounds=1)
    hold(found, "share of forwards: generate", "share of forwards: none")
    assert 0.3 < found[0]["value"] <= 1 and found[1]["value"] == 0


def test_every_image_method_of_the_shares_runs(tiny: Any) -> None:
    for call in share_race.image_calls(tiny, 1, 8).values():
        with share_race.forward_time([tiny.unet, *tiny.encoders.values()]) as inside:
            call()
        assert inside[0] > 0


def test_shares_of_language_methods() -> None:
    found = share_race.language_shares(numbers(), tokens=12, layers=3, rounds=1)
    hold(found, *(f"share of forwards: {n}" for n in ("trace-language", "knockout", "contributions")))
    assert all(0 < f["value"] < 2 for f in found)


def test_shares_of_methods_that_read_images_or_go_backwards(tiny: Any, session: Any) -> None:
    found = share_race.vision_shares(session.model("atlas-clip", "vision"), rounds=1)
    hold(found, "share of forwards: decompose", "share of forwards: retrieve-images")
    assert all(0 < f["value"] < 1 for f in found)
    language = session.model("atlas-llama", "language")
    found = share_race.counted_shares(tiny, language, steps=1, rounds=1)
    hold(found, "share of forwards: attribute", "share of forwards: context-use")
    assert all(0 < f["value"] < 3 for f in found)


def test_memory_is_measured_in_a_process_of_its_own() -> None:
    before = share_race.peak()
    block = bytearray(before - psutil.Process().memory_info().rss + 200_000_000)
    block[::4096] = b"x" * len(block[::4096])
    assert share_race.peak() - before > 100_000_000  # kept although it is freed now
    del block
    (found,) = share_race.memory_growth(1, ["contributions"])
    hold([found], "memory: contributions")
    assert 0 <= found["value"] < 0.3 and "one forward of 16 prompts" in found["how"]
    covers("memory", share_race.MEMORY)


# ---- slow ways --------------------------------------------------------------------------------------------


def test_slow_ways_at_small_sizes(tiny: Any, session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = naive_race.beside
    for module in (naive_race, naive_image_race, vision):
        monkeypatch.setattr(module, "beside", lambda *args: real(*args, rounds=1))
    rows = naive_race.text_span(numbers(), 60, 20, 30, 8) + naive_race.align(numbers(), 60, 12, 8)
    rows += naive_race.contributions(numbers(), 12, 2)
    rows += naive_race.context_use(session.model("atlas-llama", "language"))
    for race in (naive_race.trace_unet, naive_race.localize, naive_race.word_maps, naive_race.fisher):
        rows += race(tiny, steps=2)
    for race in (generate, trace_text_encoder, lens, neurons, attribute, edit, audit):
        rows += race(tiny, **({"steps": 2} if race not in (neurons, edit) else {}))
    rows += vision.decompose(numbers(), 2) + vision.retrieve_images(numbers(), 2)
    rows += vision.rank_components(numbers(), 50, 4, 8) + vision.ablate_components(numbers(), 2, 3)
    names = "text-span|align, closed form|contributions|context-use|trace-unet|localize|word-maps|passport, "
    names += "Fisher scores|generate|trace-text-encoder|lens|neurons|attribute|edit|audit|decompose|"
    names += "retrieve-images|rank-components|ablate-components"
    hold(rows, *(f"beside the slow way: {n}" for n in names.split("|")))
    assert all(r["value"] > 0 for r in rows)
    covers("beside the slow way", [n.split(",")[0] for n in names.split("|")])


def test_the_slow_way_counts_as_often_as_it_would_run(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(naive_race, "quickest", lambda c, rounds, cpu: {"fast": 2.0, "slow": 3.0})
    found = naive_race.beside("x", lambda: calls.append("fast"), lambda: calls.append("slow"), 10, "y")
    assert found["value"] == 15 and calls == ["fast", "slow"] and "2 s to 30 s" in found["how"]


def test_without_the_references_it_is_said_where_they_are() -> None:
    with pytest.raises(RequestError, match="tests/references/nothing.py. is not installed; run it in a"):
        naive_race.reference("nothing")
    assert naive_race.reference("naive_text_span").naive_text_span
