"""CLIP models as scorers: images and texts to unit vectors in one space, through each model's own
preprocessing."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image

from studio.errors import StudioError
from studio.models.base import OneNetwork
from studio.models.loading import Source, component_files, loaded_bytes


class ClipModel(OneNetwork):
    """An open_clip or transformers CLIP from a folder. `scale` is its logit scale (the inverse
    temperature)."""

    provides = frozenset({"clip"})

    def __init__(self, source: Source, device: str, dtype: torch.dtype = torch.float32) -> None:
        loaded_bytes(source.path)
        self.source, self.device = source, torch.device(device)
        try:
            self.net, self._pixels, self._ids = (
                _open_clip(source) if source.family == "open_clip" else _transformers(source)
            )
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            first = " ".join(str(error).split())[:160]
            raise StudioError(
                f"{source.name} can't be loaded: its files do not fit one another ({first})."
            ) from error
        self.net.to(self.device).eval().requires_grad_(False)
        self.scale = float(self.net.logit_scale.exp())
        self._texts = lru_cache(maxsize=512)(self._text)

    @property
    def preprocess(self) -> Any:
        """The model's own preprocessing of one PIL image."""
        return self._pixels

    @torch.no_grad()
    def image_features(self, images: np.ndarray, chunk: int = 64) -> np.ndarray:
        """Unit vectors (N, D) float32 of images (N, H, W, 3) uint8."""
        parts = []
        for start in range(0, len(images), chunk):
            pixels = torch.stack([self._pixels(Image.fromarray(im)) for im in images[start : start + chunk]])
            features = (
                self.net.encode_image(pixels.to(self.device))
                if self.family == "open_clip"
                else _tensor(self.net.get_image_features(pixel_values=pixels.to(self.device)))
            )
            parts.append(torch.nn.functional.normalize(features.float(), dim=-1).cpu())
        return torch.cat(parts).numpy()

    def text_features(self, texts: list[str]) -> np.ndarray:
        """Unit vectors (N, D) float32 of texts; many are encoded 64 at a time and not kept."""
        if len(texts) <= 64:
            return np.stack([self._texts(t) for t in texts])
        return np.concatenate([self._encoded(texts[i : i + 64]) for i in range(0, len(texts), 64)])

    def _text(self, text: str) -> np.ndarray:
        return self._encoded([text])[0]

    @torch.no_grad()
    def _encoded(self, texts: list[str]) -> np.ndarray:
        ids = self._ids(texts).to(self.device)
        features = (
            self.net.encode_text(ids)
            if self.family == "open_clip"
            else _tensor(self.net.get_text_features(input_ids=ids))
        )
        return torch.nn.functional.normalize(features.float(), dim=-1).cpu().numpy()

    def shares_text_encoder(self, model: Any) -> bool:
        """Whether a generator was built on this very text encoder, which makes its score less independent."""
        mine = (
            self.net.token_embedding.weight
            if self.family == "open_clip"
            else self.net.text_model.embeddings.token_embedding.weight
        )
        from studio.models.sites import text_root

        theirs = [
            text_root(e).embeddings.token_embedding.weight for e in getattr(model, "encoders", {}).values()
        ]
        return any(
            t.shape == mine.shape and bool((t.float().cpu() - mine.float().cpu()).abs().max() < 1e-3)
            for t in theirs
        )


def _tensor(out: Any) -> torch.Tensor:
    return out if isinstance(out, torch.Tensor) else out.pooler_output


def _open_clip(source: Source) -> tuple:
    """The network with the weights that the fingerprint covers: left to itself, open_clip looks for weights
    by names of its own, pickles among them."""
    import logging

    import open_clip

    files = component_files(source.path)
    if len(files) > 1:
        raise ValueError(f"{files[0].name} and {files[1].name} both hold weights")
    root = logging.getLogger()
    root.setLevel(max(root.level, logging.WARNING))
    where = f"local-dir:{source.path}"
    root.addFilter(_is_news)
    try:
        net, _, pixels = open_clip.create_model_and_transforms(
            where, load_weights=False, pretrained_text=False
        )
    finally:
        root.removeFilter(_is_news)
    open_clip.load_checkpoint(net, str(files[0]), strict=True)
    text = open_clip.get_model_config(where)["text_cfg"]
    options = {"local_files_only": True, "trust_remote_code": False} if text.get("hf_tokenizer_name") else {}
    return net, pixels, open_clip.get_tokenizer(where, **options)


def _is_news(record: Any) -> bool:
    """A log record that is not open_clip's warning of a network that has no weights yet."""
    return not str(record.msg).startswith("No pretrained weights loaded")


def _transformers(source: Source) -> tuple:
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    local = {"local_files_only": True, "trust_remote_code": False}
    net, info = AutoModel.from_pretrained(
        source.path, use_safetensors=True, output_loading_info=True, **local
    )
    if lacking := sorted(info["missing_keys"]):  # transformers fills them with random numbers
        raise ValueError(f"the weights lack {lacking[0]}")
    processor = AutoImageProcessor.from_pretrained(source.path, **local)
    tokenizer = AutoTokenizer.from_pretrained(source.path, **local)

    def pixels(image: Image.Image) -> torch.Tensor:
        return processor(images=image, return_tensors="pt").pixel_values[0]

    def ids(texts: list[str]) -> torch.Tensor:
        return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids

    return net, pixels, ids
