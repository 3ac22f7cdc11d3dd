"""Paths of secret files in every parameter of every endpoint, with runs that come to their end: what a
stranger gets back holds nothing of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from panels.api_parameters import Parameter, parameters
from panels.api_values import EXAMPLES, asked
from studio.errors import RequestError, StudioError
from studio.registry import find_method
from studio.session import Session
from tests.faults import TABLE
from tests.smallest import SMALLEST

SECRET = "TOPSECRET-77b0e2"
ENDINGS = ("txt", "csv", "jsonl", "json", "safetensors", "png")


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files that must not be read."""
    folder: Path = tmp_path_factory.mktemp("secrets")
    for ending in ENDINGS:
        (folder / f"secret.{ending}").write_text(SECRET)
    Image.new("RGB", (64, 64), (1, 2, 3)).save(folder / "secret.png")  # one that could be read
    save_file({"x": np.ones((2, 2), np.float32)}, folder / "secret.safetensors", {"x": SECRET})
    return folder


@pytest.fixture(scope="module")
def edit(session: Session, atlas: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The id of an edit that the store holds."""
    given = {"concept": ["star"], "replacement": ["circle"], "images": False, "layers": ["auto"]}
    return session.run(asked(session, find_method("edit"), {**given, "steps": 2}).recipe).id


def forged(parameter: Parameter, folder: Path, number: int) -> Iterator[Any]:
    """Values that name a secret file, in the shapes that the parameter may take."""
    path = str(folder / f"secret.{ENDINGS[number % len(ENDINGS)]}")
    given: list[Any] = [[path, f"@{path}", f"file://{path}", str(folder)][number % 4], {"path": path}]
    if parameter.kind != "value":  # what may stand for a file: each kind of file, each form
        paths = [str(folder / f"secret.{ending}") for ending in ENDINGS]
        given = [*paths, str(folder), *({"path": p, "meta": {"_type": "gradio.FileData"}} for p in paths)]
    yield from ([value] for value in given) if "list" in str(parameter.hint) else given


@pytest.mark.parametrize("name", TABLE)
def test_no_parameter_hands_a_file_over(session: Session, secrets: Path, edit: str, name: str) -> None:
    method, answers, refused, done = find_method(name), [], 0, 0
    plain = dict(SMALLEST[name])
    plain |= {"images": [EXAMPLES]} if method.family == "vision" else {}
    plain |= {"model": "atlas-vit"} if name == "align" else {}
    plain |= {"edit": [edit]} if method.lays_edits else {}
    for number, parameter in enumerate(parameters(method)):
        for value in forged(parameter, secrets, number):
            try:
                ask = asked(session, method, {**plain, parameter.name: value})
                run = session.run(ask.recipe, fresh=True)
            except StudioError as error:
                answers.append(str(error).encode())
                refused += isinstance(error, RequestError)
            else:
                assert parameter.kind in ("value", "seeds", "strengths", "force"), (parameter.name, value)
                done += 1
                kept = session.store.root / run.id
                answers += [file.read_bytes() for file in kept.rglob("*") if file.is_file()]
    assert refused > 3 and (done or name == "align")  # which takes no text
    assert not [answer[:300] for answer in answers if SECRET.encode() in answer]
