"""On a GPU (marker gpu, run by hand): the same images and effects as on the CPU, within what float32 and half
precision allow, and weights that stay as they were."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from studio import Recipe
from studio.session import Session

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]

GENERATE = Recipe("generate", "atlas-sd", {"prompt": ["a red star", "two blue hearts"]}, {}, (0, 1))
TRACE = Recipe(
    "trace-unet",
    "atlas-sd",
    {"prompt": "a red star on a white background", "subject": "red star"},
    {"kinds": ["cross-attention"], "steps": 8, "hint": False},
    (0, 1),
)


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float16"])
def card(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """A session on the first card, in each number type."""
    opened = Session(runs=tmp_path_factory.mktemp("card"), device="cuda", dtype=request.param)
    yield opened
    opened.close()


def pixels(session: Session) -> np.ndarray:
    """Images of GENERATE as float."""
    return session.run(GENERATE, save=False, fresh=True).result.arrays["images"].values.astype(float)


def test_images_are_those_of_the_cpu(card: Session, session: Session) -> None:
    difference = np.abs(pixels(card) - pixels(session))
    assert difference.mean() < {"float32": 0.5, "bfloat16": 12, "float16": 3}[card.dtype]


def test_effects_are_those_of_the_cpu(card: Session, session: Session) -> None:
    mine, theirs = (s.run(TRACE, save=False).result.arrays["indirect_effect"].values for s in (card, session))
    assert np.abs(mine - theirs).max() < {"float32": 0.01, "bfloat16": 0.2, "float16": 0.05}[card.dtype]


def test_an_edit_is_undone_bit_for_bit(card: Session, tmp_path: Path) -> None:
    made = card.run(
        Recipe("edit", "atlas-sd", {"concept": ["star"], "replacement": ["circle"]}, {"images": False}),
        out=tmp_path / "run",
    )
    model = card.model("atlas-sd", "diffusion")
    before = {n: p.clone() for n, p in model.unet.named_parameters()}
    assert made.status == "done"
    card.run(with_edit(GENERATE, tmp_path / "run" / "edit.safetensors"), save=False)
    assert all(torch.equal(before[n], p) for n, p in model.unet.named_parameters())


def with_edit(recipe: Recipe, file: Path) -> Any:
    """The recipe under one edit."""
    return Recipe(recipe.method, recipe.model, recipe.inputs, recipe.params, recipe.seeds, (str(file),))


def test_out_of_memory_halves_the_batch(card: Session) -> None:
    model = card.model("atlas-sd", "diffusion")
    free, _ = torch.cuda.mem_get_info()
    card.batch = 4096
    held = torch.empty(int(free * 0.97), dtype=torch.uint8, device="cuda")
    try:
        run = card.run(
            Recipe("generate", "atlas-sd", {"prompt": ["a red star"]}, {"steps": 2}, tuple(range(2048))),
            save=False,
            fresh=True,
        )
    finally:
        del held
        card.batch = 64
    assert run.host["batch"] < 4096 and run.result.arrays["images"].values.shape[1] == 2048
    assert model.fingerprint
