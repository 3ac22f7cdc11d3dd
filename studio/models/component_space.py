"""A vision transformer's components in the space of a CLIP's texts, each as some numbers and a matrix.

c_i = x_i M_i: x_i is a head's output before its output matrix (head size numbers) where the path to the
representation has one class of places, else the component's vector. M_i is a constant of the model and of the
aligner, so statistics of x_i are all that is needed of images (arXiv 2310.05916, 2406.01583).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from studio.errors import RequestError
from studio.models.aligner import Aligner, fitting_aligner
from studio.models.decomposition import Decomposition, Parts, head_labels, head_matrix


class Space:
    """Where a model's components are looked at: its own space, or through the aligner a CLIP's."""

    def __init__(self, model: Any, aligner: Aligner | None = None) -> None:
        self.model, self.aligner = model, aligner
        self.whole = Decomposition(model.layout, model.device)

    @property
    def width(self) -> int:
        """Dimensions of the space."""
        return self.whole.maps[-1].shape[-1] if self.aligner is None else self.aligner.width

    @cached_property
    def written(self) -> dict[str, torch.Tensor]:
        """By label of a head whose path has one class: what its output becomes in the model's own space
        (head size, dim)."""
        found = {}
        for part in self.whole.layout.attentions:
            if len(self.whole.maps[part.stage]) == 1:
                matrices = head_matrix(part) @ self.whole.maps[part.stage][0]
                found |= dict(zip(head_labels(part), matrices, strict=True))
        return found

    def inputs(self, parts: Parts) -> dict[str, torch.Tensor]:
        """x_i (N, its size) of every component."""
        return {label: parts.outputs.get(label, c) for label, c in parts.components.items()}

    def matrix(self, label: str) -> np.ndarray:
        """M_i (its size, width) float64; the identity for vectors in the model's own space."""
        own = self.written.get(label)
        if self.aligner is None:
            return np.eye(self.width) if own is None else own.double().cpu().numpy()
        matrix, outputs = self.aligner.matrix(label)
        if own is not None and not outputs:
            matrix = own @ matrix
        return matrix.double().cpu().numpy()

    def total(self, parts: Parts) -> torch.Tensor:
        """The representation (N, width); through an aligner the sum of all components and its bias."""
        if self.aligner is None:
            return parts.representation
        return torch.stack(list(self.aligner.components(parts).values())).double().sum(0)


def open_space(model: Any, clip: Any, aligner: str | Path | None) -> tuple[Space, Any]:
    """(the space, the CLIP whose texts are read there). clip, aligner: what --clip and --aligner name, or
    None. RequestError when the model shares no space with any texts."""
    if aligner and clip is None:
        raise RequestError("--aligner maps into the space of a CLIP; say which with --clip.")
    if aligner:
        found = fitting_aligner(aligner, model, clip, Decomposition(model.layout, model.device))
        return Space(model, found), clip
    if clip is not None and clip.fingerprint != model.fingerprint:
        raise RequestError(
            f"{clip.id} and {model.id} do not share a space; give the --aligner that `locus align` made for "
            "the two."
        )
    if model.clip is None:
        raise RequestError(
            f"{model.id} has no texts of its own; give --clip and the --aligner that `locus align` made for "
            "the two."
        )
    return Space(model), model.clip


def unit_texts(clip: Any, texts: Sequence[str]) -> np.ndarray:
    """Unit vectors (K, dim) float64 of texts."""
    return clip.text_features(list(texts)).astype(np.float64)
