"""The command line: one sentence for every wrong request, whole runs or none, help for every option."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from studio import cli
from studio.registry import find_method, load_methods
from studio.store import Store, read_run
from tests.contract import COMMON, OPTIONS, SAMPLING

TREE = Path(__file__).resolve().parent.parent
GENERATE = ["generate", "--prompt", "a red star", "--steps", "2"]
TRACE = ["trace-unet", "--prompt", "a red star", "--steps", "2", "--metric", "distance", "--no-hint"]
TEXT = ["trace-text-encoder", "--prompt", "a red star and a red cube"]

Call = Callable[..., tuple[int, str, list[str]]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs a command in this process: (exit status, standard output, lines of standard error)."""

    def run(*argv: str) -> tuple[int, str, list[str]]:
        capsys.readouterr()
        try:
            code = cli.main(list(argv))
        except SystemExit as stop:
            code = stop.code or 0
        said = capsys.readouterr()
        return code, said.out, said.err.splitlines()

    return run


@pytest.fixture
def lent(monkeypatch: pytest.MonkeyPatch, session: Any, atlas: Any) -> None:
    """Every command's own session finds atlas-sd loaded already."""
    new = cli.new_session

    def with_models(given: dict[str, Any]) -> Any:
        made = new({"device": "cpu", "threads": "2", **given})
        made._loaded.update(session._loaded)
        return made

    monkeypatch.setattr(cli, "new_session", with_models)


# ---- wrong requests ---------------------------------------------------------------------------------------

WRONG = {
    "unknown command": (["generat"], "There is no command 'generat'; did you mean 'generate'?"),
    "unknown command, far": (["zzz"], "There is no command 'zzz'; see `locus --help`."),
    "unknown option": ([*GENERATE, "--stepz", "3"], "--stepz"),
    "option without value": (["generate", "--prompt"], "See --help."),
    "stray word": ([*GENERATE, "stray"], "stray"),
    "unknown model": ([*GENERATE, "--model", "atlas-sdd"], "did you mean 'atlas-sd'?"),
    "empty model": ([*GENERATE, "--model", ""], "--model is empty"),
    "model of another kind": ([*GENERATE, "--model", "atlas-clip"], "a text-to-image model is needed"),
    "folder without a model": ([*GENERATE, "--model", "tests"], "holds no model that Locus knows"),
    "model that is not here": ([*GENERATE, "--model", "nobody/nothing"], "is not on this machine"),
    "no prompt": (["generate"], "--prompt is missing"),
    "empty prompt": (["generate", "--prompt", ""], "--prompt is empty"),
    "blank prompt": (["trace-unet", "--prompt", "  ", "--subject", "x"], "--prompt is empty"),
    "no subject": (TRACE, "--subject is missing"),
    "subject absent": ([*TRACE, "--subject", "cube"], "--subject 'cube' is not in the text"),
    "subject twice": ([*TEXT, "--subject", "red"], "stands 2 times in the text; say which"),
    "third of two": ([*TEXT, "--subject", "red", "--subject-occurrence", "3"], "must be from 1 to 2, not 3"),
    "empty replacement": ([*TRACE, "--replacement", ""], "--replacement is empty"),
    "no seeds": ([*GENERATE, "--seeds", ""], "No seeds are given"),
    "seed twice": ([*GENERATE, "--seeds", "1,1"], "a seed is repeated"),
    "seed below zero": ([*GENERATE, "--seeds", "0,-1"], "Seeds must be whole numbers"),
    "no steps": (["generate", "--prompt", "x", "--steps", "0"], "--steps must be from 1 to 1000, not 0."),
    "part of a step": (["generate", "--prompt", "x", "--steps", "1.5"], "--steps must be a whole number"),
    "noise NaN": ([*TRACE, "--subject", "red", "--noise", "nan"], "--noise must be a number, not 'nan'."),
    "negative guidance": ([*GENERATE, "--guidance", "-1"], "--guidance must be from 0 to 100, not -1."),
    "unknown kind": ([*TRACE, "--subject", "red", "--kinds", "resnets"], "did you mean 'resnet'?"),
    "unknown scheduler": ([*GENERATE, "--scheduler", "ddimm"], "did you mean 'ddim'?"),
    "steps turned round": (
        [*TRACE, "--subject", "red", "--first-step", "1", "--last-step", "0"],
        "--first-step",
    ),
    "no edit file": ([*GENERATE, "--edit", "nowhere.safetensors"], "There is no edit file"),
    "foreign edit file": ([*GENERATE, "--edit", "pyproject.toml"], "is no safetensors file"),
    "device": ([*GENERATE, "--device", "tpu"], "--device must be auto, cpu, cuda or mps, not 'tpu'."),
    "number type": ([*GENERATE, "--dtype", "int3"], "--dtype must be one of auto"),
    "float16 on a CPU": ([*GENERATE, "--dtype", "float16", "--device", "cpu"], "take --dtype float32"),
    "no threads": ([*GENERATE, "--threads", "0"], "--threads must be a whole number from 1 to 4096"),
    "threads in words": ([*GENERATE, "--threads", "two"], "--threads must be a whole number from 1 to 4096"),
    "threads in superscript": ([*GENERATE, "--threads", "²"], "--threads must be a whole number"),
    "too many threads": ([*GENERATE, "--threads", "4000"], "--threads must be from 1 to 1024"),
    "no batch": ([*GENERATE, "--batch", "-3"], "--batch must be a whole number"),
}
SIZES = {
    "height": ([*GENERATE, "--height", "66"], "autoencoder; 66 x 64 is not"),
    "width": ([*GENERATE, "--width", "9"], "64 x 9 is not"),
    "too small": ([*GENERATE, "--height", "4"], "--height must be from 8 to 4096, not 4."),
}  # fmt: skip
ELSEWHERE = {
    "open host": (["serve", "--host", "0.0.0.0"], "so it needs a login: add --auth user:password."),
    "login without colon": (["serve", "--auth", "ann"], "--auth must have the form user:password."),
    "login without password": (["serve", "--auth", "ann:"], "--auth must have the form user:password."),
    "port too high": (["serve", "--port", "65536"], "--port must be a whole number from 0 to 65535"),
    "port in words": (["serve", "--port", "http"], "--port must be a whole number from 0 to 65535"),
    "option of serve": (["serve", "--prot", "1"], "--prot"),
    "device of serve": (["serve", "--device", "tpu"], "--device must be auto"),
    "no run": (["replay"], "Which run?"),
    "run that is not there": (["replay", "nothing"], "There is no run 'nothing'"),
    "id that is a path": (["replay", "../nothing"], "is no run's id"),
    "folder that is no run": (["replay", "tests"], "is no run folder"),
    "option of models": (["models", "--yaml"], "--yaml"),
    "option of doctor": (["doctor", "--fix"], "--fix"),
}


def refused(call: Call, argv: list[str], part: str) -> None:
    """Exit 2, one sentence on standard error that holds `part`, nothing on standard output."""
    code, out, err = call(*argv)
    assert (code, out, len(err)) == (2, "", 1), (code, out, err)
    assert err[0].startswith("locus: ") and part in err[0] and "Traceback" not in err[0]


@pytest.mark.parametrize(("argv", "part"), WRONG.values(), ids=WRONG.keys())
def test_wrong_requests(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], part: str
) -> None:
    monkeypatch.chdir(TREE)
    monkeypatch.setenv("LOCUS_HOME", str(tmp_path / "home"))
    refused(call, [*argv, "--out", str(tmp_path / "out")] if len(argv) > 1 else argv, part)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("argv", "part"), SIZES.values(), ids=SIZES.keys())
def test_wrong_sizes(call: Call, lent: None, tmp_path: Path, argv: list[str], part: str) -> None:
    refused(call, [*argv, "--out", str(tmp_path / "out")], part)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("argv", "part"), ELSEWHERE.values(), ids=ELSEWHERE.keys())
def test_wrong_requests_of_studio_commands(
    call: Call, monkeypatch: pytest.MonkeyPatch, argv: list[str], part: str
) -> None:
    monkeypatch.chdir(TREE)
    refused(call, argv, part)


def test_out_that_is_taken(call: Call, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refused(call, [*GENERATE, "--out", str(tmp_path)], "exists already")
    refused(call, [*GENERATE, "--out", str(tmp_path / "file" / "run")], "is no folder that you may write to")
    refused(call, [*GENERATE, "--out", "x" * 1000], "File name too long")
    refused(call, [*GENERATE, "--out", ""], "exists already")
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("file", "mine")]


def test_a_bug_is_one_sentence_too(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(argv: list[str]) -> int:
        raise ZeroDivisionError("of\nours")

    monkeypatch.delenv("LOCUS_DEBUG", raising=False)
    monkeypatch.setitem(cli.COMMANDS, "models", broken)
    code, out, err = call("models")
    assert (code, out) == (1, "")
    assert err == [
        "locus: Running failed with ZeroDivisionError: of ours (LOCUS_DEBUG=1 shows the traceback)."
    ]


# ---- help -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(load_methods()))
def test_help_names_every_option_of_the_contract(call: Call, name: str) -> None:
    code, out, err = call(name, "--help")
    assert (code, err) == (0, [])
    found = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", out))
    m = find_method(name)
    scored = m.family == "diffusion" and name in OPTIONS
    wanted = OPTIONS.get(name, set()) | COMMON | ({"--seeds"} if m.samples else set())
    assert wanted | (SAMPLING if scored else set()) <= found
    assert "default: " in out


def test_help_gives_units_and_defaults(call: Call) -> None:
    text = " ".join(call("trace-unet", "--help")[1].replace("│", " ").split())
    assert "in standard deviations of the embedding matrix (default: 3.0)" in text
    assert "in modules (default: 1)" in text and "(default: atlas-sd)" in text


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_overview_names_every_command(call: Call, argv: list[str]) -> None:
    code, out, err = call(*argv)
    assert (code, err) == (0, [])
    assert {*load_methods(), *cli.COMMANDS} <= {
        line.split()[0] for line in out.splitlines() if line[:2] == "  "
    }


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_help_of_studio_commands(call: Call, name: str) -> None:
    code, out, err = call(name, "--help")
    assert (code, err) == (0, []) and f"locus {name}" in out


# ---- studio commands --------------------------------------------------------------------------------------


def test_models_as_json(call: Call) -> None:
    code, out, err = call("models", "--json")
    assert (code, err) == (0, [])
    rows = {r["name"]: r for r in json.loads(out)}
    assert {"name", "family", "where", "size", "ready"} <= set(rows["atlas-sd"])
    assert rows["atlas-sd"]["ready"] and rows["atlas-sd"]["bytes"] > 10**6
    assert rows["atlas-clip"]["family"] == "clip"
    assert {line.split()[0] for line in call("models")[1].splitlines() if line} >= set(rows)


def test_doctor(call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("studio.doctor.free_memory", lambda device: 8 * 10**9)
    code, out, err = call("doctor", "--json", "--runs", str(tmp_path / "runs"))
    told = json.loads(out)
    assert (code, err, told["wrong"]) == (0, [], [])
    assert {"python", "torch", "device", "free memory", "atlas-sd fingerprint"} <= set(told["facts"])
    assert list((tmp_path / "runs").iterdir()) == []


def test_doctor_finds_what_is_wrong(call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("studio.doctor.free_memory", lambda device: 10**9)
    monkeypatch.setattr("studio.doctor.fingerprint", lambda folder: "0" * 64)
    code, _, err = call("doctor", "--runs", str(tmp_path / "file"))
    assert code == 1 and all(line.startswith("locus: ") for line in err)
    for part in ("2 GB of memory", "Runs can't be written to", "atlas-sd is not the shipped one"):
        assert any(part in line for line in err), part


# ---- runs -------------------------------------------------------------------------------------------------


def test_generate_writes_a_run_and_replay_agrees(call: Call, lent: None, tmp_path: Path) -> None:
    out, runs = tmp_path / "out", tmp_path / "runs"
    code, said, err = call(*GENERATE, "--seeds", "3", "--out", str(out), "--runs", str(runs), "--json")
    assert (code, err) == (0, [])
    record = json.loads(said)
    assert record == json.loads((out / "run.json").read_text("utf-8"))
    assert record["recipe"]["inputs"]["prompt"] == ["a red star"] and record["recipe"]["seeds"] == [3]
    assert read_run(out).result.arrays["images"].values.shape == (1, 1, 64, 64, 3)
    assert not runs.exists()
    code, said, err = call("replay", str(out), "--runs", str(runs))
    assert (code, said, err) == (0, "Every array and image is the same, bit for bit.\n", [])


def test_the_store_answers_a_second_time(call: Call, lent: None, tmp_path: Path) -> None:
    first, second = (call(*GENERATE, "--runs", str(tmp_path))[1] for _ in range(2))
    assert first == second and Store(tmp_path).ids() == [Path(first.strip()).name]
    other = call(*GENERATE, "--runs", str(tmp_path), "--guidance", "2")[1]
    assert other != first and len(Store(tmp_path).ids()) == 2


def interrupted(job: Any) -> None:
    """Ctrl-C as soon as the job has taken its first step."""
    if job.done:
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    "argv", [GENERATE, [*TRACE, "--subject", "red star"]], ids=["generate", "trace-unet"]
)
def test_ctrl_c(
    call: Call, lent: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str]
) -> None:
    monkeypatch.setattr(cli, "progress_bar", lambda: interrupted)
    many = [*argv, "--seeds", ",".join(map(str, range(40)))]
    code, out, err = call(*many, "--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs"))
    assert (code, out, err) == (130, "", ["locus: Interrupted; nothing half-done was kept."])
    assert list(tmp_path.iterdir()) == []


def wait_for(screen: int, pattern: str, seconds: float = 60.0) -> None:
    """Reads a terminal until the pattern stands there."""
    seen = ""
    while not re.search(pattern, seen):
        assert select.select([screen], [], [], seconds)[0], f"nothing more came after {seen[-300:]!r}"
        try:
            seen += os.read(screen, 4096).decode("utf-8", "replace")
        except OSError:
            pytest.fail(f"the program ended after {seen[-300:]!r}")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal and SIGKILL")
def test_kill_in_the_middle_of_a_run(tmp_path: Path) -> None:
    argv = ["generate", "--prompt", "a red star", "--steps", "500", "--threads", "1", "--device", "cpu"]
    command = [sys.executable, "-m", "studio.cli", *argv, "--runs", str(tmp_path)]
    screen, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    quiet = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=TREE, env=quiet, stdout=subprocess.DEVNULL, stderr=theirs) as process:
        os.close(theirs)
        try:
            wait_for(screen, r"denoising: +\d+%.* [1-9]\d*/500")
        finally:
            process.send_signal(signal.SIGKILL)
    os.close(screen)
    assert process.returncode == -signal.SIGKILL
    kept = Store(tmp_path)
    assert kept.ids() == [] and kept.find("0" * 64) is None
    kept.sweep_leftovers()
    assert list(tmp_path.iterdir()) == []


def test_save_without_an_edit_is_said(call: Call, lent: None, tmp_path: Path) -> None:
    file = tmp_path / "none.safetensors"
    given = ("attribute", "--concept", "star", "--ratio", "0", "--steps", "1", "--check", "0")
    code, _, err = call(*given, "--save", str(file), "--runs", str(tmp_path / "runs"))
    assert code == 2 and not file.exists() and not (tmp_path / "runs").exists()
    assert err == ["locus: --save needs an edit, and --ratio 0 makes none; give a larger one."]
