"""Small random pipelines of the three Stable Diffusion layouts, saved once a test run as real folders."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from studio.errors import StudioError
from studio.models.catalog import ASSETS
from studio.models.loading import load_diffusion, locate

FAMILIES = ("sd1", "sd2", "sdxl")
ATLAS = ASSETS / "atlas" / "atlas-sd"

PNDM_CONFIG: dict[str, Any] = {  # scheduler_config.json of Stable Diffusion 1.5
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}

_BLOCKS: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
UNETS: dict[str, dict[str, Any]] = {
    "sd1": {**_BLOCKS, "cross_attention_dim": 32, "attention_head_dim": 8},
    "sd2": {
        **_BLOCKS,
        "cross_attention_dim": 1024,
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
    },
    "sdxl": {
        **_BLOCKS,
        "cross_attention_dim": 56,
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24 + 6 * 8,
    },
}


def text_config(width: int, layers: int, **more: Any) -> CLIPTextConfig:
    """A CLIP text encoder for the Atlas tokenizer."""
    return CLIPTextConfig(
        vocab_size=815,
        hidden_size=width,
        intermediate_size=2 * min(width, 64),
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=32,
        bos_token_id=813,
        eos_token_id=814,
        pad_token_id=814,
        **more,
    )


def unet(family: str, **changes: Any) -> UNet2DConditionModel:
    """A random UNet whose cross-attention is loud enough for the text to show in the image."""
    net = UNet2DConditionModel(**{**UNETS[family], **changes})
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if ".attn2.to_v.weight" in name or ".attn2.to_out.0.weight" in name:
                parameter.mul_(6)
    return net


def vae() -> AutoencoderKL:
    """A random autoencoder that halves the side."""
    return AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.18215,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


def build(family: str, seed: int = 0, **changes: Any) -> Any:
    """A random pipeline of one layout; `changes` are put into the UNet's configuration."""
    tokenizer = CLIPTokenizer.from_pretrained(ATLAS / "tokenizer", local_files_only=True)
    prediction = "v_prediction" if family == "sd2" else "epsilon"
    scheduler = PNDMScheduler.from_config({**PNDM_CONFIG, "prediction_type": prediction})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {"vae": vae(), "unet": unet(family, **changes), "tokenizer": tokenizer}
        if family == "sdxl":
            second = text_config(24, 3, hidden_act="gelu", projection_dim=24)
            return StableDiffusionXLPipeline(
                **parts,
                text_encoder=CLIPTextModel(text_config(32, 2)),
                text_encoder_2=CLIPTextModelWithProjection(second),
                tokenizer_2=tokenizer,
                scheduler=scheduler,
                add_watermarker=False,
            )
        width = UNETS[family]["cross_attention_dim"]
        return StableDiffusionPipeline(
            **parts,
            text_encoder=CLIPTextModel(text_config(width, 2)),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def save_clip(folder: Path) -> Path:
    """A small random CLIP in the layout of transformers."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    )
    config = CLIPConfig(text_config=text_config(32, 2), vision_config=vision, projection_dim=24)
    CLIPModel(config).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    tokenizer = CLIPTokenizer.from_pretrained(ATLAS / "tokenizer", local_files_only=True)
    CLIPProcessor(CLIPImageProcessor(**sizes), tokenizer).save_pretrained(folder)
    return folder


@cache
def _root() -> Path:
    root = Path(tempfile.mkdtemp(prefix="locus-layouts-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


@cache
def saved(family: str) -> Path:
    """The folder of the random pipeline of one layout. Read only: tests that change files use `copy`."""
    folder = _root() / family
    build(family).save_pretrained(folder, safe_serialization=True)
    return folder


def copy(family: str, to: Path) -> Path:
    """A copy of the folder of one layout, to be broken."""
    shutil.copytree(saved(family), to)
    return to


def load(folder: Path | str) -> Any:
    """The model of a folder or name on the CPU, without Session and its check."""
    return load_diffusion(locate(str(folder)), "cpu", torch.float32)


@cache
def model(family: str) -> Any:
    """The loaded model of one layout, or of Atlas; nobody changes its weights."""
    return load("atlas-sd" if family == "atlas" else saved(family))


# ---- broken folders --------------------------------------------------------------------------------------


def sentence(session: Any, name: str | Path, error: type = StudioError, kind: str = "diffusion") -> str:
    """What a person reads when this model is asked for; nothing stays loaded."""
    with pytest.raises(error) as caught:
        session.model(str(name), kind)
    text = str(caught.value)
    assert 20 < len(text) < 500 and "\n" not in text and "Traceback" not in text
    assert text.rstrip().endswith((".", "?", ")")) and session.loaded() == []
    return text


def edit_json(file: Path, **changes: Any) -> None:
    """Changes keys of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_weights(file: Path, name: str, change: Any) -> None:
    """Replaces one tensor of a safetensors file by change(tensor), or leaves it out for None."""
    tensors = load_file(file)
    new = change(tensors.pop(name))
    save_file(tensors if new is None else {**tensors, name: new}, file, metadata={"format": "pt"})
