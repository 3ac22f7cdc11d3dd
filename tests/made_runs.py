"""A finished trace with made-up numbers, quick to save and draw: what exports and restoring are tested on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from studio.registry import find_method
from studio.store import Store
from studio.types import Axis, Figure, Recipe, Result, Run, Trace

LAYERS = tuple(
    f"{block}.attentions.{i}.transformer_blocks.0.attn2"
    for block in ("down_blocks.0", "mid_block", "up_blocks.1")
    for i in (0, 1)
)
EFFECTS = np.array([0.1, -0.05, np.nan, 0.2, 0.0, 1e-7], np.float32)
PROMPT = 'a "red" @star & 50% {x}_y $größer$'


def traced(**changes: Any) -> Run:
    """A run of trace-unet; one layer was not measured."""
    recipe = Recipe(
        "trace-unet",
        "atlas-sd",
        {"prompt": PROMPT, "subject": "red"},
        {"kinds": ["cross-attention"], "screen": False, "noise": 3.0},
        (0, 7),
    )
    layers, seeds = Axis("layer", LAYERS), Axis("seed", ("0", "7"))
    arrays = {
        "indirect_effect": Trace(EFFECTS, (layers,), "cosine"),
        "indirect_effect_sem": Trace(np.abs(EFFECTS) / 3, (layers,), "cosine"),
        "clean": Trace(np.array([0.3, 0.4], np.float32), (seeds,), "cosine"),
    }
    images = {"seed0-clean": np.full((8, 8, 3), 200, np.uint8)}
    host = {"device": "cpu", "dtype": "float32", "threads": 1, "batch": 16, "machine": "x86_64"}
    run = Run(
        recipe,
        "done",
        "2026-11-21T18:00:00+00:00",
        1.0,
        host,
        Result(arrays, {"total_effect": 0.2, "noise": 3.0, "guidance": 7.5}, images),
        key="ab" * 32,
        model={"id": "atlas-sd", "fingerprint": "cd" * 32},
    )
    return replace(run, **changes)


def figure_of(run: Run) -> Figure:
    """The method's own figure."""
    return find_method(run.recipe.method).draw(run)


def saved(store: Store, **changes: Any) -> Run:
    """The run in a store, with its figure."""
    run = traced(**changes)
    return store.save(run, figure_of(run))
