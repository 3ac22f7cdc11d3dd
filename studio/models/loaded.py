"""From a source to a model in memory: the class of its kind, its number type, its check, what it needs."""

from __future__ import annotations

from typing import Any

from studio.errors import RequestError, StudioError
from studio.models.base import self_check
from studio.models.loading import Source, load_diffusion, loaded_bytes
from studio.models.precision import held_as

DTYPES = ("auto", "float32", "float16", "bfloat16", "int8", "int4")
QUANTIZED = ("int8", "int4")  # of language models; everything else is float32 then


def needed_bytes(source: Source, dtype: str) -> int:
    """Bytes of a model's weights in memory once loaded as `dtype`, after checking that no file is broken."""
    dtype = held_as(source.kind, dtype)
    if dtype in QUANTIZED and source.kind == "language":
        return loaded_bytes(source.path, "float16") // (2 if dtype == "int8" else 3)  # embeddings stay whole
    return loaded_bytes(source.path, "float32" if dtype in QUANTIZED else dtype)


def load(source: Source, kind: str, device: str, dtype: str) -> Any:
    """The model of a source as a `kind` (diffusion, clip, vision or language), checked; StudioError for
    files that are broken or do not fit."""
    model = _built(source, kind, device, dtype)
    self_check(model)
    return model


def _built(source: Source, kind: str, device: str, dtype: str) -> Any:
    import torch

    number = torch.float32 if dtype in QUANTIZED else getattr(torch, dtype)
    if kind == "vision":
        from studio.models.vit import VisionModel

        return VisionModel(source, device, number)
    if source.kind == "clip":
        from studio.models.vision import ClipModel

        return ClipModel(source, device)
    if source.kind == "language":
        from studio.models.language import LanguageModel

        return LanguageModel(source, device, number, quantized=dtype if dtype in QUANTIZED else "")
    return load_diffusion(source, device, number)


def check_dtype(dtype: str, device: str) -> str:
    """The number type that `auto` stands for, else the one given; RequestError for one that the device or
    this installation has not."""
    if dtype not in DTYPES:
        raise RequestError(f"--dtype must be one of {', '.join(DTYPES)}, not {dtype!r}.")
    if device == "cpu" and dtype == "float16":
        raise RequestError("float16 is too slow and too coarse on a CPU; take --dtype float32 or bfloat16.")
    if dtype in QUANTIZED:
        check_quantized(dtype)
    return "float32" if dtype == "auto" else dtype


def check_quantized(dtype: str) -> None:
    """RequestError unless bitsandbytes, which holds weights in 8 or 4 bits, is installed."""
    from importlib.util import find_spec

    bits = dtype.removeprefix("int")
    if find_spec("bitsandbytes") is None:
        raise RequestError(
            f"Weights in {bits} bits need the library bitsandbytes, which is not installed here; install it "
            "with `python -m pip install bitsandbytes`, or take --dtype bfloat16."
        )


def check_memory(source: Source, dtype: str, budget: int, device: str) -> int:
    """Bytes that the source needs; StudioError when that is more than may be used on the device."""
    need = needed_bytes(source, dtype)
    if need > budget:
        raise StudioError(
            f"{source.name} needs about {need / 1e9:.1f} GB and {budget / 1e9:.1f} GB may be used on "
            f"{device}; close other programs, or take a smaller model or --dtype."
        )
    return need
