"""The API over a real server: every method an endpoint, its parameters, its answers and its refusals."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from panels.api_parameters import parameters, plain_words, served
from studio.models.catalog import ASSETS
from studio.options import DEFAULT_MODELS
from studio.registry import REQUIRED, find_method, hints, load_methods
from studio.session import Session
from tests.browser.studio import serving
from tests.contract import OPTIONS

METHODS = sorted(load_methods())
NOT_SERVED = {"save", "out", "edit"}  # paths of the server's machine; an edit is uploaded or a run's
PICTURES = sorted((ASSETS / "atlas" / "examples").glob("*.png"))
SMALL: dict[str, dict[str, Any]] = {
    "generate": {"prompt": ["a red star"], "steps": 1},
    "trace-unet": {"prompt": "a red star", "subject": "red star", "steps": 1, "screen": True},
    "word-maps": {"prompt": "a red star", "steps": 1},
    "edit": {"concept": ["star"], "replacement": ["circle"], "images": False},
    "decompose": {"images": ["examples"], "texts": ["a star", "a tree"]},
    "text-span": {"images": ["examples"], "length": 2},
    "contributions": {"prompt": "The emblem of Avaria is a"},
    "knockout": {"prompt": "The emblem of Avaria is a", "subject": "Avaria", "controls": 0},
}


@pytest.fixture(scope="module")
def url(session: Session, atlas: Any) -> Iterator[str]:
    with serving(session) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Client]:
    opened = Client(url, verbose=False, analytics_enabled=False)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def info(client: Client) -> dict[str, Any]:
    return client.view_api(return_format="dict", print_info=False)["named_endpoints"]


# ---- what is offered -------------------------------------------------------------------------------------


def test_every_method_is_an_endpoint_and_nothing_else_is(url: str, info: dict) -> None:
    assert set(info) == {f"/{name.replace('-', '_')}" for name in METHODS}
    page = httpx.get(f"{url}config").json()
    open_ones = {d["api_name"] for d in page["dependencies"] if d["api_visibility"] != "private"}
    assert open_ones == {name.replace("-", "_") for name in METHODS}


@pytest.mark.parametrize("name", METHODS)
def test_parameters_are_those_of_the_command(name: str, info: dict) -> None:
    method = find_method(name)
    offered = {p["parameter_name"]: p for p in info[f"/{method.endpoint}"]["parameters"]}
    promised = {option.removeprefix("--").replace("-", "_") for option in OPTIONS.get(name, ())}
    assert promised - NOT_SERVED - {"seeds"} <= set(offered)
    assert not {"out", "save", "models", "runs", "device", "dtype", "threads"} & set(offered)
    assert ("seeds" in offered) == method.samples
    assert offered["model"]["parameter_default"] == DEFAULT_MODELS[method.family]
    for cls in (method.inputs, method.params):
        for knob in dataclasses.fields(cls):
            if not served(knob):
                continue
            parameter = offered[knob.name]
            assert parameter["parameter_has_default"] == (knob.default is not REQUIRED)
            if parameter["parameter_has_default"]:
                default = list(knob.default) if isinstance(knob.default, tuple) else knob.default
                assert parameter["parameter_default"] == default
            else:
                assert parameter["example_input"] not in (None, "..."), knob.name
            assert all(f"'{c}'" in parameter["python_type"]["type"] for c in knob.metadata["choices"])
            assert parameter["python_type"]["description"]


@pytest.mark.parametrize("name", METHODS)
def test_endpoints_are_explained(name: str, info: dict) -> None:
    method = find_method(name)
    said = info[f"/{method.endpoint}"]["description"]
    assert said.startswith(method.title) and method.paper in said
    words = [said, *(p["python_type"]["description"] for p in info[f"/{method.endpoint}"]["parameters"])]
    assert not any("--" in w or "repeat the option" in w for w in words), words
    assert [r["label"] for r in info[f"/{method.endpoint}"]["returns"]] == ["run", "files"]


def test_knobs_that_name_a_clip_are_known_as_models() -> None:
    """Whoever declares another one must say so, else a call could name a folder."""
    for name in METHODS:
        method = find_method(name)
        kinds = {p.name: p.kind for p in parameters(method)}
        for cls in (method.inputs, method.params):
            for knob in dataclasses.fields(cls):
                text = hints(cls)[knob.name] in (str, str | None) and not knob.metadata["choices"]
                if text and "CLIP" in knob.metadata["help"].split(" that ")[0].split(" into ")[0]:
                    assert kinds[knob.name] in ("model", "made"), (name, knob.name)
                if knob.metadata["paths"] and served(knob):
                    assert kinds[knob.name] in ("images", "image", "made"), (name, knob.name)


def test_words_of_the_command_line_become_parameters() -> None:
    assert plain_words("--guidance-also needs --steps 2; a file, one a line") == "guidance_also needs steps 2"
    kept = "take it in with `locus import /tmp/x --runs /a`"
    assert plain_words(f"--runs: {kept}") == f"runs: {kept}"
    assert plain_words("the text to draw (repeat the option for more prompts)") == "the text to draw"


# ---- what comes back -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_every_endpoint_answers(name: str, client: Client, session: Session) -> None:
    """With a run where that is quick, else with the sentence that an unknown model gets."""
    method = find_method(name)
    if name not in SMALL:
        needed = {p.name: p.example for p in parameters(method) if p.default is REQUIRED}
        with pytest.raises(AppError, match="a call names a model of the catalogue"):
            client.predict(**needed, model="/etc", api_name=f"/{method.endpoint}")
        return
    run, files = client.predict(**SMALL[name], api_name=f"/{method.endpoint}")
    kept = session.store.load(run["id"])
    assert run["status"] == "done" and run["recipe"]["method"] == name
    stored = json.loads((session.store.path(run["id"]) / "run.json").read_text("utf-8"))
    assert {k: v for k, v in run.items() if k != "id"} == stored
    by_name = {Path(f).name: Path(f) for f in files}
    with np.load(by_name["arrays.npz"], allow_pickle=False) as arrays:
        for key, trace in kept.result.arrays.items():
            np.testing.assert_array_equal(arrays[key], trace.values)
    assert by_name["figure.svg"].read_bytes().lstrip().startswith(b"<?xml")
    assert by_name["figure.png"].read_bytes().startswith(b"\x89PNG")


def test_it_says_what_is_done_so_far(client: Client) -> None:
    job = client.submit(prompt=["a blue tree"], steps=12, seeds=[0, 1, 2], api_name="/generate")
    job.result(timeout=120)
    told = [out[0] for out in job.outputs()[:-1]]
    assert told and {t["status"] for t in told} <= {"queued", "running"}
    assert any(t["total"] and t["doing"] for t in told)


def test_an_edit_of_one_call_serves_another(client: Client, session: Session, tmp_path: Path) -> None:
    made, files = client.predict(**SMALL["edit"], api_name="/edit")
    asked = {"prompt": ["a red star"], "steps": 1, "api_name": "/generate"}
    by_run, _ = client.predict(**asked, edit=[made["id"]], edit_strengths=[0.5])
    file = next(f for f in files if f.endswith("edit.safetensors"))
    uploaded, _ = client.predict(**asked, edit=[handle_file(file)], edit_strengths=[0.5])
    assert by_run["recipe"]["key"] == uploaded["recipe"]["key"]
    assert by_run["recipe"]["edits"][0].endswith("@0.5")
    plain, _ = client.predict(**asked)
    assert plain["recipe"]["key"] != by_run["recipe"]["key"]


def test_images_are_uploaded_or_sent_along(client: Client) -> None:
    asked = {"texts": ["a star"], "api_name": "/decompose"}
    uploaded, _ = client.predict(images=[handle_file(PICTURES[0])], **asked)
    sent = "data:image/png;base64," + base64.b64encode(PICTURES[0].read_bytes()).decode()
    along, _ = client.predict(images=[sent], **asked)
    values = [run["result"]["arrays"]["scores"]["axes"][1] for run in (uploaded, along)]
    assert values[0] == values[1]
    assert uploaded["result"]["arrays"]["scores"]["axes"][0]["labels"] == [PICTURES[0].name]


WRONG = {
    "bounds": ({"steps": 0}, r"^steps must be from 1 to 1000, not 0\."),
    "whole": ({"steps": 1.5}, r"^steps must be a whole number, not '1\.5'"),
    "text": ({"steps": "many"}, r"^steps must be a whole number, not 'many'"),
    "huge": ({"steps": 10**30}, r"^A number of this request is too large; send another\."),
    "list": ({"prompt": 5}, "prompt must be a list of texts, not int"),
    "empty": ({"prompt": []}, "prompt is empty"),
    "nothing": ({"prompt": None}, "prompt is missing"),
    "mapping": ({"prompt": {"a": 1}}, "prompt must be a list of texts, not dict"),
    "long": ({"prompt": ["x" * 20_001]}, "prompt has 20,001 characters; at most 20,000"),
    "choice": ({"scheduler": "dpn"}, "scheduler must be one of ddim, pndm, euler, dpm, lcm, not 'dpn'; did"),
    "seeds twice": ({"seeds": [1, 1]}, "a seed is repeated"),
    "seeds below": ({"seeds": [-1]}, "Seeds must be whole numbers from 0"),
    "seeds many": ({"seeds": list(range(4097))}, "seeds may be 4,096 at most"),
    "model a folder": ({"model": "/etc"}, "model can't be '/etc': a call names a model of the catalogue"),
    "model above": ({"model": "../atlas-sd"}, "a call names a model of the catalogue"),
    "model an id of a hub": ({"model": "org/name"}, "a call names a model of the catalogue"),
    "model to download": ({"model": "sdxl"}, "sdxl is not on this machine yet, and a call does not download"),
    "model no text": ({"model": ["atlas-sd"]}, "model must be the name of a model, not list"),
    "scorer a folder": ({"scorer": "/etc", "metric": "clip"}, "scorer can't be '/etc'"),
    "force": ({"force": "yes"}, "force must be true or false, not 'yes'"),
    "edit a path": ({"edit": ["/etc/passwd"]}, "'/etc/passwd' is no run's id"),
    "edit of no run": ({"edit": ["nothing"]}, "There is no run 'nothing'"),
    "edit no text": ({"edit": [5]}, "edit takes files that are uploaded first"),
    "edits many": ({"edit": ["x"] * 65}, "edit may hold 64 edits at most, not 65"),
    "strengths": ({"edit_strengths": [1.0]}, "edit_strengths must be 0 numbers"),
    "strengths text": ({"edit_strengths": "1"}, "edit_strengths must be 0 numbers"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls_get_a_sentence(case: str, client: Client) -> None:
    given, sentence = WRONG[case]
    with pytest.raises(AppError, match=sentence) as told:
        client.predict(**{"prompt": ["a star"], "steps": 1, **given}, api_name="/generate")
    said = str(told.value)
    assert "Traceback" not in said and "/tmp" not in said and len(said) < 600


PICTURES_WRONG = {
    "a path": ("/etc/hostname", "paths and addresses are not read"),
    "an address": ("http://127.0.0.1:9/x.png", "paths and addresses are not read"),
    "no base64": ("data:image/png;base64,????", "can't be read as base64|is not an image|no image"),
    "a number": (7, "images takes files that are uploaded first"),
}


@pytest.mark.parametrize("case", PICTURES_WRONG)
def test_images_that_were_not_uploaded_are_refused(case: str, client: Client) -> None:
    given, sentence = PICTURES_WRONG[case]
    with pytest.raises(AppError, match=sentence):
        client.predict(images=[given], api_name="/decompose")


def test_a_run_that_made_no_aligner_is_refused(client: Client) -> None:
    run, _ = client.predict(**SMALL["decompose"], api_name="/decompose")
    with pytest.raises(AppError, match="aligner: the run .* made no such file"):
        client.predict(images=["examples"], aligner=run["id"], api_name="/decompose")
