"""Paths with several stages: Swin, whose merges concatenate four places, and MaxViT, whose shortcuts pool.

Swin: a vector at place t reaches the representation through the corner that it has in each later merge, so a
stage before k merges has 4^k classes of places, one matrix each. MaxViT: average pools keep one class.
"""

from __future__ import annotations

import torch
from torch import nn

from studio.models.vit_paths import (
    Change,
    Linear,
    Path,
    Seen,
    channels_first,
    frozen,
    inverse_sigma,
    norm_bias,
    norm_map,
    project,
)

CORNERS = ((0, 0), (1, 0), (0, 1), (1, 1))  # (row, column) of a merge's four parts in their order


def mean_weights(norm: nn.Module | None, x: torch.Tensor) -> torch.Tensor:
    """1/(n sigma_t) (N, H, W, 1) of the mean of all n places of a norm that read x."""
    x = x.movedim(1, -1) if channels_first(norm) and x.ndim == 4 else x
    return inverse_sigma(norm, x)[..., None] / (x.shape[1] * x.shape[2])


class SwinPath(Path):
    """Patch merges (norm of four places together, then a matrix), a norm of every place, their mean.

    merges: the merging modules between stages, first to last, each with its `norm` and `reduction`.
    """

    def __init__(
        self, merges: list[nn.Module], norm: nn.Module, width: int, projection: Linear = (None, None)
    ) -> None:
        self.merges, self.norm, self.width, self.projection = merges, norm, width, projection
        self.watched = (norm, *merges, *(m.norm for m in merges))

    def maps(self) -> list[torch.Tensor]:
        """By stage (4^k, width of the stage, dim)."""
        found = [project(self.projection, norm_map(self.norm, self.width))[None]]
        for merge in reversed(self.merges):
            width = merge.reduction.in_features
            matrix = norm_map(merge.norm, width) @ merge.reduction.weight.detach().cpu().double().T
            corners = matrix.reshape(4, 1, width // 4, -1) @ found[0]  # (corner, later class, C, dim)
            found.insert(0, corners.flatten(0, 1))
        return found

    def weights(self, seen: Seen) -> list[torch.Tensor]:
        """By stage (images, H, W, 4^k): every place has one class only, the rest are zeros."""
        found = [mean_weights(self.norm, seen[self.norm])]
        for merge in reversed(self.merges):
            merged = found[0] * inverse_sigma(merge.norm, seen[merge.norm])[..., None]
            n, h, w, classes = merged.shape
            whole = merged.new_zeros(n, h, 2, w, 2, 4, classes)
            for corner, (row, column) in enumerate(CORNERS):
                whole[:, :, row, :, column, corner] = merged
            _, tall, wide, _ = seen[merge].shape  # an odd side was padded by one
            found.insert(0, whole.reshape(n, 2 * h, 2 * w, 4 * classes)[:, :tall, :wide])
        return found

    def constants(self, seen: Seen, weights: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The biases of the norms: those of merges act through the image's later sigmas."""
        maps, found = self.maps(), {}
        for i, merge in enumerate(self.merges):
            bias = (
                norm_bias(merge.norm, merge.reduction.in_features)
                @ merge.reduction.weight.detach().cpu().double().T
            )
            total = weights[i + 1].flatten(1, 2).sum(1).cpu().double()  # (images, classes)
            found[f"merge.{i}.bias"] = torch.einsum("nk,c,kcd->nd", total, bias, maps[i + 1])
        found["norm.bias"] = project(self.projection, norm_bias(self.norm, self.width))
        return self._projected_bias(found, weights[0])

    def changes(self) -> dict[nn.Module, Change]:
        """All norms of the path are frozen."""
        return {norm: frozen(norm) for norm in (self.norm, *(m.norm for m in self.merges))}


class MaxVitPath(Path):
    """Shortcuts (average pool, then a matrix) around the convolution of each block, a norm, a mean.

    shortcuts: (pool or None, 1 x 1 convolution or None) of every block in order; a block is a stage of its
    own. after: the norm reads the mean.
    """

    def __init__(
        self,
        shortcuts: list[tuple[nn.Module | None, nn.Conv2d | None]],
        norm: nn.Module,
        width: int,
        *,
        after: bool,
        last: nn.Module,
        projection: Linear = (None, None),
    ) -> None:
        self.shortcuts, self.norm, self.width, self.after = shortcuts, norm, width, after
        self.last, self.projection = last, projection
        self.watched = (norm, last)
        pools = [pool for pool, _ in shortcuts if pool is not None]
        self.watched += tuple(pools)

    def maps(self) -> list[torch.Tensor]:
        """By stage (1, width of the stage, dim): stage 0 is what comes before the first block."""
        found = [project(self.projection, norm_map(self.norm, self.width))[None]]
        for _, expand in reversed(self.shortcuts):
            if expand is None:
                found.insert(0, found[0])
            else:
                found.insert(0, expand.weight.detach().cpu().double()[:, :, 0, 0].T @ found[0])
        return found

    def weights(self, seen: Seen) -> list[torch.Tensor]:
        """By stage (images, H, W, 1): the mean's, back through the pools."""
        x = seen[self.norm]
        if self.after:
            n, _, h, w = seen[self.last].shape
            sigma = inverse_sigma(self.norm, x.reshape(n, -1))
            found = [(sigma / (h * w))[:, None, None, None].expand(n, h, w, 1)]
        else:
            found = [mean_weights(self.norm, x)]
        for pool, _ in reversed(self.shortcuts):
            found.insert(0, found[0] if pool is None else _through(pool, found[0], seen[pool]))
        return found

    def constants(self, seen: Seen, weights: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The biases of the shortcuts' convolutions and of the norm."""
        maps, found = self.maps(), {}
        for i, (_, expand) in enumerate(self.shortcuts):
            if expand is not None and expand.bias is not None:
                total = weights[i + 1].flatten(1).sum(1).cpu().double()
                bias = expand.bias.detach().cpu().double() @ maps[i + 1][0]
                found[f"conv.{i}.bias"] = total[:, None] * bias
        found["norm.bias"] = project(self.projection, norm_bias(self.norm, self.width))
        return self._projected_bias(found, weights[0])

    def changes(self) -> dict[nn.Module, Change]:
        """The norm is frozen."""
        return {self.norm: frozen(self.norm)}


def _through(pool: nn.Module, weights: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Weights (N, H, W, 1) of the places that an average pool read, from those of what it gave."""
    n, _, h, w = before.shape
    with torch.enable_grad():
        read = weights.new_zeros(n, 1, h, w).requires_grad_()
        (found,) = torch.autograd.grad(pool(read), read, weights.movedim(-1, 1))
    return found.movedim(1, -1)
