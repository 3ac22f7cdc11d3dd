"""What methods of a vision transformer's components share: in whose text space they are scored."""

from __future__ import annotations

from dataclasses import dataclass

from studio.registry import knob


@dataclass(frozen=True, kw_only=True)
class SpaceParams:
    """The CLIP whose texts are used, and how a model that is no CLIP gets there."""

    clip: str | None = knob(
        None, "CLIP whose texts are used; default the model itself if it is one", weights=True
    )
    aligner: str | None = knob(
        None, "file of `locus align` that maps this model's components into the CLIP's space", paths=True
    )
