"""The downloads under a panel's results: common formats at once, the rarer ones when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from studio.errors import StudioError
from studio.exports import new_folder
from studio.run_export import LEAST_DPI, MORE, MOST_DPI, QUICK, export, read_dpi

TITLES = {"tex": "LaTeX table", "bib": "BibTeX", "ipynb": "Notebook", "json": "Recipe"}
_QUEUED = dict(
    concurrency_limit=None, show_progress="hidden", api_visibility="private"
)  # a fault is a notice


def export_buttons(panel: str) -> dict[str, Any]:
    """Download buttons for every format, hidden until there is something to export. The rarer formats are
    made when their part is opened."""
    look = dict(size="sm", min_width=64)
    out: dict[str, Any] = {"run": gr.State(None)}
    with gr.Column(elem_id=f"{panel}-export", visible=False) as out["row"]:
        with gr.Row():
            for kind in QUICK:
                out[kind] = gr.DownloadButton(kind.upper(), elem_id=f"{panel}-export-{kind}", **look)
        more = gr.Accordion("More formats", open=False, elem_id=f"{panel}-export-more")
        with more:
            with gr.Row():
                for kind in MORE:
                    out[kind] = gr.DownloadButton(
                        TITLES[kind], interactive=False, elem_id=f"{panel}-export-{kind}", **look
                    )
            with gr.Row():
                dots = gr.Number(
                    300,
                    precision=0,
                    label="Dots per inch",
                    info=f"Of the PNG; from {LEAST_DPI} to {MOST_DPI}.",
                    min_width=140,
                    elem_id=f"{panel}-export-dpi",
                )
                out["large"] = gr.DownloadButton(
                    "PNG", interactive=False, elem_id=f"{panel}-export-large", **look
                )
    out["more"] = more
    rarer = [out[kind] for kind in (*MORE, "large")]
    more.expand(_rarer, [out["run"], dots], rarer, **_QUEUED)
    dots.submit(_large, [out["run"], dots], out["large"], **_QUEUED)
    dots.blur(_large, [out["run"], dots], out["large"], **_QUEUED)
    return out


def exported(
    folder: Path,
    buttons: Mapping[str, Any],
    scale: tuple[float, float] | None = None,
    kinds: Sequence[str] = QUICK,
) -> dict[Any, Any]:
    """Updates of the export buttons for a run folder; `scale` is (low, high) of the colours on the screen;
    `kinds`: the formats that are made anew, the other buttons keep theirs."""
    files = export(folder, new_folder(), kinds, scale=scale)
    unmade = gr.update(value=None, interactive=False)
    return {
        buttons["run"]: {"folder": str(folder), "scale": scale},
        buttons["row"]: gr.update(visible=True),
        buttons["more"]: gr.update(open=False),
        **{buttons[k]: _offered(files.get(k)) for k in kinds},
        **{buttons[k]: unmade for k in (*MORE, "large")},
    }


def _offered(file: Path | None, **look: Any) -> Any:
    """The update of a button for a file; a format that the run has not is not offered."""
    return gr.update(value=None if file is None else str(file), visible=file is not None, **look)


def _told(make: Callable[[], Any]) -> Any:
    """What `make` returns; a fault is shown as a notice."""
    try:
        return make()
    except StudioError as error:
        raise gr.Error(str(error), print_exception=False) from error


def _rarer(run: dict | None, dots: float | None) -> list[Any]:
    """The rarer formats of the run on screen, and its figure with as many dots per inch as asked for."""
    if not run:
        return [gr.skip()] * (len(MORE) + 1)
    files = _told(lambda: export(Path(run["folder"]), new_folder(), MORE))
    return [*(_offered(files.get(k), interactive=True) for k in MORE), _large(run, dots)]


def _large(run: dict | None, dots: float | None) -> Any:
    """The figure as PNG with so many dots per inch."""
    if not run:
        return gr.skip()

    def make() -> Any:
        dpi = read_dpi("" if dots is None else f"{dots:g}")
        file = export(Path(run["folder"]), new_folder(), ("png",), dpi=dpi, scale=run["scale"]).get("png")
        return _offered(file, label=f"PNG, {dpi} dots per inch", interactive=True)

    return _told(make)
