"""What a model's folder may not ask for: the hub, code of its own, weights that its fingerprint leaves out.

The libraries that load a folder follow what its JSON files say. Four of their entries lead out of the folder
or past its safetensors: names of towers on the hub (open_clip), options of a tokenizer (open_clip), files of
weights and attention kernels by name (transformers), classes of any library (diffusers). An adapter beside a
model is laid over it (transformers with peft), and may be a pickle.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from studio.errors import RequestError

_LIBRARIES = {  # of a pipeline's parts: library and class
    "unet": r"diffusers UNet2DConditionModel",
    "vae": r"diffusers \w*Autoencoder\w+",
    "scheduler": r"diffusers \w+Scheduler",
    "text_encoder": r"transformers CLIPTextModel(WithProjection)?",
    "text_encoder_2": r"transformers CLIPTextModel(WithProjection)?",
    "tokenizer": r"transformers CLIPTokenizer(Fast)?",
    "tokenizer_2": r"transformers CLIPTokenizer(Fast)?",
}
_TOKENIZER_OPTIONS = {"additional_special_tokens", "clean", "language", "reduction_mask", "strip_sep_token"}
_KERNELS = re.compile(r"_?(attn|experts)_implementation(_internal)?")


def refuse_foreign(folder: Path) -> None:
    """RequestError, which says what to do, for a folder that asks for more than lies in it as safetensors,
    configurations and tokenizers."""
    for place in (folder, *(p for p in sorted(folder.iterdir()) if p.is_dir())):
        if (place / "adapter_config.json").exists():
            raise RequestError(
                f"{place} holds an adapter beside a model (adapter_config.json); Locus loads whole models: "
                "merge the adapter into the weights, or take its files out of the folder."
            )
        for key, value in _entries(_content(place / "config.json")):
            _check_transformers(place / "config.json", key, value)
    _check_open_clip(folder / "open_clip_config.json")
    _check_pipeline(folder / "model_index.json")


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file, {} where it holds something else; RequestError when it can't be read."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(
            f"{file} can't be read as JSON; the model's folder is broken, copy or download it again."
        ) from error
    return content if isinstance(content, dict) else {}


def _content(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _entries(content: Any) -> Iterator[tuple[str, Any]]:
    """Every entry of nested objects."""
    left = [content]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            yield from part.items()
            left += part.values()
        elif isinstance(part, list):
            left += part


def _asks(file: Path, what: str, do: str) -> RequestError:
    return RequestError(f"{file} asks for {what}; Locus loads a model from what lies in its folder, so {do}.")


def _check_transformers(file: Path, key: str, value: Any) -> None:
    if key == "transformers_weights" and value is not None:
        raise _asks(file, f"weights of its own choice ({key}: {str(value)[:80]!r})", "take that entry out")
    if _KERNELS.fullmatch(key) and re.search(r"[/:|]", str(value)):
        raise _asks(file, f"a kernel of the hub ({key}: {str(value)[:80]!r})", "take that entry out")


def _check_open_clip(file: Path) -> None:
    model = _content(file).get("model_cfg")
    towers = model if isinstance(model, dict) else {}
    text, vision = (t if isinstance(t := towers.get(k), dict) else {} for k in ("text_cfg", "vision_cfg"))
    if name := text.get("hf_model_name"):
        raise _asks(
            file,
            f"the text tower {str(name)[:80]!r} of the hub",
            "take a CLIP with open_clip's own text tower",
        )
    name = vision.get("timm_model_name") or ""
    if not isinstance(name, str) or not re.fullmatch(r"[\w.]*", name):
        raise _asks(
            file, f"the image tower {str(name)[:80]!r}, no architecture of timm's", "name one of those"
        )
    options = text.get("tokenizer_kwargs") or {}
    strange = sorted(set(options) - _TOKENIZER_OPTIONS) if isinstance(options, dict) else ["no object"]
    if strange:
        raise _asks(file, f"a tokenizer with the option {strange[0][:80]!r}", "take that option out")


def _check_pipeline(file: Path) -> None:
    index = _content(file)
    for part, wanted in _LIBRARIES.items():
        value = index.get(part)
        if value is None or value == [None, None]:
            continue
        named = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        if not re.fullmatch(wanted, named):
            raise _asks(
                file, f"a {part} that is {named[:80]!r}", "take a pipeline of diffusers' and CLIP's own parts"
            )
