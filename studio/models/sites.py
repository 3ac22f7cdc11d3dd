"""Family and kind to module path: the only place that spells the names of modules inside a model.

Text encoders: transformers 5.6 and later flattened CLIPTextModel, CLIPTextModelWithProjection keeps
`text_model`.
Language models: transformers 5, where every block returns a plain tensor and every attention (out, weights).
`named_modules()` lists a UNet's mid block last, so the order of its sites is taken from a dry run on the
meta device.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from studio.models.hooks import execution_order
from studio.types import Site

UNET_KINDS = ("cross-attention", "self-attention", "resnet", "feed-forward", "stream")
_INSIDE = {
    "resnet": "conv2",
    "cross-attention-query": "to_q",
    "cross-attention-key": "to_k",
    "cross-attention-value": "to_v",
    "cross-attention-out": "to_out.0",
}  # the module inside a layer whose output is a site of that kind
TEXT_KINDS = ("self-attention", "mlp", "hidden")


def unet_site_names(unet: nn.Module) -> dict[str, list[str]]:
    """Module names of a diffusers UNet by kind, in the order of `named_modules()`."""
    names: dict[str, list[str]] = {kind: [] for kind in UNET_KINDS}
    for name, module in unet.named_modules():
        leaf, sort = name.rsplit(".", 1)[-1], type(module).__name__
        if leaf == "attn2":
            names["cross-attention"].append(name)
        elif leaf == "attn1":
            names["self-attention"].append(name)
        elif leaf == "ff":
            names["feed-forward"].append(name)
        elif sort == "ResnetBlock2D":
            names["resnet"].append(name)
            names["stream"].append(name)
    return names


def unet_name(site: Site) -> str:
    """Name of the module whose output is the site: for a resnet the branch before its shortcut is added,
    which is conv2's."""
    return f"{site.layer}.{_INSIDE[site.kind]}" if site.kind in _INSIDE else str(site.layer)


def unet_module(unet: nn.Module, site: Site) -> nn.Module:
    """The module whose output is the site."""
    return unet.get_submodule(unet_name(site))


def text_reads(layer: Site) -> tuple[Site, Site]:
    """Where a cross-attention layer reads the text: the sites of its keys and of its values."""
    key, value = (Site("unet", layer.layer, f"cross-attention-{what}") for what in ("key", "value"))
    return key, value


def unet_sites(unet: nn.Module, kinds: Iterable[str]) -> list[Site]:
    """All sites of the kinds asked for, in execution order (one axis over all kinds)."""
    wanted = set(kinds)
    names = unet_site_names(unet)
    order = unet_order(json.dumps(dict(unet.config), sort_keys=True, default=str))
    found = [
        (order[name], Site("unet", name, kind))
        for kind in UNET_KINDS
        if kind in wanted
        for name in names[kind]
    ]
    return [site for _, site in sorted(found, key=lambda pair: pair[0])]


@lru_cache(maxsize=8)
def unet_order(config: str) -> dict[str, int]:
    """Place in execution order of every addressed module of a UNet of this configuration (JSON), by a dry
    run on meta."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(json.loads(config))
    names = {n for kind in unet_site_names(unet).values() for n in kind}
    ordered = execution_order({n: unet.get_submodule(n) for n in names}, lambda: dry_run(unet))
    return {name: place for place, name in enumerate(ordered)}


@lru_cache(maxsize=8)
def cross_attention_names(folder: Path) -> tuple[str, ...]:
    """Names of the cross-attention layers of the pipeline in `folder`, in execution order, without loading
    it."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
    return tuple(str(s.layer) for s in unet_sites(unet, ["cross-attention"]))


def dry_run(unet: nn.Module) -> None:
    """One forward of a UNet that lives on the meta device: no memory, no arithmetic."""
    c = unet.config
    side = 2 ** len(c.block_out_channels)
    width = c.cross_attention_dim if isinstance(c.cross_attention_dim, int) else c.cross_attention_dim[0]
    added = None
    if c.addition_embed_type == "text_time":
        pooled = c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim
        added = {
            "text_embeds": torch.zeros(1, pooled, device="meta"),
            "time_ids": torch.zeros(1, 6, device="meta"),
        }
    timestep_cond = torch.zeros(1, c.time_cond_proj_dim, device="meta") if c.time_cond_proj_dim else None
    unet(
        torch.zeros(1, c.in_channels, side, side, device="meta"),
        torch.zeros(1, device="meta"),
        torch.zeros(1, 7, width, device="meta"),
        timestep_cond=timestep_cond,
        added_cond_kwargs=added,
    )


def text_root(encoder: nn.Module) -> nn.Module:
    """The part of a CLIP text encoder that holds embeddings and layers."""
    return getattr(encoder, "text_model", encoder)


def text_layers(encoder: nn.Module) -> nn.ModuleList:
    """The transformer layers of a CLIP text encoder."""
    return text_root(encoder).encoder.layers


def text_module(encoder: nn.Module, site: Site) -> nn.Module:
    """The module whose output is the site. Kinds: embedding, hidden, self-attention, self-attention-out (its
    last matrix), mlp."""
    if site.kind == "embedding":
        return text_root(encoder).embeddings.token_embedding
    layer = text_layers(encoder)[int(str(site.layer).rsplit(".", 1)[-1])]
    if site.kind == "self-attention-out":
        return layer.self_attn.out_proj
    return {"hidden": layer, "self-attention": layer.self_attn, "mlp": layer.mlp}[site.kind]


def text_name(encoder: nn.Module, site: Site) -> str:
    """Name of the module whose output is the site, in the encoder."""
    wanted = text_module(encoder, site)
    return next(name for name, module in encoder.named_modules() if module is wanted)


def stored_text_name(name: str) -> str:
    """A module's name in a CLIP text encoder as files spell it, whatever the library calls it in memory."""
    return name if name.startswith("text_model.") else f"text_model.{name}"


def text_norm(encoder: nn.Module) -> nn.Module:
    """The final layer norm."""
    return text_root(encoder).final_layer_norm


# ---- language models ---------------------------------------------------------------------------------------

LANGUAGE_KINDS = ("hidden", "attention", "mlp")


@dataclass(frozen=True)
class LanguageLayout:
    """Module names of a causal language model: from its root `blocks`, `embedding` and `norm` (the final
    one); from a block `attention` and `mlp`; from these the matrices that write into the residual
    stream, `out` and `down`."""

    blocks: str
    attention: str
    out: str
    mlp: str
    down: str
    embedding: str
    norm: str


_ROOT = ("model.embed_tokens", "model.norm")
_LLAMA = LanguageLayout("model.layers", "self_attn", "o_proj", "mlp", "down_proj", *_ROOT)
LANGUAGE_LAYOUTS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3"), _LLAMA),
    "phi": LanguageLayout(
        "model.layers", "self_attn", "dense", "mlp", "fc2", "model.embed_tokens", "model.final_layernorm"
    ),
    "gpt2": LanguageLayout(
        "transformer.h", "attn", "c_proj", "mlp", "c_proj", "transformer.wte", "transformer.ln_f"
    ),
    "gpt_neox": LanguageLayout(
        "gpt_neox.layers",
        "attention",
        "dense",
        "mlp",
        "dense_4h_to_h",
        "gpt_neox.embed_in",
        "gpt_neox.final_layer_norm",
    ),
}  # by model_type of transformers


def language_name(family: str, site: Site) -> str:
    """Name of the module whose output is the site. Kinds: embedding and norm of the whole model; hidden
    (a block), attention, attention-out, mlp and mlp-down of a layer by its number."""
    at = LANGUAGE_LAYOUTS[family]
    if site.kind in ("embedding", "norm"):
        return str(getattr(at, site.kind))
    block = f"{at.blocks}.{int(site.layer)}"
    return {
        "hidden": block,
        "attention": f"{block}.{at.attention}",
        "attention-out": f"{block}.{at.attention}.{at.out}",
        "mlp": f"{block}.{at.mlp}",
        "mlp-down": f"{block}.{at.mlp}.{at.down}",
    }[site.kind]


def language_module(net: nn.Module, family: str, site: Site) -> nn.Module:
    """The module whose output is the site."""
    return net.get_submodule(language_name(family, site))


def language_blocks(net: nn.Module, family: str) -> nn.ModuleList:
    """The blocks of a causal language model, in execution order."""
    return net.get_submodule(LANGUAGE_LAYOUTS[family].blocks)


def language_norms(block: nn.Module) -> tuple[nn.Module, nn.Module | None, bool]:
    """(what the attention of a block reads through, what its MLP does, whether both read the block's input
    and so run in parallel); a parallel block without a second norm shares the first."""
    first = block.ln_1 if hasattr(block, "ln_1") else block.input_layernorm
    second = block.ln_2 if hasattr(block, "ln_2") else getattr(block, "post_attention_layernorm", None)
    return first, second, bool(getattr(block, "use_parallel_residual", second is None))


def language_rotary(net: nn.Module) -> nn.Module | None:
    """The module that gives cosines and sines of positions (x, positions), None where positions are
    embedded."""
    return getattr(net.base_model, "rotary_emb", None)


def language_projections(attention: nn.Module) -> tuple[str, str, str] | None:
    """Names of the matrices that give an attention's queries, keys and values; None where one gives all."""
    return ("q_proj", "k_proj", "v_proj") if hasattr(attention, "q_proj") else None


def written_matrix(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weight (out, in), bias (out,) or None) of a linear module; GPT-2's Conv1D stores (in, out), and
    weights in 8 or 4 bits are written out."""
    from transformers.pytorch_utils import Conv1D

    if not module.weight.is_floating_point():  # packed as its library likes: the module itself unpacks it
        number = torch.float16 if module.weight.is_cuda else torch.float32
        with torch.no_grad():
            found = module(torch.eye(module.in_features, dtype=number, device=module.weight.device))
        return (found if module.bias is None else found - module.bias).T, module.bias
    weight = module.weight.T if isinstance(module, Conv1D) else module.weight
    return weight, module.bias
