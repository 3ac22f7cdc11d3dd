"""Word maps: their slow reference, their sums, and every shape of request."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from studio import Recipe
from studio.errors import RequestError
from studio.methods.word_maps import draw, overlay, word_spans
from studio.models.attention_maps import attention_of, enlarge
from studio.models.hooks import hook_count
from tests import layouts
from tests.references import naive_word_maps as naive

PROMPT = "a red star on a white background"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    """Small matrices gain nothing from more."""
    torch.set_num_threads(1)


def run(session: Any, seeds: tuple[int, ...] = (0,), model: str = "atlas-sd", **given: Any) -> Any:
    """A finished run of word-maps."""
    asked = {"prompt": PROMPT, "steps": 2, **given}
    inputs = {k: asked.pop(k) for k in ("prompt", "words") if k in asked}
    return session.run(Recipe("word-maps", model, inputs, asked, seeds), save=False, fresh=True).result


CASES = {
    "square": ("sd1", {}, 3.0),
    "wide": ("sd1", {"height": 24, "width": 40}, 3.0),
    "no guidance": ("sd2", {}, 0.0),
    "tall": ("sdxl", {"height": 24, "width": 16}, 3.0),
}


@pytest.mark.parametrize(("family", "size", "guidance"), CASES.values(), ids=CASES.keys())
def test_maps_equal_the_slow_reference(session: Any, family: str, size: dict, guidance: float) -> None:
    model, folder = layouts.model(family), str(layouts.saved(family))
    given = {"scheduler": "pndm", "guidance": guidance, "words": ["red star", "white"], **size}
    found = run(session, (0, 3), folder, **given)
    maps = found.arrays["maps"]
    assert maps.axis("word").labels == ("red star", "white")
    tall, wide = size.get("height", 16), size.get("width", 16)
    assert maps.values.shape == (2, 2, tall, wide) == (2, 2, *found.arrays["images"].values.shape[2:4])
    by = run(session, (0, 3), folder, by="step", **given).arrays["maps_by"].over("step").values
    for j, seed in enumerate((0, 3)):
        kept = naive.kept_probabilities(model.pipe, PROMPT, seed, 2, guidance, **size)
        for w, places in enumerate(([2, 3], [6])):
            want = naive.word_map(kept, places, tall // 2, wide // 2)
            torch.testing.assert_close(torch.from_numpy(by[j, w]), want, rtol=1e-4, atol=1e-6)
            large = torch.nn.functional.interpolate(want[None, None], (tall, wide), mode="bilinear")[0, 0]
            torch.testing.assert_close(torch.from_numpy(maps.values[j, w]), large, rtol=1e-4, atol=1e-6)


def test_latents_that_do_not_halve(session: Any) -> None:
    given = {"height": 14, "width": 22, "by": "layer", "words": ["star"]}
    found = run(session, (0,), str(layouts.saved("sd1")), **given).arrays
    assert found["maps_by"].values.shape == (1, 1, 4, 7, 11) and found["maps"].values.shape == (1, 1, 14, 22)
    mean = found["maps_by"].over("layer").values
    large = torch.nn.functional.interpolate(torch.from_numpy(mean), (14, 22), mode="bilinear").numpy()
    np.testing.assert_allclose(large, found["maps"].values, atol=1e-6)
    assert 0 < found["maps"].values.min() < found["maps"].values.max() < 1


@pytest.mark.parametrize(("by", "parts"), [("layer", 10), ("head", 3 * 3 + 3 * 6 + 4 * 9), ("step", 3)])
def test_breakdowns_average_to_the_map(session: Any, by: str, parts: int) -> None:
    found = run(session, steps=3, by=by, words=["star", "white"]).arrays
    names = found["maps_by"].axis(by).labels
    values = found["maps_by"].values
    assert len(names) == parts == len(set(names)) and values.shape == (1, 2, parts, 16, 16)
    if by == "head":  # a layer counts as one, however many heads it has
        layers = [n.split(" head ")[0] for n in names]
        share = np.array([1 / layers.count(n) / len(set(layers)) for n in layers])
        assert layers.count(layers[0]) == 3 and layers.count(layers[5]) in (3, 6, 9)
    else:
        share = np.full(parts, 1 / parts)
    small = torch.from_numpy(np.einsum("swphx,p->swhx", values, share).astype(np.float32))
    large = torch.nn.functional.interpolate(small, (64, 64), mode="bilinear").numpy()
    np.testing.assert_allclose(large, found["maps"].values, atol=1e-6)


def test_probabilities_of_all_tokens_sum_to_one(atlas: Any) -> None:
    from studio.models.sampling import raw_output

    cond, _ = atlas.encode([PROMPT, "a house"])
    plan = atlas.plan(type("P", (), {"steps": 2, "guidance": 1.0, "scheduler": None}))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 16, 16, generator=generator)
    with torch.no_grad(), attention_of(atlas) as tape:
        raw_output(atlas, x, torch.tensor(500), cond, plan)
        for i in range(len(tape.layers)):
            every = tape.onto(i, torch.eye(cond.states.shape[1]), 0)
            assert every.shape[:2] == (2, tape.heads(i)) and (every >= 0).all()
            torch.testing.assert_close(every.sum(-1), torch.ones(every.shape[:3]))
            torch.testing.assert_close(tape.onto(i, torch.eye(cond.states.shape[1]), 1), every[1:])
    assert hook_count(atlas.unet) == 0


def test_a_batch_is_its_single_seeds(session: Any) -> None:
    both = run(session, (1, 2), words=["star"]).arrays
    for j, seed in enumerate((1, 2)):
        one = run(session, (seed,), words=["star"]).arrays
        np.testing.assert_allclose(one["maps"].values[0], both["maps"].values[j], atol=1e-5)
        np.testing.assert_allclose(
            one["images"].values[0, 0].astype(int), both["images"].values[0, j], atol=1
        )


def test_images_are_those_of_generate(session: Any) -> None:
    made = run(session, (4,))
    recipe = Recipe("generate", "atlas-sd", {"prompt": [PROMPT]}, {"steps": 2}, (4,))
    other = session.run(recipe, save=False, fresh=True).result.arrays["images"].values
    np.testing.assert_array_equal(made.arrays["images"].values, other)
    assert [a.name for a in made.arrays["images"].axes] == ["prompt", "seed", "height", "width", "channel"]
    assert set(made.images) == {"seed4"} | {
        f"seed4-{i}-{w}" for i, w in enumerate(["a__1_", "a__2_", "red", "star", "on", "white", "background"])
    }


def test_a_score_when_it_is_asked_for(session: Any) -> None:
    found = run(session, (0, 1), words=["star"], metric="distance").arrays["scores"]
    assert found.values[0] == 0 and found.values[1] < -0.01


def test_words_and_phrases() -> None:
    spans = word_spans("The cat's hat, on a cat", None)
    assert list(spans) == ["The", "cat's", "hat", "on", "a", "cat"] or "cat (1)" in spans
    assert word_spans("a red star", ["red star", "star"]) == {"red star": (2, 10), "star": (6, 10)}
    assert word_spans("a star, a Star", ["star"]) == {"star": (2, 6)}
    assert word_spans("star star", ["star", "star"]) == {"star (1)": (0, 4), "star (2)": (5, 9)}
    assert word_spans("★", None) == {"★": (0, 1)}


def test_layers_are_laid_out_on_their_own_grid() -> None:
    rows = torch.arange(2 * 3, dtype=torch.float32).reshape(1, 1, 6)
    assert enlarge(rows, 2, 3).flatten().tolist() == [0, 1, 2, 3, 4, 5]
    for height, width in ((4, 6), (3, 5), (7, 11), (8, 12)):
        found = enlarge(rows, height, width)[0, 0]
        assert found.shape == (height, width) and found[0, 0] == 0 and found[-1, -1] == 5
        assert (found.diff(dim=0) >= -1e-5).all() and (found.diff(dim=1) >= -1e-5).all()


def test_overlays_colour_what_is_attended() -> None:
    heat = np.zeros((4, 4))
    heat[1, 2] = 0.3
    made = overlay(np.full((4, 4, 3), 100, np.uint8), heat)
    assert made[1, 2].tolist() == [0xB2, 0x18, 0x2B] and (made[0, 0] == 80).all()
    assert (overlay(np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2))) == 0).all()


def test_the_figure_is_a_row_a_seed(session: Any) -> None:
    recipe = Recipe("word-maps", "atlas-sd", {"prompt": PROMPT, "words": ["star"]}, {"steps": 1}, (0, 1))
    data = draw(session.run(recipe, save=False, fresh=True)).data
    assert data["rows"] == ["seed 0", "seed 1"] and data["cols"] == ["image", "star"]
    assert all(im.shape == (64, 64, 3) for row in data["images"] for im in row)


REFUSED = {
    "absent word": ({"words": ["house"]}, "--words 'house' is not in the text"),
    "empty word": ({"words": ["  "]}, "--words is empty"),
    "no prompt": ({"prompt": ""}, "--prompt is empty"),
    "lost word": ({"prompt": "star " * 60 + "moon", "words": ["moon"]}, "'moon' lies past the"),
    "size": ({"height": 66}, "66 x 64 is not"),
    "unknown breakdown": ({"by": "heads"}, "did you mean 'head'"),
}


@pytest.mark.parametrize(("given", "part"), REFUSED.values(), ids=REFUSED.keys())
def test_wrong_requests_get_a_sentence(session: Any, given: dict[str, Any], part: str) -> None:
    with pytest.raises(RequestError, match=part):
        run(session, **given)
