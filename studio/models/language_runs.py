"""Runs of a prompt's last tokens beside its clean run: what a causal trace needs and nothing else.

Facts of causal attention that are used (all exact): tokens before the first corrupted one are clean in every
run; a state restored at (token t, layer l) changes nothing at tokens before t nor, up to layer l, at any
other token; at layer l + 1 the queries, keys and values of all these tokens are known already; of the last
layer only the last position is read, so that its other tokens need keys and values alone. Many restored
states, samples and tokens go through the linear layers as rows of one batch; attention runs token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from studio.errors import StudioError
from studio.models.attention_interface import attention_interface
from studio.models.hooks import watch
from studio.models.prompt_attention import attend
from studio.models.sites import (
    LANGUAGE_KINDS,
    language_module,
    language_norms,
    language_projections,
    language_rotary,
)
from studio.types import Site

Tensor = torch.Tensor
Held = tuple[Tensor, Tensor]  # rows (n,), and what they are set to (n, D)
_PIECE = 512  # rows that go through a module at a time, on a processor


@dataclass
class Layer:
    """What is kept of a layer in one run, rows by token: its input `h` (samples, tokens, D), queries, keys
    and values after the rotary embedding (samples, tokens, heads, d), and outputs of attention and MLP."""

    h: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    attention: Tensor
    mlp: Tensor | None = None


class _Projected(Exception):
    """Ends an attention module once its queries, keys and values are known; carries them."""


def _stop_there(layer: int, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    raise _Projected(query, key, value)


class Blocks:
    """The parts of a model's blocks as functions of rows, a row being one token of one run."""

    def __init__(self, model: Any, length: int) -> None:
        self.model, self.count = model, len(model.blocks)
        self.norms = [language_norms(block) for block in model.blocks]
        self.heads, self.groups, self.size = model.heads
        self.turns: tuple[Tensor, Tensor] | None = None
        if (rotary := language_rotary(model.net)) is not None:
            probe = torch.zeros(1, 1, 1, dtype=model.dtype, device=model.device)
            cos, sin = rotary(probe, torch.arange(length, device=model.device)[None])
            self.turns = cos[0], sin[0]

    def project(self, layer: int, h: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (rows, H, d), keys and values (rows, KV, d) of `h` (rows, D) at positions (rows,)."""
        return self._in_pieces(layer, h, places, {})

    def keys(self, layer: int, h: Tensor, places: Tensor) -> tuple[Tensor, Tensor] | None:
        """What the attention reads of `h` (rows, D) and its keys (rows, KV, d), as of `project`; None where
        they can't be had without queries and values."""
        attention = self.model.attention(layer)
        names = language_projections(attention)
        if names is None or self.values(layer) is None:
            return None
        one = {  # the queries and values of one head, which nobody reads
            f"{name}.{key}": p[: self.size]
            for name in (names[0], names[2])
            for key, p in attention.get_submodule(name).named_parameters()
        }
        return self.norms[layer][0](h), self._in_pieces(layer, h, places, one)[1]

    def values(self, layer: int) -> tuple[Tensor, Tensor | None] | None:
        """The matrix (KV, d, D) that makes values of what the attention reads, and its bias (KV, d) or None;
        None where it is not on its own or is stored in 8 or 4 bits."""
        names = language_projections(self.model.attention(layer))
        module = names and self.model.attention(layer).get_submodule(names[2])
        if not module or not module.weight.is_floating_point():
            return None
        bias = None if module.bias is None else module.bias.view(self.groups, self.size)
        return module.weight.view(self.groups, self.size, -1), bias

    def _in_pieces(
        self, layer: int, h: Tensor, places: Tensor, instead: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`_projected`, a piece of the rows at a time."""
        pieces = self._pieces(len(h))
        found = [self._projected(layer, h[piece], places[piece], instead) for piece in pieces]
        return found[0] if len(found) == 1 else tuple(map(torch.cat, zip(*found, strict=True)))

    def _pieces(self, rows: int) -> list[slice]:
        """Rows that go through a module together: on a processor few enough for its cache, whose memory the
        next piece uses again."""
        size = _PIECE if self.model.device.type == "cpu" else rows
        return [slice(at, at + size) for at in range(0, rows, size)]

    def _projected(
        self, layer: int, h: Tensor, places: Tensor, instead: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Runs the attention module, with other parameters in place of some, up to our function."""
        turns = None if self.turns is None else tuple(t[places][None] for t in self.turns)
        read, attention = self.norms[layer][0](h)[None], self.model.attention(layer)
        options = {"position_embeddings": turns, "attention_mask": None, "seam": _stop_there}
        try:
            if instead:
                torch.func.functional_call(attention, instead, (read,), options)
            else:
                attention(read, **options)
        except _Projected as known:
            return tuple(t[0].transpose(0, 1) for t in known.args)
        raise StudioError(f"{self.model.id}'s attention does not ask our function; take another model.")

    def out(self, layer: int, z: Tensor) -> Tensor:
        """What attention adds to the residual stream (rows, D), from its heads' outputs (rows, H * d)."""
        where = Site("lm", layer, "attention-out")
        return language_module(self.model.net, self.model.family, where)(z)

    def finish(self, layer: int, h: Tensor, added: Tensor, held: Held | None = None) -> Tensor:
        """The block's output (rows, D) from its input and what attention added; `held` (rows, values) are
        outputs of the MLP that are set."""
        first, second, parallel = self.norms[layer]
        norm, mlp, found = first if second is None else second, self.model.mlp(layer), torch.empty_like(h)
        for piece in self._pieces(len(h)):
            stream = h[piece] + added[piece]
            found[piece] = mlp(norm(h[piece] if parallel else stream)).add_(stream)
        if held is not None:
            found[held[0]] = held[1] + h[held[0]] + added[held[0]]
        return found

    def logits(self, h: Tensor) -> Tensor:
        """Logits (rows, vocabulary) float32 of final states (rows, D)."""
        return self.model.head(self.model.final_norm(h)).float()


class PromptRuns:
    """The clean run of a prompt, kept, and runs of its last tokens from other states; made by `prompt_runs`.

    `logits` (vocabulary,) float32 are those of the clean run after the last token. `pulse` is called before
    every layer of every run and may raise, which ends the run and leaves nothing behind.
    """

    def __init__(self, model: Any, ids: Sequence[int], first: int, pulse: Callable[[], None]) -> None:
        self.model, self.ids, self.first, self.pulse = model, tuple(ids), first, pulse
        self.length, self.blocks = len(self.ids), Blocks(model, len(self.ids))
        self._masks: list[Tensor | None] = []
        self.scales: list[float] = []
        self._clean()

    def _clean(self) -> None:
        """The clean run through the library's own forward, everything read on the way."""
        heads: list[tuple[Tensor, ...]] = []

        def look(layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> None:
            heads.append(tuple(x.transpose(1, 2) for x in (q, k, v)))
            self._masks.append(None if mask is None else mask[0, 0])
            self.scales.append(scale)

        self.pulse()
        model = self.model
        sites = model.sites(LANGUAGE_KINDS)
        at = {kind: [Site("lm", i, kind) for i in range(len(model.blocks))] for kind in LANGUAGE_KINDS}
        with watch(sites, record=at["attention"] + at["mlp"], inputs=at["hidden"]) as tape:
            row = torch.tensor([self.ids], device=model.device)
            out = model.net(input_ids=row, use_cache=False, logits_to_keep=1, seam=look)
        self.logits, b = out.logits[0, -1].float(), self.first
        states = [tape.read[s] for s in at["hidden"]]
        self.places_added = states[0] - model.embedding(row)  # what the model adds for positions
        self.past = [(k[:, :b].transpose(1, 2), v[:, :b].transpose(1, 2)) for _, k, v in heads]
        self.clean = [
            Layer(h[:, b:], *(x[:, b:] for x in qkv), tape[a][:, b:], tape[m][:, b:])
            for h, qkv, a, m in zip(states, heads, at["attention"], at["mlp"], strict=True)
        ]

    def embedded(self, ids: Sequence[int], noise: Tensor | None = None) -> Tensor:
        """What goes into the first block, (samples, tokens from `first` on, D): the embeddings of these ids,
        as many as the prompt's, plus noise (samples, the same tokens, D) where it is given."""
        found = self.model.embedding(torch.tensor([ids], device=self.model.device))[:, self.first :]
        if noise is not None:
            found = found + noise.to(found)
        return found + self.places_added[:, self.first :]

    def unseen(self, layer: int, start: int, token: int) -> tuple[Tensor | None, Tensor | None]:
        """Of the tokens before `token` and of those from it on, which those from `start` on do not read at a
        layer, bool (tokens from start on, …); None where all are read."""
        n, mask = self.length - token, self._masks[layer]
        if mask is None:
            whole = torch.ones(self.length - start, n, dtype=torch.bool, device=self.model.device)
            return None, whole.triu(start - token + 1) if self.length - start > 1 else None
        rows = mask[start:]
        missing = ~rows if rows.dtype == torch.bool else rows < 0
        return tuple(x if bool(x.any()) else None for x in (missing[:, :token], missing[:, token:]))

    # ---- runs from other embeddings ---------------------------------------------------------------------

    def run(self, embedded: Tensor) -> tuple[Tensor, list[Layer]]:
        """(logits (samples, vocabulary), the layers kept) of runs whose tokens from `first` on go into the
        first block as (samples, tokens, D)."""
        samples, n, width = embedded.shape
        places, h, kept = self.places(samples, self.first), embedded, []
        for layer in range(self.blocks.count):
            self.pulse()
            flat = h.reshape(-1, width)
            q, k, v = (x.view(1, samples, n, *x.shape[1:]) for x in self.blocks.project(layer, flat, places))
            past = tuple(x.expand(samples, -1, -1, -1) for x in self.past[layer])
            unseen = self.unseen(layer, self.first, self.first)
            added = self.blocks.out(layer, attend(q, (k, v), past, self.scales[layer], unseen))
            kept.append(Layer(h, q[0], k[0], v[0], added.view_as(h)))
            h = self.blocks.finish(layer, flat, added).view_as(h)
        return self.blocks.logits(h[:, -1]), kept

    def check(self) -> None:
        """StudioError when our reading of the blocks does not give what the library's own forward gives."""
        found, _ = self.run(self.clean[0].h)
        allowed = 1e-3 if self.model.dtype == torch.float32 else 0.1
        change = float((found[0].softmax(-1) - self.logits.softmax(-1)).abs().max())
        if not change <= allowed:
            raise StudioError(
                f"{self.model.id} can't be traced: its blocks are put together in another way than those of "
                f"{self.model.family} models that Locus knows (probabilities differ by {change:.2g})."
            )

    def places(self, count: int, start: int) -> Tensor:
        """Positions of `count` runs of the tokens from `start` on, one after another."""
        return torch.arange(start, self.length, device=self.model.device).repeat(count)


@contextmanager
def prompt_runs(
    model: Any, ids: Sequence[int], first: int, pulse: Callable[[], None] = lambda: None
) -> Iterator[PromptRuns]:
    """The clean run of a prompt's ids, and runs of its tokens from `first` on while the block lasts; then
    the model's attention is as before, whatever happened."""
    with torch.no_grad(), attention_interface(model):
        yield PromptRuns(model, ids, first, pulse)
