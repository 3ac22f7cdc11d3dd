"""What each earlier token's value adds to the last position: one row of attention a layer, never the square.

a_j (layer l, head h) = A_(T-1, j) W_O^h v_j; summed over j and h, with the projection's bias, it is the
attention's output at the last position. arXiv 2309.15098, 2406.12824. Head norms go through the Gram matrix
W_O^h' W_O^h, so no vector of width D is made for a head and token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from studio.models.attention_interface import attention_interface, visible
from studio.models.hooks import watch
from studio.types import Site

_CHUNK = 256  # tokens of one piece of summed contributions


@dataclass(frozen=True, eq=False)
class AttentionRows:
    """Of one prompt of T tokens, on the CPU: `weights` (L, H, T) of the last position's attention, `norms`
    (L, H, T) of the contributions and `token_norms` (L, T) of their sums over heads, `projections` (L, H, T)
    onto the answer's logit through the final norm with its scale frozen."""

    weights: torch.Tensor
    norms: torch.Tensor
    token_norms: torch.Tensor
    projections: torch.Tensor


def row_weights(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Attention weights (H, T) float64 of the last query (H, d) over the keys (KV, T, d); float32 on devices
    without float64."""
    exact = _exact(query.device)
    heads = query.to(exact).unflatten(0, (len(key), -1)) * scaling
    scores = torch.stack([h @ k.to(exact).T for h, k in zip(heads, key, strict=True)])
    seen = visible(mask, 1, key.shape[1], query.device).reshape(-1)
    return scores.masked_fill(~seen, -torch.inf).softmax(-1).flatten(0, 1)


def _exact(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def head_parts(
    weights: torch.Tensor, value: torch.Tensor, out: torch.Tensor, direction: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norms (H, T), projections on `direction` (D,) (H, T)) of each head's contributions. weights (H, T),
    value (KV, T, d), out: W_O (D, H * d)."""
    heads, width = len(weights), value.shape[-1]
    norms, projections = torch.empty_like(weights), torch.empty_like(weights)
    for h in range(heads):
        v = value[h * len(value) // heads].to(weights.dtype)
        w = out[:, h * width : (h + 1) * width].to(weights.dtype)
        norms[h] = weights[h] * ((v @ (w.T @ w)) * v).sum(-1).clamp(min=0).sqrt()
        projections[h] = weights[h] * (v @ (w.T @ direction.to(weights.dtype)))
    return norms, projections


def token_norms(weights: torch.Tensor, value: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Norms (T,) of the contributions summed over heads, a piece of the tokens at a time."""
    times, found = len(weights) // len(value), []
    for start in range(0, weights.shape[1], _CHUNK):
        piece = slice(start, start + _CHUNK)
        mixed = value[:, piece].float().repeat_interleave(times, 0) * weights[:, piece, None].float()
        found.append((mixed.transpose(0, 1).flatten(1) @ out.float().T).norm(dim=-1))
    return torch.cat(found)


def logit_direction(norm: nn.Module, unembedding: torch.Tensor) -> torch.Tensor:
    """The direction (D,) float64, on the CPU, whose product with an addition to the final state, divided by
    `norm_scale`, is its part of the logit; a LayerNorm takes the mean away first."""
    direction = unembedding.detach().cpu().double() * norm.weight.detach().cpu().double()
    return direction - direction.mean() if isinstance(norm, nn.LayerNorm) else direction


def norm_scale(norm: nn.Module, state: torch.Tensor) -> float:
    """What the final norm divides the state (D,) by."""
    state = state.cpu().double()
    if isinstance(norm, nn.LayerNorm):
        return float((state.var(unbiased=False) + norm.eps).sqrt())
    return float((state.square().mean() + norm.variance_epsilon).sqrt())


@torch.no_grad()
def attention_rows(model: Any, ids: Sequence[int], answer: int) -> AttentionRows:
    """One forward of the prompt, in which every layer's row is reduced as soon as it is known."""
    layers: dict[int, tuple[torch.Tensor, ...]] = {}
    direction = logit_direction(model.final_norm, model.head.weight[answer])
    direction = direction.to(_exact(model.device)).to(model.device)

    def reduce(layer: int, q: Any, k: Any, v: Any, mask: Any, scaling: float) -> None:
        row = mask[:, :, -1:] if mask is not None else None
        weights, (out, _) = row_weights(q[0, :, -1], k[0], row, scaling), model.attention_out(layer)
        norms, projections = head_parts(weights, v[0], out, direction)
        found = (weights, norms, token_norms(weights, v[0], out), projections)
        layers[layer] = tuple(part.float().cpu() for part in found)

    site = Site("lm", "", "norm")
    given = torch.tensor([list(ids)], device=model.device)
    with attention_interface(model), watch({site: model.final_norm}, inputs=[site]) as tape:
        model.net(input_ids=given, use_cache=False, logits_to_keep=1, seam=reduce)
    scale = norm_scale(model.final_norm, tape.read[site][0, -1])
    weights, norms, sums, projections = (
        torch.stack([layers[i][n] for i in range(len(layers))]) for n in range(4)
    )
    return AttentionRows(weights, norms, sums, projections / scale)
