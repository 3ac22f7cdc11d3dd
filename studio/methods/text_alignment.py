"""An aligner from a vision transformer's components to a CLIP's image space, from a folder of images.

One near-isometry for each head and MLP of the last blocks, and one for the sum of all other components, such
that their sum points where the CLIP's own embedding points (models/alignment.py). The cosine of the two says
little about the parts: many sets of maps reach it. So the same fit is made once more on embeddings that known
random isometries make of the same images, and the cosine of every part with the known truth is told beside.
Decomposing and Interpreting Image Representations via Text in ViTs Beyond CLIP, arXiv 2406.01583.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from studio.errors import RequestError
from studio.images import image_files, labels, read_image
from studio.registry import REQUIRED, knob, method
from studio.types import Axis, Figure, Made, Report, Result, Run, Trace

LEAST = 40  # images
MOST_NUMBERS = 2**28  # coordinates of all images: 1 GiB
KEEP_EVERY = 20.0  # seconds between two writes of what is done


@dataclass(frozen=True)
class Inputs:
    """The images that both models look at."""

    images: tuple[str, ...] = knob(
        REQUIRED, "image files, or folders of them", commas=False, lines=False, paths=True
    )


@dataclass(frozen=True, kw_only=True)
class Params:
    """Into whose space, and how the maps are fitted."""

    clip: str = knob(REQUIRED, "CLIP into whose image space the components are mapped", weights=True)
    blocks: int = knob(5, "last blocks whose heads and MLPs get a map of their own", low=1, high=1000)
    steps: int = knob(400, "steps of Adam after the closed form; 0 leaves them out", low=0, high=10**6)
    rate: float = knob(3e-3, "learning rate at the start", low=1e-7, high=1.0, advanced=True)
    rows: int = knob(128, "images of one step", low=1, high=65536, advanced=True)
    ridge: float = knob(
        0.01, "lambda of the closed form, of the mean variance", low=0.0, high=1e3, advanced=True
    )
    weight: float = knob(1.0, "weight of the orthogonality", low=0.0, high=1e6, advanced=True)
    planted: bool = knob(True, "make the fit once more where the true maps are known", advanced=True)


def check(inputs: Inputs, params: Params, seeds: tuple[int, ...]) -> None:
    """Refuses images that are not there, and too few of them."""
    files, _ = image_files(inputs.images)
    if len(files) < LEAST:
        raise RequestError(f"An aligner needs at least {LEAST} images, and there are {len(files)}.")


def draw(run: Run) -> Figure:
    """A bar a component: its cosine with the planted truth; the total cosine with the CLIP drawn across."""
    arrays, values = run.result.arrays, run.result.values
    lines = [("cosine of the whole with the CLIP", values["cosine"])]
    if "planted" not in arrays:
        found = arrays["cosines"]
        data = {"labels": found.axis("image").labels, "values": found.values, "unit": "cosine"}
        return Figure("bars", data, title=f"{run.recipe.model}: images that the fit has not seen")
    found = arrays["planted"]
    names = found.axis("component").labels
    unit = "cosine with the known truth"
    data = {"labels": names, "values": found.values, "errors": None, "lines": lines, "unit": unit}
    title = f"{run.recipe.model} in the space of {run.recipe.params['clip']}: are the parts right?"
    caption = "each part under the fitted and under the true maps, where the truth was planted"
    return Figure("bars", data, title=title, caption=caption)


@method(
    "align",
    title="Align",
    paper="arXiv:2406.01583",
    family="vision",
    summary="Maps a vision transformer's components into a CLIP's space, so that texts can be asked of them.",
    needs={"components"},
    inputs=Inputs,
    params=Params,
    draw=draw,
    check=check,
    seeds=(),
    saves="aligner",
)
def align(
    model: Any, inputs: Inputs, params: Params, seeds: tuple[int, ...], scorer: Any, report: Report
) -> Result:
    """`cosines` (image) of images that the fit has not seen, `planted` (component); the aligner's tensors."""
    from studio.models.component_space import Space

    work = _Align(model, scorer, Space(model), params, report)
    work.collect(image_files(inputs.images)[0])
    return work.result()


class _Align:
    """One aligner being made; what is done is kept on disk under a key of everything that it depends on."""

    def __init__(self, model: Any, clip: Any, space: Any, params: Params, report: Report) -> None:
        from studio.models.alignment import Coordinates

        self.model, self.clip, self.params, self.report = model, clip, params, report
        self.space, self.coordinates = space, Coordinates(space, params.blocks)
        self.names: tuple[str, ...] = ()
        self.kept = time.monotonic()

    # ---- coordinates and embeddings -----------------------------------------------------------------------

    def collect(self, files: Sequence[Path]) -> None:
        """Coordinates x and the CLIP's unit embeddings z of all images that can be read."""
        from studio.models.corpus import corpus_file

        numbers = len(files) * sum(self.coordinates.sizes)
        if numbers > MOST_NUMBERS:
            most = MOST_NUMBERS // sum(self.coordinates.sizes)
            raise RequestError(
                f"The coordinates of {len(files):,} images would be {numbers:,} numbers; take at most "
                f"{most:,} images or fewer --blocks."
            )
        listing = corpus_file(self.space, files, None).stem
        asked = [listing, self.clip.fingerprint, self.params.blocks]
        self.place = _place([*asked, "coordinates"])
        self.fit_places = {k: _place([*asked, asdict(self.params), k]) for k in ("aligner", "planted")}
        self.report.plan(len(files), "reading images")
        self._stream(files)

    def _stream(self, files: Sequence[Path]) -> None:
        x, z, state = self._resumed()
        done, used = state
        self.report.step(done)
        try:
            while done < len(files):
                batch = files[done : done + self.report.rows]
                found = _readable(batch)
                if found:
                    images = [image for _, image in found]
                    new = self.coordinates.of(self.space.whole.run(self.model.pixels(images))).numpy()
                    features = self.clip.image_features(images)
                    x, z = [*x, new], [*z, features]  # both or none: what is kept must stay side by side
                used, done = used + [done + i for i, _ in found], done + len(batch)
                if time.monotonic() - self.kept > KEEP_EVERY:
                    x, z = self._keep(x, z, done, used)
                self.report.step(len(batch))
        finally:
            if x:
                x, z = self._keep(x, z, done, used)
        if len(used) < len(files):
            self.report.warn(f"{len(files) - len(used)} of {len(files)} files could not be read; left out.")
        if len(used) < LEAST:
            raise RequestError(f"An aligner needs at least {LEAST} images that can be read, not {len(used)}.")
        self.x, self.z = x[0], z[0]
        self.names = labels([files[i] for i in used])

    def _keep(self, x: list, z: list, done: int, used: list[int]) -> tuple[list, list]:
        from studio.store import write_tensors

        x, z = [np.concatenate(x)], [np.concatenate(z)]
        write_tensors({"x": x[0], "z": z[0]}, {"state": json.dumps([done, used])}, self.place)
        self.kept = time.monotonic()
        return x, z

    def _resumed(self) -> tuple[list, list, tuple[int, list[int]]]:
        found = _read(self.place)
        if found is None:
            return [], [], (0, [])
        tensors, state = found
        return [tensors["x"].numpy()], [tensors["z"].numpy()], tuple(state)

    # ---- fits ---------------------------------------------------------------------------------------------

    def result(self) -> Result:
        """The fit on the CLIP's embeddings and, unless it is left out, that on the planted ones."""
        import torch

        from studio.models.aligner import note
        from studio.models.alignment import HELD, total_cosines

        x, z = torch.from_numpy(self.x), torch.from_numpy(self.z)
        seen = torch.arange(len(x)) % HELD != 0
        fit, end = self._fitted(x[seen], z[seen], "aligner")
        cosines = total_cosines(end, x[~seen], z[~seen]).numpy()
        values = {"images": len(x), "cosine": float(cosines.mean()), "isometry": fit.isometry(end.maps)}
        names = tuple(n for n, s in zip(self.names, seen, strict=True) if not s)
        arrays = {"cosines": Trace(cosines, (Axis("image", names),), "cosine")}
        if self.params.planted:
            told, arrays["planted"] = self._planted(x, z, seen)
            values |= told
        params = {**asdict(self.params), **{k: v for k, v in values.items() if v is not None}}
        said = note(self.model.fingerprint, self.clip.fingerprint, "outputs", params)
        maps = end.maps.split(self.coordinates.sizes)
        return Result(arrays, values, made=Made(self.coordinates.matrices(maps, end.bias), said))

    def _planted(self, x: Any, z: Any, seen: Any) -> tuple[dict[str, float], Trace]:
        from studio.models.aligner import REST
        from studio.models.alignment import embeddings, part_cosines, planted_truth, total_cosines

        sizes = self.coordinates.sizes
        truth = planted_truth(x[seen], z[seen], 2, sizes)
        z = embeddings(truth, x)
        fit, end = self._fitted(x[seen], z[seen], "planted")
        parts = part_cosines(end.maps, truth.maps, x[~seen], sizes)
        closed = part_cosines(fit.ridge().maps, truth.maps, x[~seen], sizes)
        told = {
            "planted_cosine": float(total_cosines(end, x[~seen], z[~seen]).mean()),
            "planted_part_cosine": float(parts.mean()),
            "planted_part_cosine_ridge": float(closed.mean()),
        }
        component = Axis("component", (*self.coordinates.labels, REST))
        return told, Trace(parts.astype(np.float32), (component,), "cosine with the truth")

    def _fitted(self, x: Any, z: Any, name: str) -> tuple[Any, Any]:
        """(the fit, its end); goes on from what is kept on disk."""
        from studio.models.alignment import Fit, Settings, State

        p = self.params
        how = Settings(ridge=p.ridge, weight=p.weight, steps=p.steps, batch=p.rows, rate=p.rate)
        fit, place = Fit(x, z, self.coordinates.sizes, how), self.fit_places[name]
        what = {"aligner": "fitting the maps", "planted": "fitting where the truth is known"}[name]
        self.report.plan(p.steps, what)
        found = _read(place)
        start = State(**_state(*found)) if found else fit.polar(fit.ridge())
        self.report.step(start.step)
        latest = [start]

        def after(state: Any, loss: float) -> None:
            done, latest[0] = state.step - latest[0].step, state
            if time.monotonic() - self.kept > KEEP_EVERY:
                self._write(state, place)
            self.report.step(done)

        try:
            return fit, fit.descend(start, after)
        finally:
            if latest[0].step > start.step:
                self._write(latest[0], place)

    def _write(self, state: Any, place: Path) -> None:
        from studio.store import write_tensors

        moments = {f"moment.{i}": m.numpy() for i, m in enumerate(state.moments)}
        tensors = {"maps": state.maps.numpy(), "bias": state.bias.numpy(), **moments}
        write_tensors(tensors, {"state": json.dumps(state.step)}, place)
        self.kept = time.monotonic()


def _state(tensors: dict[str, Any], step: int) -> dict[str, Any]:
    moments = [tensors[f"moment.{i}"] for i in range(4) if f"moment.{i}" in tensors]
    return {"maps": tensors["maps"], "bias": tensors["bias"], "moments": moments, "step": step}


def _readable(files: Sequence[Path]) -> list[tuple[int, np.ndarray]]:
    """(place, image) of the files that are images."""
    found = []
    for i, file in enumerate(files):
        try:
            found.append((i, read_image(file)[0]))
        except RequestError:
            continue
    return found


def _place(asked: list[Any]) -> Path:
    """The file in the store's home in which something is kept that depends on all that is named."""
    from studio.models.loading import home

    name = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    return home() / "corpora" / f"align-{name}.safetensors"


def _read(place: Path) -> tuple[dict[str, Any], Any] | None:
    """(tensors, state) of a file; None when there is none or it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(place, "pt") as opened:
            state = json.loads((opened.metadata() or {})["state"])
            return {name: opened.get_tensor(name) for name in opened.keys()}, state
    except (SafetensorError, OSError, KeyError, ValueError):
        return None
