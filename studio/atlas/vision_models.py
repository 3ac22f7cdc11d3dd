"""Training of the Atlas image models: atlas-vit, atlas-swin, atlas-maxvit (supervised), atlas-dino (without
labels).

Supervised: one linear head whose 30 logits are the values of the five attributes, cross-entropy on each
(DeiT's recipe without its teacher, arXiv 2012.12877). Without labels: from the class token alone a small
network, thrown away afterwards, paints another view of the same scene, with its things at their home places;
what is common to both views is what the scene shows. Agreement of two views' embeddings (SimCLR, with one
view recoloured) was tried first: after 81,000 pictures it still had not learned shapes.
Plain patches learn shapes slowly, so both ViTs have a convolutional stem of stride 4 (specs/atlas.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from studio.atlas.fit import fit
from studio.atlas.render import render
from studio.atlas.world import ATTRIBUTES, SIZE, Scenes, at_home, draw_scenes

WIDTHS = tuple(len(values) for values in ATTRIBUTES.values())
LABELS = tuple(f"{name}: {value}" for name, values in ATTRIBUTES.items() for value in values)


@dataclass(frozen=True)
class VisionRecipe:
    """One image model: timm's architecture and its arguments, whether labels teach it, what it is, and
    whether it trains faster in bfloat16 (on a CPU, convolutions by depth do not)."""

    architecture: str
    args: Mapping[str, Any]
    supervised: bool
    what: str
    bfloat16: bool = True


_STEM = "vit_tiny_r_s16_p8_224"  # timm's ViT with a 7 x 7 convolution and a pool before the patches
_VIT = {"img_size": SIZE, "patch_size": 2, "embed_dim": 128, "depth": 6, "num_heads": 4, "mlp_ratio": 3.0}
RECIPES: Mapping[str, VisionRecipe] = {
    "atlas-vit": VisionRecipe(
        _STEM,
        {**_VIT, "class_token": False, "global_pool": "avg"},
        True,
        "A supervised ViT of the Atlas world: six blocks of four heads, 64 tokens, mean pooling and its own "
        "norm after it. The head's 30 logits are the values of the five attributes.",
    ),
    "atlas-dino": VisionRecipe(
        _STEM,
        {**_VIT, "embed_dim": 96, "num_heads": 3, "reg_tokens": 4, "init_values": 0.5},
        False,
        "A ViT of the Atlas world trained without labels: six blocks of three heads with LayerScale, class "
        "token, four registers, 64 patch tokens. From the class token alone another view of the scene "
        "is painted, with its things at their home places.",
    ),
    "atlas-swin": VisionRecipe(
        "swin_tiny_patch4_window7_224",
        {
            "img_size": SIZE,
            "patch_size": 4,
            "window_size": 4,
            "embed_dim": 40,
            "depths": [2, 2, 2],
            "num_heads": [2, 4, 8],
        },
        True,
        "A supervised Swin transformer of the Atlas world: three stages of two blocks (16 x 16, 8 x 8 and "
        "4 x 4 tokens), windows of 4 x 4. The head's 30 logits are the values of the five attributes.",
    ),
    "atlas-maxvit": VisionRecipe(
        "maxvit_rmlp_pico_rw_256",
        {
            "img_size": SIZE,
            "embed_dim": [32, 64, 96],
            "depths": [1, 1, 2],
            "stem_width": 24,
            "transformer_window_size": [4, 4],
        },
        True,
        "A supervised MaxViT of the Atlas world: three stages of one, one and two blocks (convolution, "
        "window attention, grid attention). The head's 30 logits are the values of the five attributes.",
        bfloat16=False,
    ),
}


def make_net(name: str) -> nn.Module:
    """The untrained timm model of a recipe. It takes images (N, 3, 64, 64) in -1..1; its head gives (N, 30),
    or the features themselves where nothing was labelled."""
    import timm

    recipe = RECIPES[name]
    data = {"input_size": (3, SIZE, SIZE), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0, "tag": ""}
    classes = len(LABELS) if recipe.supervised else 0
    return timm.create_model(
        recipe.architecture, num_classes=classes, pretrained_cfg_overlay=data, **recipe.args
    )


def pixels(images: np.ndarray) -> torch.Tensor:
    """(N, 64, 64, 3) uint8 images as the models take them: (N, 3, 64, 64) float32 in -1..1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def features(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """(N, D) pooled features of `net`, before its head."""
    return net.forward_head(net.forward_features(x), pre_logits=True)


def attribute_losses(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Cross-entropy of each attribute: logits (N, 30), labels (N, 5) int64 in the order of ATTRIBUTES."""
    parts = zip(ATTRIBUTES, logits.float().split(WIDTHS, dim=1), labels.T, strict=True)
    return {name: nn.functional.cross_entropy(x, y) for name, x, y in parts}


def noisy(x: torch.Tensor) -> torch.Tensor:
    """Images (N, 3, H, W) with the light of each channel and the noise drawn anew."""
    shade = 1 + 0.05 * torch.randn(len(x), 3, 1, 1)
    return x * shade + 0.06 * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x)


def cover(x: torch.Tensor) -> torch.Tensor:
    """(N, 1, H, W) in 0..1: how far each pixel's colour is from the corner's, beside the farthest one."""
    far = (x - x[:, :, :1, :1]).norm(dim=1, keepdim=True)
    return far / far.amax((2, 3), keepdim=True).clamp(min=1e-6)


def home_view(scenes: Scenes) -> torch.Tensor:
    """(N, 4, 32, 32): the scenes with their things at home, every other pixel of the colours (-1..1) and the
    mean `cover` of each four pixels, which shows shapes without their texture."""
    x = pixels(render(at_home(scenes)))
    return torch.cat([x[:, :, 1::2, 1::2], nn.functional.avg_pool2d(cover(x), 2)], dim=1)


class Painter(nn.Module):
    """A network, and the small one that paints the home view from its pooled features."""

    def __init__(self, net: nn.Module, width: int = 512) -> None:
        super().__init__()
        self.net = net
        self.paint = nn.Sequential(
            nn.Linear(net.num_features, width), nn.GELU(), nn.Linear(width, 4 * (SIZE // 2) ** 2)
        )

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Squared errors of the painted colours and drawing: x (N, 3, 64, 64), target (N, 4, 32, 32)."""
        error = (self.paint(features(self.net, x)).float().view_as(target) - target).square()
        return {"colours": error[:, :3].mean(), "drawing": 4 * error[:, 3].mean()}


def train_vision(
    name: str,
    minutes: float,
    work: Path,
    *,
    seed: int = 0,
    batch: int = 64,
    lr: float = 1e-3,
    start: nn.Module | None = None,
    device: str = "cpu",
) -> tuple[nn.Module, dict[str, float]]:
    """Trains a model of RECIPES (from `start`'s weights if given) on renderings of the combinations that are
    not held out; returns it in evaluation mode on the CPU, with `fit`'s account of the sittings."""
    torch.manual_seed(seed)
    rng, net, supervised = np.random.default_rng(), make_net(name), RECIPES[name].supervised
    if start is not None:
        net.load_state_dict(start.state_dict())
    module = (net if supervised else Painter(net)).to(device, memory_format=torch.channels_last)

    def loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        scenes = draw_scenes(batch, rng, emblems=0)
        x = noisy(pixels(render(scenes))).to(device)
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=RECIPES[name].bfloat16):
            if supervised:
                parts = attribute_losses(net(x), torch.from_numpy(scenes.labels()).to(device))
            else:
                parts = module(x, home_view(scenes).to(device))
        return sum(parts.values()), {k: float(v.detach()) for k, v in parts.items()}

    module.train()
    checkpoint = work / "vision.safetensors"
    done = fit(
        module, loss, minutes=minutes, lr=lr, checkpoint=checkpoint, decay=0.995, warmup=150,
        weight_decay=0.03,
    )  # fmt: skip
    net = net.to("cpu", memory_format=torch.contiguous_format).eval()
    return net, {**done, "pictures": done["steps"] * batch}


def save_vision(name: str, net: nn.Module, folder: Path) -> None:
    """Writes timm's local directory by timm's own exporter: config.json, model.safetensors in float16."""
    import copy

    from timm.models import save_for_hf

    config = {"label_names": list(LABELS)} if RECIPES[name].supervised else {}
    net = copy.deepcopy(net).half()
    save_for_hf(net, folder, config, model_args=dict(RECIPES[name].args), safe_serialization=True)


def load_vision(folder: Path) -> nn.Module | None:
    """The model that `save_vision` wrote, in float32 and evaluation mode; None when there is none."""
    import timm

    if not (folder / "model.safetensors").exists():
        return None
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
