"""From the residual stream to the representation: the path that is linear once its norms are frozen.

A norm is frozen at the point observed, with its own eps and the biased variance:
LN(sum c_i) = sum gamma (c_i - mean c_i) / sigma + beta. On such a path every place t of stage s acts through
a number that depends on the image and a matrix that does not: z = sum_s sum_t w_tk x_t M_k + constants, k the
class of the place (one for mean pooling, a head of an attention pool, a corner of a merged patch).
Decomposing and Interpreting Image Representations via Text in ViTs Beyond CLIP, arXiv 2406.01583.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import nn

Seen = Mapping[nn.Module, torch.Tensor]  # what watched modules read
Change = Callable[[torch.Tensor, Any], Any]  # (what a module read, what it gave) to what it shall give
Linear = tuple[torch.Tensor | None, torch.Tensor | None]  # matrix (inputs, outputs) and bias, or neither


def is_layer_norm(norm: nn.Module) -> bool:
    """Whether the norm takes the mean off (RMS norms do not)."""
    return isinstance(norm, nn.LayerNorm)


def known_norm(norm: nn.Module | None) -> bool:
    """Whether it is a norm that can be frozen: LayerNorm, RMSNorm, or none at all."""
    named = type(norm).__name__ in ("RmsNorm", "RmsNorm2d", "RMSNorm", "LlamaRMSNorm")
    return norm is None or isinstance(norm, nn.Identity) or is_layer_norm(norm) or named


def _plain(norm: nn.Module | None) -> bool:
    return norm is None or isinstance(norm, nn.Identity)


def norm_map(norm: nn.Module | None, width: int) -> torch.Tensor:
    """(width, width) float64 on the CPU: centring and gain of the frozen norm, without 1/sigma."""
    found = torch.eye(width, dtype=torch.float64)
    if _plain(norm):
        return found
    if is_layer_norm(norm):
        found = found - 1 / width
    return found if norm.weight is None else found * norm.weight.detach().cpu().double()


def norm_bias(norm: nn.Module | None, width: int) -> torch.Tensor:
    """beta (width,) float64 on the CPU; zeros for a norm without."""
    bias = getattr(norm, "bias", None)
    return torch.zeros(width, dtype=torch.float64) if bias is None else bias.detach().cpu().double()


def inverse_sigma(norm: nn.Module | None, x: torch.Tensor) -> torch.Tensor:
    """1/sigma of every vector of x (..., width), by the norm's own eps."""
    if _plain(norm):
        return x.new_ones(x.shape[:-1], dtype=torch.float32)
    x = x.float() if x.device.type == "mps" else x.double()  # MPS has no float64
    spread = x.var(-1, unbiased=False) if is_layer_norm(norm) else x.square().mean(-1)
    eps = norm.eps if norm.eps is not None else torch.finfo(torch.float32).eps
    return (spread + eps).rsqrt().float()


def channels_first(norm: nn.Module | None) -> bool:
    """Whether the norm reads (N, C, H, W)."""
    return type(norm).__name__.endswith("2d")


def frozen(norm: nn.Module) -> Change:
    """The norm with its statistics held fixed: linear in what it reads, same value."""

    def apply(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        x = x.movedim(1, -1) if channels_first(norm) else x
        with torch.no_grad():
            gain = inverse_sigma(norm, x)[..., None].to(x.dtype)
        y = (x - x.mean(-1, keepdim=True) if is_layer_norm(norm) else x) * gain
        if norm.weight is not None:
            y = y * norm.weight
        if getattr(norm, "bias", None) is not None:
            y = y + norm.bias
        return y.movedim(-1, 1) if channels_first(norm) else y

    return apply


def project(linear: Linear, matrix: torch.Tensor) -> torch.Tensor:
    """matrix (..., width) times the projection, float64; itself where there is none."""
    return matrix if linear[0] is None else matrix @ linear[0].detach().cpu().double()


class Path(ABC):
    """Base of all paths. `watched`: modules whose input is needed; `starts`: norms of branches within the
    path; `given`: modules whose output is needed."""

    watched: tuple[nn.Module, ...] = ()
    starts: tuple[nn.Module, ...] = ()
    given: tuple[nn.Module, ...] = ()
    projection: Linear = (None, None)

    @abstractmethod
    def maps(self) -> list[torch.Tensor]:
        """By stage (classes, width, dim) float64: what a vector there becomes in the representation."""

    def known(self, places: int, like: torch.Tensor) -> torch.Tensor | None:
        """Weights (1, places, 1) before the forward, up to a factor of the image; None when they are not."""
        return None

    def factor(self, seen: Seen) -> torch.Tensor:
        """(images,), or (1,) for all of them, what `known` is multiplied by; 1 where it is the weights."""
        return torch.ones(1)

    @abstractmethod
    def weights(self, seen: Seen) -> list[torch.Tensor]:
        """By stage (images, *grid, classes) float32."""

    @abstractmethod
    def constants(self, seen: Seen, weights: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Components (images, dim) that the path itself adds, by label; `norm.bias` is always there."""

    @abstractmethod
    def changes(self) -> dict[nn.Module, Change]:
        """What makes the path linear in a forward: for the adjoint."""

    def _projected_bias(self, found: dict[str, torch.Tensor], like: torch.Tensor) -> dict[str, torch.Tensor]:
        """The constants with the projection's bias, if it has one, all on the device of the images."""
        rows = len(like)
        if self.projection[1] is not None:
            found["projection.bias"] = self.projection[1].detach()
        return {k: v.to(like.device, torch.float32).expand(rows, -1) for k, v in found.items()}


class Pooled(Path):
    """z = norm of a pooled token, or the pooled norms of tokens, then a projection.

    places(n): weights (n,) of the n tokens. after: the norm reads the pooled vector.
    """

    def __init__(
        self,
        norm: nn.Module | None,
        width: int,
        places: Callable[[int], torch.Tensor],
        *,
        after: bool,
        projection: Linear = (None, None),
    ) -> None:
        self.norm, self.width, self.places, self.after = norm, width, places, after
        self.projection = projection
        self.watched = () if _plain(norm) else (norm,)

    def maps(self) -> list[torch.Tensor]:
        """One stage, one class."""
        return [project(self.projection, norm_map(self.norm, self.width))[None]]

    def known(self, places: int, like: torch.Tensor) -> torch.Tensor | None:
        """The pooling itself, when sigma is one number an image."""
        p = self.places(places).to(like.device)
        single = int((p != 0).sum()) == 1
        return p[None, :, None] if self.after or single or _plain(self.norm) else None

    def factor(self, seen: Seen) -> torch.Tensor:
        """1/sigma of the vector that is pooled."""
        if _plain(self.norm):
            return torch.ones(())
        x = seen[self.norm]
        if x.ndim == 3:
            x = x[:, int(self.places(x.shape[1]).argmax())]
        return inverse_sigma(self.norm, x)

    def weights(self, seen: Seen) -> list[torch.Tensor]:
        """p_t / sigma_t, for pooling after the norm."""
        x = seen[self.norm]
        return [(self.places(x.shape[1]).to(x.device) * inverse_sigma(self.norm, x))[..., None]]

    def constants(self, seen: Seen, weights: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """beta, through the projection."""
        bias = project(self.projection, norm_bias(self.norm, self.width))
        return self._projected_bias({"norm.bias": bias}, weights[0])

    def changes(self) -> dict[nn.Module, Change]:
        """The final norm is frozen."""
        return {} if _plain(self.norm) else {self.norm: frozen(self.norm)}


class AttentionPool(Path):
    """z = o + mlp(norm o), o = sum of heads g and tokens t of a_g[t] v_t W_O^g, the a held fixed (SigLIP).

    probabilities(pool's input (N, T, D)): a (N, T, heads). value: (W_V^T (D, heads, head size), b_V);
    out: (W_O^T (heads, head size, D), b_O). skip: prefix tokens that the pool does not read. hold: what keeps
    the probabilities out of the gradient: (module, change of its output or of its input).
    """

    def __init__(self, norm: nn.Module | None, pool: nn.Module, parts: Mapping[str, Any]) -> None:
        self.norm, self.pool, self.parts = norm, pool, parts
        self.width, self.projection = parts["width"], parts.get("projection", (None, None))
        self.mlp, self.skip = parts["mlp"], parts.get("skip", 0)
        self.watched = (pool,) if _plain(norm) else (norm, pool)
        self.starts = () if self.mlp is None else (parts["start"],)
        self.given = () if self.mlp is None else (self.mlp,)

    @cached_property
    def _heads(self) -> torch.Tensor:
        """W_V^T W_O^T by head (heads, D, dim)."""
        value, out = (self.parts[k][0].detach().cpu().double() for k in ("value", "out"))
        return project(self.projection, torch.einsum("dhe,hef->hdf", value, out))

    def maps(self) -> list[torch.Tensor]:
        """One stage, one class a head of the pool."""
        return [norm_map(self.norm, self.width) @ self._heads]

    def weights(self, seen: Seen) -> list[torch.Tensor]:
        """a_g[t] / sigma_t; 0 for prefix tokens that the pool does not read."""
        found = self.parts["probabilities"](seen[self.pool])
        found = nn.functional.pad(found, (0, 0, self.skip, 0))
        if not _plain(self.norm):
            found = found * inverse_sigma(self.norm, seen[self.norm])[..., None]
        return [found.float()]

    def constants(self, seen: Seen, weights: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The norm's bias through all heads, the pool's own biases, and its MLP."""
        heads = self._heads.sum(0)
        value, out = (self.parts[k] for k in ("value", "out"))
        own = torch.zeros(self.width, dtype=torch.float64)
        if value[1] is not None:
            own = torch.einsum("he,hef->f", value[1].detach().cpu().double(), out[0].detach().cpu().double())
        if out[1] is not None:
            own = own + out[1].detach().cpu().double()
        found = {"pool.bias": project(self.projection, own)}
        if self.mlp is not None:
            y = seen[self.mlp].reshape(len(weights[0]), -1).cpu().double()
            found["pool.mlp"] = project(self.projection, y)
        found["norm.bias"] = norm_bias(self.norm, self.width) @ heads
        return self._projected_bias(found, weights[0])

    def changes(self) -> dict[nn.Module, Change]:
        """The norm is frozen and the MLP's output held; `hold` freezes the probabilities."""
        found = {} if _plain(self.norm) else {self.norm: frozen(self.norm)}
        if self.mlp is not None:
            found[self.mlp] = lambda x, out: out.detach()
        return found | self.parts["hold"]
