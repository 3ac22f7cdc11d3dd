"""Vision transformers from folders: timm, open_clip and transformers, with each model's own preprocessing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from studio.errors import StudioError
from studio.models.base import OneNetwork
from studio.models.loading import Source, component_files, loaded_bytes
from studio.models.vit_layouts import Layout, transformers_layout
from studio.models.vit_timm import open_clip_layout, timm_layout

Pixels = Callable[[Image.Image], torch.Tensor]
_TOWERS = ("CLIPVisionModel", "CLIPVisionModelWithProjection", "SiglipVisionModel")
_FAULTS = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, AssertionError)


class OpenAttention(nn.Module):
    """torch's MultiheadAttention with its inner matrices as modules, so that they can be watched.

    Shares the weights. pool: queries come from somewhere else than keys and values, which then have a matrix
    `kv` beside `q`; else one `qkv`. Equal to the original to rounding.
    """

    def __init__(self, attention: nn.MultiheadAttention, *, pool: bool) -> None:
        super().__init__()
        width, self.num_heads = attention.embed_dim, attention.num_heads
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        for name, rows in {"q": (0, 1), "kv": (1, 3)}.items() if pool else {"qkv": (0, 3)}.items():
            first, last = (r * width for r in rows)
            setattr(self, name, _linear(weight[first:last], None if bias is None else bias[first:last]))
        self.proj = attention.out_proj
        self.pool = pool

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, None]:
        """(rows, T, width) in and out; key and value are one tensor, so is query unless it pools."""
        if options.get("attn_mask") is not None:
            raise ValueError("no mask is expected in an image tower")
        if self.pool:
            q, (k, v) = self.q(query), self.kv(key).chunk(2, -1)
        else:
            q, k, v = self.qkv(query).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2)), None


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """A Linear on these very weights."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return made


class VisionModel(OneNetwork):
    """A vision transformer of a folder. `clip`: the CLIP whose image tower it is, None for other models.

    StudioError when the folder's files do not fit one another or the weights are not all there.
    """

    provides = frozenset({"components"})

    def __init__(self, source: Source, device: str, dtype: torch.dtype = torch.float32) -> None:
        loaded_bytes(source.path)
        self.source, self.device, self.dtype = source, torch.device(device), dtype
        self.clip: Any = None
        try:
            self.net, self._pixels = _load(self)
        except _FAULTS as error:
            if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
                raise
            first = " ".join(str(error).split())[:160]
            raise StudioError(
                f"{source.name} can't be loaded: its files do not fit one another ({first})."
            ) from error
        self.net.to(self.device, dtype).eval().requires_grad_(False)

    def pixels(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """(N, 3, H, W) on the device of images (H, W, 3) uint8, by the model's own preprocessing."""
        found = torch.stack([self._pixels(Image.fromarray(image)) for image in images])
        return found.to(self.device, self.dtype)

    @cached_property
    def layout(self) -> Layout:
        """Its branches and its path to the representation; StudioError with the reason when unknown."""
        if self.source.family == "timm":
            return timm_layout(self.id, self.net)
        if self.source.family == "open_clip":
            return open_clip_layout(self.id, self.net.visual)
        return transformers_layout(self.id, self.net)

    @torch.no_grad()
    def representation(self, pixels: torch.Tensor) -> torch.Tensor:
        """(N, dim) before L2 normalisation: a CLIP's image embedding, else the pooled, normed features."""
        return self.layout.run(pixels)


def _load(model: VisionModel) -> tuple[nn.Module, Pixels]:
    """(net, preprocessing of one image) by the library that wrote the folder."""
    source = model.source
    if source.family == "timm":
        return _timm(source)
    if source.kind == "clip":
        from studio.models.vision import ClipModel

        model.clip = ClipModel(source, str(model.device))
        net = model.clip.net
        _watchable(net.visual if source.family == "open_clip" else net)
        return net, model.clip.preprocess
    return _transformers(source)


def _watchable(tower: nn.Module) -> None:
    """Puts OpenAttention in the place of torch's attention."""
    for parent in list(tower.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.MultiheadAttention) and child.in_proj_weight is not None:
                if child.bias_k is None and child.batch_first:
                    pool = not name == "attn"
                    setattr(parent, name, OpenAttention(child, pool=pool))


def _timm(source: Source) -> tuple[nn.Module, Pixels]:
    import timm
    from safetensors.torch import load_file
    from timm.data import create_transform, resolve_data_config

    net = timm.create_model(f"local-dir:{source.path}", pretrained=False)
    weights: dict[str, torch.Tensor] = {}
    for file in component_files(source.path):
        weights |= load_file(file)
    net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights.items()})
    return net, create_transform(**resolve_data_config(model=net), is_training=False)


def _transformers(source: Source) -> tuple[nn.Module, Pixels]:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    local = {"local_files_only": True, "trust_remote_code": False}
    config = transformers.AutoConfig.from_pretrained(source.path, **local)
    asked = (config.architectures or [""])[0]
    loader = getattr(transformers, asked) if asked in _TOWERS else transformers.AutoModel
    options = {"add_pooling_layer": False} if config.model_type in ("vit", "deit") else {}
    said = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # its report of heads that nobody needs
    try:
        net, info = loader.from_pretrained(
            source.path, use_safetensors=True, output_loading_info=True, **local, **options
        )
    finally:
        transformers.utils.logging.set_verbosity(said)
    if lacking := sorted(info["missing_keys"]):  # transformers fills them with random numbers
        raise ValueError(f"the weights lack {lacking[0]}")
    _watchable(net)
    processor = transformers.AutoImageProcessor.from_pretrained(source.path, **local)

    def pixels(image: Image.Image) -> torch.Tensor:
        return processor(images=image, return_tensors="pt").pixel_values[0]

    return net, pixels
