"""Orders of images in the slow, obvious way: every component's whole vector, image by image, in float64.

Components come from naive_decomposition.Slow, which shares nothing with studio/models/decomposition*.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np


def naive_by_text(images: Sequence[Mapping[str, np.ndarray]], chosen: Sequence[str], z, text) -> list[float]:
    """Score of each image: its chosen components (dim,) one after the other along the unit text, over |z|."""
    found = []
    for components, whole in zip(images, z, strict=True):
        score = 0.0
        for label, vector in components.items():
            if label in chosen:
                score += float(np.dot(vector, text)) / math.sqrt(float(np.dot(whole, whole)))
        found.append(score)
    return found


def naive_by_image(
    images: Sequence[Mapping[str, np.ndarray]], chosen: Sequence[str], reference: Mapping[str, np.ndarray]
) -> list[float]:
    """Cosine of each image with the reference: each chosen component minus its own mean over the images."""
    means = {label: sum(i[label] for i in images) / len(images) for label in chosen}
    asked = sum(reference[label] - means[label] for label in chosen)
    found = []
    for components in images:
        own = sum(components[label] - means[label] for label in chosen)
        found.append(float(own @ asked) / math.sqrt(float(own @ own) * float(asked @ asked)))
    return found
