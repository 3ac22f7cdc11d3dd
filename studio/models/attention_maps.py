"""Cross-attention probabilities of a running UNet, from queries and keys: fused attention gives none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import interpolate

from studio.models.hooks import Tape, watch
from studio.models.sites import text_reads, unet_module
from studio.types import Site

_MOST = 2**26  # probabilities in memory at once


class AttentionTape:
    """What each cross-attention layer of a model last asked and was offered, in execution order."""

    def __init__(self, model: Any, tape: Tape, sites: dict[Site, tuple[Site, Site]]) -> None:
        self.layers = tuple(str(s.layer) for s in sites)
        self._modules = [unet_module(model.unet, s) for s in sites]
        self._tape, self._sites = tape, list(sites.values())

    def heads(self, layer: int) -> int:
        """Attention heads of a layer."""
        return self._modules[layer].heads

    def onto(self, layer: int, weights: torch.Tensor, skip: int) -> torch.Tensor:
        """Probabilities (rows, heads, positions, words) of a layer, float32: those of the tokens summed with
        `weights` (words, tokens). The first `skip` rows, the unconditional ones, are left out."""
        query, key = (self._tape[s][skip:] for s in self._sites[layer])
        module = self._modules[layer]
        size = max(1, _MOST // (module.heads * query.shape[1] * key.shape[1]))
        parts = zip(query.split(size), key.split(size), strict=True)
        return torch.cat([probabilities(module, q, k) @ weights.T for q, k in parts])


def probabilities(module: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """softmax(q k / sqrt(d)) of an attention module's projections (rows, positions or tokens, width):
    (rows, heads, positions, tokens), float32."""
    query, key = (x.unflatten(-1, (module.heads, -1)).transpose(1, 2) for x in (query, key))
    query = module.norm_q(query) if getattr(module, "norm_q", None) is not None else query
    key = module.norm_k(key) if getattr(module, "norm_k", None) is not None else key
    logits = query.float() @ key.float().transpose(-1, -2)
    return (logits * query.shape[-1] ** -0.5).softmax(-1)


@contextmanager
def attention_of(model: Any) -> Iterator[AttentionTape]:
    """Records queries and keys of every cross-attention layer for the length of the block."""
    sites = {}
    for layer in model.unet_sites(["cross-attention"]):
        query = Site("unet", layer.layer, "cross-attention-query")
        sites[layer] = (query, text_reads(layer)[0])
    modules = {s: unet_module(model.unet, s) for pair in sites.values() for s in pair}
    with watch(modules, record=modules) as tape:
        yield AttentionTape(model, tape, sites)
    if tape.touched != set(modules):
        raise RuntimeError(f"queries and keys that were never read: {set(modules) - tape.touched}")


def enlarge(maps: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Maps (A, B, positions) of a layer as (A, B, height, width): laid out on the layer's own grid, which
    halves latents of that size until it fits, then bilinear."""
    tall, wide = height, width
    while tall * wide > maps.shape[-1]:
        tall, wide = -(-tall // 2), -(-wide // 2)
    return resized(maps.unflatten(-1, (tall, wide)), height, width)


def resized(maps: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Maps (A, B, h, w) at another size, bilinear."""
    return interpolate(maps, (height, width), None, "bilinear", False)
