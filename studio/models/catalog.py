"""Known models by name: family, where the weights come from, licence and size. Anything else comes by path
or hub id."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parent.parent
ASSETS = (
    _PACKAGE.parent / "assets" if (_PACKAGE.parent / "assets" / "atlas").is_dir() else _PACKAGE / "assets"
)
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpm": "DPMSolverMultistepScheduler",
    "lcm": "LCMScheduler",
}  # our names to diffusers' classes


@dataclass(frozen=True)
class Entry:
    """One known model. `source` is a hub id, or a folder of assets/ for embedded models; `size` is bytes to
    download."""

    name: str
    family: str
    source: str
    licence: str
    size: int
    note: str
    embedded: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path | None:
        """The folder of an embedded model."""
        return ASSETS / self.source if self.embedded else None


_GB = 10**9
_ENTRIES = (
    Entry(
        "atlas-sd",
        "diffusion",
        "atlas/atlas-sd",
        "Apache-2.0",
        0,
        "small Stable Diffusion of the Atlas world, ready offline",
        True,
        {"steps": 20, "guidance": 3.0, "scorer": "atlas-clip"},
    ),
    Entry(
        "atlas-clip",
        "clip",
        "atlas/atlas-clip",
        "Apache-2.0",
        0,
        "small CLIP of the Atlas world, ready offline",
        True,
    ),
    Entry(
        "stable-diffusion-1.4",
        "diffusion",
        "CompVis/stable-diffusion-v1-4",
        "CreativeML OpenRAIL-M",
        int(4.3 * _GB),
        "512 x 512; the model of most papers",
    ),
    Entry(
        "stable-diffusion-1.5",
        "diffusion",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "CreativeML OpenRAIL-M",
        int(4.3 * _GB),
        "512 x 512",
    ),
    Entry(
        "stable-diffusion-2.1",
        "diffusion",
        "stabilityai/stable-diffusion-2-1",
        "CreativeML OpenRAIL++-M",
        int(5.2 * _GB),
        "768 x 768, v-prediction",
    ),
    Entry(
        "sdxl",
        "diffusion",
        "stabilityai/stable-diffusion-xl-base-1.0",
        "CreativeML OpenRAIL++-M",
        int(13.9 * _GB),
        "1024 x 1024, two text encoders",
        defaults={"guidance": 5.0},
    ),
    Entry(
        "sd-turbo",
        "diffusion",
        "stabilityai/sd-turbo",
        "Stability AI Community",
        int(5.2 * _GB),
        "512 x 512 in one to four steps",
        defaults={"steps": 4, "guidance": 1.0},
    ),
    Entry(
        "sdxl-turbo",
        "diffusion",
        "stabilityai/sdxl-turbo",
        "Stability AI Community",
        int(13.9 * _GB),
        "512 x 512 in one to four steps",
        defaults={"steps": 4, "guidance": 1.0},
    ),
    Entry(
        "lcm-dreamshaper",
        "diffusion",
        "SimianLuo/LCM_Dreamshaper_v7",
        "MIT",
        int(4.3 * _GB),
        "768 x 768 in four to eight steps",
        defaults={"steps": 6, "guidance": 8.0},
    ),
    Entry(
        "clip-vit-b-16",
        "clip",
        "laion/CLIP-ViT-B-16-laion2B-s34B-b88K",
        "MIT",
        int(0.6 * _GB),
        "scores for natural images",
    ),
    Entry(
        "clip-vit-l-14",
        "clip",
        "laion/CLIP-ViT-L-14-laion2B-s32B-b82K",
        "MIT",
        int(1.7 * _GB),
        "scores for natural images",
    ),
)
CATALOG: dict[str, Entry] = {entry.name: entry for entry in _ENTRIES}
DEFAULT_SCORER = "clip-vit-b-16"
