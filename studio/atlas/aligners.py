"""`python -m studio.atlas.aligners [MODEL …]`: aligners of the Atlas vision models into atlas-clip's space.

Each is fitted on renderings of the combinations that training sees and measured on renderings of those that
it never sees: the cosine of the whole, and the cosine of every part with maps that were planted. The files go
to assets/atlas/aligners in float16, the figures, measured after that rounding, into the card beside them.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from studio.atlas.render import render
from studio.atlas.world import draw_scenes
from studio.models.aligner import note
from studio.models.alignment import (
    Coordinates,
    Fit,
    Settings,
    embeddings,
    part_cosines,
    planted_truth,
    total_cosines,
)
from studio.models.catalog import ASSETS
from studio.models.component_space import Space
from studio.models.loading import locate
from studio.models.vision import ClipModel
from studio.models.vit import VisionModel
from studio.store import write_tensors

FOLDER = ASSETS / "atlas" / "aligners"
BLOCKS = {"atlas-vit": 5, "atlas-dino": 5, "atlas-swin": 2, "atlas-maxvit": 3}  # with maps of their own
_COLUMNS = {
    "blocks": "last blocks with maps",
    "images": "pictures",
    "cosine": "cosine with the CLIP",
    "centred": "both centred first",
    "planted_cosine": "planted: cosine of the whole",
    "planted_part_cosine": "planted: cosine of a part",
    "planted_ridge": "the same, ridge alone",
    "planted_random": "the same, random start",
}


@dataclass(frozen=True)
class Options:
    """What to make."""

    models: tyro.conf.Positional[tuple[str, ...]] = tuple(BLOCKS)
    """models to make aligners of"""
    images: int = 2000
    """renderings to fit on; a quarter as many more to measure on"""
    steps: int = 400
    """steps of Adam after the closed form"""
    seed: int = 0
    """of the renderings"""


def main(options: Options) -> None:
    """Makes the aligners and writes the card; models that were not asked for keep their lines."""
    torch.set_num_threads(1)
    clip = ClipModel(locate("atlas-clip"), "cpu")
    known = FOLDER / "figures.json"
    rows = json.loads(known.read_text()) if known.exists() else {}
    for name in options.models:
        rows[name] = make(name, clip, options)
        print(name, json.dumps(rows[name]), flush=True)
        known.write_text(json.dumps(rows, indent=1) + "\n")
        write_card(rows)


def make(name: str, clip: Any, options: Options, folder: Path = FOLDER) -> dict[str, Any]:
    """Makes one aligner; returns its figures."""
    model = VisionModel(locate(name), "cpu")
    coordinates = Coordinates(Space(model), BLOCKS.get(name, 5))
    seen = looked_at(coordinates, clip, options.images, options.seed, held=False)
    unseen = looked_at(coordinates, clip, max(40, options.images // 4), options.seed + 1, held=True)
    settings = Settings(steps=options.steps)
    fit = Fit(*seen, coordinates.sizes, settings)
    end = fit.descend(fit.polar(fit.ridge()))
    end.maps, end.bias = end.maps.half().float(), end.bias.half().float()
    y = unseen[0] @ end.maps + end.bias
    centred = torch.nn.functional.cosine_similarity(y - y.mean(0), unseen[1] - unseen[1].mean(0))
    figures = {
        "blocks": BLOCKS.get(name, 5),
        "images": options.images,
        "cosine": float(total_cosines(end, *unseen).mean()),
        "centred": float(centred.mean()),
        **planted(coordinates.sizes, seen, unseen, settings),
    }
    matrices = coordinates.matrices(end.maps.split(coordinates.sizes), end.bias)
    said = note(model.fingerprint, clip.fingerprint, "outputs", {**asdict(settings), **figures})
    write_tensors(
        {k: v.astype(np.float16) for k, v in matrices.items()}, said, folder / f"{name}.safetensors"
    )
    return figures


def looked_at(
    coordinates: Coordinates, clip: Any, count: int, seed: int, *, held: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Coordinates (N, F) and the CLIP's unit embeddings (N, width) of `count` renderings."""
    scenes, x, z = draw_scenes(count, np.random.default_rng(seed), emblems=0, held=held), [], []
    for start in range(0, count, 32):
        images = list(render(scenes.pick(np.arange(start, min(count, start + 32)))))
        x.append(coordinates.of(coordinates.space.whole.run(coordinates.space.model.pixels(images))))
        z.append(torch.from_numpy(clip.image_features(images)))
    return torch.cat(x), torch.cat(z)


def planted(
    sizes: Sequence[int],
    seen: tuple[torch.Tensor, torch.Tensor],
    unseen: tuple[torch.Tensor, torch.Tensor],
    settings: Settings,
) -> dict[str, float]:
    """The same fit where known random isometries made the embeddings of the same pictures."""
    truth = planted_truth(*seen, 2, sizes)
    fit = Fit(seen[0], embeddings(truth, seen[0]), sizes, settings)
    closed = fit.ridge()
    ends = {"": fit.descend(fit.polar(closed)), "ridge": closed, "random": fit.descend(fit.random())}
    parts = {k: float(part_cosines(s.maps, truth.maps, unseen[0], sizes).mean()) for k, s in ends.items()}
    return {
        "planted_cosine": float(total_cosines(ends[""], unseen[0], embeddings(truth, unseen[0])).mean()),
        "planted_part_cosine": parts[""],
        "planted_ridge": parts["ridge"],
        "planted_random": parts["random"],
    }


def write_card(rows: dict[str, dict[str, Any]]) -> None:
    """The card of all aligners."""
    head = "| model | " + " | ".join(_COLUMNS.values()) + " |\n" + "| --- " * (1 + len(_COLUMNS)) + "|\n"
    lines = [
        f"| {name} | "
        + " | ".join(f"{row[k]:.3f}" if isinstance(row[k], float) else str(row[k]) for k in _COLUMNS)
        + " |"
        for name, row in sorted(rows.items())
    ]
    (FOLDER / "README.md").write_text(
        "---\nlicense: apache-2.0\n---\n# Aligners of the Atlas vision models\n\n"
        "Maps from the components of each model into the image space of atlas-clip: `locus decompose --model "
        "atlas-vit --clip atlas-clip --aligner assets/atlas/aligners/atlas-vit.safetensors`. Fitted on "
        "renderings, measured on combinations of attributes that no model was trained on.\n\n## Measured\n"
        f"`python -m studio.atlas.aligners` ({date.today().isoformat()}, {platform.machine()}). The cosine "
        "of the whole says that the sum of the parts points where the CLIP's embedding points; it does not "
        "say that the parts are right. For that the same fit was made on embeddings that known isometries "
        "make of the same pictures: the mean cosine of a part's contributions, centred over the pictures, "
        "with the true ones. A part is a head or an MLP of the last blocks, or the rest.\n\n"
        + head
        + "\n".join(lines)
        + "\n"
    )


if __name__ == "__main__":
    main(tyro.cli(Options))
