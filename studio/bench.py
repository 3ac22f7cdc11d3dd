"""The benchmark: every figure that the project states, measured in one run and written as one file.

{host, results: [{name, value, unit, bar, holds, how}], failed: [{name, error}]}: `bar` is the figure asked
for, `holds` whether it is met (null where none is asked for), `failed` the entries that ended with an error.
The file is whole after every result, so that nothing is lost when a later entry fails or the run is ended.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio.errors import RequestError, StudioError, sentence
from studio.models.device import release
from studio.models.precision import HALVES
from studio.real_shapes import LAYOUTS, real_shape
from studio.switch_race import switches

_log = logging.getLogger("locus")
Row = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Entry:
    """One measurement. group: "" is made unless real shapes are asked for, others when asked for ("planted",
    "real-shapes"). run: (session, settings, say) to rows, which may come one by one. cpu: it measures CPU
    seconds, or its slow reference is written for float32 on a CPU."""

    name: str
    group: str
    run: Callable[[Any, Any, Say], Iterable[Row]]
    cpu: bool = False


def planted_truth(session: Any, settings: Any, say: Say) -> list[Row]:
    """Methods against what is known to be planted (studio/planted.py)."""
    import torch

    from studio.planted import measure

    torch.set_num_threads(session.threads)
    model, scorer = session.model("atlas-sd", "diffusion"), session.model("atlas-clip", "clip")
    return measure(model, scorer, settings, say, session.batch)


def planted_components(session: Any, settings: Any, say: Say) -> list[Row]:
    """The same for feed-forward weights (studio/planted_components.py)."""
    import torch

    from studio.planted_components import measure_components

    torch.set_num_threads(session.threads)
    model, scorer = session.model("atlas-sd", "diffusion"), session.model("atlas-clip", "clip")
    return measure_components(model, scorer, settings, say, session.batch)


def planted_vision(session: Any, settings: Any, say: Say) -> list[Row]:
    """The ranking of components against planted heads (studio/planted_vision.py)."""
    import torch

    from studio.planted_vision import measure_vision

    torch.set_num_threads(session.threads)
    return measure_vision(say)


def spurious_correlation(session: Any, settings: Any, say: Say) -> list[Row]:
    """Heads that learned the background, with and without its components (studio/spurious_correlation.py)."""
    import torch

    from studio.models.catalog import ASSETS
    from studio.spurious_correlation import measure_correlation

    torch.set_num_threads(session.threads)
    aligner = str(ASSETS / "atlas" / "aligners" / "atlas-vit.safetensors")
    vit, clip = session.model("atlas-vit", "vision"), session.model("atlas-clip", "clip")
    asked = {
        "atlas-vit": (vit, clip, aligner),
        "atlas-clip": (session.model("atlas-clip", "vision"), None, None),
    }
    return measure_correlation(asked, say)


def _on_atlas(measure: str) -> Callable[[Any, Any, Say], list[Row]]:
    """An entry's `run`: a function of studio/diffusion_race.py on the embedded model."""

    def run(session: Any, settings: Any, say: Say) -> list[Row]:
        import torch

        from studio import diffusion_race

        torch.set_num_threads(session.threads)
        return getattr(diffusion_race, measure)(session.model("atlas-sd", "diffusion"))

    return run


def _on_small(measure: str, layout: str) -> Callable[[Any, Any, Say], list[Row]]:
    """The same on a small random UNet of a layout."""

    def run(session: Any, settings: Any, say: Say) -> list[Row]:
        import torch

        from studio import diffusion_race

        torch.set_num_threads(session.threads)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = diffusion_race.small_model(session.model("atlas-sd", "diffusion"), layout)
        return getattr(diffusion_race, measure)(model)

    return run


def _solver(layout: str) -> Callable[[Any, Any, Say], list[Row]]:
    """The solver at the real sizes of a layout, on random numbers."""

    def run(session: Any, settings: Any, say: Say) -> list[Row]:
        import torch

        from studio import diffusion_race

        torch.set_num_threads(session.threads)
        generator = torch.Generator("cpu").manual_seed(0)
        return diffusion_race.solver(layout, lambda *shape: torch.randn(shape, generator=generator))

    return run


def _language(race: str, least: float, **size: Any) -> Callable[[Any, Any, Say], list[Row]]:
    """A function of studio/language_race.py on a random Llama: how many times faster than the naive way."""

    def run(session: Any, settings: Any, say: Say) -> list[Row]:
        import torch

        from studio import language_race
        from studio.diffusion_race import row

        torch.set_num_threads(1)
        generator = torch.Generator("cpu").manual_seed(0)
        found = getattr(language_race, race)(lambda *shape: torch.randn(shape, generator=generator), **size)
        what = race.replace("_race", "").replace("_", " ")
        how = f"{found['how']}; largest difference of a probability {found['error']:.1e}"
        name = f"{what}, {found['tokens']} tokens"
        if subject := size.get("subject"):
            name += f", subject {subject[0]}-{subject[1]}"
        return [row(f"language {name}", found["ratio"], "times faster", least, how, least=True)]

    return run


def decomposition_cost(session: Any, settings: Any, say: Say) -> list[Row]:
    """A ViT-B/16's decomposition beside its plain forward (studio/vision_race.py)."""
    import torch

    from studio import vision_race
    from studio.diffusion_race import row

    torch.set_num_threads(1)
    generator = torch.Generator("cpu").manual_seed(0)
    found = vision_race.race("vit-b16", lambda *shape: torch.randn(shape, generator=generator), rounds=6)
    rows = [
        row(f"decompose, {what}", found["ratios"][what], "times a forward", bar, found["how"], least=False)
        for what, bar in vision_race.BARS.items()
    ]
    memory = max(found["memory"], 1e-3)  # what can't be told from nothing
    bar, how = vision_race.MEMORY_BAR, found["how"]
    return [*rows, row("decompose, tokens' memory", memory, "GB", bar, how, least=False)]


def command_line(session: Any, settings: Any, say: Say) -> list[Row]:
    """How soon the command line answers."""
    from studio.diffusion_race import help_time

    return help_time()


def server_start(session: Any, settings: Any, say: Say) -> list[Row]:
    """How soon the server and its first image are there."""
    from tempfile import TemporaryDirectory

    from studio import start_race

    with TemporaryDirectory(prefix="locus-bench-") as folder:
        return start_race.server_start(Path(folder), session.threads)


def _numbers() -> Callable[..., Any]:
    """Random tensors of any shape, the same in every run; one thread from here on."""
    import torch

    torch.set_num_threads(1)
    generator = torch.Generator("cpu").manual_seed(0)

    def draw(*shape: int) -> Any:
        return torch.randn(shape, generator=generator)

    return draw


def growth(session: Any, settings: Any, say: Say) -> Iterator[Row]:
    """How costs grow (studio/growth_race.py)."""
    from studio import growth_race

    numbers, model = _numbers(), session.model("atlas-sd", "diffusion")
    yield from growth_race.language_growth(numbers)
    yield from growth_race.image_growth(model, numbers)
    yield from growth_race.vision_growth(numbers)


def fewest_operations(session: Any, settings: Any, say: Say) -> Iterator[Row]:
    """Operations above the fewest that the answer needs."""
    from studio import growth_race

    numbers, model = _numbers(), session.model("atlas-sd", "diffusion")
    yield from growth_race.language_floor(numbers)
    yield from growth_race.image_floor(model, numbers)


def forward_shares(session: Any, settings: Any, say: Say) -> Iterator[Row]:
    """How much of the time is forwards (studio/share_race.py)."""
    from studio import share_race

    numbers, model = _numbers(), session.model("atlas-sd", "diffusion")
    yield from share_race.image_shares(model)
    yield from share_race.vision_shares(session.model("atlas-clip", "vision"))
    yield from share_race.language_shares(numbers)
    yield from share_race.counted_shares(model, session.model("atlas-llama", "language"))


def memory(session: Any, settings: Any, say: Say) -> list[Row]:
    """Memory over a plain run, each method in a process of its own."""
    from studio import share_race

    return share_race.memory_growth(session.threads)


def slow_ways(session: Any, settings: Any, say: Say) -> Iterator[Row]:
    """Fast ways beside the references of the tests (studio/naive_*race.py), one method after the other."""
    from studio import naive_image_race, naive_race, naive_vision_race

    numbers = _numbers()
    image, language = session.model("atlas-sd", "diffusion"), session.model("atlas-llama", "language")
    vision = ("decompose", "retrieve_images", "rank_components", "ablate_components")
    drawn = ("generate", "trace_text_encoder", "lens", "neurons", "attribute", "edit", "audit")
    for module, names, given in (
        (naive_race, ("text_span", "align", "contributions"), numbers),
        (naive_vision_race, vision, numbers),
        (naive_race, ("context_use",), language),
        (naive_race, ("trace_unet", "localize", "word_maps", "fisher"), image),
        (naive_image_race, drawn, image),
    ):
        for name in names:
            yield from getattr(module, name)(given)


ENTRIES: tuple[Entry, ...] = (
    Entry("help", "", command_line),
    Entry("server-start", "", server_start),
    Entry("solver-sd1", "", _solver("sd1"), cpu=True),
    Entry("solver-sdxl", "", _solver("sdxl"), cpu=True),
    Entry("locogen-cost", "", _on_atlas("locogen")),
    Entry("unet-trace-cost", "", _on_atlas("unet_trace")),
    Entry("unet-screen-rows", "", _on_small("screen_rows", "sd1"), cpu=True),
    Entry("text-encoder-trace-images", "", _on_atlas("text_trace")),
    Entry("attribution-forwards", "", _on_small("attribution", "least"), cpu=True),
    Entry("language-trace-40", "", _language("trace_race", 7.5, tokens=40, subject=(5, 9)), cpu=True),
    Entry("language-trace-late", "", _language("trace_race", 50, tokens=40, subject=(28, 32)), cpu=True),
    Entry("language-trace-240", "", _language("trace_race", 600, tokens=240, subject=(226, 230)), cpu=True),
    Entry("knockout-40", "", _language("knockout_race", 60, tokens=40), cpu=True),
    Entry("knockout-240", "", _language("knockout_race", 200, tokens=240), cpu=True),
    Entry("decompose-cost", "", decomposition_cost, cpu=True),
    Entry("slow-ways", "", slow_ways, cpu=True),
    Entry("forward-shares", "", forward_shares, cpu=True),
    Entry("operations", "", fewest_operations, cpu=True),
    Entry("memory", "", memory, cpu=True),
    Entry("growth", "", growth, cpu=True),
    Entry("planted-truth", "planted", planted_truth),
    Entry("planted-components", "planted", planted_components),
    Entry("planted-vision", "planted", planted_vision),
    Entry("spurious-correlation", "planted", spurious_correlation),
    *(Entry(f"real-{layout}", "real-shapes", real_shape(layout)) for layout in LAYOUTS),
    Entry("real-switches", "real-shapes", switches),
)


def chosen(groups: Sequence[str], only: Sequence[str]) -> list[Entry]:
    """The entries named, else those of these groups and of none, real shapes first: on a GPU most others are
    left out. RequestError for a name that does not exist."""
    known = {e.name: e for e in ENTRIES}
    if wrong := [n for n in only if n not in known]:
        raise RequestError(f"There is no benchmark {wrong[0][:60]!r}; known: {', '.join(known)}.")
    found = [e for e in ENTRIES if e.group in {"", *groups}]
    return [known[n] for n in only] or sorted(found, key=lambda e: e.group != "real-shapes")


def run_bench(
    session: Any, entries: Sequence[Entry], settings: dict[str, Any], out: Path, say: Say
) -> dict[str, Any]:
    """Runs the entries one after the other; the file `out` is written whole after every result. An entry that
    fails is named in `failed`, and the others go on. settings: by entry's name."""
    record: dict[str, Any] = {"host": session.host(session.batch), "results": [], "failed": []}
    for entry in entries:
        say(entry.name)
        try:
            for row in (left_out(session, entry) or entry.run)(session, settings.get(entry.name), say):
                record["results"].append(row)
                _write(record, out)
        except Exception as error:  # the other figures are worth having
            if not isinstance(error, StudioError):
                _log.exception("the benchmark %s failed", entry.name)
            record["failed"].append({"name": entry.name, "error": sentence(error)})
            say(f"{entry.name} failed: {record['failed'][-1]['error']}")
        release(session.device)
        _write(record, out)
    return record


def left_out(session: Any, entry: Entry) -> Callable[..., list[Row]] | None:
    """In place of a measurement that this session cannot make: one row that says why."""
    half, elsewhere = session.dtype in HALVES, entry.cpu and session.device != "cpu"
    if entry.group == "real-shapes" or not (half or elsewhere):
        return None
    why = "CPU seconds are compared; take --device cpu" if elsewhere else "its figure is one of float32"
    how = f"left out on {session.device} in {session.dtype}: {why}"
    row = {"name": entry.name, "value": None, "unit": "", "bar": None, "holds": None, "how": how}
    return lambda *_: [row]


def _write(record: dict[str, Any], out: Path) -> None:
    """Replaces the file at once, so that nobody ever reads half of it."""
    beside = out.with_name(out.name + ".part")
    beside.write_text(json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
    beside.replace(out)
