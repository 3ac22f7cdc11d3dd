"""Files that a person names, on the command line and in a sweep: found, made whole, texts in them read."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from studio import cli
from studio.errors import RequestError
from studio.given_files import whole_edit, whole_model, with_files
from studio.models.loaded import DTYPES
from studio.options import method_options
from studio.registry import find_method, load_methods
from studio.sweep_file import prompt_sweep, read_sweep

WORDS = ("a red star", "a blue circle")
LISTS = [
    (m.name, f.name)
    for m in load_methods().values()
    for record in (m.inputs, m.params)
    for f in fields(record)
    if f.metadata["lines"]
]
PATHS = [
    (m.name, f.name, f.metadata)
    for m in load_methods().values()
    for record in (m.inputs, m.params)
    for f in fields(record)
    if f.metadata["paths"] or f.metadata["weights"]
]


@pytest.fixture
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is not the one where the command is started; words.txt, a.png, a model and a checkpoint
    stand there."""
    folder, start = tmp_path / "apart", tmp_path / "start"
    for made in (folder / "mine", start):
        made.mkdir(parents=True)
    (folder / "words.txt").write_text("\n".join(["", f" {WORDS[0]} ", WORDS[1], ""]), "utf-8")
    (folder / "a.png").write_bytes(b"")
    (folder / "own.safetensors").write_bytes(b"")
    monkeypatch.chdir(start)
    return folder


def sweep(folder: Path, method: str, **values: Any) -> list[dict[str, Any]]:
    """What the runs of a sweep file in that folder are asked for; a list is a grid."""
    grid = {k: v for k, v in values.items() if isinstance(v, list)}
    params = {k: v for k, v in values.items() if k not in grid}
    lines = [f"method: {method}", f"params: {params}", f"grid: {grid}"]
    (folder / "sweep.yaml").write_text("\n".join(lines), "utf-8")
    return [dict(p.asked) for p in read_sweep(str(folder / "sweep.yaml")).points]


@pytest.mark.parametrize(("method", "name"), LISTS, ids=lambda v: v)
def test_a_sweep_reads_every_file_of_texts_as_the_command_line_does(
    apart: Path, method: str, name: str
) -> None:
    assert sweep(apart, method, **{name: "words.txt"}) == [{name: list(WORDS)}]
    both = sweep(apart, method, **{name: ["words.txt", ["a cube", "words.txt"], "a heart"]})
    assert [r[name] for r in both] == [list(WORDS), ["a cube", *WORDS], ["a heart"]]
    given = cli._asked(find_method(method), {name: (str(apart / "words.txt"), "a cube")})
    assert given[name] == [*WORDS, "a cube"]


@pytest.mark.parametrize(("method", "name", "meta"), PATHS, ids=lambda v: v if isinstance(v, str) else "")
def test_a_sweep_makes_every_path_whole(apart: Path, method: str, name: str, meta: Any) -> None:
    file = "own.safetensors" if meta["weights"] else "a.png"
    (asked,) = sweep(apart, method, **{name: file})
    assert asked[name] == str(apart / file)
    named = find_method(method)
    assert with_files(named, {name: file}, apart)[name] == str(apart / file)
    found = cli._asked(named, {name: f"../apart/{file}"})
    assert found[name] == str(apart / file)


def test_a_file_of_the_starting_folder_is_found_after_those_beside_the_sweep(
    apart: Path, tmp_path: Path
) -> None:
    start = tmp_path / "start"
    for name in ("a.png", "b.png"):
        (start / name).write_bytes(b"")
    asked = sweep(apart, "decompose", images=[["a.png", "b.png"], "c.png"])
    assert [list(r["images"]) if not isinstance(r["images"], str) else r["images"] for r in asked] == [
        [str(apart / "a.png"), str(start / "b.png")],
        str(start / "c.png"),
    ]


def test_a_table_of_runs_says_what_the_file_says(apart: Path) -> None:
    """`varied` and `row` stay as they were written: they are what the tables show."""
    (apart / "sweep.yaml").write_text("method: decompose\ngrid: {texts: [words.txt]}\nrows: rows.jsonl\n")
    (apart / "rows.jsonl").write_text('{"images": ["a.png"]}\n')
    (point,) = read_sweep(str(apart / "sweep.yaml")).points
    assert point.varied == {"texts": "words.txt"} and point.row == {"images": ["a.png"]}
    assert point.asked == {"texts": list(WORDS), "images": (str(apart / "a.png"),)}


def test_texts_are_read_once(apart: Path) -> None:
    """A line of a file that is itself the name of a file stays a text, also with --prompts."""
    (apart / "names.txt").write_text("words.txt\n")
    assert sweep(apart, "decompose", texts="names.txt") == [{"texts": ["words.txt"]}]
    shared = {"prompt_templates": ["words.txt"], "templates": ["words.txt"]}
    (apart / "p.txt").write_text("x\n")
    (point,) = prompt_sweep(find_method("generate"), shared, apart / "p.txt").points
    assert point.asked == {**shared, "prompt": "x"}


def test_a_file_of_texts_that_is_no_text(apart: Path) -> None:
    (apart / "words.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RequestError, match="words.txt can't be read as a text file in UTF-8"):
        sweep(apart, "decompose", texts="words.txt")


def test_models_are_names_folders_or_checkpoints(apart: Path) -> None:
    models = ["mine", "own.safetensors", "atlas-sd", "nobody/nothing", ""]
    asked = [r["model"] for r in sweep(apart, "generate", model=models)]
    assert asked == [str(apart / "mine"), str(apart / "own.safetensors"), "atlas-sd", "nobody/nothing", ""]
    assert whole_model("../apart/own.safetensors") == str(apart / "own.safetensors")
    (apart / "judge").mkdir()
    assert whole_model("judge", apart) == "judge"  # a word of --second-scorer


def test_edits_keep_their_strength(apart: Path) -> None:
    assert whole_edit("own.safetensors@0.5", apart) == f"{apart}/own.safetensors@0.5"
    (apart / "b@0.5").write_bytes(b"")
    assert whole_edit("b@0.5", apart) == f"{apart}/b@0.5"
    with pytest.raises(RequestError, match="`edit` must be a file or a list of files"):
        sweep(apart, "generate", edit=[[3]])


def test_a_row_of_prompts_finds_its_files_beside_it(apart: Path) -> None:
    (apart / "p.jsonl").write_text('{"prompt": "x", "scorer": "mine", "edit": "own.safetensors"}\n')
    (point,) = prompt_sweep(find_method("generate"), {"model": "m"}, apart / "p.jsonl").points
    assert point.asked["scorer"] == str(apart / "mine")
    assert point.asked["edit"] == [str(apart / "own.safetensors")] and point.asked["model"] == "m"


def test_help_names_every_number_type() -> None:
    said = method_options(find_method("generate"))["dtype"][2]
    assert [name for name in DTYPES if name not in said] == []
