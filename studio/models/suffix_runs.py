"""Runs of a prompt's last tokens alone, against the clean keys and values of the tokens before them.

In causal attention a cut or a patch at some tokens changes nothing before them, and nothing below its layer:
so only the suffix from there on is computed, from that layer on, in one batch of many streams that share the
clean keys and values. Exact up to rounding; the speed of knockouts rests on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from studio.models.attention_interface import visible
from studio.models.hooks import watch
from studio.types import Site

Window = tuple[int, int]


@dataclass(frozen=True, eq=False)
class CleanRun:
    """One clean forward of a prompt of T tokens: by layer the inputs of the block (T, D), the keys and values
    (KV, T, d) float32 and which keys each query sees (T, T) bool; `rest` the block's other arguments; `last`
    the last block's output (T, D), `logits` (vocabulary) float32 after the last token."""

    model: Any
    ids: tuple[int, ...]
    inputs: tuple[torch.Tensor, ...]
    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    seen: tuple[torch.Tensor, ...]
    rest: tuple[tuple[tuple, dict[str, Any]], ...]
    last: torch.Tensor
    logits: torch.Tensor

    def after(self, layer: int) -> torch.Tensor:
        """The output (T, D) of block `layer`."""
        return self.inputs[layer + 1] if layer + 1 < len(self.inputs) else self.last


@torch.no_grad()
def clean_run(model: Any, ids: Sequence[int]) -> CleanRun:
    """The clean forward; the caller is inside `attention_interface(model)`."""
    keys, values, seen, masks = {}, {}, {}, {}

    def record(layer: int, q: Any, k: Any, v: Any, mask: Any, scaling: float) -> None:
        keys[layer], values[layer] = k[0].float(), v[0].float()
        if id(mask) not in masks:  # the same object in all layers of one kind
            masks[id(mask)] = visible(mask, q.shape[2], k.shape[2], q.device).reshape(*q.shape[2:3], -1)
        seen[layer] = masks[id(mask)]

    sites = model.sites(("hidden",))
    final = Site("lm", len(model.blocks) - 1, "hidden")
    given = torch.tensor([list(ids)], device=model.device)
    with watch(sites, inputs=sites, record=[final]) as tape:
        out = model.net(input_ids=given, use_cache=False, logits_to_keep=1, seam=record)
    order = range(len(model.blocks))
    return CleanRun(
        model,
        tuple(ids),
        tuple(tape.read[site][0] for site in sites),
        *(tuple(found[i] for i in order) for found in (keys, values, seen)),
        tuple(tape.rest[site] for site in sites),
        tape[final][0],
        out.logits[0, -1].float(),
    )


class Suffix:
    """Streams of the tokens from `start` on, all of one clean run; n tokens each."""

    def __init__(self, clean: CleanRun, start: int) -> None:
        self.clean, self.model, self.start = clean, clean.model, start
        self.n = len(clean.ids) - start
        self._cut: torch.Tensor | None = None
        self._rest = [self._sliced(*rest) for rest in clean.rest]

    def _sliced(self, arguments: tuple, options: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """A block's other arguments for the suffix: of what has a row for each token (positions and their
        rotary embedding) the rows from `start` on; attention is ours."""
        length = len(self.clean.ids)

        def cut(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(cut(v) for v in value)
            by_token = isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[:2] == (1, length)
            return value[:, self.start :] if by_token else value

        return cut(arguments), {k: cut(v) for k, v in options.items()} | {"seam": self._attend}

    def fresh(self, layer: int, streams: int) -> torch.Tensor:
        """Clean inputs of block `layer`, (streams, n, D)."""
        return self.clean.inputs[layer][None, self.start :].expand(streams, -1, -1)

    def block(self, layer: int, hidden: torch.Tensor, cut: torch.Tensor | None = None) -> torch.Tensor:
        """Output (streams, n, D) of block `layer` for these inputs; `cut` (streams, n, T) bool says which
        keys each query may not see, beyond those that it never sees."""
        arguments, options = self._rest[layer]
        self._cut = cut
        try:
            return self.model.blocks[layer](hidden, *arguments, **options)
        finally:
            self._cut = None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (streams, vocabulary) float32 after the last token, from the last block's output."""
        return self.model.head(self.model.final_norm(hidden[:, -1])).float()

    def _attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scaling: float
    ) -> torch.Tensor:
        """Attention of the streams' queries (R, H, n, d) to the clean prefix, which all share, and to their
        own keys and values (R, KV, n, d); (R, n, H, d). A query that sees nothing gives zero."""
        rows, heads, n, d = q.shape
        groups, dtype, edge = k.shape[1], q.dtype, self.start
        q = (q.float() * scaling).unflatten(1, (groups, -1)).transpose(0, 1)  # (KV, R, H / KV, n, d)
        k, v = k.float().transpose(0, 1)[:, :, None], v.float().transpose(0, 1)[:, :, None]
        shared = q.reshape(groups, -1, d) @ self.clean.keys[layer][:, :edge].transpose(1, 2)
        own = (q * k).sum(-1, keepdim=True) if n == 1 else q @ k.transpose(-1, -2)
        scores = torch.cat([shared.view(*q.shape[:-1], edge), own], -1)
        hidden = ~self.clean.seen[layer][edge:]
        hidden = (hidden[None] if self._cut is None else hidden | self._cut)[:, None]
        weights = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
        weights.masked_fill_(hidden.all(-1, keepdim=True), 0.0)
        out = weights.view(groups, -1, edge + n)[..., :edge] @ self.clean.values[layer][:, :edge]
        own = weights[..., edge:]
        out = out.view(q.shape) + (own * v if n == 1 else own @ v)
        return out.permute(1, 3, 0, 2, 4).reshape(rows, n, heads, d).to(dtype)


def cut_windows(suffix: Suffix, cuts: torch.Tensor, windows: Sequence[Window]) -> list[torch.Tensor]:
    """Last-token hidden states with attention cut in windows of layers: for each of `windows` (lo, hi), the
    last block's output (cuts, n, D). cuts: (C, n, T) bool, edges that are cut in the layers lo to hi - 1.

    Windows that open at the same layer share their cut layers: each opens as a stream of its own where its
    window closes.
    """
    depth = len(suffix.model.blocks)
    kinds = sorted(set(windows))
    blocked: dict[int, torch.Tensor] = {}  # by lo: the stream whose edges are cut since then
    opened: dict[Window, torch.Tensor] = {}
    for layer in range(depth):
        for lo, hi in kinds:
            if hi == layer:
                opened[lo, hi] = blocked[lo]
            if lo == layer and lo not in blocked:
                blocked[lo] = suffix.fresh(lo, len(cuts))
        blocked = {lo: h for lo, h in blocked.items() if any(w[0] == lo and w[1] > layer for w in kinds)}
        streams = [*blocked.values(), *opened.values()]
        if not streams:
            continue
        whole = torch.cat(streams)
        closed = torch.zeros(len(opened), *cuts.shape, dtype=torch.bool, device=cuts.device)
        cut = torch.cat([cuts.repeat(len(blocked), 1, 1), closed.flatten(0, 1)])
        parts = iter(suffix.block(layer, whole, cut).split(len(cuts)))
        blocked = {lo: next(parts) for lo in blocked}
        opened = {window: next(parts) for window in opened}
    return [opened[lo, hi] if hi < depth else blocked[lo] for lo, hi in windows]


def patched_layers(
    suffix: Suffix, states: Sequence[torch.Tensor], at: Sequence[int], layers: Sequence[int]
) -> torch.Tensor:
    """The last block's output (layers, n, D) when block l's output at the suffix's positions `at` is
    states[l] (len(at), D), for each of `layers` (ascending) in turn."""
    streams, place = None, torch.as_tensor(list(at), device=suffix.model.device)
    for layer in range(min(layers), len(suffix.model.blocks)):
        if streams is not None:
            streams = suffix.block(layer, streams)
        if layer in layers:
            start = suffix.clean.after(layer)[None, suffix.start :].clone()
            start[0, place] = states[layer].to(start.dtype)
            streams = start if streams is None else torch.cat([streams, start])
    return streams
