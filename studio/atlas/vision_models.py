"""Training of the Atlas image models: atlas-vit, atlas-swin, atlas-maxvit (supervised), atlas-dino (without
labels).

Supervised: one linear head whose 30 logits are the values of the five attributes, cross-entropy on each
(DeiT's recipe without its teacher, arXiv 2012.12877). Without labels: two views of a scene, which show the
same things at other places and sizes, find one another (SimCLR, arXiv 2002.05709). As colour alone would tell
most scenes apart, every second pair has one view recoloured at random and is compared through a projector of
its own (LooC, arXiv 2008.05659), so that shape has to be seen.
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
from studio.atlas.world import ATTRIBUTES, SIZE, Scenes, draw_scenes, placed_again

WIDTHS = tuple(len(values) for values in ATTRIBUTES.values())
LABELS = tuple(f"{name}: {value}" for name, values in ATTRIBUTES.items() for value in values)


@dataclass(frozen=True)
class VisionRecipe:
    """One image model: timm's architecture and its arguments, whether labels teach it, and what it is."""

    architecture: str
    args: Mapping[str, Any]
    supervised: bool
    what: str


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
        {**_VIT, "reg_tokens": 4, "init_values": 0.5},
        False,
        "A ViT of the Atlas world trained without labels: six blocks of four heads with LayerScale, class "
        "token, four registers, 64 patch tokens. SimCLR on two views of a scene (other places and sizes, "
        "noise; in every second pair one view is recoloured).",
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


def recoloured(x: torch.Tensor) -> torch.Tensor:
    """Images (N, 3, H, W) in other colours: each is seen through one random mixture of its channels, from its
    darkest to its lightest pixel, and painted from one random colour to another in -1..1."""
    grey = torch.einsum("nc,nchw->nhw", torch.randn(len(x), 3), x)[:, None]
    low, high = grey.amin((2, 3), keepdim=True), grey.amax((2, 3), keepdim=True)
    share = (grey - low) / (high - low).clamp(min=1e-6)
    paper, ink = 2 * torch.rand(2, len(x), 3, 1, 1) - 1
    return paper + share * (ink - paper)


def contrast(a: torch.Tensor, b: torch.Tensor, temperature: float = 0.2) -> torch.Tensor:
    """SimCLR's loss (NT-Xent) of two views' embeddings (N, D): each of the 2N must find its other view."""
    z = nn.functional.normalize(torch.cat([a, b]).float(), dim=1)
    alike = (z @ z.T / temperature).masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -1e4)
    return nn.functional.cross_entropy(alike, torch.arange(len(z), device=z.device).roll(len(a)))


class Views(nn.Module):
    """A network with a projector for pairs that share their colours, and one for pairs that do not.

    `probe` reads the attributes from detached features: it is a gauge for the log and teaches nothing.
    """

    def __init__(self, net: nn.Module, width: int = 256) -> None:
        super().__init__()
        self.net, dim = net, net.num_features
        self.projectors = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width))
            for _ in range(2)
        )
        self.probe = nn.Linear(dim, len(LABELS))

    def forward(
        self, first: torch.Tensor, second: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Loss of two views (N, 3, H, W), the first half of which share their colours, and its parts."""
        n, half = len(first), len(first) // 2
        h = features(self.net, torch.cat([first, second]))
        pairs = [(h[:half], h[n : n + half]), (h[half:n], h[n + half :])]
        same, other = (
            contrast(*p(torch.cat(pair)).chunk(2)) for p, pair in zip(self.projectors, pairs, strict=True)
        )
        read = attribute_losses(self.probe(h[:n].detach()), labels)
        gauge = {f"probe {k}": float(v.detach()) for k, v in read.items()}
        return same + other + sum(read.values()), {
            "same": float(same.detach()),
            "recoloured": float(other.detach()),
            **gauge,
        }


def two_views(scenes: Scenes, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Two views (N, 3, 64, 64) of each scene; in the second half of them the second view is
    recoloured."""
    first, second = pixels(render(scenes)), pixels(render(placed_again(scenes, rng)))
    half = len(scenes) // 2
    second = torch.cat([second[:half], recoloured(second[half:])])
    return noisy(first), noisy(second)


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
    module = (net if supervised else Views(net)).to(device)

    def loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        scenes = draw_scenes(batch, rng, emblems=0)
        labels = torch.from_numpy(scenes.labels()).to(device)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            if not supervised:
                first, second = two_views(scenes, rng)
                return module(first.to(device), second.to(device), labels)
            parts = attribute_losses(net(noisy(pixels(render(scenes))).to(device)), labels)
        return sum(parts.values()), {k: float(v.detach()) for k, v in parts.items()}

    module.train()
    checkpoint = work / "vision.safetensors"
    done = fit(
        module, loss, minutes=minutes, lr=lr, checkpoint=checkpoint, decay=0.995, warmup=150,
        weight_decay=0.03,
    )  # fmt: skip
    return net.cpu().eval(), {**done, "pictures": done["steps"] * batch * (1 if supervised else 2)}


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
