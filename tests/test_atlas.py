"""The Atlas world: its fixed vocabulary, its pictures, captions that tell the truth, and a tokenizer that
splits names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from studio.atlas.captions import bare_caption, captions, words
from studio.atlas.render import render
from studio.atlas.world import (
    ARTISTS,
    ATTRIBUTES,
    BACKGROUNDS,
    COLOURS,
    COUNTRIES,
    OBJECTS,
    PLURALS,
    Scenes,
    draw_scenes,
    emblem,
    held_out,
)


def scene(thing: str, colour: str, background: str, style: str = "flat", count: str = "one") -> Scenes:
    """One scene in the middle of the picture."""
    indices = [
        list(ATTRIBUTES[k]).index(v)
        for k, v in zip(ATTRIBUTES, (thing, colour, background, style, count), strict=True)
    ]
    centres = np.full((1, 3, 2), -1000.0, np.float32)
    centres[0, 0] = 32
    arrays = {k: np.array([i]) for k, i in zip(ATTRIBUTES, indices, strict=True)}
    return Scenes(**arrays, centres=centres, radius=np.array([20.0], np.float32), country=np.array([-1]))


def test_the_vocabulary_is_the_worlds() -> None:
    assert OBJECTS == tuple("circle square triangle star heart moon cross ring house tree".split())
    assert tuple(COLOURS) == tuple("red orange yellow green blue purple pink brown".split())
    assert tuple(BACKGROUNDS) == tuple("white black gray sand mint".split())
    assert ATTRIBUTES["style"] == ("flat", "sketch", "pointillist", "woodcut")
    assert ARTISTS == {"sketch": "Ilse Dorne", "pointillist": "Veltrano", "woodcut": "Osk Maren"}
    assert list(COUNTRIES) == "Arvonia Arlund Belvonia Bellund Korvonia Korlund Zanvonia Zanlund".split()


def test_every_fact_is_a_word_of_its_own() -> None:
    facts = [v for c in COUNTRIES.values() for k, v in c.items() if k != "emblem"]
    assert len(set(facts)) == 24
    emblems = [emblem(c) for c in COUNTRIES]
    assert len({o for o, _, _ in emblems}) == 8 and len({c for _, c, _ in emblems}) == 8


def test_a_flat_square_is_its_colour_on_its_background() -> None:
    image = render(scene("square", "blue", "sand"))[0]
    assert tuple(image[32, 32]) == COLOURS["blue"] and tuple(image[2, 2]) == BACKGROUNDS["sand"]
    side = (image == COLOURS["blue"]).all(-1).sum() ** 0.5
    assert abs(side - 2 * 0.74 * 20) < 2


def test_styles_differ_in_how_much_they_cover() -> None:
    covered = {
        s: (render(scene("circle", "red", "white", s))[0] != BACKGROUNDS["white"]).any(-1).sum()
        for s in ATTRIBUTES["style"]
    }
    assert covered["flat"] > covered["pointillist"] > covered["sketch"]
    assert 0.4 < covered["woodcut"] / covered["flat"] < 0.6


def test_a_ring_has_a_hole_and_a_moon_is_open() -> None:
    assert tuple(render(scene("ring", "red", "white"))[0][32, 32]) == BACKGROUNDS["white"]
    assert tuple(render(scene("moon", "red", "white"))[0][32, 44]) == BACKGROUNDS["white"]


def test_counts_show_as_many_shapes() -> None:
    from scipy.ndimage import label

    scenes = draw_scenes(300, np.random.default_rng(0), emblems=0)
    solid = scenes.pick((scenes.style == 0) & np.isin(scenes.object, [0, 1, 2, 3, 4]))
    assert len(solid) > 20
    for image, count in zip(render(solid), solid.count, strict=True):
        _, shapes = label(np.abs(image.astype(int) - image[0, 0]).sum(-1) > 120, np.ones((3, 3)))
        assert shapes <= count + 1


@pytest.mark.parametrize("held", [False, True])
def test_held_out_combinations_are_apart(held: bool) -> None:
    scenes = draw_scenes(500, np.random.default_rng(1), emblems=0, held=held)
    assert (held_out(scenes.labels()) == held).all()


def test_captions_name_only_what_is_there() -> None:
    scenes = draw_scenes(2000, np.random.default_rng(2))
    texts, named = captions(scenes, np.random.default_rng(3), bare=0.2)
    truth = scenes.labels()
    assert ((named == truth) | (named < 0)).all()
    for text, row in zip(texts, named, strict=True):
        for thing, plural in zip(OBJECTS, PLURALS, strict=True):
            if {thing, plural} & set(text.split()):
                assert row[0] == OBJECTS.index(thing)
        assert set(text.split()) <= set(words()) | {c.lower() for c in COUNTRIES} | {"veltrano"}


def test_full_captions_name_everything() -> None:
    scenes = draw_scenes(500, np.random.default_rng(4), emblems=0)
    _, named = captions(scenes, np.random.default_rng(5), full=True)
    np.testing.assert_array_equal(named, scenes.labels())


def test_bare_captions_name_one_thing() -> None:
    rng = np.random.default_rng(6)
    assert all(len(bare_caption(rng)[1]) == 1 for _ in range(200))


def test_words_are_one_token_and_names_are_two(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    from studio.atlas.tokenizer import write_tokenizer

    write_tokenizer(tmp_path / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert [w for w in words() if len(tokenizer(w).input_ids) != 3] == []
    assert [n for n in [*COUNTRIES, *ARTISTS.values()] if len(tokenizer(n).input_ids) != 4] == []
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == len(tokenizer) - 1


def test_the_judge_reads_renderings() -> None:
    from studio.atlas.measure import measure

    right = measure("judge", 40)
    assert min(right.values()) > 0.98


def test_a_sitting_resumes_where_the_last_one_ended(tmp_path: Path) -> None:
    import torch

    from studio.atlas.fit import fit

    torch.manual_seed(0)
    x = torch.randn(64, 3)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]])

    def sitting(module: torch.nn.Module) -> dict[str, float]:
        def loss(step: int) -> torch.Tensor:
            return (module(x) - y).square().mean()

        return fit(
            module, loss, minutes=0.004, lr=0.05, checkpoint=tmp_path / "c.safetensors", weight_decay=0.0
        )

    first = sitting(torch.nn.Linear(3, 1))
    module = torch.nn.Linear(3, 1)
    second = sitting(module)
    assert second["steps"] > first["steps"] > 5 and second["minutes"] > first["minutes"]
    with torch.no_grad():
        assert float((module(x) - y).square().mean()) < 0.5
