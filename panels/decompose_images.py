"""The images of the Decompose panel: uploaded, pasted, or examples; kept by the store, shown as thumbnails.

A page holds only the id of its set: "examples", or one of studio.uploads.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from panels import waking, widgets
from panels.running import QUIET, STREAM
from studio.atlas.world import ATTRIBUTES
from studio.errors import RequestError, StudioError
from studio.images import ENDINGS, image_files, labels, read_image
from studio.models.catalog import ASSETS
from studio.session import Session
from studio.uploads import Uploads

EXAMPLES = "examples"
TOLD = "Ten example images."
LOST = "The images of this run are not among those kept here; choose them again to run it."
PRESS = "() => document.querySelector('#decompose-run').click()"
TRIES = {  # examples: what is asked of the pictures
    "Things": tuple(f"a {thing}" for thing in ATTRIBUTES["object"]),
    "Colours": ATTRIBUTES["colour"],
    "Backgrounds": tuple(f"a {paper} background" for paper in ATTRIBUTES["background"]),
}
SIDE = 160  # pixels of a thumbnail
MOST_SHOWN = 200
MOST_TRIED = 500  # uploaded files that are opened at once; a run says what is wrong with others


class Pasted(gr.Image):
    """An image field that hands over the file as it came, whatever it holds."""

    is_template = True  # for the page it is an Image

    def preprocess(self, payload: object) -> str | None:
        """The path of the uploaded file."""
        return getattr(payload, "path", None)


def folder_of(session: Session, set_id: str | None) -> Path:
    """The folder of a set; RequestError when no images were chosen or they are gone."""
    if not set_id:
        raise RequestError("No images are given; choose some, or take an example.")
    if set_id == EXAMPLES:
        return ASSETS / "atlas" / "examples"
    return Uploads(session.store).folder(set_id)


def files_of(session: Session, set_id: str | None) -> list[Path]:
    """The set's files in the order of a run."""
    return image_files([str(folder_of(session, set_id))])[0]


def set_of(session: Session, given: Sequence[str] | None) -> str | None:
    """The id of the set whose folder a run's images are; None for images that no page chose."""
    folders = [Path(str(g)) for g in given or ()]
    if folders == [folder_of(session, EXAMPLES)]:
        return EXAMPLES
    root = Uploads(session.store).root
    if len(folders) != 1 or folders[0].parent != root:
        return None
    try:
        folder_of(session, folders[0].name)
    except StudioError:
        return None
    return folders[0].name


def added(session: Session, set_id: str | None, given: Sequence[str]) -> tuple[str, str]:
    """(the id of a set with more images, a sentence about them). Examples are replaced, other sets grow.

    RequestError when no image is among the files.
    """
    files = [Path(g) for g in given]
    images = [f for f in files if f.suffix.lower() in ENDINGS]
    left_out = [f"{f.name[:60]} is no image" for f in files if f not in images]
    good = []
    for n, file in enumerate(images):
        fault = fault_of(file) if n < MOST_TRIED else ""
        if fault:
            left_out.append(fault)
        else:
            good.append(file)
    if not good:
        first = left_out[0].rstrip(".") if left_out else "nothing was given"
        endings = ", ".join(sorted(ENDINGS))
        raise RequestError(f"No image could be read: {first}. Images end in {endings}.")
    before = [] if set_id in (None, "", EXAMPLES) else files_of(session, set_id)
    found = Uploads(session.store).keep([*before, *good])
    count = len(files_of(session, found))
    said = f"{count} image{'s' if count > 1 else ''}."
    if left_out:
        said += f" Left out: {len(left_out)} ({left_out[0].rstrip('.')})."
    return found, said


def fault_of(file: Path) -> str:
    """Why a file can't be used, without the folder it lies in; "" when it can."""
    try:
        read_image(file)
    except StudioError as error:
        return str(error).replace(str(file), file.name[:80])
    return ""


def thumbnail(pixels: np.ndarray) -> Image.Image:
    """An image (H, W, 3) uint8 that is at most SIDE on a side."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((SIDE, SIDE))
    return picture


def pictures(files: Sequence[Path], captions: Sequence[str]) -> list[tuple[Image.Image, str]]:
    """Thumbnails with captions; a file that can't be read is grey."""
    found = []
    for file, caption in zip(files[:MOST_SHOWN], captions, strict=False):
        try:
            pixels = read_image(file)[0]
        except StudioError:
            pixels = np.full((64, 64, 3), 160, np.uint8)
            caption = f"{caption} (can't be read)"
        found.append((thumbnail(pixels), caption))
    return found


def gallery(session: Session, set_id: str | None) -> list[tuple[Image.Image, str]]:
    """What the gallery shows of a set."""
    files = files_of(session, set_id)
    return pictures(files, [Path(n).stem for n in labels(files)])


def by_label(session: Session, given: Sequence[str] | None) -> dict[str, Path]:
    """{label in a run: file} of a run's images, as far as a page chose them: the examples, or uploads. A run
    may come from another machine and name any folder of this one, whose files are nobody's to see."""
    found = set_of(session, given)
    files = files_of(session, found) if found else []
    return dict(zip(labels(files), files, strict=True))


class Chooser:
    """The handlers of the image fields of a form: images (the id), gallery, files, folder, pasted, clear,
    said, and the examples try-NAME."""

    def __init__(self, session: Session, form: dict[str, Any]) -> None:
        self.session, self.form = session, form
        self.kept = widgets.kept_in_browser("locus-decompose-images")

    def wire(self) -> None:
        """Connects them."""
        form = self.form
        here = [form["images"], form["gallery"], form["said"], self.kept]
        for name in ("files", "folder"):
            form[name].upload(self.take, [form[name], form["images"]], here, **STREAM)
        pasted = form["pasted"]
        pasted.upload(self.take_one, [pasted, form["images"]], [*here, pasted], **STREAM)
        form["clear"].click(lambda: self.shown("", "Choose images."), None, here, **QUIET)
        for name, tried in TRIES.items():
            outputs = [*here, form["texts"], form["method"]]
            done = form[f"try-{name}"].click(_example(self, tried), None, outputs, **QUIET)
            done.then(None, None, None, js=PRESS)
        waking.when_asked(lambda: True, [], self.reloaded, [self.kept], here[:3], **QUIET)

    def shown(self, set_id: str, said: str) -> list[Any]:
        """Another set of images: id, thumbnails, sentence, and what the browser keeps."""
        thumbs = gallery(self.session, set_id) if set_id else []
        if len(thumbs) == MOST_SHOWN:
            said += f" The first {MOST_SHOWN} are shown."
        return [set_id, gr.update(value=thumbs), said, {"images": set_id}]

    def back(self, given: Sequence[str]) -> dict[Any, Any]:
        """Updates that choose a run's images again; those that are no longer kept are said."""
        form, found = self.form, set_of(self.session, given)
        if found is None:
            return {form["said"]: LOST}
        count = len(files_of(self.session, found))
        said = TOLD if found == EXAMPLES else f"{count} image{'s' if count > 1 else ''}."
        here = [form["images"], form["gallery"], form["said"], self.kept]
        return dict(zip(here, self.shown(found, said), strict=True))

    def take(self, files: list[str] | None, set_id: str) -> list[Any]:
        """Files or a folder were uploaded."""
        try:
            return self.shown(*added(self.session, set_id, files or []))
        except Exception as error:
            return [gr.skip(), gr.skip(), widgets.spoken(error), gr.skip()]

    def take_one(self, file: str | None, set_id: str) -> list[Any]:
        """An image was dropped or pasted; its field is empty again."""
        return [*self.take([file] if file else [], set_id), None]

    def reloaded(self, _: bool, kept: dict | None) -> list[Any]:
        """The page is there: the images that this browser had, else the examples."""
        set_id = kept.get("images") if isinstance(kept, dict) else None
        try:
            count = len(files_of(self.session, set_id))
        except StudioError:
            set_id = EXAMPLES
        said = TOLD if set_id == EXAMPLES else f"{count} image{'s' if count > 1 else ''}."
        return self.shown(set_id, said)[:3]


def _example(chooser: Chooser, texts: Sequence[str]) -> Any:
    def load() -> list[Any]:
        return [*chooser.shown(EXAMPLES, TOLD), "\n".join(texts), "decompose"]

    return load
