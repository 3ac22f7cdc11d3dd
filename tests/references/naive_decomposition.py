"""The decomposition in the slow, obvious way: float64, every component's whole vector by the full Jacobian.

The net is copied in float64 and its norms on the way to the representation are replaced by affine maps with
the statistics of these very images, attention pools by their probabilities. What is left of the way is
linear, so a vector written at a place becomes exactly J times that vector, J being found one output number at
a time. A head's vector is formed at every place: its output times its columns of the output matrix. Nothing
of studio/models/decomposition*.py is used.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def norms_on_the_way(net: nn.Module) -> list[nn.Module]:
    """The norms that the residual stream itself passes, by their names in each library."""
    ends = ("norm", "fc_norm", "layernorm", "post_layernorm", "ln_post", "head.norm")
    found = []
    for name, module in net.named_modules():
        short = name.removeprefix("visual.").removeprefix("trunk.").removeprefix("vision_model.")
        merge = short.endswith("downsample.norm")
        if (short in ends or merge) and not isinstance(module, nn.Identity):
            found.append(module)
    return found


class Fixed(nn.Module):
    """gamma (x - mean x) / sigma + beta with the sigma that it is given; mean 0 for an RMS norm."""

    def __init__(self, norm: nn.Module, x: torch.Tensor) -> None:
        super().__init__()
        self.gain, self.shift = norm.weight, getattr(norm, "bias", None)
        self.planes = "2d" in type(norm).__name__.lower()
        x = x.movedim(1, -1) if self.planes else x
        self.centred = isinstance(norm, nn.LayerNorm)
        square = ((x - x.mean(-1, keepdim=True)) ** 2 if self.centred else x**2).mean(-1, keepdim=True)
        self.sigma = torch.sqrt(square + norm.eps).detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Linear in x but for beta."""
        x = x.movedim(1, -1) if self.planes else x
        x = (x - x.mean(-1, keepdim=True) if self.centred else x) / self.sigma
        x = x if self.gain is None else x * self.gain
        x = x if self.shift is None else x + self.shift
        return x.movedim(-1, 1) if self.planes else x


def replace(net: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts `new` in every place of `old`."""
    for parent in net.modules():
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, new)


class Slow:
    """A model's components of some images. `make(net)`: the layout of a net, which says where things are."""

    def __init__(self, net: nn.Module, make: Callable[[nn.Module], Any], pixels: torch.Tensor) -> None:
        self.net = copy.deepcopy(net).double()
        self.pixels = pixels.double()
        layout = make(self.net)
        read: dict[nn.Module, torch.Tensor] = {}
        handles = [
            m.register_forward_pre_hook(lambda m, a: read.__setitem__(m, a[0]))
            for m in norms_on_the_way(self.net)
        ]
        with torch.no_grad():
            self.representation = layout.run(self.pixels)
        for handle in handles:
            handle.remove()
        for norm, x in read.items():
            replace(self.net, norm, Fixed(norm, x))
        self.layout = layout
        self._record()

    def _record(self) -> None:
        """One forward in which branches are leaves; what they wrote is kept."""
        self.leaves: dict[str, torch.Tensor] = {}
        self.inputs: dict[str, torch.Tensor] = {}
        handles = [self._cut(start) for start in self._starts()]
        handles.append(self.layout.first.register_forward_pre_hook(self._leaf_in("embedding")))
        for part in self.layout.parts:
            module = part.out if hasattr(part, "out") else part.module
            handles.append(module.register_forward_hook(self._leaf_out(part.label)))
        pool = getattr(self.layout.path, "parts", None)
        if pool is not None:
            handles.append(pool["mlp"].register_forward_hook(self._leaf_out("pool.mlp")))
            (kv,) = pool["hold"]
            handles.append(kv.register_forward_hook(lambda m, a, out: _hold_keys(out)))
        with torch.enable_grad():
            self.z = self.layout.run(self.pixels)
        for handle in handles:
            handle.remove()
        names = list(self.leaves)
        rows = []
        for d in range(self.z.shape[1]):
            whole = torch.zeros_like(self.z)
            whole[:, d] = 1
            rows.append(
                torch.autograd.grad(self.z, [self.leaves[n] for n in names], whole, retain_graph=True)
            )
        stacked = (torch.stack(found) for found in zip(*rows, strict=True))
        self.jacobian = dict(zip(names, stacked, strict=True))  # (dim, shape of the leaf) each
        self.z = self.z.detach()

    def _starts(self) -> list[nn.Module]:
        return [*(p.start for p in self.layout.parts), *self.layout.path.starts]

    def _cut(self, start: nn.Module) -> Any:
        return start.register_forward_pre_hook(lambda m, a: (a[0].detach(), *a[1:]))

    def _leaf_in(self, name: str) -> Callable:
        def hook(module: nn.Module, args: Any) -> Any:
            self.leaves[name] = args[0].detach().requires_grad_()
            return (self.leaves[name], *args[1:])

        return hook

    def _leaf_out(self, name: str) -> Callable:
        def hook(module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
            self.inputs[name] = args[0].detach()
            self.leaves[name] = out.detach().requires_grad_()
            return self.leaves[name]

        return hook

    def _pushed(self, name: str, vectors: torch.Tensor) -> torch.Tensor:
        """(images, dim) of vectors in the shape of a leaf, through the Jacobian."""
        images = len(self.z)
        product = (self.jacobian[name] * vectors).flatten(1)
        return product.unflatten(1, (images, -1)).sum(-1).T

    def components(self) -> dict[str, torch.Tensor]:
        """All components but the path's constants, (images, dim) float64, as one dictionary."""
        found = {}
        for name, leaf in self.leaves.items():
            part = next((p for p in self.layout.parts if p.label == name and hasattr(p, "out")), None)
            if part is None:
                found[name] = self._pushed(name, leaf.detach())
                continue
            outputs, weight = self.inputs[name], part.out.weight
            size = weight.shape[1] // part.heads
            for h in range(part.heads):
                columns = slice(h * size, (h + 1) * size)
                vectors = outputs[..., columns] @ weight[:, columns].T  # the head's vector at every place
                found[f"{name}.head.{h}"] = self._pushed(name, vectors)
            if part.out.bias is not None:
                found[f"{name}.bias"] = self._pushed(name, part.out.bias.expand_as(leaf))
        return found

    def constants(self) -> torch.Tensor:
        """What the path itself adds, all together (images, dim): the whole minus the parts."""
        return self.z - sum(self.components().values())


def _hold_keys(out: torch.Tensor) -> torch.Tensor:
    keys, values = out.chunk(2, -1)
    return torch.cat([keys.detach(), values], -1)


def key_token_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    written: torch.Tensor,
    through: torch.Tensor,
    direction: torch.Tensor,
) -> torch.Tensor:
    """Score of every key token of one head of one image: its vector is formed at every query's place.

    q, k, v (T, size), q already scaled; written (width, size): the head's columns of W_O; through (T, dim,
    width): the Jacobian at every place; direction (dim,).
    """
    attention = (q @ k.T).softmax(-1)
    found = []
    for j in range(len(k)):
        vectors = attention[:, j, None] * (written @ v[j])[None]  # (T, width): what key j writes everywhere
        found.append(torch.einsum("tdw,tw->d", through, vectors) @ direction)
    return torch.stack(found)
