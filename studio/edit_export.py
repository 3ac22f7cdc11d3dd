"""Edits for other programs: a LoRA in diffusers' layout where the change has a low rank, a whole pipeline
always."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from studio.edits import Active, compose, overlay
from studio.errors import RequestError
from studio.exports import write_pipeline
from studio.store import write_tensors
from studio.types import Edit

TOLERANCE = 1e-6  # of the norm of a change: what float32 deltas hold of it


def export_edits(
    model: Any, active: Sequence[Active], *, lora: Path | None, full: Path | None, force: bool = False
) -> None:
    """Writes the composed edits as a LoRA file, and the model with them in its weights as a folder."""
    deltas = compose(model, active, force=force)
    if lora is not None:
        write_tensors(lora_tensors(deltas), {"format": "pt"}, lora)
    if full is not None:
        with overlay(model, active, force=force):
            write_pipeline(model.pipe, full)


def composed(model: Any, active: Sequence[Active]) -> Edit:
    """Active edits at their strengths as one edit, which is no closed form any more (method "stack")."""
    own = [a.strength * a.edit.params.get("strength", 1.0) for a in active]
    parts = [
        {**a.edit.params, "method": a.edit.method, "strength": s} for a, s in zip(active, own, strict=True)
    ]
    deltas = {n: d.float().cpu().numpy() for n, d in compose(model, active).items()}
    concepts = tuple(c for a in active for c in a.edit.concepts)
    others = tuple(r for a in active for r in a.edit.replacements)
    return Edit(deltas, model.fingerprint, concepts, {"parts": parts}, "stack", others)


def lora_tensors(deltas: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """LoRA tensors (float32, names as diffusers saves them) of deltas by parameter name; all of one component
    have the same rank, so that every loader scales them by 1.

    RequestError for what a LoRA can't hold: a bias, or a change of high rank.
    """
    from studio.models.sites import stored_text_name

    parts: dict[str, dict[str, tuple[Any, Any]]] = {}
    for name, delta in deltas.items():
        part, module = name.split(".", 1)
        if delta.ndim != 2 or not module.endswith(".weight"):
            raise RequestError(
                f"A LoRA can't hold the change of {name}, only those of matrices; take the whole model "
                "(--full)."
            )
        module = module.removesuffix(".weight")
        module = stored_text_name(module) if part.startswith("text_encoder") else module
        parts.setdefault(part, {})[module] = low_rank(name, delta)
    out: dict[str, np.ndarray] = {}
    for part, modules in parts.items():
        rank = max(up.shape[1] for up, _ in modules.values())
        for module, (up, down) in modules.items():
            empty = rank - up.shape[1]
            out[f"{part}.{module}.lora_A.weight"] = _padded(down, (0, 0, 0, empty))
            out[f"{part}.{module}.lora_B.weight"] = _padded(up, (0, empty))
    return out


def _padded(matrix: Any, room: tuple[int, ...]) -> np.ndarray:
    import torch

    return torch.nn.functional.pad(matrix, room).float().cpu().numpy()


def low_rank(name: str, delta: Any) -> tuple[Any, Any]:
    """(up (m, r), down (r, d)) float64 whose product is the delta (m, d), by the largest column that is left,
    again and again; RequestError when r would be more than half of what the matrix allows."""
    import torch

    rest = delta.cpu().double().clone()
    least, basis = TOLERANCE * rest.norm(), []
    while rest.norm() > least:
        if len(basis) >= min(rest.shape) // 2:
            raise RequestError(
                f"The change of {name} has no low rank, so it makes no LoRA; take the whole model (--full)."
            )
        column = rest[:, rest.square().sum(0).argmax()]
        for q in basis:  # once more, against what rounding left of the others
            column = column - q * (q @ column)
        q = column / column.norm()
        basis.append(q)
        rest -= torch.outer(q, q @ rest)
    up = torch.stack(basis, 1) if basis else rest[:, :1] * 0
    return up, up.T @ delta.cpu().double()
