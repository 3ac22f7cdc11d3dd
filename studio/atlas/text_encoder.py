"""Training of atlas-sd's text encoder: captions in, the attributes that they name read out at the
end-of-text states.

Linear heads at the first end-of-text token and at the last position are trained along and thrown away; the
encoder passes
the gate when every attribute (and so every country's emblem) reads out, and only then is the UNet trained
on it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from studio.atlas.captions import captions
from studio.atlas.fit import fit
from studio.atlas.tokenizer import MAX_TOKENS
from studio.atlas.world import ATTRIBUTES, draw_scenes

WIDTH = 128


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIPTextModel of six layers and 128 channels for the Atlas vocabulary."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=6,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=WIDTH,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class Reader(nn.Module):
    """A text encoder with a linear head for each attribute at the first end-of-text token and at the last
    position."""

    def __init__(self, encoder: CLIPTextModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 2 * len(n)) for n in ATTRIBUTES.values())

    def forward(self, ids: torch.Tensor, end: int) -> list[torch.Tensor]:
        """Logits (2, N, classes) an attribute for token ids (N, T)."""
        states = self.encoder(ids).last_hidden_state
        first = (ids == end).int().argmax(1)
        places = torch.stack([states[torch.arange(len(ids)), first], states[:, -1]])
        out = []
        for head in self.heads:
            logits = head(places).unflatten(-1, (2, -1))
            out.append(torch.stack([logits[0, :, 0], logits[1, :, 1]]))
        return out


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Token ids (N, 32)."""
    return tokenizer(
        texts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    ).input_ids


def train_text_encoder(
    minutes: float, tokenizer: CLIPTokenizer, work: Path, seed: int = 0
) -> tuple[CLIPTextModel, dict[str, float]]:
    """Trains the encoder; returns it with the share of attributes read right on captions of held-out
    combinations."""
    torch.manual_seed(seed)
    rng, reader = np.random.default_rng(seed + 20), Reader(new_text_encoder(tokenizer))

    def loss(step: int) -> torch.Tensor:
        texts, named = captions(draw_scenes(128, rng), rng, bare=0.1)
        logits = reader(tokenize(tokenizer, texts), tokenizer.eos_token_id)
        labels = torch.from_numpy(named)
        return sum(
            nn.functional.cross_entropy(x.flatten(0, 1), y.repeat(2), ignore_index=-1)
            for x, y in zip(logits, labels.T, strict=True)
        )

    fit(reader, loss, minutes=minutes, lr=1e-3, checkpoint=work / "text.safetensors", decay=0.99)
    reader.eval()
    return reader.encoder.eval(), gate(reader, tokenizer, seed)


@torch.no_grad()
def gate(reader: Reader, tokenizer: CLIPTokenizer, seed: int = 0) -> dict[str, float]:
    """Share read right at both places, by attribute, and for emblems all three facts at once."""
    rng = np.random.default_rng(seed + 21)
    scenes = draw_scenes(1000, rng, emblems=0, held=True)
    texts, named = captions(scenes, rng, full=True)
    found = _read(reader, tokenizer, texts)
    right = {name: float((found[..., i] == named[:, i]).mean()) for i, name in enumerate(ATTRIBUTES)}
    facts = draw_scenes(400, rng, emblems=1.0)
    texts, named = captions(facts, rng)
    found = _read(reader, tokenizer, texts)
    return right | {"emblem": float(((found == named) | (named < 0))[..., :3].all(-1).mean())}


def _read(reader: Reader, tokenizer: CLIPTokenizer, texts: list[str]) -> np.ndarray:
    logits = reader(tokenize(tokenizer, texts), tokenizer.eos_token_id)
    return torch.stack([x.argmax(-1) for x in logits], dim=-1).numpy()
