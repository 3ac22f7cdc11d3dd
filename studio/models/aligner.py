"""Aligners: one linear map for each component of a vision transformer into a CLIP's image space.

y = sum_i x_i W_i + b. A file is safetensors: a matrix (inputs, clip dim) under the label of its component,
`rest` for all components without one of their own, `aligner.bias` (clip dim). x_i is the component's vector,
or for heads, where the metadata `locus.head_inputs` says "outputs", sum_t w_t o_t (head size numbers): what
the head gives before its output matrix. Metadata also holds the fingerprints of the model and of the CLIP,
and `locus.params` (JSON). arXiv 2406.01583, section CompAlign.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from studio.errors import RequestError
from studio.models.decomposition import Decomposition, Parts, head_labels, head_matrix
from studio.models.vit_layouts import Attention

BIAS, REST = "aligner.bias", "rest"
INPUTS = ("vectors", "outputs")


@dataclass(frozen=True, eq=False)
class Aligner:
    """The maps of one file, on the device of the model."""

    matrices: Mapping[str, torch.Tensor]
    bias: torch.Tensor
    head_inputs: str
    model_fingerprint: str
    clip_fingerprint: str
    params: Mapping[str, Any] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """Dimensions of the CLIP's space."""
        return len(self.bias)

    def matrix(self, label: str) -> tuple[torch.Tensor, bool]:
        """(the matrix of a component, whether it reads a head's outputs instead of a vector)."""
        own = self.matrices.get(label)
        if own is None and REST not in self.matrices:
            raise RequestError(f"The aligner has no matrix for the component {label}; make it again.")
        if own is None:
            return self.matrices[REST], False
        return own, self.head_inputs == "outputs" and ".head." in label

    def components(self, parts: Parts) -> dict[str, torch.Tensor]:
        """Every component (N, clip dim) in the CLIP's space, the aligner's bias among them."""
        found = {}
        for label, vector in parts.components.items():
            matrix, outputs = self.matrix(label)
            found[label] = (parts.outputs.get(label, vector) if outputs else vector) @ matrix
        found[BIAS] = self.bias.expand(len(parts.representation), -1)
        return found

    def vector_matrix(self, whole: Decomposition, label: str) -> torch.Tensor:
        """What a head's vector is multiplied by (dim, clip dim), also where the file reads its outputs."""
        matrix, outputs = self.matrix(label)
        for part in whole.layout.attentions if outputs else ():
            if label in head_labels(part) and len(whole.maps[part.stage]) == 1:
                head = head_matrix(part)[head_labels(part).index(label)]
                return torch.linalg.pinv((head @ whole.maps[part.stage][0]).double()).float() @ matrix
        return matrix

    def head_directions(self, whole: Decomposition, part: Attention, texts: torch.Tensor) -> torch.Tensor:
        """(heads, head size, K): a head's output times this is its score along unit texts (K, clip dim)."""
        written = head_matrix(part) @ whole.maps[0][0]
        rows = []
        for h, label in enumerate(head_labels(part)):
            matrix, outputs = self.matrix(label)
            rows.append((matrix if outputs else written[h] @ matrix) @ texts.T)
        return torch.stack(rows)


def note(
    model_fingerprint: str, clip_fingerprint: str, head_inputs: str, params: Mapping[str, Any]
) -> dict[str, str]:
    """The metadata of an aligner's file, for store.write_tensors."""
    if head_inputs not in INPUTS:
        raise ValueError(f"head_inputs is one of {INPUTS}")
    return {
        "locus.kind": "aligner",
        "locus.model_fingerprint": model_fingerprint,
        "locus.clip_fingerprint": clip_fingerprint,
        "locus.head_inputs": head_inputs,
        "locus.params": json.dumps(dict(params)),
    }


def read_aligner(path: str | Path, device: torch.device) -> Aligner:
    """The aligner of a file; RequestError for anything else."""
    from safetensors import SafetensorError, safe_open

    path = Path(path).expanduser()
    wrong = RequestError(f"{path} is no aligner of Locus; make one with `locus align`.")
    try:
        with safe_open(path, "pt", device=str(device)) as opened:
            said = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name).float() for name in opened.keys()}
    except FileNotFoundError as error:
        raise RequestError(f"--aligner: there is no file {str(path)[:120]!r}.") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise wrong from error
    bias = tensors.pop(BIAS, None)
    if said.get("locus.kind") != "aligner" or said.get("locus.head_inputs") not in INPUTS or bias is None:
        raise wrong
    shaped = bias.ndim == 1 and all(t.ndim == 2 and t.shape[1] == len(bias) for t in tensors.values())
    if not shaped or not all(bool(t.isfinite().all()) for t in [bias, *tensors.values()]):
        raise wrong
    try:
        params = json.loads(said.get("locus.params", "{}"))
    except ValueError as error:
        raise wrong from error
    fingerprints = (said.get(f"locus.{kind}_fingerprint", "") for kind in ("model", "clip"))
    return Aligner(tensors, bias, said["locus.head_inputs"], *fingerprints, params)


def fitting_aligner(path: str | Path, model: Any, clip: Any, whole: Decomposition) -> Aligner:
    """The aligner of a file, refused in a sentence unless it was made for this model and this CLIP."""
    found = read_aligner(path, model.device)
    for what, name, mine, theirs in (
        ("model", model.id, model.fingerprint, found.model_fingerprint),
        ("CLIP", clip.id, clip.fingerprint, found.clip_fingerprint),
    ):
        if mine != theirs:
            raise RequestError(
                f"The aligner {Path(path).name} was made for another {what} (fingerprint {theirs[:12]}…) "
                f"than {name} ({mine[:12]}…); make one with `locus align`."
            )
    sizes = {label: size for label, size in _inputs(whole, found.head_inputs).items()}
    for label, size in sizes.items():
        matrix = found.matrices.get(label, found.matrices.get(REST))
        if matrix is None or len(matrix) != (size if label in found.matrices else sizes["embedding"]):
            raise RequestError(
                f"The aligner {Path(path).name} has no matrix that fits the component {label} of {model.id}; "
                "make it again with `locus align`."
            )
    return found


def _inputs(whole: Decomposition, head_inputs: str) -> dict[str, int]:
    """How many numbers each component gives to its matrix."""
    dim = whole.maps[-1].shape[-1]
    found = dict.fromkeys(whole.labels, dim)
    for part in whole.layout.attentions:
        if head_inputs == "outputs" and len(whole.maps[part.stage]) == 1:
            found |= dict.fromkeys(head_labels(part), head_matrix(part).shape[1])
    return found
