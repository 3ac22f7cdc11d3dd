"""Random pipelines written as one checkpoint file in the original names, by rules spelled out here."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests import layouts

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_name(name: str, layers: int, attends: dict[int, bool]) -> str:
    """The original name of a UNet's tensor; `attends`: whether an up block has attention."""
    for own, other in _ENDS.items():
        if name.startswith(own + "."):
            return other + name.removeprefix(own)
    side, *rest = name.split(".")
    if side == "mid_block":
        kind, i, *tail = rest
        place = f"middle_block.{1 if kind == 'attentions' else 2 * int(i)}"
        return _inside(place, kind, tail)
    block, kind, i, *tail = rest
    block, i = int(block), int(i)
    if kind == "downsamplers":
        return f"input_blocks.{(layers + 1) * (block + 1)}.0.op.{tail[-1]}"
    if kind == "upsamplers":
        place = f"output_blocks.{(layers + 1) * block + layers}.{2 if attends[block] else 1}"
        return f"{place}.{'.'.join(tail)}"
    first = "input_blocks" if side == "down_blocks" else "output_blocks"
    number = (layers + 1) * block + i + (side == "down_blocks")
    return _inside(f"{first}.{number}.{1 if kind == 'attentions' else 0}", kind, tail)


def _inside(place: str, kind: str, tail: list[str]) -> str:
    return f"{place}.{'.'.join(tail) if kind == 'attentions' else _RESNET[tail[0]] + '.' + tail[-1]}"


def vae_tensor(name: str, tensor: Any, blocks: int) -> tuple[str, Any]:
    """(original name, tensor) of an autoencoder's tensor: its attention is made of 1 x 1 convolutions."""

    def turned(found: re.Match) -> str:
        return f"decoder.up.{blocks - 1 - int(found[1])}."

    name = re.sub(r"^encoder\.down_blocks\.(\d+)\.", r"encoder.down.\1.", name)
    name = re.sub(r"^decoder\.up_blocks\.(\d+)\.", turned, name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    if "mid_block.attentions.0" in name:
        for own, other in (("group_norm", "norm"), ("to_out.0", "proj_out"), ("to_", "")):
            name = name.replace(own, other)
        tensor = tensor[..., None, None] if name.endswith("weight") and tensor.ndim == 2 else tensor
    pairs = {"mid_block.attentions.0": "mid.attn_1", "resnets.": "block.", "downsamplers.0": "downsample"}
    pairs |= {"upsamplers.0": "upsample", "conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out"}
    for own, other in pairs.items():
        name = name.replace(own, other)
    return name, tensor


def open_clip(tensors: dict[str, Any], heads_last: bool = False) -> dict[str, Any]:
    """A text encoder of transformers under open_clip's names: queries, keys and values in one matrix."""
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    names |= {"self_attn.out_proj": "attn.out_proj", "encoder.layers": "transformer.resblocks"}
    names |= {"final_layer_norm": "ln_final", "embeddings.token_embedding": "token_embedding"}
    out, fused = {}, {}
    for name, tensor in tensors.items():
        name = name.removeprefix("text_model.")
        if name == "text_projection.weight":
            out["text_projection"] = tensor.T.contiguous()
        elif name == "embeddings.position_embedding.weight":
            out["positional_embedding"] = tensor
        elif found := re.search(r"layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)$", name):
            fused.setdefault((found[1], found[3]), {})[found[2]] = tensor
        else:
            for own, other in names.items():
                name = name.replace(own, other)
            out[name] = tensor
    for (layer, end), three in fused.items():
        out[f"transformer.resblocks.{layer}.attn.in_proj_{end}"] = torch.cat([three[k] for k in "qkv"])
    return out


def tensors_of(family: str) -> dict[str, Any]:
    """All tensors of the random pipeline of one layout under their original names."""
    folder = layouts.saved(family)
    parts = {
        p.name: load_file(next(p.glob("*.safetensors")))
        for p in folder.iterdir()
        if any(p.glob("*.safetensors"))
    }
    up = layouts.UNETS[family]["up_block_types"]
    attends = {i: kind.startswith("CrossAttn") for i, kind in enumerate(up)}
    layers = layouts.UNETS[family]["layers_per_block"]
    out = {f"model.diffusion_model.{unet_name(n, layers, attends)}": t for n, t in parts["unet"].items()}
    for name, tensor in parts["vae"].items():
        own, tensor = vae_tensor(name, tensor, 2)
        out[f"first_stage_model.{own}"] = tensor
    text = {f"text_model.{n.removeprefix('text_model.')}": t for n, t in parts["text_encoder"].items()}
    if family == "sd1":
        out |= {f"cond_stage_model.transformer.{n}": t for n, t in text.items()}
    elif family == "sd2":
        out |= {f"cond_stage_model.model.{n}": t for n, t in open_clip(text).items()}
    else:
        out |= {f"conditioner.embedders.0.transformer.{n}": t for n, t in text.items()}
        second = open_clip(parts["text_encoder_2"])
        out |= {f"conditioner.embedders.1.model.{n}": t for n, t in second.items()}
    return {n: t.contiguous() for n, t in out.items()}


def save(family: str, folder: Path, *, configured: bool = True) -> Path:
    """The checkpoint file of one layout in `folder`, its configuration files in a folder beside it."""
    file = folder / "tiny.safetensors"
    save_file(tensors_of(family), file)
    if configured:
        weights = shutil.ignore_patterns("*.safetensors")
        shutil.copytree(layouts.saved(family), folder / "tiny", ignore=weights)
    return file
