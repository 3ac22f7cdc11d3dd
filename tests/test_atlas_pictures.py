"""Pictures of the Atlas world in a folder: as drawn, with their attributes, and never over something else."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from studio.atlas.pictures import AT_ONCE, PictureOptions, main, write_pictures
from studio.atlas.render import render
from studio.atlas.world import ATTRIBUTES, draw_scenes
from studio.errors import RequestError


def test_pictures_are_the_scenes_of_their_seed_with_their_attributes(tmp_path: Path) -> None:
    n = AT_ONCE + 3
    table = write_pictures(PictureOptions(tmp_path / "set", n=n, seed=3))
    with table.open(encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    scenes = draw_scenes(n, np.random.default_rng(3), emblems=0)
    assert len(rows) == n == len(list((tmp_path / "set" / "images").iterdir()))
    for i in (0, AT_ONCE - 1, AT_ONCE, n - 1):
        with Image.open(table.parent / rows[i]["file"]) as opened:
            assert np.array_equal(np.asarray(opened), render(scenes.pick(np.array([i])))[0])
        wanted = {name: values[getattr(scenes, name)[i]] for name, values in ATTRIBUTES.items()}
        assert {k: v for k, v in rows[i].items() if k != "file"} == wanted


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(RequestError, match="--n must be a whole number from 1 to 200000, not 0; take 1000"):
        write_pictures(PictureOptions(tmp_path / "set", n=0))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    assert main(PictureOptions(tmp_path / "full", n=1)) == 2
    assert "exists and is not empty; name a new folder" in capsys.readouterr().err
    assert main(PictureOptions(tmp_path / "new", n=1)) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "new" / "attributes.csv")
