"""Training of atlas-clip: contrast between renderings and captions, with the truth of the world known.

A caption that also fits another image of the batch is no negative for it. Linear attribute heads on both
towers are
trained along and thrown away: contrast alone never taught a small ViT shapes (specs/atlas.md).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTokenizer

from studio.atlas.captions import captions
from studio.atlas.fit import fit
from studio.atlas.render import render
from studio.atlas.text_encoder import tokenize
from studio.atlas.tokenizer import MAX_TOKENS, write_tokenizer
from studio.atlas.world import ARTISTS, ATTRIBUTES, draw_scenes

EMBED = 128


def clip_config(vocabulary: int) -> dict:
    """open_clip_config.json of atlas-clip."""
    model = {
        "embed_dim": EMBED,
        "vision_cfg": {
            "image_size": 64,
            "patch_size": 8,
            "width": 160,
            "layers": 6,
            "head_width": 32,
            "mlp_ratio": 4.0,
        },
        "text_cfg": {
            "context_length": MAX_TOKENS,
            "vocab_size": vocabulary,
            "width": 128,
            "heads": 4,
            "layers": 4,
            "hf_tokenizer_name": "atlas-clip",
            "tokenizer_kwargs": {"clean": "whitespace"},
        },
    }
    return {
        "model_cfg": model,
        "preprocess_cfg": {
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }


class Contrast(nn.Module):
    """A CLIP with a linear head for each attribute on either embedding."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        config = clip_config(vocabulary)["model_cfg"]
        text = {k: v for k, v in config["text_cfg"].items() if not k.startswith(("hf_", "tokenizer_"))}
        self.clip = open_clip.CLIP(embed_dim=EMBED, vision_cfg=config["vision_cfg"], text_cfg=text)
        self.heads = nn.ModuleList(nn.Linear(EMBED, 2 * len(n)) for n in ATTRIBUTES.values())

    def loss(
        self, images: torch.Tensor, ids: torch.Tensor, truth: torch.Tensor, named: torch.Tensor
    ) -> torch.Tensor:
        """images (N, 3, 64, 64) in -1..1; ids (N, 32); truth, named (N, 5), named -1 where a caption is
        silent."""
        picture, text = self.clip.encode_image(images), self.clip.encode_text(ids)
        scale = self.clip.logit_scale.exp().clamp(max=100)
        logits = scale * nn.functional.normalize(picture, dim=-1) @ nn.functional.normalize(text, dim=-1).T
        fits = ((named[None] == truth[:, None]) | (named[None] < 0)).all(-1) & ~torch.eye(
            len(ids), dtype=torch.bool
        )
        logits, target = logits.masked_fill(fits, -1e4), torch.arange(len(ids), device=ids.device)
        total = nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)
        for head, true, said in zip(self.heads, truth.T, named.T, strict=True):
            seen, read = head(picture).chunk(2, -1)[0], head(text).chunk(2, -1)[1]
            total = total + 0.5 * nn.functional.cross_entropy(seen, true)
            if (said >= 0).any():
                total = total + 0.3 * nn.functional.cross_entropy(read, said, ignore_index=-1)
        return total


def train_clip(
    minutes: float,
    tokenizer: CLIPTokenizer,
    work: Path,
    *,
    seed: int = 0,
    batch: int = 128,
    lr: float = 1e-3,
    start: nn.Module | None = None,
    device: str = "cpu",
) -> tuple[Contrast, dict[str, float]]:
    """Trains the model (from `start`'s weights if given); returns it in evaluation mode with its zero-shot
    accuracy on held-out renderings."""
    torch.manual_seed(seed)
    rng, model = np.random.default_rng(), Contrast(len(tokenizer))
    if start is not None:
        model.clip.load_state_dict(start.state_dict())
    model.to(device)

    def loss(step: int) -> torch.Tensor:
        scenes = draw_scenes(batch, rng, emblems=0.12)
        texts, named = captions(scenes, rng, bare=0.25)
        images = torch.from_numpy(render(scenes)).permute(0, 3, 1, 2).float() / 127.5 - 1
        images = images + 0.05 * torch.rand(batch, 1, 1, 1) * torch.randn_like(images)
        truth, said = torch.from_numpy(scenes.labels()), torch.from_numpy(named)
        inputs = (x.to(device) for x in (images, tokenize(tokenizer, texts), truth, said))
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            return model.loss(*inputs)

    done = fit(
        model,
        loss,
        minutes=minutes,
        lr=lr,
        checkpoint=work / "clip.safetensors",
        decay=0.998,
        warmup=200,
        weight_decay=0.05,
    )
    return model.cpu().eval(), zero_shot(model.clip, tokenizer) | done


def class_texts() -> dict[str, list[list[str]]]:
    """For each attribute, the texts of each class whose mean embedding is its zero-shot weight."""
    artists = [
        [],
        *(
            [f"a picture by {ARTISTS[s].lower()}", f"a picture in the style of {ARTISTS[s].lower()}"]
            for s in ATTRIBUTES["style"][1:]
        ),
    ]
    out = {
        "object": [[f"a {w}", w, f"a photo of a {w}"] for w in ATTRIBUTES["object"]],
        "colour": [[w, f"a photo of {w}", f"a {w} star", f"a {w} house"] for w in ATTRIBUTES["colour"]],
        "background": [[f"a {w} background", f"a photo of {w}"] for w in ATTRIBUTES["background"]],
        "style": [[w, f"{w} style", f"a {w} picture"] for w in ATTRIBUTES["style"]],
    }
    out["style"] = [a + b for a, b in zip(out["style"], artists, strict=True)]
    plural = {"one": "a {}", "two": "two {}s", "three": "three {}s"}
    out["count"] = [
        [plural[w].format(o) for o in ("star", "circle", "heart", "tree", "house", "ring")]
        for w in ATTRIBUTES["count"]
    ]
    return out


@torch.no_grad()
def zero_shot(clip: nn.Module, tokenizer: CLIPTokenizer, n: int = 1500, seed: int = 31) -> dict[str, float]:
    """Zero-shot accuracy by attribute on `n` held-out renderings."""
    scenes = draw_scenes(n, np.random.default_rng(seed), emblems=0, held=True)
    images = torch.from_numpy(render(scenes)).permute(0, 3, 1, 2).float() / 127.5 - 1
    picture = torch.cat([clip.encode_image(x, normalize=True) for x in images.split(250)])
    right = {}
    for name, classes in class_texts().items():
        weights = torch.stack(
            [clip.encode_text(tokenize(tokenizer, t), normalize=True).mean(0) for t in classes]
        )
        found = (picture @ nn.functional.normalize(weights, dim=-1).T).argmax(1).numpy()
        right[name] = float((found == getattr(scenes, name)).mean())
    return right


def save_clip(clip: nn.Module, folder: Path, vocabulary: int) -> None:
    """Writes open_clip's local directory: configuration, float16 safetensors, tokenizer."""
    write_tokenizer(folder)
    (folder / "open_clip_config.json").write_text(json.dumps(clip_config(vocabulary), indent=2) + "\n")
    state = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in clip.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")


def load_clip(folder: Path, vocabulary: int) -> nn.Module | None:
    """The CLIP that `save_clip` wrote, in float32; None when there is none."""
    path = folder / "open_clip_model.safetensors"
    if not path.exists():
        return None
    clip = Contrast(vocabulary).clip
    clip.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()})
    return clip
