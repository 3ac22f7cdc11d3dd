"""The decomposition of scores by one backward a direction, for any residual path that is linear once frozen.

Every branch is cut where it reads the residual stream, its values (attention) or its output (MLP) become
leaves, and the norms of the path are frozen. Then grad(v) . v is the exact score of a head's key token,
<grad, out> that of an MLP, and <grad at the output projection, bias> that of its bias. arXiv 2406.01583.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from studio.models.decomposition import head_labels
from studio.models.hooks import changed
from studio.models.vit_layouts import Attention, Layout, Write


@dataclass(frozen=True, eq=False)
class Scores:
    """representation (N, dim); by label, each branch's score (N, K) along the directions, the path's own
    constants left out; tokens (N, places, K) of key tokens of the heads asked for, on the finest grid, and
    what falls on padding (N, K)."""

    representation: torch.Tensor
    components: dict[str, torch.Tensor]
    tokens: torch.Tensor
    padding: torch.Tensor
    grid: tuple[int, ...]


def adjoint_scores(
    layout: Layout, pixels: torch.Tensor, directions: torch.Tensor, heads: frozenset[str] | None = None
) -> Scores:
    """Scores along directions (K, dim) by K backwards; `heads`: whose key tokens are summed (None: all)."""
    one = _Graph(layout)
    with torch.enable_grad(), changed(one.before(), one.after()):
        z = layout.run(pixels)
    found: list[dict[Any, torch.Tensor]] = []
    for k, direction in enumerate(directions):
        wanted = direction.to(z.dtype).expand_as(z)
        grads = torch.autograd.grad(
            z, list(one.leaves.values()), wanted, retain_graph=k + 1 < len(directions)
        )
        found.append(dict(zip(one.leaves, grads, strict=True)))
    read = _Reading(one, found, len(pixels))
    components, tokens, padding, grid = read.all(heads)
    return Scores(z.detach().float(), components, tokens, padding, grid)


class _Graph:
    """A forward whose graph is the residual path and the way of the values into it, nothing else."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.leaves: dict[Any, torch.Tensor] = {}
        self.grids: dict[Attention, torch.Size] = {}  # the places of each attention's stage

    def before(self) -> dict[nn.Module, Callable[[Any], Any]]:
        """Cuts: the embedding becomes a leaf, branches read the stream without a gradient."""
        starts = [*(p.start for p in self.layout.parts), *self.layout.path.starts]
        found: dict[nn.Module, Callable[[Any], Any]] = {start: torch.Tensor.detach for start in starts}
        found |= {a.start: lambda x, a=a: self._start(a, x) for a in self.layout.attentions}
        found[self.layout.first] = lambda x: self._leaf("embedding", x)
        return found

    def after(self) -> dict[nn.Module, Callable[[Any, Any], Any]]:
        """Leaves: values, outputs of MLPs; what an output projection gave is kept for its bias."""
        found: dict[nn.Module, Callable[[Any, Any], Any]] = {}
        for part in self.layout.parts:
            if isinstance(part, Write):
                found[part.module] = lambda x, out, part=part: self._leaf(part, out)
                continue
            found[part.sources[-1]] = lambda x, out, part=part: self._leaf(part, out)
            found[part.out] = lambda x, out, part=part: self.leaves.__setitem__((part, "out"), out)
        return found | self.layout.path.changes()

    def _start(self, part: Attention, x: torch.Tensor) -> torch.Tensor:
        self.grids[part] = x.shape[1:-1]
        return x.detach()

    def _leaf(self, key: Any, x: torch.Tensor) -> torch.Tensor:
        self.leaves[key] = x.detach().requires_grad_()
        return self.leaves[key]


class _Reading:
    """Scores from leaves and gradients."""

    def __init__(self, graph: _Graph, grads: list[dict[Any, Any]], images: int) -> None:
        self.layout, self.leaves, self.grids = graph.layout, graph.leaves, graph.grids
        self.grads, self.images = grads, images

    def all(
        self, heads: frozenset[str] | None
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor, tuple[int, ...]]:
        """(scores by label, tokens on the finest grid, padding, that grid)."""
        components = {"embedding": self._outer("embedding")}
        maps: list[torch.Tensor] = []
        total = torch.zeros(())
        for part in self.layout.parts:
            if isinstance(part, Write):
                components[part.label] = self._outer(part)
                continue
            scores = self._keys(part)  # (rows, T, heads, K)
            by_head = self._by_image(scores.sum(1))  # (N, heads, K)
            labels = head_labels(part)
            components |= {label: by_head[:, h] for h, label in enumerate(labels)}
            components[f"{part.label}.bias"] = self._bias(part)
            chosen = [h for h, label in enumerate(labels) if heads is None or label in heads]
            if chosen:
                maps.append(self._placed(part, scores[:, :, chosen].sum(2)))
                total = total + by_head[:, chosen].sum(1)
        grid = max(self.grids.values(), key=lambda g: g.numel())
        tokens = sum(spread(m, grid) for m in maps).flatten(1, -2)
        return components, tokens, total - tokens.sum(1), tuple(grid)

    def _outer(self, key: Any) -> torch.Tensor:
        """<grad, leaf> of every image (N, K)."""
        leaf = self.leaves[key]
        return torch.stack([(g[key] * leaf).float().flatten(1).sum(1) for g in self.grads], -1).detach()

    def _bias(self, part: Attention) -> torch.Tensor:
        """<gradient at the output projection, its bias>."""
        if part.out.bias is None:
            return self.grads[0]["embedding"].new_zeros(self.images, len(self.grads))
        found = [(g[part, "out"].flatten(1, -2).sum(1) @ part.out.bias).float() for g in self.grads]
        return self._by_image(torch.stack(found, -1)).detach()

    def _keys(self, part: Attention) -> torch.Tensor:
        """grad(v) . v of every key token (rows, T, heads, K)."""
        values = part.values(self.leaves[part]).float()
        found = [(part.values(g[part]).float() * values).sum(-1) for g in self.grads]
        return torch.stack(found, -1).detach()

    def _by_image(self, x: torch.Tensor) -> torch.Tensor:
        """Sums the rows (windows) of an image."""
        return x if len(x) == self.images else x.unflatten(0, (self.images, -1)).sum(1)

    def _placed(self, part: Attention, scores: torch.Tensor) -> torch.Tensor:
        """Scores (rows, T, K) at their places (N, *grid, K): the transpose of the order of the rows."""
        stage = self.grids[part]
        with torch.enable_grad():
            places = scores.new_zeros(self.images, *stage, scores.shape[-1]).requires_grad_()
            rows = part.rows(places)
            (found,) = torch.autograd.grad(rows, places, scores.reshape(rows.shape))
        return found


def spread(scores: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
    """Scores (N, h, w, K) on a finer grid, shared equally among the places that a coarse one covers."""
    if tuple(scores.shape[1:-1]) == tuple(grid):
        return scores
    whole = scores.movedim(-1, 1)
    factor = [-(-fine // coarse) for fine, coarse in zip(grid, whole.shape[2:], strict=True)]
    index = [torch.arange(fine, device=scores.device) // f for fine, f in zip(grid, factor, strict=True)]
    counts = [torch.bincount(i, minlength=n) for i, n in zip(index, whole.shape[2:], strict=True)]
    share = whole / (counts[0][:, None] * counts[1]).clamp(min=1)
    return share[:, :, index[0]][:, :, :, index[1]].movedim(1, -1)
