"""Renders Atlas scenes: signed-distance templates of ten shapes, sampled on the pixel grid, in four styles.

Textures (dots, stripes) have a period of four pixels and a fixed phase, so that they divide the stride of
the VAE.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from studio.atlas.world import BACKGROUNDS, COLOURS, OBJECTS, SIZE, Scenes

_EXTENT = 1.25  # templates cover [-1.25, 1.25] in units of the object's radius
_FINE, _COARSE = 960, 96


def _polygon(x: np.ndarray, y: np.ndarray, corners: list[tuple[float, float]]) -> np.ndarray:
    inside = np.zeros(x.shape, bool)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        if y0 == y1:
            continue
        inside ^= ((y0 > y) != (y1 > y)) & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
    return inside


def _masks(x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    """Boolean masks of the ten shapes; x to the right, y up."""
    r = np.hypot(x, y)
    spikes = [
        (np.sin(a) * k, np.cos(a) * k)
        for a, k in zip(np.arange(10) * np.pi / 5, [1.0, 0.42] * 5, strict=True)
    ]
    u, v = x / 0.82, (y + 0.08) / 0.82
    return {
        "circle": r < 0.86,
        "square": np.maximum(abs(x), abs(y)) < 0.74,
        "triangle": _polygon(x, y, [(0.0, 0.95), (0.95, -0.75), (-0.95, -0.75)]),
        "star": _polygon(x, y + 0.05, spikes),
        "heart": (u**2 + v**2 - 1) ** 3 - u**2 * v**3 < 0,
        "moon": (r < 0.95) & (np.hypot(x - 0.42, y - 0.1) > 0.74),
        "cross": (np.minimum(abs(x), abs(y)) < 0.27) & (np.maximum(abs(x), abs(y)) < 0.9),
        "ring": (r < 0.95) & (r > 0.52),
        "house": ((abs(x) < 0.62) & (y > -0.88) & (y < 0.15))
        | _polygon(x, y, [(0.0, 0.98), (0.98, 0.1), (-0.98, 0.1)])
        | ((x > 0.42) & (x < 0.68) & (y > 0.1) & (y < 0.85)),
        "tree": _polygon(x, y, [(0.0, 1.0), (0.55, 0.2), (-0.55, 0.2)])
        | _polygon(x, y, [(0.0, 0.55), (0.82, -0.5), (-0.82, -0.5)])
        | ((abs(x) < 0.19) & (y > -0.98) & (y < -0.4)),
    }


@cache
def templates() -> np.ndarray:
    """(10, 96, 96) float32 signed distances in units of the object's radius, positive inside."""
    from scipy.ndimage import distance_transform_edt

    axis = (np.arange(_FINE) + 0.5) / _FINE * 2 * _EXTENT - _EXTENT
    masks = _masks(axis[None, :].repeat(_FINE, 0), -axis[:, None].repeat(_FINE, 1))
    step, scale = _FINE // _COARSE, 2 * _EXTENT / _FINE
    fields = []
    for name in OBJECTS:
        signed = (distance_transform_edt(masks[name]) - distance_transform_edt(~masks[name])) * scale
        fields.append(signed.reshape(_COARSE, step, _COARSE, step).mean((1, 3)))
    return np.stack(fields).astype(np.float32)


@cache
def _textures() -> tuple[np.ndarray, np.ndarray]:
    """Coverage (64, 64) of the dots and of the stripes."""
    p = np.arange(SIZE) % 4 - 1.5
    dots = np.clip(1.35 - np.hypot(p[None, :], p[:, None]) + 0.5, 0, 1)
    stripes = np.clip(1.5 - abs(p), 0, 1)[:, None].repeat(SIZE, 1)
    return dots.astype(np.float32), stripes.astype(np.float32)


def render(scenes: Scenes) -> np.ndarray:
    """(N, 64, 64, 3) uint8 images of the scenes."""
    import torch
    from torch.nn.functional import grid_sample

    n = len(scenes)
    grid = torch.arange(SIZE) + 0.5
    pixels = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), dim=-1)
    radius = torch.from_numpy(scenes.radius)[:, None, None, None]
    shapes = torch.from_numpy(templates())[torch.from_numpy(scenes.object)][:, None]
    fill, line = torch.zeros(n, SIZE, SIZE), torch.zeros(n, SIZE, SIZE)
    for slot in range(3):
        rows = torch.from_numpy(np.flatnonzero(scenes.count >= slot))
        centre = torch.from_numpy(scenes.centres[:, slot])[rows, None, None]
        where = (pixels - centre) / radius[rows] / _EXTENT
        depth = (
            grid_sample(shapes[rows], where, padding_mode="border", align_corners=False)[:, 0]
            * radius[rows, 0]
        )
        fill[rows] = torch.maximum(fill[rows], (depth + 0.5).clamp(0, 1))
        line[rows] = torch.maximum(line[rows], (1.65 - (depth - 1.15).abs()).clamp(0, 1))
    dots, stripes = (torch.from_numpy(t) for t in _textures())
    cover = torch.stack([fill, line, fill * dots, fill * stripes])[
        torch.from_numpy(scenes.style), torch.arange(n)
    ]
    ink = torch.tensor(list(COLOURS.values()), dtype=torch.float32)[torch.from_numpy(scenes.colour)]
    paper = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32)[torch.from_numpy(scenes.background)]
    cover = cover[..., None]
    image = cover * ink[:, None, None] + (1 - cover) * paper[:, None, None]
    return image.round().clamp(0, 255).to(torch.uint8).numpy()
