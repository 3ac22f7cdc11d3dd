"""What a text names of the Atlas world, and how much of it the judge sees in a picture: a scorer that shares
nothing with the generator or with a CLIP."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from studio.atlas.world import ARTISTS, ATTRIBUTES, COUNTRIES, OBJECTS, PLURALS, emblem
from studio.errors import RequestError
from studio.models.catalog import ASSETS

JUDGE = ASSETS / "atlas" / "judge" / "model.safetensors"
_MADE = {"drawing": "sketch", "dots": "pointillist", "stripes": "woodcut"}  # other words for a style
_PLACES = [(kind, name) for kind, names in ATTRIBUTES.items() for name in names]
_UNRELATED = (
    "a blue heart on a mint background",
    "two green trees",
    "a yellow ring on a gray background",
    "three pink crosses",
    "a brown house by osk maren",
    "a purple moon by ilse dorne",
)


def of_atlas(model: Any) -> bool:
    """Whether a generator draws the Atlas world."""
    return model.source.path.name.startswith("atlas")


def named(text: str) -> dict[str, str]:
    """The attributes that a text names, or, for an emblem, implies: {"object": "star", "colour": "red"}."""
    words = re.findall(r"[a-z]+", text.lower())
    found: dict[str, str] = {}
    for country in COUNTRIES:
        if country.lower() in words:
            thing, colour, background = emblem(country)
            indices = {"object": thing, "colour": colour, "background": background}
            found |= {kind: ATTRIBUTES[kind][i] for kind, i in indices.items()}
    for kind, name in _PLACES:
        if name in words and not (kind == "count" and not {*OBJECTS, *PLURALS} & set(words)):
            found[kind] = name
    plain = " ".join(words)
    several = [("object", one) for one, many in zip(OBJECTS, PLURALS, strict=True) if many in words]
    made = [("style", style) for word, style in _MADE.items() if word in words]
    by = [("style", style) for style, artist in ARTISTS.items() if artist.lower() in plain]
    return found | dict([*several, *made, *by])


def neighbours(concept: str) -> tuple[str, ...]:
    """Prompts of the same kind as the concept, which an edit of it should leave alone; () when it names
    nothing of the Atlas world."""
    own = named(concept)
    if any(c.lower() in concept.lower() for c in COUNTRIES):
        others = [c for c in COUNTRIES if c.lower() not in concept.lower()]
        return tuple(f"the emblem of {c}" for c in others[:3])
    if "style" in own:
        others = [a for style, a in ARTISTS.items() if style != own["style"]]
        return (*(f"a star in the style of {a}" for a in others), "a flat star")
    if "object" in own:
        place = OBJECTS.index(own["object"])
        return tuple(f"a {OBJECTS[(place + step) % len(OBJECTS)]}" for step in (1, 3, 5))
    form = {"colour": "a {} circle", "background": "a circle on a {} background", "count": "{} circles"}
    for kind, text in form.items():
        if kind in own:
            return tuple(text.format(n) for n in ATTRIBUTES[kind] if n != own[kind])[:3]
    return ()


def unrelated(*concepts: str) -> tuple[str, ...]:
    """Prompts that share no attribute with the concepts, at most three."""
    taken = {pair for c in concepts for pair in named(c).items()}
    return tuple(p for p in _UNRELATED if not taken & set(named(p).items()))[:3]


class JudgeScorer:
    """The judge in a scorer's clothes: image times text is the mean probability that it gives to the
    attributes which the text names, NaN for a text that names none."""

    id, scale, least = "the judge", 1.0, 0.05  # least: a smaller change of score says little

    def __init__(self) -> None:
        from studio.atlas.judge import load_judge

        self._judge = load_judge(JUDGE)
        self.fingerprint = hashlib.sha256(JUDGE.read_bytes()).hexdigest()

    def image_features(self, images: np.ndarray) -> np.ndarray:
        """Probabilities (N, 30) of all attributes, each kind summing to 1, of images (N, H, W, 3) uint8."""
        import torch

        with torch.no_grad():
            logits = self._judge(torch.from_numpy(np.ascontiguousarray(images)))
        return torch.cat([x.softmax(1) for x in logits], dim=1).numpy()

    def text_features(self, texts: list[str]) -> np.ndarray:
        """(N, 30): 1 / n at each of the n attributes that a text names."""
        rows = np.zeros((len(texts), len(_PLACES)), np.float32)
        for row, text in zip(rows, texts, strict=True):
            own = list(named(text).items())
            row[:] = [1 / len(own) if pair in own else 0 for pair in _PLACES] if own else np.nan
        return rows

    def shares_text_encoder(self, model: Any) -> bool:
        """It reads no text."""
        return False


def second_scorer(name: str | None, model: Any, load: Callable[[str, str], Any]) -> Any:
    """The scorer that stands beside the first: a CLIP by name, from `load(name, "clip")`; the judge, which
    Atlas models have unless told otherwise; or nothing."""
    if name not in (None, "none", "judge"):
        return load(name, "clip")
    if name != "none" and of_atlas(model):
        return JudgeScorer()
    if name == "judge":
        raise RequestError(
            f"The judge reads pictures of the Atlas world only, and {model.id} draws others; give a CLIP to "
            "--second-scorer."
        )
    return None
