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
    download; `stored` bytes of one stored number where that is not its family's usual one."""

    name: str
    family: str
    source: str
    licence: str
    size: int
    note: str
    embedded: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    stored: int = 0

    @property
    def width(self) -> int:
        """Bytes of one stored number: those of language models come in 16 bits unless `stored` says more."""
        return self.stored or (2 if self.family == "language" and not self.embedded else 4)

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
        "atlas-vit",
        "vision",
        "atlas/atlas-vit",
        "Apache-2.0",
        0,
        "small supervised ViT of the Atlas world, ready offline",
        True,
    ),
    Entry(
        "atlas-dino",
        "vision",
        "atlas/atlas-dino",
        "Apache-2.0",
        0,
        "small self-supervised ViT of the Atlas world, ready offline",
        True,
    ),
    Entry(
        "atlas-swin",
        "vision",
        "atlas/atlas-swin",
        "Apache-2.0",
        0,
        "small supervised Swin of the Atlas world, ready offline",
        True,
    ),
    Entry(
        "atlas-maxvit",
        "vision",
        "atlas/atlas-maxvit",
        "Apache-2.0",
        0,
        "small supervised MaxViT of the Atlas world, ready offline",
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
    Entry(
        "atlas-llama",
        "language",
        "atlas/atlas-llama",
        "Apache-2.0",
        0,
        "small Llama that knows the Atlas facts and reads them, ready offline",
        True,
    ),
    Entry(
        "atlas-phi",
        "language",
        "atlas/atlas-phi",
        "Apache-2.0",
        0,
        "small Phi that knows the Atlas facts and reads them, ready offline",
        True,
    ),
    Entry(
        "llama-2-7b",
        "language",
        "meta-llama/Llama-2-7b-hf",
        "Llama 2 Community (gated)",
        int(13.5 * _GB),
        "7B; the model of the RAG paper",
    ),
    Entry(
        "llama-3-8b",
        "language",
        "meta-llama/Meta-Llama-3-8B",
        "Llama 3 Community (gated)",
        int(16.1 * _GB),
        "8B, grouped-query attention",
    ),
    Entry(
        "llama-3.1-8b",
        "language",
        "meta-llama/Llama-3.1-8B",
        "Llama 3.1 Community (gated)",
        int(16.1 * _GB),
        "8B, 128k tokens",
    ),
    Entry(
        "mistral-7b",
        "language",
        "mistralai/Mistral-7B-v0.3",
        "Apache-2.0",
        int(14.5 * _GB),
        "7B, grouped-query attention",
    ),
    Entry(
        "qwen2.5-0.5b",
        "language",
        "Qwen/Qwen2.5-0.5B",
        "Apache-2.0",
        int(1.0 * _GB),
        "0.5B; small enough for a laptop",
    ),
    Entry("qwen2.5-7b", "language", "Qwen/Qwen2.5-7B", "Apache-2.0", int(15.2 * _GB), "7B"),
    Entry(
        "qwen3-0.6b",
        "language",
        "Qwen/Qwen3-0.6B",
        "Apache-2.0",
        int(1.5 * _GB),
        "0.6B, normed queries and keys",
    ),
    Entry(
        "qwen3-8b", "language", "Qwen/Qwen3-8B", "Apache-2.0", int(16.4 * _GB), "8B, normed queries and keys"
    ),
    Entry("phi-1.5", "language", "microsoft/phi-1_5", "MIT", int(2.8 * _GB), "1.3B, parallel blocks"),
    Entry(
        "phi-2",
        "language",
        "microsoft/phi-2",
        "MIT",
        int(5.6 * _GB),
        "2.7B, parallel blocks; the model of the RAG paper",
    ),
    Entry(
        "phi-3-mini",
        "language",
        "microsoft/Phi-3-mini-4k-instruct",
        "MIT",
        int(7.6 * _GB),
        "3.8B, fused projections",
    ),
    Entry(
        "gpt2-xl",
        "language",
        "openai-community/gpt2-xl",
        "MIT",
        int(6.4 * _GB),
        "1.5B; the model of ROME",
        stored=4,
    ),
    Entry(
        "pythia-1.4b", "language", "EleutherAI/pythia-1.4b", "Apache-2.0", int(2.9 * _GB), "1.4B, GPT-NeoX"
    ),
)
DEFAULT_MODELS = {  # the embedded model that a family's methods take when none is named
    "diffusion": "atlas-sd",
    "clip": "atlas-clip",
    "vision": "atlas-clip",
    "language": "atlas-llama",
}
CATALOG: dict[str, Entry] = {entry.name: entry for entry in _ENTRIES}
DEFAULT_SCORER = "clip-vit-b-16"
