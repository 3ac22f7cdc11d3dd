"""One declaration, and every sentence with which a wrong request is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import pytest

from studio.errors import RequestError
from studio.registry import (
    MAX_TEXT,
    REQUIRED,
    Method,
    find_method,
    knob,
    load_methods,
    parse,
    parse_seeds,
    plain,
)


@dataclass(frozen=True)
class Inputs:
    """What a made-up method is asked about."""

    prompt: str = knob(REQUIRED, "the text to draw")
    words: tuple[str, ...] = knob((), "words", commas=False)
    negative: str | None = knob(None, "what not to draw")


@dataclass(frozen=True)
class Params:
    """How it is done."""

    steps: int | None = knob(None, "denoising steps", low=1, high=1000)
    guidance: float = knob(3.0, "guidance scale", low=0)
    shift: float = knob(0.0, "shift", high=2)
    metric: str = knob("clip", "metric", choices=("clip", "distance"))
    kinds: tuple[str, ...] = knob(("mlp",), "kinds", choices=("mlp", "attention"))
    screen: bool = knob(False, "only the screen")


def made_up(seeds: tuple[int, ...] = (0,)) -> Method:
    """A method that is declared and never run."""
    return Method(
        "make-up",
        "Made up",
        "",
        "",
        "diffusion",
        frozenset(),
        Inputs,
        Params,
        lambda: None,
        lambda: None,
        seeds,
        None,
    )


def refusal(seeds: Any = None, **given: Any) -> str:
    """The sentence that refuses the request."""
    with pytest.raises(RequestError) as caught:
        parse(made_up(), {"prompt": "a star", **given}, seeds)
    assert caught.value.code == 2
    return str(caught.value)


def test_defaults_are_filled_in() -> None:
    inputs, params, seeds = parse(made_up((4, 5)), {"prompt": "a star"})
    assert (inputs, params, seeds) == (Inputs("a star"), Params(), (4, 5))
    assert plain(params)["kinds"] == ["mlp"]


def test_none_stands_for_a_default() -> None:
    given = {f.name: None for c in (Inputs, Params) for f in fields(c)} | {"prompt": "a star"}
    assert parse(made_up(), given)[:2] == (Inputs("a star"), Params())


def test_text_is_read_as_its_type() -> None:
    given = {"prompt": "x", "steps": "7", "guidance": "1e1", "kinds": "mlp, attention", "words": ["a", "b"]}
    inputs, params, _ = parse(made_up(), given)
    assert (params.steps, params.guidance, params.kinds) == (7, 10.0, ("mlp", "attention"))
    assert isinstance(params.steps, int) and inputs.words == ("a", "b")


def test_whole_numbers_may_come_as_floats() -> None:
    assert parse(made_up(), {"prompt": "x", "steps": 20.0})[1].steps == 20


REFUSED = {
    "unknown, near": ({"guidence": 1}, "make-up has no option 'guidence'; did you mean 'guidance'?"),
    "unknown, far": ({"zzz": 1}, "make-up has no option 'zzz'."),
    "missing": ({"prompt": None}, "--prompt is missing: the text to draw."),
    "empty": ({"prompt": " \n"}, "--prompt is empty: the text to draw."),
    "no text": ({"prompt": 5}, "--prompt must be a text, not int."),
    "too long": (
        {"prompt": "x" * (MAX_TEXT + 1)},
        "--prompt has 20,001 characters; at most 20,000 are taken.",
    ),
    "no UTF-8": ({"prompt": "\udcff"}, "--prompt holds bytes that are no text; write it in UTF-8."),
    "no number": ({"guidance": "high"}, "--guidance must be a number, not 'high'."),
    "NaN": ({"guidance": math.nan}, "--guidance must be a number, not 'nan'."),
    "NaN in text": ({"guidance": "NaN"}, "--guidance must be a number, not 'NaN'."),
    "infinity": ({"guidance": "inf"}, "--guidance must be a number, not 'inf'."),
    "bool as number": ({"guidance": True}, "--guidance must be a number, not 'True'."),
    "list as number": ({"guidance": [1]}, "--guidance must be a number, not '[1]'."),
    "huge": ({"guidance": 10**400}, f"--guidance must be a number, not '1{'0' * 59}'."),
    "no whole number": ({"steps": 1.5}, "--steps must be a whole number, not '1.5'."),
    "out of both": ({"steps": 0}, "--steps must be from 1 to 1000, not 0."),
    "too large": ({"steps": "1001"}, "--steps must be from 1 to 1000, not 1001."),
    "under the least": ({"guidance": -0.5}, "--guidance must be at least 0, not -0.5."),
    "over the most": ({"shift": 2.5}, "--shift must be at most 2, not 2.5."),
    "choice, near": (
        {"metric": "clipp"},
        "--metric must be one of clip, distance, not 'clipp'; did you mean 'clip'?",
    ),
    "choice, far": ({"metric": "zzz"}, "--metric must be one of clip, distance, not 'zzz'."),
    "one of several": ({"kinds": "mlp,zzz"}, "--kinds must be one of mlp, attention, not 'zzz'."),
    "no text in list": ({"kinds": [1]}, "--kinds must be a list of texts, not list."),
    "no list": ({"kinds": 5}, "--kinds must be a list of texts, not int."),
    "empty list": ({"kinds": []}, "--kinds is empty: kinds."),
    "only commas": ({"kinds": ","}, "--kinds is empty: kinds."),
    "flag": ({"screen": "yes"}, "--screen must be true or false, not 'yes'."),
}


@pytest.mark.parametrize(("given", "sentence"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals(given: dict, sentence: str) -> None:
    assert refusal(**given) == sentence


@pytest.mark.parametrize(
    ("seeds", "expected"),
    [("0,1,2", (0, 1, 2)), (" 5 , 3,", (5, 3)), (7, (7,)), ([2, 1], (2, 1)), (2**32 - 1, (2**32 - 1,))],
)
def test_seeds(seeds: Any, expected: tuple[int, ...]) -> None:
    assert parse_seeds(made_up(), seeds) == expected


WRONG = "Seeds must be whole numbers from 0 to 4294967295, separated by commas, not "
NONE = "No seeds are given; give at least one, for example --seeds 0,1,2."


@pytest.mark.parametrize(
    ("seeds", "sentence"),
    [
        ("", NONE),
        (" , ", NONE),
        ([], NONE),
        ("1,1", "Each seed may be given once; a seed is repeated."),
        ([3, 3], "Each seed may be given once; a seed is repeated."),
        (-1, WRONG + "'-1'."),
        (2**32, WRONG + "'4294967296'."),
        (10**400, WRONG + f"'1{'0' * 59}'."),
        ("one", WRONG + "'one'."),
        ("1.5", WRONG + "'1.5'."),
        (1.5, WRONG + "'1.5'."),
        (True, WRONG + "'True'."),
        (math.nan, WRONG + "'nan'."),
        ({}, WRONG + "'{}'."),
    ],
    ids=str,
)
def test_seeds_refused(seeds: Any, sentence: str) -> None:
    assert refusal(seeds) == sentence


def test_a_method_that_does_not_sample_takes_no_seeds() -> None:
    assert parse_seeds(made_up(()), None) == () and not made_up(()).samples
    with pytest.raises(RequestError, match="make-up does not sample, so it takes no seeds"):
        parse_seeds(made_up(()), "0")


def test_names_and_endpoints() -> None:
    methods = load_methods()
    assert {"generate", "trace-unet", "trace-text-encoder"} <= set(methods)
    assert all(name == m.name and m.endpoint == name.replace("-", "_") for name, m in methods.items())
    assert methods["trace-unet"].endpoint == "trace_unet"


def test_every_method_declares_itself() -> None:
    for m in load_methods().values():
        declared = [f for c in (m.inputs, m.params) for f in fields(c)]
        assert m.title and m.summary.endswith("."), m.name
        assert all(f.metadata.get("help") for f in declared), m.name
        names = [f.name for f in declared]
        assert len(set(names)) == len(names), m.name


def test_unknown_methods() -> None:
    assert find_method("generate").name == "generate"
    with pytest.raises(RequestError, match="no method 'generat'; did you mean 'generate'"):
        find_method("generat")
    with pytest.raises(RequestError, match="no method 'zzz'; known methods: .*generate"):
        find_method("zzz")
