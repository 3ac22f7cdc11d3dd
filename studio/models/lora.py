"""LoRA files as edits: a matrix W becomes W + strength * (alpha / rank) * up down, the base weights stay.

Read are files of diffusers and peft, and those of kohya's trainers in diffusers' or in the original names.
diffusers converts the names; the scale alpha / rank is folded into `up` before (arXiv 2106.09685).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from studio.errors import RequestError
from studio.types import Edit

METHOD = "lora"
ANY_WEIGHTS = ""  # a LoRA does not say which weights it was trained on: it fits where its shapes fit
_MATRIX = re.compile(
    r"^(?P<stem>.+?)(?:\.lora_(?P<kohya>down|up)|\.lora_(?P<peft>[AB])|[._]lora(?:_linear_layer)?\."
    r"(?P<plain>down|up))\.weight$"
)
_OTHER_KINDS = {"dora_scale": "DoRA", "lora_magnitude": "DoRA", "lokr_": "LoKr", "hada_": "LoHa"}
_OTHER_KINDS |= {"oft_": "OFT", "lora_mid": "Tucker", "diff_b": "full-matrix", "lora_B.bias": "biased"}


@dataclass(frozen=True, eq=False)
class LoraDelta:
    """The delta of one weight: up (m, r) and down (r, ...), of which `shape` is the product's shape."""

    up: np.ndarray
    down: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that it changes: (m, d), or (m, d, h, w) of a convolution."""
        return (self.up.shape[0], *self.down.shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes of the two factors."""
        return self.up.nbytes + self.down.nbytes

    def dense(self) -> Any:
        """The delta, a float32 tensor on the CPU."""
        import torch

        up, down = torch.tensor(self.up), torch.tensor(self.down)
        return (up.flatten(1) @ down.flatten(1)).reshape(self.shape)


def is_lora(names: Any) -> bool:
    """Whether a file's tensors are those of a LoRA, or of one of its kin."""
    return any(_MATRIX.match(n) or n.startswith("lora_") or _kin(n) for n in names)


def _kin(name: str) -> str:
    return next((kind for mark, kind in _OTHER_KINDS.items() if mark in name), "")


def read_lora(path: Path) -> Edit:
    """The edit that a LoRA file makes; RequestError for another kind of adapter, or a file that is damaged or
    for another family of models."""
    from safetensors import safe_open

    with safe_open(path, "pt") as opened:
        note = opened.metadata() or {}
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    if kin := next(filter(None, map(_kin, tensors)), ""):
        raise RequestError(
            f"{path} is a {kin} adapter; Locus lays plain LoRA files (two factors a matrix) over a model."
        )
    folded = _folded(path, tensors, note)
    deltas: dict[str, LoraDelta] = {}
    pairs = _pairs(path, _converted(path, folded))
    for name, (up, down) in pairs.items():
        if not up.isfinite().all() or not down.isfinite().all():
            raise RequestError(f"{path} holds NaN or infinity in {name}; make or download the LoRA again.")
        deltas[name] = LoraDelta(up.float().numpy(), down.float().numpy())
    ranks = sorted({d.down.shape[0] for d in deltas.values()})
    return Edit(deltas, ANY_WEIGHTS, (), {"file": path.name, "ranks": ranks}, METHOD)


def _folded(path: Path, tensors: dict[str, Any], note: Mapping[str, str]) -> dict[str, Any]:
    """Tensors without alphas, alpha / rank multiplied into each `up`; float32."""
    alphas = {n.removesuffix(".alpha"): float(t) for n, t in tensors.items() if n.endswith(".alpha")}
    adapter = _adapter_note(path, note)
    ranks, out = {}, {}
    for name, tensor in tensors.items():
        if (found := _MATRIX.match(name)) and _is_down(found):
            ranks[found["stem"]] = tensor.shape[0]
    for name, tensor in tensors.items():
        if name.endswith(".alpha"):
            continue
        found = _MATRIX.match(name)
        if found is None:
            raise RequestError(f"{path} holds {name[:80]}, which is no part of a LoRA that Locus knows.")
        tensor, stem = tensor.float(), found["stem"]
        if not _is_down(found):
            rank = ranks.get(stem, tensor.shape[-1])
            alpha = alphas.get(stem)
            tensor = tensor * (alpha / rank if alpha is not None else _noted_scale(adapter, stem, rank))
        out[name] = tensor
    return out


def _is_down(found: re.Match) -> bool:
    return "down" in (found["kohya"], found["plain"]) or found["peft"] == "A"


def _adapter_note(path: Path, note: Mapping[str, str]) -> dict[str, Any]:
    """What diffusers writes beside the tensors of a peft adapter: rank and alpha by component."""
    try:
        content = json.loads(note.get("lora_adapter_metadata", "{}"))
    except ValueError as error:
        raise RequestError(f"The metadata of {path} are damaged; make or download the LoRA again.") from error
    return content if isinstance(content, dict) else {}


def _noted_scale(adapter: Mapping[str, Any], stem: str, rank: int) -> float:
    """alpha / rank of one matrix by the adapter's metadata, 1 without: peft's rules."""
    part, _, module = stem.partition(".")
    alpha = adapter.get(f"{part}.lora_alpha")
    for pattern, value in (adapter.get(f"{part}.alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    if alpha is None:
        return 1.0
    return alpha / (math.sqrt(rank) if adapter.get(f"{part}.use_rslora") else rank)


def _converted(path: Path, tensors: dict[str, Any]) -> dict[str, Any]:
    """The same under peft's names: COMPONENT.MODULE.lora_A.weight and lora_B."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin
    from diffusers.utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    out: dict[str, Any] = {}
    try:
        blocks = SimpleNamespace(layers_per_block=2)  # of SDXL, whose LoRAs come in the original names
        named, _ = StableDiffusionLoraLoaderMixin.lora_state_dict(dict(tensors), unet_config=blocks)
        for part in sorted({name.split(".")[0] for name in named}):
            own = {n.removeprefix(f"{part}."): t for n, t in named.items() if n.startswith(f"{part}.")}
            if not all("lora_A" in n or "lora_B" in n for n in own):
                text = part.startswith("text")
                own = convert_state_dict_to_peft(convert_state_dict_to_diffusers(own)) if text else own
                own = own if text else convert_unet_state_dict_to_peft(own)
            out |= {f"{part}.{name}": tensor for name, tensor in own.items()}
    except (ValueError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        said = " ".join(str(error).split())[:120]
        raise RequestError(f"{path} has names that are no LoRA of Stable Diffusion's: {said}.") from error
    if strange := [n for n in out if ".lora_A." not in n and ".lora_B." not in n]:
        raise RequestError(f"{path} has names that are no LoRA of Stable Diffusion's: {strange[0][:80]}.")
    return out


def _pairs(path: Path, tensors: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{parameter: (up, down)}; RequestError where a factor is missing, or the two do not fit."""
    out = {}
    for name, down in tensors.items():
        if ".lora_A." not in name:
            continue
        stem, up = name.split(".lora_A.")[0], tensors.get(name.replace(".lora_A.", ".lora_B."))
        if not stem.startswith(("unet.", "text_encoder.", "text_encoder_2.")):
            raise RequestError(f"{path} changes {stem[:80]}; Locus takes LoRAs of UNets and text encoders.")
        if up is None or up.ndim != down.ndim or up.shape[1] != down.shape[0]:
            raise RequestError(f"{path} is damaged: the two factors of {stem[:80]} do not fit.")
        out[f"{stem}.weight"] = (up, down)
    if len(out) * 2 != len(tensors):
        raise RequestError(f"{path} is damaged: some factors have no partner; download it again.")
    return out


def fitted(edit: Edit, names: Any) -> Edit:
    """The LoRA under the parameter names of a model (`names`): releases of the text encoder's library differ
    in whether its parts stand under text_model. Other edits as they are."""
    if edit.method != METHOD:
        return edit
    known = set(names)

    def own(name: str) -> str:
        part, _, rest = name.partition(".")
        bare = rest.removeprefix("text_model.")
        return next((n for n in (name, f"{part}.{bare}", f"{part}.text_model.{bare}") if n in known), name)

    return replace(edit, deltas={own(name): delta for name, delta in edit.deltas.items()})
