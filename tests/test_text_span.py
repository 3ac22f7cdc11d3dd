"""TextSpan from covariances: the same picks as the slow form on all contributions, random and of models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from studio import figures
from studio.atlas.text_bank import attribute_texts, text_bank
from studio.atlas.world import ATTRIBUTES
from studio.errors import RequestError
from studio.images import read_image
from studio.methods.text_span import bank_texts, draw, greedy_span
from studio.models.component_space import Space
from studio.models.corpus import statistics
from studio.types import Recipe
from tests import vision_families as families
from tests.references.naive_text_span import naive_text_span
from tests.vision_corpora import Quiet, picture_folder


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home without anything kept, and one thread."""
    monkeypatch.setenv("LOCUS_HOME", str(tmp_path / "home"))
    torch.set_num_threads(1)


def unit(rng: np.random.Generator, count: int, dim: int) -> np.ndarray:
    texts = rng.normal(size=(count, dim)) + 0.5  # texts have a direction in common
    return texts / np.linalg.norm(texts, axis=1, keepdims=True)


@pytest.mark.parametrize(("size", "dim", "rank"), [(6, 40, 6), (6, 40, 4), (12, 8, 8), (1, 5, 1)])
@pytest.mark.parametrize("seed", range(4))
def test_picks_and_shares_are_those_of_the_slow_form(size: int, dim: int, rank: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    outputs = rng.normal(size=(200, size)) * rng.uniform(0.2, 3, size) + rng.normal(size=size)
    matrix, texts = rng.normal(size=(size, dim)), unit(rng, 60, dim)
    known = (np.cov(outputs.T, bias=True).reshape(size, size), outputs.mean(0), matrix)
    found = greedy_span(*known, texts, length=10, rank=rank)
    picks, shares = naive_text_span(outputs @ matrix, texts, 10, rank)
    assert found.picks.tolist() == picks and found.rank == rank == len(picks)
    assert np.allclose(found.shares, shares, rtol=1e-8)
    if rank == min(size, dim):
        assert found.shares.sum() == pytest.approx(1)  # as many texts as directions tell everything
    alone = ((outputs - outputs.mean(0)) @ matrix @ texts.T).var(0) / (outputs @ matrix).var(0).sum()
    assert np.allclose(found.alone, alone)


def test_the_rank_is_at_most_the_head_size() -> None:
    rng = np.random.default_rng(0)
    outputs, matrix, texts = rng.normal(size=(50, 3)), rng.normal(size=(3, 20)), unit(rng, 30, 20)
    found = greedy_span(np.cov(outputs.T, bias=True), outputs.mean(0), matrix, texts, length=10, rank=80)
    assert found.rank == 3 and len(found.picks) == 3


def test_a_head_that_writes_a_constant_has_no_texts() -> None:
    rng = np.random.default_rng(0)
    known = (np.zeros((3, 3)), np.ones(3), rng.normal(size=(3, 20)))
    found = greedy_span(*known, unit(rng, 30, 20), length=4)
    assert len(found.picks) == 0 and found.variance == 0 and not found.alone.any()


def test_a_planted_direction_is_found_first() -> None:
    rng = np.random.default_rng(1)
    texts = unit(rng, 40, 30)
    outputs = np.concatenate([3 * rng.normal(size=(300, 1)), rng.normal(size=(300, 1))], 1)
    matrix = np.stack([texts[17], texts[5]])
    found = greedy_span(np.cov(outputs.T, bias=True), outputs.mean(0), matrix, texts, length=2)
    assert found.picks.tolist() == [17, 5] and found.shares[0] > 0.8


@pytest.mark.parametrize("name", ["openclip", "hf-clip"])
def test_heads_of_a_model(name: str, tmp_path: Path) -> None:
    """From files to picks: every head as the slow form on its contributions (float32 outputs)."""
    model, files = families.model(name), picture_folder(tmp_path / "pictures", 40)
    space = Space(model)
    found = statistics(space, files, Quiet())
    parts = space.whole.run(model.pixels([read_image(f)[0] for f in files]))
    texts = unit(np.random.default_rng(0), 50, space.width)
    heads = [label for label in parts.components if ".head." in label]
    assert len(heads) > 3
    for label in heads:
        span = greedy_span(
            found.covariances[label], found.means[label], space.matrix(label), texts, 4, rank=4
        )
        picks, shares = naive_text_span(parts.components[label].double().numpy(), texts, 4, 4)
        assert span.picks.tolist() == picks and np.allclose(span.shares, shares, rtol=2e-3)


@pytest.fixture(scope="module")
def run(session: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("pictures")
    picture_folder(folder, 24)
    heads = ("block.4.head.1", "block.5.head.0")
    recipe = Recipe("text-span", "atlas-clip", {"images": (str(folder),)}, {"heads": heads, "length": 3})
    return session.run(recipe)


def test_the_run_of_a_clip(run: Any) -> None:
    arrays, values = run.result.arrays, run.result.values
    assert arrays["picks"].values.shape == (2, 3) and arrays["share"].values.shape == (2, 3)
    assert arrays["alone"].axis("text").labels == text_bank() and values["images"] == 24
    assert set(values["texts"]) == {"block.4.head.1", "block.5.head.0"} == set(values["ranks"])
    first = values["texts"]["block.4.head.1"][0]
    assert text_bank()[int(arrays["picks"].values[0, 0])] == first
    assert np.nansum(arrays["share"].values, 1).max() <= 1 + 1e-6
    json.dumps(values)
    figure = draw(run)
    assert figure.kind == "table" and len(figure.data["rows"]) == 2 and first in str(figure.data["rows"])
    assert figures.to_bytes(figure, "svg").startswith(b"<?xml")


def test_refusals(session: Any, run: Any) -> None:
    folder = run.recipe.inputs["images"]
    for given, sentence in (
        ({"heads": ("block.9.head.0",)}, "atlas-clip has no head block.9.head.0; its last is block.5.head.4"),
        ({"heads": ("nine",)}, "'nine' is no head; write block.LAYER.head.HEAD"),
        ({"aligner": "/nowhere/a.safetensors", "clip": "atlas-clip"}, "--aligner: there is no file"),
        ({"length": 0}, "--length must be from 1 to 200"),
    ):
        with pytest.raises(RequestError, match=sentence):
            session.run(Recipe("text-span", "atlas-clip", {"images": folder}, given))
    with pytest.raises(RequestError, match="--texts is needed with"):
        bank_texts(families.model("hf-clip").clip, None, "--texts")


def test_the_bank_names_every_value() -> None:
    bank, features = text_bank(), attribute_texts()
    assert len(bank) == len(set(bank)) > 300 and tuple(features) == tuple(ATTRIBUTES)
    for name, values in features.items():
        assert len(values) == len(ATTRIBUTES[name]) and all(texts for texts in values)
        words = [" ".join(texts) for texts in values]
        assert len(set(words)) == len(words)
