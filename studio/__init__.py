"""Locus, an interpretability studio: the public names, loaded on first use, so that a saved run opens
without torch."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "Axis": "types",
    "Edit": "types",
    "Figure": "types",
    "Patch": "types",
    "Recipe": "types",
    "RequestError": "errors",
    "Run": "types",
    "Session": "session",
    "Site": "types",
    "Store": "store",
    "StudioError": "errors",
    "Trace": "types",
    "read_run": "store",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"studio has no {name!r}")
    return getattr(import_module(f"studio.{_HOMES[name]}"), name)
