"""Files of prompts: one run a line, on the command line and in the rows of a sweep."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from studio import cli
from studio.errors import RequestError
from studio.registry import find_method, load_methods
from studio.session import Session
from studio.sweep_file import prompt_sweep, read_rows

WORDS = ["a red star", "a blue circle"]


@pytest.fixture
def locus(session: Session, atlas: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A command on a store of its own, with the loaded models; (exit status, output, error)."""

    def opened(given: dict[str, Any]) -> Session:
        made = Session(runs=tmp_path / "runs", device="cpu", threads=1)
        made._loaded.update(session._loaded)
        return made

    monkeypatch.setattr("studio.prompt_command.new_session", opened)
    return lambda *argv: cli.main([str(a) for a in argv])


def written(folder: Path, name: str, *lines: str) -> Path:
    (folder / name).write_text("\n".join(lines) + "\n", "utf-8")
    return folder / name


def test_a_text_file_makes_a_run_a_line(locus: Any, tmp_path: Path, capsys: Any) -> None:
    file, out = written(tmp_path, "p.txt", WORDS[0], "", f"  {WORDS[1]} "), tmp_path / "out"
    asked = ["generate", "--prompts", file, "--steps", "1", "--seeds", "0,1", "--out", out]
    assert locus(*asked) == 0
    assert capsys.readouterr().out.splitlines() == ["2 runs made, 0 found in the store, 0 failed", str(out)]
    rows = list(csv.DictReader((out / "sweep.csv").read_text().splitlines()))
    assert [r["prompt"] for r in rows] == WORDS and {r["line"] for r in rows} == {"1", "3"}
    assert all((tmp_path / "runs" / r["run"] / "run.json").is_file() for r in rows)
    assert locus(*asked) == 0 and "0 runs made, 2 found" in capsys.readouterr().out


def test_jsonl_says_more_than_the_prompt(locus: Any, tmp_path: Path, capsys: Any) -> None:
    """What a line says goes before the options; a column of other methods is passed over."""
    lines = [json.dumps({"prompt": "a red star", "words": ["red"], "subject": "star"}), json.dumps(WORDS[1])]
    file, out = written(tmp_path, "p.jsonl", *lines), tmp_path / "out"
    assert (
        locus("word-maps", "--prompts", file, "--words", "circle", "--steps", "1", "--out", out, "--json")
        == 0
    )
    assert json.loads(capsys.readouterr().out)["made"] == 2
    runs = [json.loads(f.read_text())["recipe"] for f in sorted((tmp_path / "runs").glob("*/run.json"))]
    assert sorted((r["inputs"]["prompt"], r["inputs"]["words"]) for r in runs) == [
        ("a blue circle", ["circle"]),
        ("a red star", ["red"]),
    ]


@pytest.mark.parametrize("name", sorted(load_methods()))
def test_every_method_with_a_prompt_a_concept_or_a_text_takes_a_file(name: str, tmp_path: Path) -> None:
    from dataclasses import fields

    from studio.options import method_options

    method = find_method(name)
    known = [f.name for c in (method.inputs, method.params) for f in fields(c)]
    plain = next((n for n in ("prompt", "concept", "text") if n in known), None)
    options = method_options(method)
    assert ("prompts" in options) == (plain is not None)
    file = written(tmp_path, "p.txt", *WORDS)
    if plain:
        assert f"file of {plain}s" in options["prompts"][2]
        for told in (file, written(tmp_path, "p.jsonl", *map(json.dumps, WORDS))):
            assert [p.asked[plain] for p in prompt_sweep(method, {"model": "m"}, told).points] == WORDS
        return
    with pytest.raises(RequestError, match="takes no prompt, concept or text of its own, so it takes no"):
        prompt_sweep(method, {}, file)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--prompts", "{file}"], "Where to? --prompts makes a run a line in the store"),
        (
            ["--prompts", "{file}", "--prompt", "x", "--out", "{out}"],
            "--prompts and --prompt do not go together",
        ),
        (["--prompts", "{file}", "--force", "--out", "{out}"], "--prompts and --force do not go together"),
        (["--prompts", "{gone}", "--out", "{out}"], "gone.txt can't be read: No such file"),
        (["--prompts", "{empty}", "--out", "{out}"], "empty.txt holds no line"),
        (["--prompts", "{bytes}", "--out", "{out}"], "it is no text in UTF-8"),
        (["--prompts", "{bad}", "--out", "{out}"], "Line 2 of {bad} is no JSON"),
        (["--prompts", "{list}", "--out", "{out}"], "must be an object"),
        (["--prompts", "{odd}", "--out", "{out}"], "no option 'promt'; did you mean 'prompt'?"),
        (["--prompts", "{twice}", "--out", "{out}"], "asks for the same run twice"),
    ],
)
def test_files_and_options_that_are_wrong(
    locus: Any, tmp_path: Path, capsys: Any, argv: list[str], says: str
) -> None:
    names = {"file": written(tmp_path, "p.txt", *WORDS), "empty": written(tmp_path, "empty.txt", "")}
    names |= {"gone": tmp_path / "gone.txt", "out": tmp_path / "out", "bytes": tmp_path / "b.txt"}
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    names["bad"] = written(tmp_path, "bad.jsonl", '"a"', "{")
    names["list"] = written(tmp_path, "list.jsonl", "[1]")
    names["odd"] = written(tmp_path, "odd.jsonl", '{"promt": "a"}')
    names["twice"] = written(tmp_path, "twice.txt", "a star", "a star")
    assert locus("lens", *(a.format(**names) for a in argv)) == 2
    said = capsys.readouterr().err
    assert says.format(**names) in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_sweep_takes_a_text_file_for_its_rows(tmp_path: Path) -> None:
    assert read_rows(written(tmp_path, "p.txt", *WORDS)) == [
        (1, {"prompt": WORDS[0]}),
        (2, {"prompt": WORDS[1]}),
    ]
    assert read_rows(written(tmp_path, "p.jsonl", '"a"', '{"window": 3}')) == [
        (1, {"prompt": "a"}),
        (2, {"window": 3}),
    ]


def test_columns_of_a_csv_file(locus: Any, tmp_path: Path, capsys: Any) -> None:
    """Cells are options, as typed; an empty one leaves the option as it is."""
    file = written(tmp_path, "p.csv", "prompt, steps", '"a red star, on white",1', "", "a blue circle,")
    assert read_rows(file) == [
        (2, {"prompt": "a red star, on white", "steps": "1"}),
        (4, {"prompt": "a blue circle"}),
    ]
    asked = ["generate", "--prompts", file, "--steps", "2", "--out", tmp_path / "out"]
    assert locus(*asked) == 0 and capsys.readouterr().out.startswith("2 runs made")
    runs = [json.loads(f.read_text())["recipe"] for f in (tmp_path / "runs").glob("*/run.json")]
    assert sorted((*r["inputs"]["prompt"], r["params"]["steps"]) for r in runs) == [
        ("a blue circle", 2),
        ("a red star, on white", 1),
    ]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["prompt,prompt", "a,b"], "The first line of {file} must name each column once, such as prompt,"),
        (["prompt,", "a,b"], "The first line of {file} must name each column once"),
        (["prompt", "a", "b,c"], "Line 3 of {file} has more cells than columns are named; put quotes around"),
        (["prompt", 'a "b', '"c" d'], "Line 3 of {file} is no CSV: "),
        (
            ["prompt,steps", ",", ""],
            "{file} holds no line below the names of its columns; write a run a line.",
        ),
        (["prompt,device", "a,cpu"], "Line 2 of {file} holds 'device', which is one for all runs"),
    ],
)
def test_csv_files_that_are_wrong(tmp_path: Path, lines: list[str], says: str) -> None:
    file = written(tmp_path, "p.csv", *lines)
    with pytest.raises(RequestError) as error:
        read_rows(file)
    assert str(error.value).startswith(says.format(file=file))


def test_a_file_of_concepts_makes_an_edit_a_line(locus: Any, tmp_path: Path, capsys: Any) -> None:
    rows, out = ("concept,replacement", "star,circle", "cube,heart"), tmp_path / "out"
    file = written(tmp_path, "c.csv", *rows)
    options = ["--prompts", file, "--out", out]
    assert locus("edit", *options, "--concept", "heart") == 2
    assert (
        "--prompts and --concept do not go together: the file says the concepts." in capsys.readouterr().err
    )
    assert locus("edit", *options, "--save", tmp_path / "e.safetensors") == 2
    assert "--prompts and --save do not go together" in capsys.readouterr().err
    assert locus("edit", *options) == 0 and capsys.readouterr().out.startswith("2 runs made")
    made = [json.loads(f.read_text())["recipe"]["inputs"] for f in (tmp_path / "runs").glob("*/run.json")]
    assert sorted(m["concept"][0] for m in made) == ["cube", "star"]
    assert len(list((tmp_path / "runs").glob("*/edit.safetensors"))) == 2
