"""Whatever fails while a method computes, in every method: no hook, no overlay, no lock and no half run
stays, the weights are bit-identical, a person is told a sentence, and the next run is as it always was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from panels.widgets import sentence
from studio.errors import Cancelled, StudioError
from studio.registry import find_method, load_methods
from studio.session import Session
from tests.faults import LONG, METHODS, TABLE, Methods, failing_at, same, speaking, spread
from tests.smallest import SMALLEST
from tests.test_session import edit_file

HOOKLESS = ("attribute", "audit", "generate", "lens")  # read what the models' own forwards give


@pytest.fixture(scope="module")
def methods(session: Session, atlas: Any, tmp_path_factory: pytest.TempPathFactory) -> Methods:
    """The table of all methods."""
    folder: Path = tmp_path_factory.mktemp("faults")
    return Methods(session, folder, str(edit_file(atlas, folder / "edit.safetensors")))


def test_the_table_holds_every_method() -> None:
    assert set(SMALLEST) == set(load_methods())


@pytest.mark.parametrize("name", TABLE)
def test_every_method_that_takes_an_edit_runs_under_one_here(methods: Methods, name: str) -> None:
    method = find_method(name)
    laid = methods.clean(name).run.host.get("edits", [])
    assert len(laid) == (method.family == "diffusion" and not method.saves)


# ---- in the model, in a hook ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLE)
def test_an_exception_in_the_model(methods: Methods, name: str) -> None:
    clean = methods.clean(name)
    with methods.unharmed():
        with failing_at(clean.forwards // 2, ZeroDivisionError("injected")):
            with pytest.raises(ZeroDivisionError) as raised:
                methods.run(name)
    assert "Something went wrong inside" in sentence(raised.value)
    assert same(methods.run(name, go_on=True, save=False), clean.run)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_an_exception_anywhere_in_the_model(methods: Methods, name: str) -> None:
    clean = methods.clean(name)
    for call in spread(clean.forwards, 8):
        with methods.unharmed(call), failing_at(call, ZeroDivisionError("injected")):
            with pytest.raises(ZeroDivisionError):
                methods.run(name)
        assert same(methods.run(name, go_on=True, save=False), clean.run), call


@pytest.mark.parametrize("name", TABLE)
def test_an_exception_in_a_hook(methods: Methods, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    clean, reached = methods.clean(name), []

    def broken(*_: Any, **__: Any) -> None:
        reached.append(1)
        raise ZeroDivisionError("injected")

    def breaking(register: Any) -> Any:
        return lambda module, hook, **options: register(module, broken, **options)

    for kind in ("register_forward_hook", "register_forward_pre_hook"):
        monkeypatch.setattr(torch.nn.Module, kind, breaking(getattr(torch.nn.Module, kind)))
    with methods.unharmed():
        if name in HOOKLESS:
            methods.run(name, save=False)
        else:
            with pytest.raises(ZeroDivisionError):
                methods.run(name)
    monkeypatch.undo()
    assert bool(reached) == (name not in HOOKLESS)
    assert same(methods.run(name, save=False), clean.run)


# ---- stopped ----------------------------------------------------------------------------------------------


def _stopped_at(methods: Methods, name: str, words: list[int]) -> None:
    for word in words:
        with methods.unharmed(word), speaking(word), pytest.raises(Cancelled):
            methods.run(name)
    assert same(methods.run(name, go_on=True, save=False), methods.clean(name).run)


@pytest.mark.parametrize("name", TABLE)
def test_stopped_at_some_steps(methods: Methods, name: str) -> None:
    words = methods.clean(name).words
    assert words > 1, "it can't be stopped while it runs"
    _stopped_at(methods, name, [words // 2])


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_stopped_at_every_step(methods: Methods, name: str) -> None:
    _stopped_at(methods, name, spread(methods.clean(name).words, 10**6 if name not in LONG else 20))


# ---- out of memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLE)
def test_memory_that_runs_out_once(methods: Methods, name: str) -> None:
    """The batch is halved and the run goes on; its numbers are those of the whole batch."""
    clean = methods.clean(name)
    with methods.unharmed(), failing_at(clean.forwards // 2, torch.OutOfMemoryError("injected")):
        again = methods.run(name, save=False)
    assert any("the batch was halved" in w for w in again.result.values["warnings"])
    for array, trace in clean.run.result.arrays.items():
        near = dict(atol=2e-3 * max(1, np.abs(trace.values).max(initial=0)), rtol=0, equal_nan=True)
        assert np.allclose(trace.values, again.result.arrays[array].values, **near), array


@pytest.mark.parametrize("name", TABLE)
def test_memory_that_never_suffices(methods: Methods, name: str) -> None:
    methods.clean(name)
    with methods.unharmed(), failing_at(None, None, always=torch.OutOfMemoryError("injected")):
        with pytest.raises(StudioError, match="not enough memory"):
            methods.run(name)
