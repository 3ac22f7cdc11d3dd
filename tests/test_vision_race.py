"""The race of the decomposition against a plain forward, on a model that takes no time."""

from __future__ import annotations

import pytest
import torch

from studio import vision_race


@pytest.mark.parametrize(("name", "kinds"), [("test_vit", {"heads", "tokens", "adjoint"})])
def test_the_race_measures_every_contender(monkeypatch: pytest.MonkeyPatch, name: str, kinds: set) -> None:
    monkeypatch.setattr(vision_race, "MODELS", {"tiny": {"model_name": name, "num_classes": 0}})
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    found = vision_race.race(
        "tiny", lambda *shape: torch.randn(*shape, generator=generator), batch=2, texts=3, rounds=2
    )
    assert set(found["ratios"]) == kinds and all(r > 0 for r in found["ratios"].values())
    assert found["seconds"] > 0 and found["memory"] >= 0 and 0 < found["error"] <= 2e-6
    assert found["how"] == "tiny, batch 2, 3 texts, 1 thread, least of 2 rounds"
