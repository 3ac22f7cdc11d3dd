"""What every model offers to methods, and the check at load that its addresses point at parts that matter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from studio.errors import StudioError


class Model(Protocol):
    """A loaded model. Family modules (diffusion.py …) add their own operations to this."""

    id: str
    family: str
    fingerprint: str
    provides: frozenset[str]

    def components(self) -> Mapping[str, Any]:
        """Modules that hold weights, by the names that edit files use."""

    def nbytes(self) -> int:
        """Memory of the weights."""


def self_check(model: Any) -> None:
    """Zeroes a few sites of each kind in one forward and asserts that the output changes; StudioError names
    a dead site.

    Public tools fail silently when a library renames a module; this is where such a change would be seen.
    """
    if not hasattr(model, "zeroing_changes"):
        return
    changes = model.zeroing_changes()
    for site, change in changes.items():
        if not np.isfinite(change):
            raise StudioError(
                f"{model.id} gives no finite numbers at {site}: its weights hold NaN or infinity; "
                "copy or download it again."
            )
        if change == 0:
            raise StudioError(
                f"{model.id} does not react when {site} is zeroed, so a trace there would mean nothing; "
                "this model's layout is not supported."
            )
