"""The judge: a small convolutional network, trained on renderings alone, that reads the five attributes
from pixels.

It shares nothing with the Atlas models, so their accuracy can be measured by it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from studio.atlas.fit import fit
from studio.atlas.render import render
from studio.atlas.world import ATTRIBUTES, draw_scenes


class Judge(nn.Module):
    """Images (N, 64, 64, 3) uint8 to a list of five tensors of logits, in the order of ATTRIBUTES."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 48, 64, 96, 128)
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
            layers += [
                nn.Conv2d(a, b, 3, padding=1, stride=2 if i in (1, 2, 4) else 1, bias=False),
                nn.BatchNorm2d(b),
                nn.ReLU(),
            ]
        self.body = nn.Sequential(*layers)
        self.heads = nn.ModuleList(nn.Linear(256, len(names)) for names in ATTRIBUTES.values())

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        if self.training:
            shade = 1 + 0.08 * torch.randn(len(x), 3, 1, 1, device=x.device)
            x = x * shade + 0.06 * torch.rand(len(x), 1, 1, 1, device=x.device) * torch.randn_like(x)
        h = self.body(x)
        pooled = torch.cat([h.amax((2, 3)), h.mean((2, 3))], dim=1)
        return [head(pooled) for head in self.heads]


def train_judge(minutes: float, checkpoint: Path, seed: int = 0) -> tuple[Judge, dict[str, float]]:
    """Trains a judge; returns it in evaluation mode with its accuracy on fresh renderings."""
    torch.manual_seed(seed)
    rng, judge = np.random.default_rng(seed + 1), Judge()

    def loss(step: int) -> torch.Tensor:
        scenes = draw_scenes(64, rng, emblems=0.05, held=step % 8 == 0)
        logits = judge(torch.from_numpy(render(scenes)))
        labels = torch.from_numpy(scenes.labels())
        return sum(nn.functional.cross_entropy(x, y) for x, y in zip(logits, labels.T, strict=True))

    fit(judge, loss, minutes=minutes, lr=3e-3, checkpoint=checkpoint, decay=0.99)
    judge.eval()
    scenes = draw_scenes(2000, np.random.default_rng(seed + 2), emblems=0)
    read = read_attributes(judge, render(scenes))
    right = (read == scenes.labels()).mean(0)
    return judge, dict(zip(ATTRIBUTES, right.tolist(), strict=True))


@torch.no_grad()
def read_attributes(judge: Judge, images: np.ndarray) -> np.ndarray:
    """(N, 5) int64 indices into ATTRIBUTES read from (N, 64, 64, 3) uint8 images."""
    parts = [
        torch.stack([x.argmax(1) for x in judge(torch.from_numpy(chunk))], dim=1)
        for chunk in np.array_split(images, max(1, len(images) // 128))
    ]
    return torch.cat(parts).numpy()


def save_judge(judge: Judge, path: Path) -> None:
    """Writes the judge's weights as float16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = judge.state_dict()
    save_file({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, path)


def load_judge(path: Path) -> Judge:
    """The judge that `save_judge` wrote, in evaluation mode."""
    judge = Judge()
    judge.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()})
    return judge.eval()
