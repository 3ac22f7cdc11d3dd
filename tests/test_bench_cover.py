"""What the benchmark measures of every method: every section names every method of the registry, measured or
left out with a reason; references that only the benchmark uses are the methods' own values."""

from __future__ import annotations

import pytest
import torch

from studio.bench_cover import LEFT_OUT, MEASURED, said
from studio.bench_page import SECTIONS, page
from studio.method_race import REQUESTS, requested
from studio.methods.text_to_image import corruption_patches
from studio.registry import find_method, load_methods, parse
from studio.types import Patch, Site
from tests import layouts
from tests.references import naive_text_encoder

PROMPT, SUBJECT = "a red star on a white background", "white background"


def test_every_section_speaks_of_every_method() -> None:
    assert set(MEASURED) == set(LEFT_OUT) == set(SECTIONS) - {""}
    for section, names in MEASURED.items():
        assert len(names) == len(set(names)) and not set(names) & set(LEFT_OUT[section])
        assert {*names, *LEFT_OUT[section]} == set(load_methods()), section


def test_every_method_has_a_request_that_is_taken() -> None:
    assert set(REQUESTS) == set(load_methods()) - {"align"}  # 40 images, and 10 come with Locus
    for name, asked in REQUESTS.items():
        method = find_method(name)
        parsed = parse(method, asked.given, list(asked.seeds) if method.samples else None)
        if method.check:
            method.check(*parsed)


def test_the_page_says_what_is_left_out_and_why() -> None:
    row = {"value": 1.0, "unit": "x", "bar": None, "holds": None, "how": "y"}
    made = page({"host": {}, "results": [row | {"name": "memory: lens"}]})
    assert "Not in this table: generate (it is the plain run); audit (its images are drawn as" in made
    assert said("start") == "" and said("operations").endswith(".")
    assert "align (its images are read as decompose reads them)" in said("operations")


def test_a_request_takes_other_options_and_seeds() -> None:
    model = layouts.model("sd1")
    found = requested("generate", model, seeds=(3, 4), steps=1, metric="distance")()
    assert found.arrays["images"].axis("seed").labels == ("3", "4") and found.values["steps"] == 1


# ---- references -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1])
def test_a_restored_state_is_that_of_the_reference(layer: int) -> None:
    model = layouts.model("sd1")
    noise = corruption_patches(model, PROMPT, SUBJECT, None, 3.0, 0, 1)
    places = model.subject_positions(PROMPT, SUBJECT, None)
    token = places[-1]
    copy = Patch(Site("text", layer, "mlp"), do="copy", value=0, at=(token,), rows=(1,))
    ours = model.encode([PROMPT] * 2, patches=[*noise, copy])[0].states[1]
    low = model.encode([PROMPT] * 2, patches=noise)[0].states[1]
    drawn = torch.as_tensor(noise[0].value)
    slow = naive_text_encoder.restored_states(model.pipe, PROMPT, places, drawn, layer, token)[0]
    torch.testing.assert_close(ours, slow, atol=1e-5, rtol=0)
    assert float((slow - low).abs().max()) > 1e-3


@pytest.mark.parametrize("family", ["sd1", "atlas"])
def test_states_after_a_layer_are_those_of_the_reference(family: str) -> None:
    model = layouts.model(family)
    ours = model.lens(PROMPT).states
    for layer in range(len(ours)):
        slow = naive_text_encoder.layer_states(model.pipe, PROMPT, layer)
        torch.testing.assert_close(ours[layer : layer + 1], slow, atol=1e-5, rtol=0)
