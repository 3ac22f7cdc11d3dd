"""From a name to weights on disk: the catalogue, a folder, a checkpoint file, or a hub id; fingerprints;
every fault in one sentence.

Only safetensors are opened. A fingerprint hashes the tensors as stored, so file layout and device do not
matter.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

from studio.errors import RequestError, StudioError
from studio.models.catalog import CATALOG, Entry
from studio.models.foreign import read_json, refuse_foreign
from studio.models.hub import Hub
from studio.models.single_file import checkpoint_family, layout, load_checkpoint

COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
PIPELINES = {
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "LatentConsistencyModelPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionXLImg2ImgPipeline",
}
VISION_TYPES = {"clip_vision_model", "siglip_vision_model", "vit", "deit", "dinov2"}
VISION_TYPES |= {"dinov2_with_registers"}  # transformers' model types that are vision transformers
_FINGERPRINTS: dict[tuple, str] = {}


@dataclass(frozen=True)
class Source:
    """A model on disk: the name it was asked for by, its folder or checkpoint file, family (sd1, sd2, sdxl,
    clip …) and hub revision."""

    name: str
    path: Path
    kind: str
    family: str
    revision: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def configuration(self) -> Path:
        """The folder of its configuration files, which one of weights alone does not bring."""
        return layout(self.path, self.family) if self.path.is_file() else self.path

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the sorted (name, stored dtype, shape, bytes) of all tensors."""
        return fingerprint(self.path)


def parameter_bytes(module: Any) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])


def locate(name: str, models: Path | None = None, hub: Hub | None = None) -> Source:
    """Finds a model by catalogue name, folder, checkpoint file or hub id, downloading the last when it isn't
    cached (as `hub` allows).

    RequestError when the name means nothing, the model is of no known family or asks for more than lies in
    its folder (models/foreign.py); StudioError when it can't be had.
    """
    if not isinstance(name, str) or not name.strip():
        raise RequestError(
            "--model is empty; give a name of `locus models`, a folder, or a hub id such as org/name."
        )
    entry = CATALOG.get(name)
    if entry and entry.embedded:
        return _source(name, entry.path, entry, None)
    own = [models / f"{name}.safetensors", models / name] if models else []
    for place in [os.path.expanduser(name), *own]:
        if os.path.isdir(place):  # unlike Path's, these take any text
            return _source(name, Path(place), None, None)
        if os.path.isfile(place):
            return _source(name, _checkpoint(Path(place)), None, None)
    hub_id = entry.source if entry else name
    if (
        hub_id.count("/") != 1
        or not all(part.strip(".") for part in hub_id.split("/"))
        or hub_id.startswith(("/", ".", "~"))
    ):
        near = get_close_matches(name, CATALOG, 1)
        raise RequestError(
            f"There is no model {name[:80]!r}: it is no name of `locus models`, no folder, no .safetensors "
            f"file and no hub id (org/name)" + (f"; did you mean {near[0]!r}?" if near else ".")
        )
    folder = (hub or Hub()).fetch(hub_id, entry)
    revision = folder.name if folder.parent.name == "snapshots" else None
    return _source(name, folder, entry, revision)


def _checkpoint(file: Path) -> Path:
    """The file, if it may be a checkpoint; RequestError for a pickle or another kind of file."""
    if file.suffix.lower() != ".safetensors":
        pickle = (
            "is a pickle, which can run foreign code, so Locus never opens it"
            if (file.suffix.lower() in (".ckpt", ".bin", ".pt", ".pth"))
            else "is no checkpoint"
        )
        raise RequestError(f"{file} {pickle}; Locus takes .safetensors files and folders of them.")
    return file


def _source(name: str, folder: Path, entry: Entry | None, revision: str | None) -> Source:
    kind, family = identify(folder)
    source = Source(name, folder, kind, family, revision, entry.defaults if entry else {})
    refuse_foreign(source.configuration)
    return source


def identify(folder: Path) -> tuple[str, str]:
    """(kind, family) of a model folder by its configuration files, or of a checkpoint file by its names."""
    if folder.is_file():
        shapes = {name: shape for name, _, shape, _, _ in tensors_of(folder)}
        return "diffusion", checkpoint_family(folder, shapes)
    if (folder / "model_index.json").exists():
        return "diffusion", _pipeline_family(folder)
    if (folder / "open_clip_config.json").exists():
        return "clip", "open_clip"
    if (config := folder / "config.json").exists():
        content = read_json(config)
        if "architecture" in content:
            return "vision", "timm"
        if not (kind := content.get("model_type", "")):
            return "unknown", ""
        if kind in ("clip", "siglip"):
            return "clip", "clip"
        return ("vision" if kind in VISION_TYPES else "language"), kind
    raise RequestError(
        f"The folder {folder} holds no model that Locus knows: expected model_index.json (diffusers), "
        "config.json (transformers, timm) or open_clip_config.json (open_clip)."
    )


def _pipeline_family(folder: Path) -> str:
    cls = read_json(folder / "model_index.json").get("_class_name", "")
    cls = cls if isinstance(cls, str) else "pipeline with code of its own"
    if cls not in PIPELINES:
        raise RequestError(
            f"{folder.name} is a {cls or 'pipeline without a class'}; Locus reads Stable Diffusion 1, 2 and "
            "XL pipelines, whose UNet has cross-attention."
        )
    width = read_json(folder / "unet" / "config.json").get("cross_attention_dim", 768)
    return "sdxl" if "XL" in cls else "sd2" if width == 1024 else "sd1"


# ---- weights files ----------------------------------------------------------------------------------------


def weight_files(folder: Path) -> dict[str, list[Path]]:
    """The safetensors files to read, by component ("" for a model of one part or in one file); RequestError
    when there are only pickles."""
    if folder.is_file():
        return {"": [folder]}
    parts = (
        [c for c in COMPONENTS if (folder / c).is_dir()] if (folder / "model_index.json").exists() else [""]
    )
    return {part: component_files(folder / part) for part in parts}


_INDEX = ".index.json"
_NAMES = {  # of the file or index of weights by the library that reads the folder, in its own order
    "open_clip": (
        "open_clip_model.safetensors",
        "open_clip_pytorch_model.safetensors",
        "model.safetensors",
        "pytorch_model.safetensors",
    ),
    "diffusers": (f"diffusion_pytorch_model.safetensors{_INDEX}", "diffusion_pytorch_model.safetensors"),
    "transformers": ("model.safetensors", f"model.safetensors{_INDEX}", "pytorch_model.safetensors"),
}
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")


def component_files(folder: Path) -> list[Path]:
    """The safetensors files of one component: those that its library will read, the shards of its index or
    its one file."""
    part = "diffusers" if folder.name in ("unet", "vae") else "transformers"
    library = "open_clip" if (folder / "open_clip_config.json").exists() else part
    for place in (folder / name for name in _NAMES[library]):
        if place.is_file():
            return _shards(place) if place.name.endswith(_INDEX) else [place]
    found = sorted(folder.glob("*.safetensors"))
    if main := [f for f in found if not re.search(r"\.(fp16|non_ema)[.-]", f.name)] or found:
        return main
    if pickles := sorted(f for f in folder.glob("*") if f.suffix in _PICKLES):
        raise RequestError(
            f"{pickles[0].name} in {folder} is a pickle, which can run foreign code, so Locus never opens "
            "it; convert the model to safetensors."
        )
    raise RequestError(f"{folder} holds no .safetensors file; the model is not complete.")


def _shards(index: Path) -> list[Path]:
    """The files that an index names: safetensors of its own folder, else RequestError."""
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
        if names and all(re.fullmatch(r"[^/\\]+\.safetensors", name) for name in names):
            return sorted(index.parent / name for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(f"{index} is broken; copy or download it again.") from error
    raise RequestError(
        f"{index} names files that are no safetensors of its folder; copy or download the model again."
    )


def tensors_of(file: Path) -> Iterator[tuple[str, str, list[int], int, int]]:
    """(name, stored dtype, shape, first byte, last byte) of a safetensors file, checked against the file's
    length."""
    broken = RequestError(f"{file} is broken or cut short; copy or download it again.")
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length <= min(size - 8, 10**8):
                raise broken
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        rows = [
            (n, t["dtype"], t["shape"], 8 + length + t["data_offsets"][0], 8 + length + t["data_offsets"][1])
            for n, t in header.items()
        ]
    except FileNotFoundError as error:
        raise RequestError(f"{file} is missing; the model is not complete.") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise broken from error
    if rows and max(r[4] for r in rows) != size:
        raise broken
    yield from rows


def fingerprint(folder: Path) -> str:
    """SHA-256 over the sorted (name, stored dtype, shape, bytes) of all tensors of a model folder.

    A pipeline's tensors are named COMPONENT.TENSOR, as in edit files.
    """
    files = weight_files(folder)
    stamp = tuple(
        (str(f), f.stat().st_mtime_ns, f.stat().st_size) for fs in files.values() for f in fs if f.exists()
    )
    if stamp in _FINGERPRINTS:
        return _FINGERPRINTS[stamp]
    rows = [
        (f"{part}.{name}" if part else name, dtype, shape, file, first, last)
        for part, fs in files.items()
        for file in fs
        for name, dtype, shape, first, last in tensors_of(file)
    ]
    digest = hashlib.sha256()
    for name, dtype, shape, file, first, last in sorted(rows, key=lambda r: r[0]):
        digest.update(json.dumps([name, dtype, shape]).encode())
        with file.open("rb") as opened:
            opened.seek(first)
            left = last - first
            while left and (block := opened.read(min(left, 1 << 22))):
                digest.update(block)
                left -= len(block)
    _FINGERPRINTS[stamp] = digest.hexdigest()
    return _FINGERPRINTS[stamp]


_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4}


def loaded_bytes(folder: Path, dtype: str = "float32") -> int:
    """Bytes of all weights once they are loaded as `dtype` (text encoders of pipelines are float32 always),
    after checking that no file is broken."""
    total = 0
    for part, files in weight_files(folder).items():
        size = 4 if dtype == "float32" or part.startswith("text_encoder") else 2
        for file in files:
            for _, stored, _, first, last in tensors_of(file):
                floating = stored in ("F64", "F32", "F16", "BF16")
                total += (last - first) // _SIZES.get(stored, 1) * size if floating else last - first
    return total


_LOADING_FAULTS = (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError)


def load_diffusion(source: Source, device: str, dtype: Any) -> Any:
    """A DiffusionModel of the folder or file, through diffusers' own loader, safetensors only."""
    import diffusers
    import torch
    import transformers
    from safetensors import SafetensorError

    from studio.models.diffusion import DiffusionModel
    from studio.models.precision import loop_dtype

    loaded_bytes(source.path)
    try:
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        if source.path.is_file():
            pipe = load_checkpoint(source.path, source.family, loop_dtype(dtype))
            for part in (pipe.unet, pipe.vae):
                part.to(dtype)
        else:
            cls = getattr(diffusers, read_json(source.path / "model_index.json")["_class_name"])
            pipe = cls.from_pretrained(source.path, **_options(source, dtype))
        pipe.to(torch.device(device))
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
            raise
        first = " ".join(str(error).split())[:160]
        raise StudioError(
            f"{source.name} can't be loaded: its files do not fit one another ({first})."
        ) from error
    return DiffusionModel(pipe, source, device, dtype)


def _options(source: Source, dtype: Any) -> dict[str, Any]:
    """What diffusers is told of a pipeline's folder."""
    from studio.models.precision import part_dtypes

    options: dict[str, Any] = {
        "dtype": part_dtypes(dtype),
        "use_safetensors": True,
        "local_files_only": True,
        "low_cpu_mem_usage": True,
        "trust_remote_code": False,
        **dict.fromkeys(("feature_extractor", "image_encoder")),  # for pictures as prompts: not loaded
    }
    if source.family != "sdxl":
        options |= {"safety_checker": None, "requires_safety_checker": False}
    if not any((source.path / "unet").glob("diffusion_pytorch_model*.safetensors")) or _only_variant(
        source.path / "unet"
    ):
        options["variant"] = "fp16"
    return options


def _only_variant(folder: Path) -> bool:
    files = [f.name for f in folder.glob("*.safetensors")]
    return bool(files) and all(".fp16." in f for f in files)


def home() -> Path:
    """$LOCUS_HOME, by default ~/.locus."""
    return Path(os.environ.get("LOCUS_HOME") or "~/.locus").expanduser()
