"""Attention knockouts the slow, obvious way: one whole forward for every cell, the model's own eager
attention and an additive mask of its own in the layers of the window.

Dissecting Factual Associations, arXiv 2304.14767: the score of an edge is minus infinity in every head.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch


def window(layer: int, width: int, depth: int) -> range:
    """The layers [max(0, l - w//2), min(L, l + ceil(w/2)))."""
    return range(max(0, layer - width // 2), min(depth, layer - (-width // 2)))


@torch.no_grad()
def logits_cut(
    model: Any, ids: Sequence[int], edges: Iterable[tuple[int, int]], layers: Iterable[int]
) -> torch.Tensor:
    """Logits (vocabulary) after the last token when the edges (source, blocked) are cut in these layers. A
    source that sees nothing attends to nothing: its attention is zero."""
    net, length = model.net, len(ids)
    former = net.config._attn_implementation
    handles, edges = [], list(edges)
    lowest = torch.finfo(next(net.parameters()).dtype).min

    def cut(module: Any, args: tuple, options: dict) -> tuple[tuple, dict]:
        mask = options["attention_mask"].clone()
        for source, blocked in edges:
            mask[:, :, source, blocked] = lowest
        return args, {**options, "attention_mask": mask}

    def silence(module: Any, args: tuple) -> tuple:
        heads = args[0].clone()  # what the output projection reads: zero where nothing is seen
        for source in {s for s, _ in edges}:
            if {b for s, b in edges if s == source} >= set(range(source + 1)):
                heads[:, source] = 0
        return (heads,)

    try:
        net.set_attn_implementation("eager")
        for layer in layers:
            handles.append(model.attention(layer).register_forward_pre_hook(cut, with_kwargs=True))
            out = model._module(layer, "attention-out")
            handles.append(out.register_forward_pre_hook(silence))
        causal = torch.full((length, length), lowest).triu(1)[None, None]
        given = torch.tensor([list(ids)])
        return net(input_ids=given, attention_mask=causal, use_cache=False).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()
        net.set_attn_implementation(former)


def edges_of(group: Sequence[int], length: int, sources: str) -> list[tuple[int, int]]:
    """The edges that are cut: from the last token, or from every token that is later than the blocked one and
    not of the group."""
    if sources == "last":
        return [(length - 1, t) for t in group]
    return [(s, t) for t in group for s in range(t + 1, length) if s not in group]


def knockout(
    model: Any, ids: Sequence[int], groups: Sequence[Sequence[int]], width: int, sources: str, answer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(clean probability of the answer, probabilities (group, layer) with the group knocked out)."""
    depth = len(model.blocks)
    found = torch.zeros(len(groups), depth)
    for g, group in enumerate(groups):
        for layer in range(depth):
            cut = edges_of(group, len(ids), sources)
            found[g, layer] = logits_cut(model, ids, cut, window(layer, width, depth)).softmax(-1)[answer]
    return logits_cut(model, ids, [], []).softmax(-1)[answer], found
