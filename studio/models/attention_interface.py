"""One hook point for every language family: transformers' attention interface, with a function of our own.

The function sees queries after the rotary embedding and key/value heads that are not repeated. A mask
function is registered beside it: without one transformers passes no mask and padding is silently attended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from studio.errors import StudioError

NAME = "locus"

Seam = Callable[..., torch.Tensor | None]


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    seam: Seam | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """PyTorch's attention, unless the forward was called with `seam=`, which then gives the output (rows,
    queries, heads, head size); where it gives None, PyTorch's attention stands."""
    if seam is not None:
        found = seam(module.layer_idx, query, key, value, mask, float(options["scaling"]))
        if found is not None:
            return found, None
    return sdpa_attention_forward(module, query, key, value, mask, **options)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def attention_interface(model: Any) -> Iterator[None]:
    """For the length of the block the model's attention runs through our function; then, whatever happened,
    through the one before."""
    former = model.net.config._attn_implementation
    model.net.set_attn_implementation(NAME)
    try:
        if model.net.config._attn_implementation != NAME:
            raise StudioError(f"{model.id} does not let its attention be replaced; take another model.")
        yield
    finally:
        model.net.set_attn_implementation(former)


class Visits:
    """A seam that counts: `layers` are those whose attention asked it. `of` is the seam that answers."""

    def __init__(self, of: Seam | None = None) -> None:
        self.layers: set[int] = set()
        self._of = of

    def __call__(self, layer: int, *arguments: Any) -> torch.Tensor | None:
        self.layers.add(layer)
        return self._of(layer, *arguments) if self._of else None


def repeated(heads: torch.Tensor, times: int) -> torch.Tensor:
    """Key/value heads (rows, KV, tokens, d) as often as query heads use them, (rows, KV * times, tokens,
    d): query head h reads key/value head h // times."""
    return heads if times == 1 else heads.repeat_interleave(times, dim=1)


def visible(mask: torch.Tensor | None, queries: int, keys: int, device: Any) -> torch.Tensor:
    """Which keys each query may see, bool, broadcastable to (rows, heads, queries, keys): the mask given, or
    the causal one (the last query is the last key) where there is none."""
    if mask is not None:
        return mask if mask.dtype == torch.bool else mask >= 0
    return torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def masked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor, scaling: float
) -> torch.Tensor:
    """softmax(q k^T scaling) v over the keys that are seen, (rows, queries, heads, d).

    query (rows, H, queries, d), key and value (rows, KV, keys, d), seen bool, broadcastable to (rows, H,
    queries, keys). A query that sees no key gives zero: never NaN, never a mean over all keys.
    """
    times = query.shape[1] // key.shape[1]
    key, value = repeated(key, times), repeated(value, times)
    scores = (query @ key.transpose(-1, -2)).float() * scaling
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen, 0.0)
    return (weights.to(value.dtype) @ value).transpose(1, 2)
