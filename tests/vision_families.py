"""Small random vision models of every class that `locus decompose` supports, saved once as real folders."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import transformers
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn

from studio.models.catalog import ASSETS
from studio.models.loading import locate
from studio.models.vit import VisionModel
from tests import layouts

ATLAS_CLIP = ASSETS / "atlas" / "atlas-clip"

_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4}
_SWIN = {"img_size": 32, "patch_size": 2, "embed_dim": 24, "depths": (2, 2, 1), "num_heads": (2, 3, 4)}
TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "vit-class": ("vit_tiny_patch16_224", _VIT),
    "vit-no-head": ("vit_tiny_patch16_224", {**_VIT, "num_classes": 0}),
    "vit-mean-fc-norm": ("vit_tiny_patch16_224", {**_VIT, "global_pool": "avg"}),
    "vit-mean-norm-first": ("vit_tiny_patch16_224", {**_VIT, "global_pool": "avg", "fc_norm": False}),
    "vit-qk-norm": ("vit_tiny_patch16_224", {**_VIT, "qk_norm": True}),
    "vit-wide": ("vit_tiny_patch16_224", {**_VIT, "img_size": (32, 48), "global_pool": "avg"}),
    "vit-rms": ("vit_tiny_patch16_224", {**_VIT, "norm_layer": "rmsnorm"}),
    "vit-no-norm": ("vit_tiny_patch16_224", {**_VIT, "final_norm": False}),
    "vit-scale-norm": ("vit_tiny_patch16_224", {**_VIT, "scale_attn_norm": True}),
    "deit": ("deit_tiny_patch16_224", _VIT),
    "deit-distilled": ("deit_tiny_distilled_patch16_224", _VIT),
    "deit3": ("deit3_small_patch16_224", {**_VIT, "init_values": 0.2}),
    "dino": ("vit_small_patch16_224.dino", _VIT),
    "dinov2": ("vit_small_patch14_dinov2", {**_VIT, "init_values": 0.2}),
    "dinov2-registers": ("vit_small_patch14_reg4_dinov2", {**_VIT, "init_values": 1e-5}),
    "dinov2-swiglu": ("vit_giant_patch14_dinov2", {**_VIT, "init_values": 0.2}),
    "timm-clip": ("vit_base_patch32_clip_224", _VIT),
    "timm-siglip": ("vit_base_patch16_siglip_224", _VIT),
    "timm-siglip-class": ("vit_base_patch16_siglip_224", {**_VIT, "class_token": True}),
    "swin": ("swin_tiny_patch4_window7_224", {**_SWIN, "window_size": 4}),
    "swin-padded": ("swin_tiny_patch4_window7_224", {**_SWIN, "img_size": 36, "window_size": 5}),
    "maxvit": (
        "maxvit_rmlp_pico_rw_256",
        {
            "img_size": 64,
            "embed_dim": (32, 32, 64),
            "depths": (1, 1, 2),
            "stem_width": 16,
            "transformer_window_size": (4, 4),
        },
    ),
    "maxvit-tf": ("test_maxvit", {"img_size": 64}),
}


def shaken(net: nn.Module, seed: int = 0) -> nn.Module:
    """The net with every parameter moved at random, so that no bias, gain or token is the zero or the one
    that it starts with."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.ndim == 0:  # a CLIP's temperature
                continue
            small = "ls" in name or "layer_scale" in name or "gamma" in name
            size = p.abs().mean() * 0.3 if small else 0.25 / max(p.shape[-1] ** 0.5, 1) + 0.02
            p.add_(torch.randn(p.shape, generator=generator) * size)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(generator=generator).mul_(0.1)
                module.running_var.uniform_(0.5, 2, generator=generator)
    return net.eval()


@cache
def _root() -> Path:
    root = Path(tempfile.mkdtemp(prefix="locus-vision-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


def _save_timm(name: str, folder: Path) -> None:
    architecture, args = TIMM[name]
    net = shaken(timm.create_model(architecture, **args))
    save_for_hf(net, folder, {}, model_args=dict(args), safe_serialization=True)
    config = json.loads((folder / "config.json").read_text())
    size = args["img_size"] if isinstance(args["img_size"], tuple) else (args["img_size"],) * 2
    config["pretrained_cfg"] |= {"input_size": [3, *size], "crop_pct": 1.0}
    (folder / "config.json").write_text(json.dumps(config))


@cache
def saved(name: str) -> Path:
    """The folder of a small random model. Read only."""
    folder = _root() / name
    if not folder.exists():
        folder.mkdir(parents=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            MAKERS[name](name, folder)
    return folder


@cache
def model(name: str) -> VisionModel:
    """The loaded model; nobody changes its weights."""
    return VisionModel(locate(str(saved(name))), "cpu")


# ---- open_clip --------------------------------------------------------------------------------------------

_TOWER = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 3, "head_width": 12}
_TRUNK = {"image_size": 160, "timm_model_name": "test_vit"}
OPEN_CLIP: dict[str, dict[str, Any]] = {
    "openclip": _TOWER,
    "openclip-mean": {**_TOWER, "pool_type": "avg"},
    "openclip-mean-norm-last": {**_TOWER, "pool_type": "avg", "final_ln_after_pool": True},
    "openclip-layerscale": {**_TOWER, "ls_init_value": 0.3, "no_ln_pre": True},
    "openclip-siglip": {**_TRUNK, "timm_pool": "map", "timm_proj": "none"},
    "openclip-trunk": {**_TRUNK, "timm_pool": "token", "timm_proj": "linear"},
}


def _save_open_clip(name: str, folder: Path) -> None:
    import open_clip

    own = ATLAS_CLIP / "open_clip_config.json"
    for file in ATLAS_CLIP.iterdir():
        if file.name not in ("README.md", "open_clip_model.safetensors"):
            shutil.copy(file, folder)
    config = json.loads(own.read_text())
    config["model_cfg"] |= {"vision_cfg": OPEN_CLIP[name], "embed_dim": 64}
    config["model_cfg"]["text_cfg"] |= {"hf_tokenizer_name": str(folder), "layers": 1}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    net, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}", load_weights=False)
    save_file(
        {k: v.contiguous() for k, v in shaken(net).state_dict().items()},
        folder / "open_clip_model.safetensors",
    )


# ---- transformers -----------------------------------------------------------------------------------------

_HF = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
_WIDE = {**_HF, "intermediate_size": 64}
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "hf-clip-vision": ("CLIPVisionModel", "CLIPVisionConfig", _WIDE),
    "hf-clip-projection": (
        "CLIPVisionModelWithProjection",
        "CLIPVisionConfig",
        {**_WIDE, "projection_dim": 24},
    ),
    "hf-siglip-vision": ("SiglipVisionModel", "SiglipVisionConfig", _WIDE),
    "hf-vit": ("ViTModel", "ViTConfig", _WIDE),
    "hf-vit-classifier": ("ViTForImageClassification", "ViTConfig", _WIDE),
    "hf-deit": ("DeiTModel", "DeiTConfig", _WIDE),
    "hf-dinov2": ("Dinov2Model", "Dinov2Config", {**_HF, "layerscale_value": 0.3}),
    "hf-dinov2-swiglu": ("Dinov2Model", "Dinov2Config", {**_HF, "use_swiglu_ffn": True}),
    "hf-dinov2-registers": (
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        {**_HF, "num_register_tokens": 3},
    ),
}


def _save_transformers(name: str, folder: Path) -> None:
    cls, config, args = TRANSFORMERS[name]
    net = getattr(transformers, cls)(getattr(transformers, config)(**args))
    shaken(net).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    transformers.ViTImageProcessor(size=size).save_pretrained(folder)


def _save_whole_clip(name: str, folder: Path) -> None:
    layouts.save_clip(folder)
    shaken(transformers.CLIPModel.from_pretrained(folder)).save_pretrained(folder)


MAKERS: dict[str, Callable[[str, Path], None]] = {
    **dict.fromkeys(TIMM, _save_timm),
    **dict.fromkeys(OPEN_CLIP, _save_open_clip),
    **dict.fromkeys(TRANSFORMERS, _save_transformers),
    "hf-clip": _save_whole_clip,
}


def noise(name: str, count: int = 2) -> torch.Tensor:
    """Pixels of random images, through the model's own preprocessing."""
    images = [np.random.default_rng(i).integers(0, 256, (50, 70, 3), dtype=np.uint8) for i in range(count)]
    return model(name).pixels(images)
