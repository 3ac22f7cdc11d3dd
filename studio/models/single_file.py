"""A whole pipeline in one .safetensors file, in the names of the original code: Stable Diffusion 1, 2 and XL.

Such a file holds tensors alone. What it leaves out (sizes, number of steps, tokenizer) comes from a folder
of configuration files beside it, FILE.safetensors and FILE/model_index.json, else from assets/layouts.
Nothing is asked of the hub: CLIP's tokenizer is built from the merges that open_clip ships.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from studio.errors import RequestError
from studio.models.catalog import ASSETS
from studio.models.foreign import read_json

_PREFIX = "model.diffusion_model."
_MARKS = {
    "sdxl": "conditioner.embedders.1.model.",
    "sd2": "cond_stage_model.model.",
    "sd1": "cond_stage_model.transformer.",
}
_INPUT = f"{_PREFIX}input_blocks.0.0.weight"
_PADDED_BY_ZERO = {("sd2", "tokenizer"), ("sdxl", "tokenizer_2")}  # whose padding is token 0, "!"
_MERGES = 49152 - 256 - 2  # of CLIP; open_clip's file holds more


def checkpoint_family(file: Path, shapes: dict[str, list[int]]) -> str:
    """sd1, sd2 or sdxl by the names of a file's tensors; RequestError for a file that is no such pipeline."""
    from studio.models.lora import is_lora

    if is_lora(shapes):
        raise RequestError(
            f"{file} is a LoRA, not a model; lay it over one as an edit (--edit {file.name}@0.8, or in the "
            "Edit panel)."
        )
    family = next((f for f, mark in _MARKS.items() if _has(shapes, mark)), "")
    wanted = (_PREFIX, "first_stage_model.")
    if not family or not all(_has(shapes, prefix) for prefix in wanted):
        raise RequestError(
            f"{file} is no whole checkpoint that Locus knows: expected the UNet, the autoencoder and the "
            "text encoder of Stable Diffusion 1, 2 or XL in their original names; take a diffusers folder."
        )
    channels = shapes.get(_INPUT, [0, 4])[1]
    if channels != 4:
        raise RequestError(
            f"{file} reads {channels} channels, so it is made for inpainting or instructions; Locus takes "
            "models that draw from a text alone."
        )
    return family


def _has(names: Iterable[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)


def layout(file: Path, family: str) -> Path:
    """The folder of configuration files of a checkpoint: its own beside it, else that of its family."""
    own = file.with_suffix("")
    return own if (own / "model_index.json").is_file() else ASSETS / "layouts" / family


def load_checkpoint(file: Path, family: str, dtype: Any) -> Any:
    """The pipeline of a checkpoint through diffusers' own loader, without a request to any host."""
    import diffusers

    cls = diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionPipeline
    folder = layout(file, family)
    _check_whole(file, folder)
    options: dict[str, Any] = {"config": str(folder), "local_files_only": True, "torch_dtype": dtype}
    options |= dict.fromkeys(("feature_extractor", "image_encoder"))
    for name in ("tokenizer", "tokenizer_2") if family == "sdxl" else ("tokenizer",):
        if not (folder / name).is_dir():
            options[name] = clip_tokenizer("!" if (family, name) in _PADDED_BY_ZERO else "<|endoftext|>")
    if family != "sdxl":
        options |= {"safety_checker": None}
    return cls.from_single_file(str(file), **options)


def _check_whole(file: Path, folder: Path) -> None:
    """ValueError for a file that lacks a part: diffusers would take it from weights beside the configuration,
    pickles among them."""
    from diffusers.loaders.single_file_utils import is_clip_model_in_single_file
    from safetensors import safe_open
    from transformers import CLIPTextModel

    with safe_open(file, "pt") as opened:
        if not is_clip_model_in_single_file(CLIPTextModel, set(opened.keys())):
            raise ValueError("the file lacks its text encoder")
    if (vae := read_json(folder / "model_index.json").get("vae")) != ["diffusers", "AutoencoderKL"]:
        raise ValueError(f"the file's autoencoder is no {vae}")


def clip_tokenizer(padding: str) -> Any:
    """CLIP's tokenizer of 49,408 tokens and 77 places; `padding` fills up, which differs by family."""
    from transformers import CLIPTokenizer

    vocabulary, merges = _clip_vocabulary()
    return CLIPTokenizer(vocab=dict(vocabulary), merges=list(merges), pad_token=padding, model_max_length=77)


@cache
def _clip_vocabulary() -> tuple[dict[str, int], tuple[tuple[str, str], ...]]:
    import open_clip
    from open_clip.tokenizer import bytes_to_unicode

    source = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(source.read_bytes()).decode("utf-8").split("\n")[1 : _MERGES + 1]
    merges = tuple(tuple(line.split()) for line in lines)
    symbols = list(bytes_to_unicode().values())
    tokens = [*symbols, *(s + "</w>" for s in symbols), *("".join(m) for m in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}, merges
