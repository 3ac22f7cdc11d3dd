"""Edits as overlays: deltas read from an edit file, added to a model for the length of a `with`, undone
whatever happens."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from studio.errors import RequestError
from studio.types import Edit


def read_edit(path: str | Path) -> Edit:
    """Reads an edit file (safetensors, contract); RequestError when it isn't one."""
    from safetensors import SafetensorError, safe_open

    path = Path(os.path.expanduser(path))
    if not os.path.isfile(path):
        raise RequestError(f"There is no edit file {str(path)[:200]}.")
    try:
        with safe_open(path, "np") as opened:
            note = opened.metadata() or {}
            kinds = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
            deltas = {name: opened.get_tensor(name) for name, kind in kinds.items() if kind == "F32"}
    except (SafetensorError, OSError) as error:
        raise RequestError(
            f"{path} is no safetensors file, or it is cut short; save the edit again."
        ) from error
    foreign = RequestError(
        f"{path} is no edit file of Locus: its metadata lack locus.base_fingerprint, its names are foreign, "
        "or its deltas are not float32."
    )
    if (
        "locus.base_fingerprint" not in note
        or set(kinds) != set(deltas)
        or any(not n.startswith(("unet.", "text_encoder")) for n in deltas)
    ):
        raise foreign
    try:
        concepts = json.loads(note.get("locus.concepts", "[]"))
        replacements = json.loads(note.get("locus.replacements", "[]"))
        params = json.loads(note.get("locus.params", "{}"))
    except ValueError as error:
        raise foreign from error
    if not isinstance(concepts, list) or not isinstance(params, dict) or not isinstance(replacements, list):
        raise foreign
    return Edit(
        deltas,
        note["locus.base_fingerprint"],
        tuple(concepts),
        params,
        note.get("locus.method", ""),
        tuple(replacements),
    )


def edit_hash(path: str | Path) -> str:
    """SHA-256 of an edit file's bytes."""
    return hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()


@contextmanager
def overlay(model: Any, edits: Iterable[Edit], *, force: bool = False) -> Iterator[None]:
    """Adds the edits to the model's weights and puts the very same weights back at the end, also after an
    error.

    RequestError, before anything is touched, when an edit was made for other weights (unless `force`) or
    does not fit.
    """
    import torch

    edits = list(edits)
    parameters = {
        f"{part}.{name}": p
        for part, module in model.components().items()
        for name, p in module.named_parameters()
    }
    for edit in edits:
        if edit.base_fingerprint != model.fingerprint and not force:
            raise RequestError(
                f"This edit was made for weights {edit.base_fingerprint[:12]}…, and {model.id} has "
                f"{model.fingerprint[:12]}…; use it with its own model, or insist with --force."
            )
        for name, delta in edit.deltas.items():
            if name not in parameters or parameters[name].shape != delta.shape:
                raise RequestError(
                    f"The edit changes {name}, which {model.id} has not in that shape; it is for another "
                    f"model."
                )
    saved = {name: parameters[name].detach().clone() for edit in edits for name in edit.deltas}
    try:
        with torch.no_grad():
            for edit in edits:
                for name, delta in edit.deltas.items():
                    p = parameters[name]
                    p.add_(torch.tensor(delta).to(p.device, p.dtype))
        yield
    finally:
        with torch.no_grad():
            for name, value in saved.items():
                parameters[name].copy_(value)
