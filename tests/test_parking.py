"""The models of the running job stay on the device until it ends, however tight memory is."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from studio.errors import Cancelled, StudioError
from studio.models.loaded import needed_bytes
from studio.models.loading import locate
from studio.models.parking import Parking
from studio.session import Session
from studio.types import Recipe

SCORED = Recipe("generate", "atlas-sd", {"prompt": ["a red star"], "steps": 1, "metric": "clip"}, {}, (0,))


class Away(Parking):
    """Stands for another device: parked weights are float64, which nothing else can be computed with."""

    def _to_host(self, tensor: Any) -> Any:
        return tensor.double()


def size(name: str) -> int:
    """Bytes of a model in memory."""
    return needed_bytes(locate(name), "float32")


def tight(tmp_path: Path, memory: int) -> Session:
    """A session with so many bytes for models, and a host with room for all that must leave the device."""
    session = Session(runs=tmp_path / "runs", device="cpu", threads=1, memory=memory)
    session.parking = Away("cpu", room=lambda: 10**12)
    return session


@pytest.fixture
def narrow(tmp_path: Path) -> Iterator[Session]:
    """Room for the generator, or for its scorer, a little too small for both."""
    session = tight(tmp_path, int(size("atlas-sd") + 0.5 * size("atlas-clip")))
    yield session
    session.close()


@pytest.fixture
def words(tmp_path: Path) -> Iterator[Session]:
    """Room for one of two language models."""
    session = tight(tmp_path, int(1.5 * max(size("atlas-llama"), size("atlas-phi"))))
    yield session
    session.close()


def names(session: Session) -> list[str]:
    """The models on the device."""
    return [name for name, _ in session.loaded()]


def test_a_scorer_does_not_drive_the_generator_out(narrow: Session) -> None:
    run = narrow.run(SCORED)
    assert run.status == "done" and names(narrow) == ["atlas-sd", "atlas-clip"] and len(narrow.parking) == 0
    generator = narrow.model("atlas-sd", "diffusion")
    assert {p.dtype for m in generator.components().values() for p in m.parameters()} == {torch.float32}


def test_what_the_job_does_not_use_leaves_first(narrow: Session) -> None:
    narrow.model("atlas-llama", "language")
    assert narrow.run(SCORED).status == "done"
    assert names(narrow) == ["atlas-sd", "atlas-clip"] and len(narrow.parking) == 1


def test_a_device_without_room_for_both_is_a_sentence(
    narrow: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("studio.models.parking.free_memory", lambda device: 0)
    with pytest.raises(StudioError) as raised:
        narrow.run(SCORED)
    assert str(raised.value) == (
        "atlas-clip needs about 0.0 GB beside the other models of this run, more than is free on cpu; take a "
        "smaller model or --dtype."
    )
    assert names(narrow) == ["atlas-sd"] and len(narrow.parking) == 0


@pytest.mark.parametrize("end", [None, ZeroDivisionError("bug"), Cancelled(), KeyboardInterrupt()])
def test_they_may_leave_once_the_job_has_ended(words: Session, end: BaseException | None) -> None:
    """Whatever way it ends."""

    def both(model: Any) -> None:
        words.model("atlas-phi", "language")
        assert names(words) == ["atlas-llama", "atlas-phi"] and len(words.parking) == 0
        if end is not None:
            raise end

    if end is None:
        words.call("atlas-llama", both, kind="language")
    else:
        with pytest.raises(type(end)):
            words.call("atlas-llama", both, kind="language")
    words._memory = int(1.1 * size("atlas-clip"))
    words.model("atlas-clip", "clip")
    assert names(words) == ["atlas-clip"] and len(words.parking) == 2


def test_another_thread_does_not_move_what_a_job_uses(words: Session) -> None:
    begun, go = threading.Event(), threading.Event()

    def wait(model: Any) -> Any:
        begun.set()
        assert go.wait(60)
        return {p.dtype for p in model.net.parameters()}

    told: list[Any] = []
    job = threading.Thread(target=lambda: told.append(words.call("atlas-llama", wait, kind="language")))
    job.start()
    assert begun.wait(60)
    words.model("atlas-phi", "language")
    go.set()
    job.join(60)
    assert told == [{torch.float32}] and len(words.parking) == 0


def test_without_a_job_the_least_recently_used_leaves(words: Session) -> None:
    first = words.model("atlas-llama", "language")
    words.model("atlas-phi", "language")
    assert names(words) == ["atlas-phi"] and len(words.parking) == 1
    assert all(p.dtype == torch.float64 for p in first.net.parameters())
