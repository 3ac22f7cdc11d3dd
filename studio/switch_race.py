"""What a GPU's switches bring on the UNet of SD 1 at its real size: each measured on and off, in turn.

channels last, torch.compile, CUDA graphs (for a whole batch and for one row, where launching costs most), and
pinned memory for a model that comes back from the host. The first two run on a CPU too, so that the tests can
run them; figures are for a GPU alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from studio.errors import StudioError, sentence
from studio.models.device import release
from studio.real_shapes import Row, Settings, Stopwatch, line, random_model, rows_of, unet_forward

Turn = tuple[Callable[[], Any], Callable[[], Any]]  # sets a state, makes one call in it
ROUNDS = 5
NAMES = ("channels last", "torch.compile", "CUDA graph", "CUDA graph, one row", "pinned return")


def switches(session: Any, settings: Any, say: Callable[[str], None]) -> Iterator[Row]:
    """A row a switch, or that it needs a GPU. What fails is left out, and named at the end by a
    StudioError."""
    import torch

    if session.device != "cuda":
        told = "needs a GPU: locus bench --only real-switches --device cuda --dtype bfloat16 --out FILE.json"
        yield from (line(f"switches, {name}", None, "times as fast", told) for name in NAMES)
        return
    settings = settings or Settings()
    model = random_model(session, "sd1", getattr(torch, session.dtype.replace("auto", "float32")), settings)
    rows, failed = settings.rows or rows_of(session, model), []
    for name, sides in sides_of(model, rows).items():
        say(f"switches, {name}")
        try:
            yield compared(name, *sides(), Stopwatch(session.device), rows)
        except Exception as error:  # the other switches are worth knowing
            failed.append(f"{name}: {sentence(error)}")
        release(session.device)
    if failed:
        raise StudioError("; ".join(failed))


def sides_of(model: Any, rows: int) -> dict[str, Callable[[], tuple[Turn, Turn]]]:
    """By switch what makes its two sides, on and off."""
    return {
        "channels last": lambda: memory_formats(model, rows),
        "torch.compile": lambda: compilers(model, rows),
        "CUDA graph": lambda: graphs(model, rows),
        "CUDA graph, one row": lambda: graphs(model, 1),
        "pinned return": lambda: returns(model),
    }


def compared(name: str, on: Turn, off: Turn, watch: Stopwatch, rows: int) -> Row:
    """How many times as fast a switch makes a call; both sides in turn, the best of each. The first call of a
    side is not timed."""
    best = {True: float("inf"), False: float("inf")}
    for turn in range(ROUNDS + 1):
        for which, (prepare, call) in ((True, on), (False, off)):
            prepare()
            if turn == 0:
                call()
                continue
            best[which] = min(best[which], watch.seconds(call))
    how = f"on {best[True]:.4g} s, off {best[False]:.4g} s, in turn, best of {ROUNDS}; SD 1"
    how += "" if name == "pinned return" else f", a forward of {1 if 'one row' in name else rows} rows"
    return line(f"switches, {name}", best[False] / best[True], "times as fast", how)


def nothing() -> None:
    """A side that needs no preparing."""


def memory_formats(model: Any, rows: int) -> tuple[Turn, Turn]:
    """The UNet's convolutions in the order that a GPU reads, and in PyTorch's own."""
    import torch

    forward = unet_forward(model, rows)
    kinds = (torch.channels_last, torch.contiguous_format)
    on, off = ((lambda kind=kind: model.unet.to(memory_format=kind), forward) for kind in kinds)
    return on, off


def compilers(model: Any, rows: int, backend: str = "inductor") -> tuple[Turn, Turn]:
    """The compiled UNet and the plain one."""
    from studio.models.compiled import CompiledUNet

    forward, compiled = unet_forward(model, rows), CompiledUNet(model.unet, backend)

    def side(used: Any) -> Callable[[], Any]:
        def call() -> Any:
            model.compiled = used
            try:
                return forward()
            finally:
                model.compiled = None

        return call

    return (nothing, side(compiled)), (nothing, side(None))


def graphs(model: Any, rows: int) -> tuple[Turn, Turn]:
    """The kernels of a forward launched at once from a recording, and one by one."""
    import torch

    forward, graph = unet_forward(model, rows), torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # a recording must not meet kernels that are chosen at the first call
        for _ in range(3):
            forward()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        forward()
    return (nothing, graph.replay), (nothing, forward)


def returns(model: Any) -> tuple[Turn, Turn]:
    """A model that comes back from pinned pages of the host, and from plain ones."""
    from studio.models.parking import Parking

    def side(pin: bool) -> Turn:
        parking = Parking(str(model.device).split(":")[0], room=lambda: 2**60, pin=pin)
        return lambda: parking.park("model", model), lambda: parking.fetch("model")

    return side(True), side(False)
