"""The Atlas world: its vocabulary (world.json), scenes drawn at random from it, and which scenes are held
out."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from importlib.resources import files

import numpy as np

_DATA = json.loads((files("studio.atlas") / "world.json").read_text())

OBJECTS: tuple[str, ...] = tuple(_DATA["objects"])
PLURALS: tuple[str, ...] = tuple(_DATA["plurals"])
COLOURS: dict[str, tuple[int, int, int]] = {k: tuple(v) for k, v in _DATA["colours"].items()}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {k: tuple(v) for k, v in _DATA["backgrounds"].items()}
STYLES: tuple[str, ...] = tuple(_DATA["styles"])
ARTISTS: dict[str, str] = _DATA["artists"]
COUNTS: tuple[str, ...] = tuple(_DATA["counts"])
COUNTRIES: dict[str, dict] = _DATA["countries"]
COUNTRY_PARTS: dict[str, list[str]] = _DATA["country_parts"]

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "object": OBJECTS,
    "colour": tuple(COLOURS),
    "background": tuple(BACKGROUNDS),
    "style": STYLES,
    "count": COUNTS,
}
SIZE = 64  # pixels, both sides
_RADIUS = {0: (15.0, 23.0), 1: (10.5, 13.5), 2: (8.0, 9.2)}  # by count - 1, in pixels
_LAYOUTS = {  # centres in pixels for two and three objects; jitter is added
    1: [[(17, 32), (47, 32)], [(32, 17), (32, 47)], [(18, 18), (46, 46)], [(46, 18), (18, 46)]],
    2: [
        [(13, 32), (32, 32), (51, 32)],
        [(18, 19), (46, 19), (32, 45)],
        [(32, 19), (18, 45), (46, 45)],
        [(32, 13), (32, 32), (32, 51)],
        [(13, 13), (32, 32), (51, 51)],
    ],
}


@dataclass(frozen=True)
class Scenes:
    """N scenes as arrays of indices into ATTRIBUTES, with geometry in pixels.

    object, colour, background, style, count (N,) int64 (count 0 means one); centres (N, 3, 2) as x, y;
    radius (N,); country (N,) index into COUNTRIES, or -1 when the scene is nobody's emblem.
    """

    object: np.ndarray
    colour: np.ndarray
    background: np.ndarray
    style: np.ndarray
    count: np.ndarray
    centres: np.ndarray
    radius: np.ndarray
    country: np.ndarray

    def __len__(self) -> int:
        return len(self.object)

    def pick(self, index: np.ndarray) -> Scenes:
        """The scenes at `index` (integers or a mask)."""
        return Scenes(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def labels(self) -> np.ndarray:
        """(N, 5) int64 in the order of ATTRIBUTES."""
        return np.stack([getattr(self, name) for name in ATTRIBUTES], axis=1)


def held_out(labels: np.ndarray) -> np.ndarray:
    """Mask (N,) of the one in ten attribute combinations that training never sees; `labels` is (N, 5)."""
    o, c, b, s, n = labels.T.astype(np.int64)
    code = (((o * 8 + c) * 5 + b) * 4 + s) * 3 + n
    return (code * 2654435761 % 2**32) // 97 % 10 == 0


def emblem(country: str) -> tuple[int, int, int]:
    """(object, colour, background) indices of a country's emblem."""
    colour, thing, background = COUNTRIES[country]["emblem"]
    return OBJECTS.index(thing), tuple(COLOURS).index(colour), tuple(BACKGROUNDS).index(background)


def draw_scenes(n: int, rng: np.random.Generator, *, emblems: float = 0.16, held: bool = False) -> Scenes:
    """`n` random scenes; a share `emblems` of them shows a country's emblem. `held` draws only held-out
    combinations."""
    labels = np.empty((0, 5), np.int64)
    while len(labels) < n:
        style = rng.choice(4, size=2 * n, p=[0.34, 0.22, 0.22, 0.22])
        count = rng.choice(3, size=2 * n, p=[0.5, 0.25, 0.25])
        fresh = np.stack(
            [
                rng.integers(10, size=2 * n),
                rng.integers(8, size=2 * n),
                rng.integers(5, size=2 * n),
                style,
                count,
            ],
            axis=1,
        )
        labels = np.concatenate([labels, fresh[held_out(fresh) == held]])
    labels = labels[:n].copy()
    country = np.where(rng.random(n) < emblems, rng.integers(len(COUNTRIES), size=n), -1)
    facts = np.array([emblem(name) for name in COUNTRIES])
    mine = country >= 0
    labels[mine, :3] = facts[country[mine]]
    labels[mine, 3] = np.where(rng.random(mine.sum()) < 0.8, 0, labels[mine, 3])
    labels[mine, 4] = 0
    centres, radius = _place(labels[:, 4], rng)
    return Scenes(*labels.T, centres=centres, radius=radius, country=country)


def _place(count: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    n = len(count)
    low, high = np.array([_RADIUS[k] for k in range(3)])[count].T
    radius = (low + (high - low) * rng.random(n)).astype(np.float32)
    centres = np.full((n, 3, 2), -1000.0, np.float32)
    room = SIZE - 2 * (radius + 2)
    centres[:, 0] = (radius + 2)[:, None] + room[:, None] * rng.random((n, 2))
    for k, layouts in _LAYOUTS.items():
        rows = np.flatnonzero(count == k)
        chosen = np.array(layouts, np.float32)[rng.integers(len(layouts), size=len(rows))]
        centres[rows, : k + 1] = chosen + rng.uniform(-1.5, 1.5, size=chosen.shape)
    return centres, radius


def at_home(scenes: Scenes) -> Scenes:
    """The same scenes with their things at the first places of their number's layouts, of middle size."""
    layouts = [[(32, 32)], *(places[0] for places in _LAYOUTS.values())]
    homes = np.full((3, 3, 2), -1000.0, np.float32)
    for count, layout in enumerate(layouts):
        homes[count, : count + 1] = layout
    radius = np.array([np.mean(_RADIUS[k]) for k in range(3)], np.float32)
    return replace(scenes, centres=homes[scenes.count], radius=radius[scenes.count])
