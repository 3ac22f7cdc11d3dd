"""Mean ablation in the slow, obvious way: a timm ViT written out in float64, image by image, head by head.

Only plain blocks: norm1, qkv, proj, norm2, mlp (fc1, act, fc2), LayerScale or none; pooling by class token
or by the mean of patches, before or after the norm.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn


class SlowViT:
    """A float64 copy of a net; `run` takes one image and what is put in the place of branches."""

    def __init__(self, net: nn.Module) -> None:
        self.net = copy.deepcopy(net).double().eval()

    @torch.no_grad()
    def run(
        self, image: torch.Tensor, instead: Mapping[str, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(representation (D,), {label: what the branch gave at every token}) of one image (3, H, W)."""
        net, instead, given = self.net, instead or {}, {}
        x = net._pos_embed(net.patch_embed(image[None].double()))
        x = net.norm_pre(x)[0]
        for i, block in enumerate(net.blocks):
            y, attention = block.norm1(x), block.attn
            q, k, v = attention.qkv(y).chunk(3, dim=-1)
            size = q.shape[-1] // attention.num_heads
            outs = []
            for h in range(attention.num_heads):
                columns, label = slice(h * size, (h + 1) * size), f"block.{i}.head.{h}"
                weights = (q[:, columns] @ k[:, columns].T / size**0.5).softmax(-1)
                given[label] = weights @ v[:, columns]
                outs.append(instead.get(label, given[label]))
            x = x + block.ls1(attention.proj(torch.cat(outs, -1)))
            label = f"block.{i}.mlp"
            given[label] = block.mlp.fc2(block.mlp.act(block.mlp.fc1(block.norm2(x))))
            x = x + block.ls2(instead.get(label, given[label]))
        return self._pooled(x), given

    def _pooled(self, x: torch.Tensor) -> torch.Tensor:
        net = self.net
        x = net.norm(x)
        x = x[0] if net.global_pool == "token" else x[net.num_prefix_tokens :].mean(0)
        return net.fc_norm(x)


def naive_true_ablation(
    net: nn.Module, images: Any, reference: Any, labels: Sequence[str]
) -> list[torch.Tensor]:
    """The representation (D,) of each image while the branches give their mean over the reference images."""
    slow = SlowViT(net)
    seen = [slow.run(image)[1] for image in reference]
    means = {label: sum(s[label] for s in seen) / len(seen) for label in labels}
    return [slow.run(image, means)[0] for image in images]


def naive_direct_effect(
    contributions: list[dict[str, torch.Tensor]],
    reference: list[dict[str, torch.Tensor]],
    labels: Sequence[str],
) -> list[torch.Tensor]:
    """z' of each image: every component (D,) summed, those of `labels` as their mean over the reference."""
    found = []
    for image in contributions:
        total = torch.zeros_like(next(iter(image.values())))
        for label, vector in image.items():
            mean = sum(r[label] for r in reference) / len(reference)
            total = total + (mean if label in labels else vector)
        found.append(total)
    return found
