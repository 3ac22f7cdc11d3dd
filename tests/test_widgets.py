"""What all panels share: how a job is followed."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from panels import widgets
from studio.jobs import Job
from studio.types import Recipe


def test_a_change_is_shown_at_once_and_then_it_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most eight times a second, and what comes after a rest waits for nothing."""
    job, did = Job(1, "me", Recipe("generate", "m")), []

    def wait(version: int, seconds: float) -> int:
        did.append(f"wait for more than {version - job.version:+d}")
        job.step()
        if job.done == 3:
            job.finish("done")
        return job.version

    monkeypatch.setattr(job, "wait", wait)
    resting = SimpleNamespace(wait=lambda seconds: did.append(f"rest {seconds}"))
    monkeypatch.setattr(threading, "Event", lambda: resting)
    for shown in widgets.follow(job):
        did.append(f"show {shown.done}")
    each = ["rest 0.12", "wait for more than +0"]
    assert did == ["show 0", *each, "show 1", *each, "show 2", *each, "show 3"]


def test_what_changes_while_it_is_shown_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(1, "me", Recipe("generate", "m"))
    monkeypatch.setattr(threading, "Event", lambda: SimpleNamespace(wait=lambda seconds: None))
    seen = []
    for shown in widgets.follow(job):
        seen.append(shown.done)
        if shown.done < 3:
            job.step()
        elif not job.over:
            job.finish("done")
    assert seen == [0, 1, 2, 3, 3]
