"""Attention of a prompt's last tokens in many runs at once: the tokens before are shared.

A world is one restored state; each has S samples, and of each sample its own last n tokens, with queries,
keys and values of H heads, KV key/value heads and size d. The t tokens before are those of the sample.
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor
Pair = tuple[Tensor, Tensor]  # keys and values
Unseen = tuple[Tensor | None, Tensor | None]  # of the tokens before and of the own: what is not read
_COPIED = 3  # times its own tokens: so many earlier ones are copied for every world


def attend(q: Tensor, own: Pair, before: Pair, scale: float, unseen: Unseen) -> Tensor:
    """Attention outputs (W * S * queries, H * d) of the last `queries` tokens of W worlds of S samples.

    q (W, S, queries, H, d); own keys and values (W, S, n, KV, d), one set a world; those of the tokens before
    (S, KV, t, d) are shared by the worlds of a sample. unseen: bool (queries, t) and (queries, n), the keys
    that are not read; None where all are.
    """
    w, s, m, heads, d = q.shape
    (k, v), (k0, v0) = own, before
    if q.device.type == "cpu" and k0.shape[2] <= _COPIED * k.shape[2]:
        return _attend_together(q, own, before, scale, unseen)
    weights = _weights(q, k, k0, scale, unseen).to(v.dtype)
    groups, t = weights.shape[1], k0.shape[2]
    z = weights[..., t:] @ v.permute(1, 3, 0, 2, 4)
    if t:
        z += (weights[..., :t].reshape(s, groups, -1, t) @ v0).view_as(z)
    return z.view(s, groups, w, -1, m, d).permute(2, 0, 4, 1, 3, 5).reshape(w * s * m, heads * d)


def attend_last(
    q: Tensor, own: Pair, before: Pair, scale: float, unseen: Unseen, matrix: Tensor, bias: Tensor | None
) -> Tensor:
    """`attend` of the last token alone, q (W, S, 1, H, d), where in place of the own values stands what they
    are made from (W, S, n, D), with the matrix (KV, d, D) and bias (KV, d): one weighted sum is projected for
    each head instead of every token."""
    w, s, _, heads, d = q.shape
    (k, read), (k0, v0) = own, before
    weights = _weights(q, k, k0, scale, unseen).to(read.dtype)  # S, KV, W, heads of each, keys
    groups, t = weights.shape[1], k0.shape[2]
    mine = weights[..., t:].permute(1, 2, 0, 3, 4)  # KV, W, S, heads of each, n
    sums = mine.permute(1, 2, 0, 3, 4).reshape(w * s, heads, -1) @ read.flatten(0, 1)
    sums = sums.view(w, s, groups, -1, read.shape[-1]).permute(2, 0, 1, 3, 4)
    z = sums.reshape(groups, -1, read.shape[-1]) @ matrix.transpose(1, 2)
    z = z.view(groups, w, s, -1, d)
    if bias is not None:
        z += mine.sum(-1, keepdim=True) * bias[:, None, None, None]
    if t:
        past = weights[..., :t].reshape(s, groups, -1, t) @ v0
        z += past.view(s, groups, w, -1, d).permute(1, 2, 0, 3, 4)
    return z.permute(1, 2, 0, 3, 4).reshape(w * s, heads * d)


def _weights(q: Tensor, k: Tensor, k0: Tensor, scale: float, unseen: Unseen) -> Tensor:
    """Attention weights (S, KV, W, H / KV * queries, t + n), float32."""
    w, s, m, heads, d = q.shape
    groups, t = k.shape[3], k0.shape[2]
    each = heads // groups
    scaled = q.new_empty(s, groups, w, each, m, d)
    torch.mul(q.view(w, s, m, groups, each, d).permute(1, 3, 0, 4, 2, 5), scale, out=scaled)
    k = k.permute(1, 3, 0, 2, 4)  # S, KV, W, n, d
    parts = [scaled.view(s, groups, w * each * m, d) @ k0.transpose(-1, -2)] if t else []
    parts.append(scaled.view(s, groups, w, each * m, d) @ k.transpose(-1, -2))
    for part, missing in zip(parts, unseen[-len(parts) :], strict=True):
        if missing is not None:
            part.view(s, groups, w, each, m, -1).masked_fill_(missing, -torch.inf)
    scores = torch.cat([x.view(s, groups, w, each * m, -1) for x in parts], -1) if t else parts[0]
    return scores.softmax(-1, dtype=torch.float32)


def _attend_together(q: Tensor, own: Pair, before: Pair, scale: float, unseen: Unseen) -> Tensor:
    """`attend` through PyTorch's attention, which wants the shared keys and values in every world."""
    w, s, m, heads, d = q.shape
    n, groups, t = own[0].shape[2], own[0].shape[3], before[0].shape[2]
    whole = []
    for past, mine in zip(before, own, strict=True):
        both = mine.new_empty(w, s, t + n, groups, d)
        both[:, :, :t], both[:, :, t:] = past.transpose(1, 2), mine
        whole.append(both.view(w * s, t + n, groups, d).transpose(1, 2))
    seen = None
    if any(part is not None for part in unseen):
        none = [torch.zeros(m, size, dtype=torch.bool, device=q.device) for size in (t, n)]
        seen = ~torch.cat([a if a is not None else b for a, b in zip(unseen, none, strict=True)], 1)
    attention = torch.nn.functional.scaled_dot_product_attention
    rows = q.reshape(w * s, m, heads, d).transpose(1, 2)
    z = attention(rows, *whole, attn_mask=seen, scale=scale, enable_gqa=groups < heads)
    return z.transpose(1, 2).reshape(w * s * m, heads * d)
