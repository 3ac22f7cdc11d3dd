"""What pages leave behind: export folders and the edits of single clicks go when they are old or many."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from studio import exports, kept_edits
from studio.errors import RequestError, StudioError
from studio.exports import DAY, MOST, new_folder, page_folder, sweep, sweep_broken_uploads
from studio.kept_edits import MOST_PASSING
from studio.store import Store


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder of the test's own."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def age(path: Path, seconds: float) -> None:
    """Makes a file or folder look so old."""
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_old_export_folders_are_swept_and_young_ones_and_others_stay(temporary: Path) -> None:
    old, young = new_folder(), new_folder()
    (old / "edit.safetensors").write_bytes(b"x")
    other, file = temporary / "other", temporary / "locus-export-file"
    other.mkdir()
    file.touch()
    for path in (old, other, file):
        age(path, DAY + 60)
    age(young, DAY - 60)
    assert sweep() == 1
    assert set(temporary.iterdir()) == {young, other, file}
    assert sweep() == 0


def test_a_link_that_looks_like_an_export_folder_is_not_followed(temporary: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "kept").touch()
    (temporary / "locus-export-link").symlink_to(tmp_path / "mine")
    age(tmp_path / "mine", 2 * DAY)
    assert sweep() == 0 and (tmp_path / "mine" / "kept").exists()


def test_the_number_of_export_folders_is_bounded_and_the_newest_stay(temporary: Path) -> None:
    made = [new_folder() for _ in range(MOST)]
    for i, folder in enumerate(made):
        age(folder, 100 - i)
    made += [new_folder(), new_folder()]
    assert set(temporary.iterdir()) == set(made[2:]) and len(made[2:]) == MOST


def test_folders_that_vanish_meanwhile_do_no_harm(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = temporary / "locus-export-gone"
    monkeypatch.setattr(exports, "_folders", lambda: [gone])
    assert exports._changed(gone) == 0.0
    assert sweep() == 1  # it is not there, however it went


def edit(folder: Path, content: str) -> Path:
    """A file with this content."""
    path = folder / "any.safetensors"
    path.write_text(content)
    return path


def test_edits_of_clicks_are_swept_a_day_after_their_last_use(tmp_path: Path) -> None:
    kept = Store(tmp_path / "runs")
    first, used, own = (kept.keep_edit(edit(tmp_path, c), passing=c != "own") for c in ("a", "used", "own"))
    for digest in (first, used, own):
        age(kept.edit_file(digest), DAY + 60)
    assert kept.edit_file(used).read_text() == "used"  # looked at again
    assert kept.sweep_leftovers() == 1
    assert not kept.has_edit(first) and kept.has_edit(used)
    assert kept.has_edit(own)  # what is in somebody's stack is never swept
    with pytest.raises(RequestError, match="That edit is no longer in the store; make it again"):
        kept.edit_file(first)


def test_an_edit_that_goes_into_a_stack_is_kept_for_good(tmp_path: Path) -> None:
    kept = Store(tmp_path / "runs")
    digest = kept.keep_edit(edit(tmp_path, "a"), passing=True)
    assert kept.keep_edit(kept.edit_file(digest)) == digest
    assert kept.keep_edit(edit(tmp_path, "a"), passing=True) == digest  # a click on it again changes nothing
    for file in kept.root.rglob("*.safetensors"):
        age(file, 2 * DAY)
    kept.sweep_leftovers()
    assert kept.edit_file(digest).read_text() == "a"
    assert [f.parent.name for f in kept.root.rglob("*.safetensors")] == ["edits"]


def test_the_number_of_edits_of_clicks_is_bounded(tmp_path: Path) -> None:
    kept = Store(tmp_path / "runs")
    made = []
    for i in range(MOST_PASSING + 2):
        made.append(kept.keep_edit(edit(tmp_path, str(i)), passing=True))
        age(kept._place(made[-1]), 1000 - i)
    assert [kept.has_edit(d) for d in made] == [False] * 2 + [True] * MOST_PASSING
    assert kept.ids() == []  # and none of it looks like a run


def test_a_click_on_an_edit_again_makes_it_young(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_edits, "MOST_PASSING", 2)
    kept = Store(tmp_path / "runs")
    first, second = (kept.keep_edit(edit(tmp_path, c), passing=True) for c in "ab")
    age(kept._place(first), 20)
    age(kept._place(second), 10)
    assert kept.keep_edit(edit(tmp_path, "a"), passing=True) == first
    third = kept.keep_edit(edit(tmp_path, "c"), passing=True)
    assert [kept.has_edit(d) for d in (first, second, third)] == [True, False, True]


_PAGE = "import os, signal\nfrom studio.exports import page_folder\nprint(page_folder())\n"


def test_the_folder_of_a_page_goes_with_its_process_however_that_ends(temporary: Path) -> None:
    def ended(how: str) -> Path:
        asked = [sys.executable, "-c", _PAGE + how]
        tree, environment = Path(__file__).parents[1], {**os.environ, "TMPDIR": str(temporary)}
        done = subprocess.run(asked, capture_output=True, text=True, cwd=tree, env=environment)
        return Path(done.stdout.strip())

    assert not ended("").exists()
    killed = ended("import sys; sys.stdout.flush(); os.kill(os.getpid(), signal.SIGKILL)")
    mine = page_folder()
    assert killed.parent == temporary and killed.is_dir()
    assert sweep() == 1 and not killed.exists() and mine.is_dir()


def test_a_full_temporary_folder_is_said(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    for make in (new_folder, page_folder):
        with pytest.raises(StudioError, match="the disk is full.*; make room there"):
            make()


def test_uploads_that_broke_off_are_swept_after_an_hour(tmp_path: Path) -> None:
    old, young, other = (tmp_path / name for name in ("tmpold", "tmpyoung", "kept.png"))
    for path in (old, young, other):
        path.write_bytes(b"x")
    (tmp_path / "tmpfolder").mkdir()
    for path in (old, other, tmp_path / "tmpfolder"):
        age(path, 3700)
    assert sweep_broken_uploads(tmp_path) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept.png", "temporary", "tmpfolder", "tmpyoung"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(("told", "codes"), [(signal.SIGINT, (0, 130)), (signal.SIGTERM, (143,))])
def test_a_studio_that_is_told_to_end_leaves_nothing(
    temporary: Path, tmp_path: Path, told: signal.Signals, codes: tuple[int, ...]
) -> None:
    command = [sys.executable, "-m", "studio.cli", "serve", "--port", "0", "--device", "cpu"]
    command += ["--runs", str(tmp_path / "runs")]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    environment.pop("GRADIO_TEMP_DIR", None)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=Path(__file__).parents[1], env=environment, **pipes) as process:
        assert process.stdout.readline().startswith("Locus is at http://127.0.0.1:")
        assert len(list(temporary.glob("locus-page-*"))) == 1
        process.send_signal(told)
        said, _ = process.communicate(timeout=120)
    assert process.returncode in codes and "Traceback" not in said
    assert not list(temporary.glob("locus-page-*"))
