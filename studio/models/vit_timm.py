"""Layouts of timm's vision transformers and of open_clip's image towers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from studio.models.vit_hierarchies import MaxVitPath, SwinPath
from studio.models.vit_layouts import (
    Attention,
    Layout,
    Write,
    attention_pool,
    checked_norms,
    fused_attention,
    linear,
    mean_from,
    one_token,
    refuse,
)
from studio.models.vit_paths import Linear, Path, Pooled

_REASONS = {
    "ResPostBlock": "its blocks normalise after each branch (post-norm), so they are no plain sum",
    "SwinTransformerV2Block": "its blocks normalise after each branch (post-norm), so they are no plain sum",
    "ParallelScalingBlock": "its blocks run attention and MLP in one",
    "DiffParallelScalingBlock": "its blocks run attention and MLP in one",
    "ParallelThingsBlock": "its blocks run several attentions in one",
    "CustomResidualAttentionBlock": "its attention is scaled by head or by cosine",
}


def unknown_blocks(model: str, block: nn.Module) -> Exception:
    """Refuses blocks that Locus does not know, with the reason where there is one."""
    name = type(block).__name__
    return refuse(model, _REASONS.get(name, f"its blocks are of the unknown kind {name}"))


def gain_of(module: nn.Module | None) -> torch.Tensor | None:
    """LayerScale's gamma; None where there is none."""
    return getattr(module, "gamma", None)


def timm_layout(model: str, net: nn.Module, projection: Linear = (None, None), run: Any = None) -> Layout:
    """The layout of a timm model by its class. run, projection: of a tower that continues after its trunk."""
    kind = type(net).__name__
    makers = {
        "VisionTransformer": _vit,
        "VisionTransformerDistilled": _vit,
        "SwinTransformer": _swin,
        "MaxxVit": _maxvit,
    }
    if kind not in makers:
        blocks = getattr(net, "blocks", None) or [
            b for layer in getattr(net, "layers", []) for b in layer.blocks
        ]
        if blocks and type(blocks[0]).__name__ in _REASONS:
            raise unknown_blocks(model, blocks[0])
        raise refuse(model, f"its class {kind} is not one that Locus knows")
    return makers[kind](model, net, projection, run)


# ---- ViT, DeiT, DINO, DINOv2, CLIP and SigLIP towers ------------------------------------------------------


def _vit(model: str, net: nn.Module, projection: Linear, run: Any) -> Layout:
    parts: list[Attention | Write] = []
    for i, b in enumerate(net.blocks):
        if type(b).__name__ != "Block" or type(b.attn).__name__ != "Attention":
            raise unknown_blocks(model, b if type(b).__name__ != "Block" else b.attn)
        parts.append(fused_attention(f"block.{i}", 0, b.norm1, b.attn, gain_of(b.ls1)))
        parts.append(Write(f"block.{i}.mlp", 0, b.norm2, b.mlp, gain_of(b.ls2)))
    prefix = (("class",) if net.cls_token is not None else ()) + (
        ("distillation",) if hasattr(net, "dist_token") else ()
    )
    registers = net.num_prefix_tokens - len(prefix)
    prefix += tuple(f"register.{i}" for i in range(registers))

    def pre_logits(pixels: torch.Tensor) -> torch.Tensor:
        return net.forward_head(net.forward_features(pixels), pre_logits=True)

    path = _vit_path(model, net, projection)
    return Layout(tuple(parts), path, net.blocks[0], run or pre_logits, prefix)


def _vit_path(model: str, net: nn.Module, projection: Linear) -> Path:
    pool, width = net.global_pool, net.embed_dim
    norm = net.norm if not isinstance(net.norm, nn.Identity) else None
    last = net.fc_norm if not isinstance(net.fc_norm, nn.Identity) else None
    checked_norms(model, norm, last)
    if norm is not None and last is not None:
        raise refuse(model, "it normalises both before and after pooling")
    if pool == "map":
        return _map_path(model, net, norm, last, projection)
    if hasattr(net, "dist_token"):
        return Pooled(norm, width, mean_from(0, 2), after=False, projection=projection)
    skip = 0 if net.pool_include_prefix else net.num_prefix_tokens
    places = {"token": one_token(0), "avg": mean_from(skip)}.get(pool)
    if places is None:
        raise refuse(model, f"its pooling {pool!r} is not linear")
    return Pooled(norm or last, width, places, after=norm is None and last is not None, projection=projection)


def _map_path(model: str, net: nn.Module, norm: Any, last: Any, projection: Linear) -> Path:
    pool = net.attn_pool
    if last is not None or pool.pos_embed is not None or pool.latent_len != 1:
        raise refuse(model, "its attention pool has positions, several queries or a norm after it")
    skip = 0 if net.pool_include_prefix else net.num_prefix_tokens
    more = {"projection": projection, "skip": skip}
    start = pool.norm if pool.mlp is not None else None
    return attention_pool(
        norm,
        pool,
        pool,
        query=lambda: pool.q(pool.latent),
        mlp=pool.mlp,
        start=start,
        width=net.embed_dim,
        **more,
    )


# ---- Swin -------------------------------------------------------------------------------------------------


def _swin(model: str, net: nn.Module, projection: Linear, run: Any) -> Layout:
    parts: list[Attention | Write] = []
    number = 0
    for stage, layer in enumerate(net.layers):
        for b in layer.blocks:
            parts.append(_window(f"block.{number}", stage, b, b.attn, None, _swin_rows(b)))
            parts.append(Write(f"block.{number}.mlp", stage, b.norm2, b.mlp, None))
            number += 1
    merges = [layer.downsample for layer in net.layers[1:]]
    checked_norms(model, net.norm, *(m.norm for m in merges))
    if net.global_pool != "avg":
        raise refuse(model, f"its pooling {net.global_pool!r} is not linear")
    path = SwinPath(merges, net.norm, net.num_features, projection)

    def pre_logits(pixels: torch.Tensor) -> torch.Tensor:
        return net.forward_head(net.forward_features(pixels), pre_logits=True)

    return Layout(tuple(parts), path, net.layers[0], run or pre_logits)


def _window(label: str, stage: int, block: Any, attention: Any, gain: Any, rows: Any) -> Attention:
    if getattr(attention, "head_first", False):  # the matrix has q, k, v of one head after the other
        heads = attention.num_heads
        size = attention.qkv.out_features // (3 * heads)
        found = fused_attention(label, stage, block.norm1, attention, gain, plain=False)
        return replace(
            found,
            rows=rows,
            values=lambda out: out.flatten(1, -2).unflatten(-1, (heads, 3, size))[:, :, :, 2],
        )
    found = fused_attention(label, stage, block.norm1, attention, gain, plain=False)
    values = found.values
    return replace(found, rows=rows, values=lambda out: values(out.flatten(1, -2)))


def _swin_rows(block: nn.Module) -> Any:
    """Weights (N, H, W, k) in the order of the block's windows: shifted, padded, partitioned."""
    from timm.models.swin_transformer import window_partition

    def rows(weights: torch.Tensor) -> torch.Tensor:
        tall, wide = block.window_size
        if any(block.shift_size):
            weights = weights.roll([-s for s in block.shift_size], (1, 2))
        _, h, w, _ = weights.shape
        weights = nn.functional.pad(weights, (0, 0, 0, -w % wide, 0, -h % tall))
        return window_partition(weights, (tall, wide)).flatten(1, 2)

    return rows


# ---- MaxViT -----------------------------------------------------------------------------------------------


def _maxvit(model: str, net: nn.Module, projection: Linear, run: Any) -> Layout:
    parts: list[Attention | Write] = []
    shortcuts = []
    for stage, block in enumerate(b for s in net.stages for b in s.blocks):
        name = type(block).__name__
        if name != "MaxxVitBlock" or type(block.conv).__name__ != "MbConvBlock" or block.nchw_attn:
            raise refuse(model, f"its blocks ({name}) are not MaxViT's")
        conv = block.conv
        shortcuts.append(_shortcut(model, conv.shortcut))
        parts.append(Write(f"conv.{stage}", stage + 1, conv.pre_norm, conv.conv3_1x1, None, True))
        for b in filter(None, (block.attn_block, block.attn_grid)):
            number = sum(isinstance(p, Attention) for p in parts)
            rows = _partition_rows(b)
            parts.append(_window(f"block.{number}", stage + 1, b, b.attn, gain_of(b.ls1), rows))
            parts.append(Write(f"block.{number}.mlp", stage + 1, b.norm2, b.mlp, gain_of(b.ls2)))
    if net.global_pool not in ("avg", "fast", "fastavg"):
        raise refuse(model, f"its pooling {net.global_pool!r} is not linear")
    after = isinstance(net.norm, nn.Identity)
    norm = net.head.norm if after else net.norm
    checked_norms(model, norm)
    path = MaxVitPath(
        shortcuts, norm, net.num_features, after=after, last=net.head.global_pool, projection=projection
    )
    return Layout(tuple(parts), path, net.stages, run or _maxvit_run(net, after), (), True)


def _maxvit_run(net: nn.Module, after: bool) -> Any:
    """The representation of a MaxViT: what its head reads, before an MLP with a nonlinearity of its own."""

    def run(pixels: torch.Tensor) -> torch.Tensor:
        x = net.forward_features(pixels)
        if not after:
            return net.forward_head(x, pre_logits=True)
        return net.head.flatten(net.head.norm(net.head.global_pool(x)))

    return run


def _shortcut(model: str, module: nn.Module) -> tuple[nn.Module | None, nn.Conv2d | None]:
    """(pool, 1 x 1 convolution) of a block's shortcut."""
    if isinstance(module, nn.Identity):
        return None, None
    if "Avg" not in type(module.pool).__name__:
        raise refuse(model, "it pools by maxima on the residual path")
    return module.pool, module.expand if isinstance(module.expand, nn.Conv2d) else None


def _partition_rows(block: nn.Module) -> Any:
    """Weights (N, H, W, k) in the order of the block's windows or grids."""
    from timm.models.maxxvit import grid_partition, window_partition

    def rows(weights: torch.Tensor) -> torch.Tensor:
        size = list(block.partition_size)
        split = window_partition if block.partition_block else grid_partition
        return split(weights.contiguous(), size).flatten(1, 2)

    return rows


# ---- open_clip --------------------------------------------------------------------------------------------


def open_clip_layout(model: str, tower: nn.Module) -> Layout:
    """The image tower of an open_clip model: its own VisionTransformer, or a trunk of timm."""
    if type(tower).__name__ == "TimmModel":
        return _trunk(model, tower)
    if type(tower).__name__ != "VisionTransformer":
        raise refuse(model, f"its image tower {type(tower).__name__} is no transformer of open_clip or timm")
    if tower.attn_pool is not None:
        raise refuse(model, "its attention pool asks with several queries (CoCa)")
    parts: list[Attention | Write] = []
    for i, b in enumerate(tower.transformer.resblocks):
        if type(b).__name__ != "ResidualAttentionBlock" or not hasattr(b.attn, "qkv"):
            raise unknown_blocks(model, b)
        parts.append(fused_attention(f"block.{i}", 0, b.ln_1, b.attn, gain_of(b.ls_1)))
        parts.append(Write(f"block.{i}.mlp", 0, b.ln_2, b.mlp, gain_of(b.ls_2)))
    places = {"tok": one_token(0), "avg": mean_from(1)}.get(tower.pool_type)
    if places is None:
        raise refuse(model, "it does not pool its tokens")
    projection = (tower.proj, None)
    width = tower.ln_post.normalized_shape[0]
    checked_norms(model, tower.ln_post)
    path = Pooled(tower.ln_post, width, places, after=tower.final_ln_after_pool, projection=projection)
    first = tower.transformer.resblocks[0]
    return Layout(tuple(parts), path, first, tower, ("class",))


def _trunk(model: str, tower: nn.Module) -> Layout:
    """A timm trunk whose own head, or the tower's, is the projection."""
    heads = [m for m in tower.head.children() if not isinstance(m, nn.Dropout)]
    if len(heads) > 1 or not all(isinstance(m, nn.Linear) for m in heads):
        raise refuse(model, "its head is no single matrix")
    own = tower.trunk.get_classifier()
    matrices = [m for m in (own, *heads) if isinstance(m, nn.Linear)]
    if len(matrices) > 1:
        raise refuse(model, "two matrices follow its pooling")
    projection = linear(matrices[0]) if matrices else (None, None)
    return timm_layout(model, tower.trunk, projection, tower)
