"""Which components of a vision transformer a method looks at: those named, or the first for a feature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from studio.errors import RequestError
from studio.methods.component_roles import Groups, atlas_attributes, feature_basis, read_features, roles
from studio.methods.text_span import bank_texts


@dataclass(frozen=True)
class Choice:
    """What was asked: names, or the first `top` for `feature` among features (arXiv 2406.01583)."""

    components: tuple[str, ...] | None
    top: int | None
    feature: str | None
    features: tuple[str, ...] | None
    bank: tuple[str, ...] | None

    def check(self) -> None:
        """RequestError when it says too little, or two things at once."""
        if self.components and (self.top or self.feature):
            raise RequestError("--components names what to take, --top ranks by --feature; give one of them.")
        if self.top and not self.feature:
            raise RequestError("--top takes the first components for a feature; say which with --feature.")
        named = read_features(self.features or ())
        if self.feature and named and self.feature not in named:
            raise RequestError(
                f"--feature: {self.feature[:40]!r} is none of the --features {', '.join(named)[:200]}."
            )


def feature_groups(clip: Any, features: Sequence[str] | None, feature: str | None) -> Mapping[str, Groups]:
    """{name: texts} of the features asked for; without any, the feature read as a text, or the attributes of
    atlas-clip when it is one of them."""
    if features:
        return read_features(features)
    if clip.source.path.name == "atlas-clip":
        known = atlas_attributes(clip)
        if feature is None or feature in known:
            return known
    return read_features((feature,), "--feature")


def basis_of(clip: Any, name: str, groups: Groups, centre: np.ndarray) -> np.ndarray:
    """Orthonormal rows (k, dim) of a feature's texts, centred."""
    from studio.models.component_space import unit_texts

    basis = feature_basis(np.stack([unit_texts(clip, texts).mean(0) for texts in groups]), centre)
    if not len(basis):
        raise RequestError(
            f"The texts of {name[:40]!r} are the centre of the --bank itself; give a bank of several."
        )
    return basis


def text_centre(clip: Any, bank: Sequence[str] | None) -> np.ndarray:
    """(dim,) mean of the bank's unit texts."""
    from studio.models.component_space import unit_texts

    return unit_texts(clip, bank_texts(clip, bank, "--bank")).mean(0)


def first_components(
    space: Any, clip: Any, found: Any, choice: Choice, allowed: Sequence[str]
) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """(the first `top` of the allowed labels for the feature, their scores). With other features in the order
    of the score minus the largest of theirs. found: models/corpus.Statistics."""
    centre = text_centre(clip, choice.bank)
    features = feature_groups(clip, choice.features, choice.feature)
    name = choice.feature if choice.feature in features else next(iter(features))
    scores = {
        n: roles(space, found, basis_of(clip, n, groups, centre))["score"] for n, groups in features.items()
    }
    own = scores[name]
    others = [s for n, s in scores.items() if n != name]
    order = own - np.max(others, axis=0) if others else own
    labels = list(found.covariances)
    ranked = [i for i in np.argsort(-order, kind="stable") if labels[i] in set(allowed)][: choice.top]
    return tuple(labels[i] for i in ranked), tuple(float(own[i]) for i in ranked)
