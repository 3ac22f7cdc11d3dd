"""How vision transformers are built: their residual branches and their way to the representation, by library.

A layout names what a decomposition needs and nothing else: which module reads the heads' outputs, where the
queries, keys and values are, which norm opens a branch, and the path of models/vit_paths.py. The names of
modules were listed from instances of timm 1.0.31, open_clip 3.3 and transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from studio.errors import StudioError
from studio.models.vit_paths import AttentionPool, Linear, Path, Pooled, known_norm


@dataclass(frozen=True, eq=False)
class Write:
    """A branch whose output is one component: an MLP or a convolution. `gain`: its LayerScale."""

    label: str
    stage: int
    start: nn.Module
    module: nn.Module
    gain: torch.Tensor | None = None
    channels_first: bool = False


@dataclass(frozen=True, eq=False)
class Attention:
    """An attention branch. out: its last matrix, which reads the heads' outputs (rows, T, heads x size).

    sources: the modules whose outputs hold queries, keys and values, the values in the last. values(output):
    (rows, T, heads, size). attend(outputs): queries and keys (rows, heads, T, size), for attention that is a
    plain softmax; None: windows, a bias or a gate. rows: weights (N, *grid, k) in the order of `out`'s rows.
    mixes: the heads' outputs pass a norm together, so they can't be split by key token.
    """

    label: str
    stage: int
    start: nn.Module
    out: nn.Linear
    sources: tuple[nn.Module, ...]
    values: Callable[[torch.Tensor], torch.Tensor]
    attend: Callable[[list[torch.Tensor]], tuple[torch.Tensor, torch.Tensor]] | None
    heads: int
    scale: float
    gain: torch.Tensor | None = None
    rows: Callable[[torch.Tensor], torch.Tensor] = lambda weights: weights
    mixes: bool = False


@dataclass(frozen=True, eq=False)
class Layout:
    """A model as a decomposition sees it. first: the module that reads the embedding. run(pixels): the
    representation (N, dim). prefix: names of the tokens that are no patches."""

    parts: tuple[Attention | Write, ...]
    path: Path
    first: nn.Module
    run: Callable[[torch.Tensor], torch.Tensor]
    prefix: tuple[str, ...] = ()
    channels_first: bool = False

    @property
    def attentions(self) -> list[Attention]:
        """The attention branches in forward order."""
        return [p for p in self.parts if isinstance(p, Attention)]


class NotDecomposable(StudioError):
    """The model's sum of residual branches is not known: a sentence with the reason."""

    code = 2


def refuse(model: str, reason: str) -> NotDecomposable:
    """The sentence for a model that can't be decomposed."""
    return NotDecomposable(
        f"{model} can't be decomposed: {reason}; take a pre-norm ViT, Swin or MaxViT of timm, a CLIP or "
        "SigLIP of open_clip or transformers, or a transformers ViT, DeiT or DINOv2."
    )


def linear(module: nn.Module) -> Linear:
    """(matrix (inputs, outputs), bias) of a Linear; nothing for an identity."""
    return (module.weight.T, module.bias) if isinstance(module, nn.Linear) else (None, None)


def one_token(index: int) -> Callable[[int], torch.Tensor]:
    """Pooling weights that take one token."""
    return lambda n: nn.functional.one_hot(torch.tensor(index), n).float()


def mean_from(first: int, last: int | None = None) -> Callable[[int], torch.Tensor]:
    """Pooling weights of the mean over tokens first .. last."""

    def places(n: int) -> torch.Tensor:
        found = torch.zeros(n)
        found[first:last] = 1
        return found / found.sum()

    return places


def checked_norms(model: str, *norms: nn.Module | None) -> None:
    """Refuses norms that can't be frozen."""
    for norm in norms:
        if not known_norm(norm):
            raise refuse(model, f"its norm {type(norm).__name__} is not a LayerNorm or RMSNorm")


# ---- attention --------------------------------------------------------------------------------------------


def fused_attention(
    label: str, stage: int, start: nn.Module, attention: nn.Module, gain: Any, *, plain: bool = True
) -> Attention:
    """timm's Attention (one `qkv` matrix, rows of q, k, v by head), also in Swin's windows."""
    heads, size = attention.num_heads, attention.qkv.out_features // (3 * attention.num_heads)
    gate, norm = getattr(attention, "gate", None), getattr(attention, "norm", None)
    mixes = norm is not None and not isinstance(norm, nn.Identity)

    def attend(found: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = found[-1].unflatten(-1, (3, heads, size)).permute(2, 0, 3, 1, 4)[:2]
        normed = hasattr(attention, "q_norm")
        return (attention.q_norm(q), attention.k_norm(k)) if normed else (q, k)

    return Attention(
        label,
        stage,
        start,
        attention.proj,
        (attention.qkv,),
        lambda found: found.unflatten(-1, (3, heads, size))[:, :, 2],
        attend if plain and gate is None and not mixes else None,
        heads,
        size**-0.5,
        gain,
        mixes=mixes,
    )


def split_attention(label: str, start: nn.Module, attention: nn.Module, gain: Any) -> Attention:
    """transformers' attention: q_proj, k_proj, v_proj and o_proj (out_proj in CLIP and SigLIP)."""
    config = attention.config
    heads = config.num_attention_heads
    size = attention.q_proj.out_features // heads
    out = attention.o_proj if hasattr(attention, "o_proj") else attention.out_proj

    def split(found: torch.Tensor) -> torch.Tensor:
        return found.unflatten(-1, (heads, size))

    return Attention(
        label,
        0,
        start,
        out,
        (attention.q_proj, attention.k_proj, attention.v_proj),
        split,
        lambda found: (split(found[0]).transpose(1, 2), split(found[1]).transpose(1, 2)),
        heads,
        size**-0.5,
        gain,
    )


# ---- transformers -----------------------------------------------------------------------------------------


def transformers_layout(model: str, net: nn.Module) -> Layout:
    """CLIP, SigLIP, ViT, DeiT, DINOv2 and their projections."""
    tower = getattr(net, "vision_model", net)
    kind, config = type(tower).__name__, tower.config
    maker = {"CLIPVisionModel": _clip, "SiglipVisionModel": _siglip}.get(kind)
    if maker:
        return maker(model, net, tower, config)
    if kind not in ("ViTModel", "DeiTModel", "Dinov2Model", "Dinov2WithRegistersModel"):
        raise refuse(model, f"its class {kind} is not one that Locus knows")
    if kind == "ViTModel" or kind == "DeiTModel":
        rows = [(b.layernorm_before, b.attention, b.layernorm_after, b.mlp, None, None) for b in tower.layers]
    else:
        rows = [
            (b.norm1, b.attention, b.norm2, b.mlp, b.layer_scale1.lambda1, b.layer_scale2.lambda1)
            for b in tower.encoder.layer
        ]
    blocks = tower.layers if hasattr(tower, "layers") else tower.encoder.layer
    registers = getattr(config, "num_register_tokens", 0)
    prefix = ("class", *(["distillation"] if kind == "DeiTModel" else []))
    path = Pooled(tower.layernorm, config.hidden_size, one_token(0), after=False)
    names = prefix + tuple(f"register.{i}" for i in range(registers))
    checked_norms(model, tower.layernorm)
    return Layout(
        _split_parts(rows), path, blocks[0], lambda x: net(pixel_values=x).last_hidden_state[:, 0], names
    )


def _split_parts(rows: list[tuple]) -> tuple[Attention | Write, ...]:
    """Blocks of transformers: (norm, attention, norm, MLP, LayerScale, LayerScale) each."""
    parts: list[Attention | Write] = []
    for i, (norm1, attention, norm2, mlp, gain1, gain2) in enumerate(rows):
        parts.append(split_attention(f"block.{i}", norm1, attention, gain1))
        parts.append(Write(f"block.{i}.mlp", 0, norm2, mlp, gain2))
    return tuple(parts)


def _clip(model: str, net: nn.Module, tower: nn.Module, config: Any) -> Layout:
    head = getattr(net, "visual_projection", None)
    rows = [(b.layer_norm1, b.self_attn, b.layer_norm2, b.mlp, None, None) for b in tower.encoder.layers]
    projection = linear(head)
    path = Pooled(tower.post_layernorm, config.hidden_size, one_token(0), after=True, projection=projection)

    def run(pixels: torch.Tensor) -> torch.Tensor:
        pooled = tower(pixel_values=pixels).pooler_output
        return pooled if head is None else head(pooled)

    checked_norms(model, tower.post_layernorm)
    return Layout(_split_parts(rows), path, tower.encoder.layers[0], run, ("class",))


def _siglip(model: str, net: nn.Module, tower: nn.Module, config: Any) -> Layout:
    if not getattr(tower, "use_head", True):
        raise refuse(model, "it has no pooling head, so no representation of the whole image")
    rows = [(b.layer_norm1, b.self_attn, b.layer_norm2, b.mlp, None, None) for b in tower.encoder.layers]
    head = tower.head
    path = attention_pool(
        tower.post_layernorm,
        head,
        head.attention,
        query=lambda: head.attention.q(head.probe),
        mlp=head.mlp,
        start=head.layernorm,
        width=config.hidden_size,
    )
    checked_norms(model, tower.post_layernorm, head.layernorm)
    return Layout(
        _split_parts(rows), path, tower.encoder.layers[0], lambda x: tower(pixel_values=x).pooler_output
    )


def attention_pool(
    norm: nn.Module | None,
    pool: nn.Module,
    attention: nn.Module,
    *,
    query: Callable[[], torch.Tensor],
    mlp: nn.Module | None,
    start: nn.Module | None,
    width: int,
    **more: Any,
) -> AttentionPool:
    """The path through a pool whose `attention` has `kv` and `proj` and which asks with one latent query
    (1, 1, width)."""
    heads = attention.num_heads
    size = width // heads
    value, bias = attention.kv.weight[width:].T.unflatten(-1, (heads, size)), attention.kv.bias
    out = linear(attention.proj)
    matrix = torch.eye(width) if out[0] is None else out[0]

    def probabilities(x: torch.Tensor) -> torch.Tensor:
        q = query().unflatten(-1, (heads, size))[0].transpose(0, 1)  # (heads, 1, size)
        k = attention.kv(x)[..., :width].unflatten(-1, (heads, size)).transpose(1, 2)
        if hasattr(attention, "k_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        return (q * size**-0.5 @ k.transpose(-2, -1)).softmax(-1)[:, :, 0].transpose(1, 2)

    parts = {
        "width": width,
        "probabilities": probabilities,
        "value": (value, None if bias is None else bias[width:].unflatten(-1, (heads, size))),
        "out": (matrix.unflatten(0, (heads, size)), out[1]),
        "mlp": mlp,
        "start": start,
        "hold": {attention.kv: lambda x, found: _values_only(found, width)},
        **more,
    }
    return AttentionPool(norm, pool, parts)


def _values_only(found: torch.Tensor, width: int) -> torch.Tensor:
    """Keys and values side by side, the keys (the first `width`) kept out of the gradient."""
    return torch.cat([found[..., :width].detach(), found[..., width:]], -1)
