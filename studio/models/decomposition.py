"""The exact first-order decomposition of an image representation, in closed form, streamed in one forward.

Head h: sum_k (sum_t w_tk o_ht) W_O^h diag(g) M_k, o_ht the head's output at t; MLP: sum_k (sum_t w_tk g
mlp_t) M_k; the embedding alike; output biases and beta are components of their own, and every component is
centred by its own mean (M_k). w and M are those of models/vit_paths.py. arXiv 2310.05916, 2406.01583.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import nn

from studio.models.hooks import changed
from studio.models.vit_layouts import Attention, Layout, Write


@dataclass(frozen=True, eq=False)
class Parts:
    """What one batch is made of: the representation (N, dim) and, by label, every component (N, dim).

    outputs: by head label, sum_t w_t o_ht (N, head size), before W_O, where the path has one class. tokens:
    (N, tokens, K) scores of key tokens, summed over the heads asked for, not divided by anything. by_head:
    for every attention in order (heads, N, tokens, K); empty when not asked for.
    """

    representation: torch.Tensor
    components: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]
    tokens: torch.Tensor | None = None
    by_head: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True, eq=False)
class TokenQuestion:
    """Scores of key tokens, summed over the heads named (None: all). directions(attention): what a head's
    output is multiplied by (heads, head size, K), see `along`. keep: keep every head's own too."""

    directions: Callable[[Attention], torch.Tensor]
    heads: frozenset[str] | None = None
    keep: bool = False


class Decomposition:
    """A model's layout, ready to decompose batches: constant matrices are made once."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout, self.device = layout, device

    @cached_property
    def maps(self) -> list[torch.Tensor]:
        """By stage (classes, width, dim) float32 on the device."""
        return [m.to(self.device, torch.float32) for m in self.layout.path.maps()]

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Components in forward order, before those of the path."""
        found = ["embedding"]
        for part in self.layout.parts:
            found += head_labels(part) if isinstance(part, Attention) else [part.label]
            found += [f"{part.label}.bias"] if isinstance(part, Attention) else []
        return tuple(found)

    def streams_tokens(self) -> bool:
        """Whether token scores have a closed form: softmax attention and one class of places."""
        return (
            len(self.maps) == 1 and len(self.maps[0]) == 1 and all(a.attend for a in self.layout.attentions)
        )

    def along(self, directions: torch.Tensor) -> Callable[[Attention], torch.Tensor]:
        """Directions (K, dim) of the representation, folded into each head's output matrix."""
        folded = self.maps[0][0] @ directions.T
        return cache(lambda part: head_matrix(part) @ folded)

    @torch.no_grad()
    def run(self, pixels: torch.Tensor, tokens: TokenQuestion | None = None) -> Parts:
        """Decomposes one batch; `tokens` needs `streams_tokens`."""
        one = _Pass(self, tokens)
        with changed(one.before(), one.after()):
            representation = self.layout.run(pixels)
        return one.parts(representation.float())


def head_labels(attention: Attention) -> list[str]:
    """block.3.head.0 …"""
    return [f"{attention.label}.head.{h}" for h in range(attention.heads)]


def head_matrix(attention: Attention) -> torch.Tensor:
    """W_O^h diag(g) (heads, head size, width) float32."""
    matrix = attention.out.weight.detach().float().T
    matrix = matrix if attention.gain is None else matrix * attention.gain.detach().float()
    return matrix.unflatten(0, (attention.heads, -1))


class _Pass:
    """One forward: what hooks see, reduced over tokens at once where the weights are known beforehand."""

    def __init__(self, whole: Decomposition, tokens: TokenQuestion | None) -> None:
        self.whole, self.layout, self.question = whole, whole.layout, tokens
        self.seen: dict[nn.Module, torch.Tensor] = {}
        self.kept: dict[int, torch.Tensor] = {}  # by number of the part; -1 is the embedding
        self.known: torch.Tensor | None = None
        self.single: int | None = None  # the only token that is pooled
        self.sources: dict[int, dict[nn.Module, torch.Tensor]] = {}
        self.scores: torch.Tensor | None = None
        self.by_head: list[torch.Tensor] = []

    # ---- hooks --------------------------------------------------------------------------------------------

    def before(self) -> dict[nn.Module, Callable[[Any], Any]]:
        """What is looked at before modules run."""
        found: dict[nn.Module, Callable[[Any], Any]] = {self.layout.first: self._embedding}
        for i, part in enumerate(self.layout.parts):
            if isinstance(part, Attention):
                found[part.out] = lambda x, i=i, part=part: self._heads(i, part, x)
        for module in self.layout.path.watched:
            seen = self._watched(module, found.get(module))
            found[module] = seen
        return found

    def after(self) -> dict[nn.Module, Callable[[Any, Any], Any]]:
        """What is looked at after modules ran."""
        found: dict[nn.Module, Callable[[Any, Any], Any]] = {}
        for i, part in enumerate(self.layout.parts):
            if isinstance(part, Write):
                found[part.module] = lambda x, out, i=i, part=part: self._keep(
                    i, out.movedim(1, -1) if part.channels_first else out
                )
            elif self.question is not None:
                for module in part.sources:
                    found[module] = lambda x, out, i=i, module=module: self._source(i, module, out)
        for module in self.layout.path.given:
            found[module] = lambda x, out, module=module: self.seen.__setitem__(module, out)
        return found

    def _watched(self, module: nn.Module, also: Callable[[Any], Any] | None) -> Callable[[Any], Any]:
        def see(x: torch.Tensor) -> None:
            self.seen[module] = x
            if also is not None:
                also(x)

        return see

    def _embedding(self, x: torch.Tensor) -> None:
        x = x.movedim(1, -1) if self.layout.channels_first else x
        if x.ndim == 3:
            self.known = self.layout.path.known(x.shape[1], x)
        if self.known is not None and int((self.known == 1).sum()) == 1 == int((self.known != 0).sum()):
            self.single = int(self.known.argmax())
        self._keep(-1, x)

    def _heads(self, i: int, part: Attention, x: torch.Tensor) -> None:
        self._keep(i, x.flatten(1, -2))
        if self.question is not None and self.known is not None:
            self._token_scores(part, self.sources.pop(i), self.known)

    def _source(self, i: int, module: nn.Module, out: torch.Tensor) -> None:
        self.sources.setdefault(i, {})[module] = out

    def _keep(self, i: int, x: torch.Tensor) -> None:
        """The sum over tokens (N, 1, width) if the weights are known by now, else the tensor itself."""
        if self.known is None:
            self.kept[i] = x
        elif self.single is not None:
            self.kept[i] = x[:, self.single : self.single + 1].clone()
        else:
            self.kept[i] = self.known.to(x.dtype).transpose(1, 2) @ x

    # ---- tokens -------------------------------------------------------------------------------------------

    def _token_scores(
        self, part: Attention, outputs: Mapping[nn.Module, torch.Tensor], weights: torch.Tensor
    ) -> None:
        """Adds u_hj (v_hj . m_hk) of one attention; u_hj = sum_t w_t a_h[t, j]."""
        labels, asked = head_labels(part), self.question.heads
        if asked is not None and not asked & set(labels):
            return
        found = [outputs[m] for m in part.sources]
        reads = key_weights(part, found, weights).transpose(1, 2)  # (N, tokens, heads)
        values = part.values(found[-1]).float() * reads[..., None]
        matrix = self.question.directions(part)
        if asked is not None:
            chosen = torch.tensor([name in asked for name in labels], device=matrix.device)
            matrix = matrix * chosen[:, None, None]
        if self.question.keep:
            found = values.movedim(2, 0).flatten(1, 2) @ matrix  # (heads, N tokens, K)
            self.by_head.append(found.unflatten(1, values.shape[:2]))
        added = values.flatten(2) @ matrix.flatten(0, 1)
        self.scores = added if self.scores is None else self.scores.add_(added)

    # ---- the end ------------------------------------------------------------------------------------------

    def parts(self, representation: torch.Tensor) -> Parts:
        """Everything, once the forward is over."""
        path = self.layout.path
        streamed = self.known is not None
        if streamed:
            factor = path.factor(self.seen).to(representation.device).expand(len(representation))
            weights = [self.known * factor[:, None, None]]
        else:
            weights = path.weights(self.seen)
            factor = representation.new_ones(len(representation))
        if self.question is not None and not streamed:
            for i, outputs in self.sources.items():
                self._token_scores(self.layout.parts[i], outputs, weights[0])
        components, outputs = self._components(weights, factor, streamed)
        components |= path.constants(self.seen, weights)
        scores = None if self.scores is None else self.scores * factor[:, None, None]
        for kept in self.by_head:
            kept.mul_(factor[:, None, None])
        return Parts(representation, components, outputs, scores, tuple(self.by_head))

    def _components(
        self, weights: list[torch.Tensor], factor: torch.Tensor, streamed: bool
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        components: dict[str, torch.Tensor] = {}
        outputs: dict[str, torch.Tensor] = {}

        def reduced(i: int, stage: int, rows: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
            x = self.kept[i]
            if streamed:
                return x.float() * factor[:, None, None]
            return summed(x, rows(weights[stage]), len(factor))

        components["embedding"] = self._mapped(0, reduced(-1, 0, lambda w: w))
        for i, part in enumerate(self.layout.parts):
            if isinstance(part, Write):
                x = reduced(i, part.stage, lambda w: w)
                x = x if part.gain is None else x * part.gain.float()
                components[part.label] = self._mapped(part.stage, x)
                continue
            x = reduced(i, part.stage, part.rows).unflatten(-1, (part.heads, -1))  # (N, classes, heads, size)
            written = torch.einsum("nshe,hec->nhsc", x, head_matrix(part))
            found = written.flatten(2) @ self.whole.maps[part.stage].flatten(0, 1)
            for h, label in enumerate(head_labels(part)):
                components[label] = found[:, h]
                if x.shape[1] == 1:
                    outputs[label] = x[:, 0, h]
            components[f"{part.label}.bias"] = self._bias(part, weights[part.stage])
        return components, outputs

    def _mapped(self, stage: int, x: torch.Tensor) -> torch.Tensor:
        """(N, classes, width) to (N, dim)."""
        return x.flatten(1) @ self.whole.maps[stage].flatten(0, 1)

    def _bias(self, part: Attention, weights: torch.Tensor) -> torch.Tensor:
        """The output projection's bias, written at every place."""
        total = weights.flatten(1, -2).sum(1)  # (N, classes)
        bias = part.out.bias
        if bias is None:
            return total.new_zeros(len(total), self.whole.maps[part.stage].shape[-1])
        bias = bias.float() if part.gain is None else bias.float() * part.gain.float()
        return torch.einsum("nk,c,kcd->nd", total, bias, self.whole.maps[part.stage])


def summed(x: torch.Tensor, weights: torch.Tensor, images: int) -> torch.Tensor:
    """sum_t w_tk x_t (images, classes, width) of x (rows, T, width), several rows an image."""
    x, weights = x.flatten(1, -2).float(), weights.flatten(1, -2)
    found = weights.transpose(1, 2) @ x
    return found if len(found) == images else found.unflatten(0, (images, -1)).sum(1)


def key_weights(part: Attention, found: list[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """u_hj = sum_t w_t a_h[t, j] (N, heads, tokens); weights (N or 1, T, 1). Only rows with a weight are
    computed; image by image when all have one."""
    q, k = (x.float() for x in part.attend(found))
    w = weights[..., 0].expand(len(q), -1)
    asking = (w != 0).any(0).nonzero()[:, 0]
    q, w = q[:, :, asking] * part.scale, w[:, asking]
    if len(asking) == 1:
        return (q @ k.transpose(-2, -1)).softmax(-1)[:, :, 0] * w[:, None]
    rows = [
        torch.einsum("t,htj->hj", w[i], (q[i] @ k[i].transpose(-2, -1)).softmax(-1)) for i in range(len(q))
    ]
    return torch.stack(rows)
