"""What every model offers to methods, and the check at load that its addresses point at parts that matter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from studio.errors import StudioError


class Model(Protocol):
    """A loaded model. Family modules (diffusion.py …) add their own operations to this."""

    id: str
    family: str
    fingerprint: str
    provides: frozenset[str]

    def components(self) -> Mapping[str, Any]:
        """Modules that hold weights, by the names that edit files use."""

    def nbytes(self) -> int:
        """Memory of the weights."""


class FromSource:
    """What a model knows of itself by where it came from (`source`, see models/loading.py)."""

    source: Any

    @property
    def id(self) -> str:
        """The name that it was asked for by."""
        return self.source.name

    @property
    def family(self) -> str:
        """The family's name, as models/loading.py tells it from the configuration."""
        return self.source.family

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weights as stored (contract)."""
        return self.source.fingerprint


class OneNetwork(FromSource):
    """A model whose weights are one network, `net`, under no name."""

    net: Any

    def components(self) -> dict[str, Any]:
        """The whole model."""
        return {"": self.net}

    def nbytes(self) -> int:
        """Memory of the weights."""
        from studio.models.loading import parameter_bytes

        return parameter_bytes(self.net)


def self_check(model: Any) -> None:
    """StudioError for a model whose weights are no numbers or not all there, or that does not react where
    methods will touch it.

    Zeroes the sites of each kind and asserts that the output changes: public tools fail silently when a
    library renames a module; this is where such a change would be seen.
    """
    for part, module in model.components().items():
        for name, parameter in module.named_parameters():
            # a sum is finite only if every term is; where float16 overflows, the terms are looked at
            if not parameter.sum().isfinite() and not parameter.isfinite().all():
                raise StudioError(
                    f"{model.id} can't be used: {part or 'the model'}'s {name} holds NaN or infinity; copy "
                    "or download it again."
                )
    for part in getattr(model, "encoders", {}):
        _check_text(model, part)
    if not hasattr(model, "zeroing_changes"):
        return
    changes = model.zeroing_changes()
    for site, change in changes.items():
        if not np.isfinite(change):
            raise StudioError(
                f"{model.id} gives no finite numbers at {site}: its weights hold NaN or infinity; "
                "copy or download it again."
            )
        if change == 0:
            raise StudioError(
                f"{model.id} does not react when {site} is zeroed, so a trace there would mean nothing; "
                "this model's layout is not supported."
            )


def _check_text(model: Any, part: str) -> None:
    """transformers fills tensors that a file lacks with random numbers, and makes an empty tokenizer where
    there is none, with no more than a log line."""
    from studio.models.loading import component_files, tensors_of

    encoder, tokenizer = model.encoders[part], model.tokenizers[part]
    suffix = part.removeprefix("text").replace("2", "_2")
    one_file = model.source.path.is_file()  # there the loader itself refuses what is missing
    files = [] if one_file else component_files(model.source.path / f"text_encoder{suffix}")
    stored = {name.removeprefix("text_model.") for file in files for name, *_ in tensors_of(file)}
    wanted = {name.removeprefix("text_model.") for name, _ in encoder.named_parameters()}
    if not one_file and (missing := sorted(wanted - stored)):
        raise StudioError(
            f"{model.id} can't be loaded: text_encoder{suffix} lacks {missing[0]} (in all {len(missing)} "
            "tensors); copy or download it again."
        )
    words, length = encoder.config.vocab_size, encoder.config.max_position_embeddings
    fits = tokenizer is not None and 2 < tokenizer.model_max_length <= length
    if not fits or not words / 2 <= len(tokenizer) <= words:
        raise StudioError(
            f"{model.id} can't be loaded: the files of tokenizer{suffix} are missing or do not fit its text "
            "encoder; copy or download it again."
        )
