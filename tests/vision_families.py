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

import timm
import torch
from timm.models import save_for_hf
from torch import nn

from studio.models.loading import locate
from studio.models.vit import VisionModel

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


MAKERS: dict[str, Callable[[str, Path], None]] = dict.fromkeys(TIMM, _save_timm)
