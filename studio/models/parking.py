"""Models that make room on a GPU wait in the host's memory, in pages that stay where they are (pinned), and
come back by copies that the GPU makes by itself.

An evicted model is so a fraction of a second away instead of a load from disk. Oldest out when the host has
no room; a model whose weights are packed (8 or 4 bits) can't be moved and is let go. What the running job
uses is never moved.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from studio.errors import StudioError
from studio.models.device import free_memory, release

_SHARE = 0.5  # of the host's free memory that waiting models may take


def host_room(device: str) -> int:
    """Bytes in which models may wait: none where the device's memory is the host's own."""
    return int(_SHARE * free_memory("cpu")) if device == "cuda" else 0


class Parking:
    """Models out of a device's memory, by key, oldest first.

    room: bytes that the host gives for more of them, asked every time. pin: whether the host's copies are
    pinned, which only a GPU can use.
    """

    def __init__(self, device: str, room: Callable[[], int] | None = None, pin: bool | None = None) -> None:
        self.device = device
        self._room = room or (lambda: host_room(device))
        self._pin = device == "cuda" if pin is None else pin
        self._waiting: OrderedDict[Any, Any] = OrderedDict()
        self._used: set[Any] | None = None  # by the job that runs, if one does

    @contextmanager
    def job(self) -> Iterator[None]:
        """A job: what is used in it stays on the device until it ends, whatever way it ends."""
        self._used = set()
        try:
            yield
        finally:
            self._used = None

    def use(self, key: Any) -> None:
        """The job that runs, if one does, uses this model."""
        if self._used is not None:
            self._used.add(key)

    def make_room(self, loaded: OrderedDict[Any, Any], name: str, need: int, budget: int) -> None:
        """Parks the least recently used of the loaded models until `need` more bytes, of the model `name`,
        are within the budget. Those of the running job stay: they may go above the budget together, and
        StudioError says when even the device has no room for that."""
        while sum(model.nbytes() for model in list(loaded.values())) + need > budget:
            free = [key for key in list(loaded) if key not in (self._used or ())]
            if not free and loaded and need > free_memory(self.device):
                raise StudioError(
                    f"{name} needs about {need / 1e9:.1f} GB beside the other models of this run, more than "
                    f"is free on {self.device}; take a smaller model or --dtype."
                )
            if not free:
                return
            if (model := loaded.pop(free[0], None)) is not None:  # another thread may have let it go
                self.park(free[0], model)
                del model
                release(self.device)

    def __contains__(self, key: Any) -> bool:
        return key in self._waiting

    def __len__(self) -> int:
        return len(self._waiting)

    def nbytes(self) -> int:
        """Bytes of the host that waiting models hold."""
        return sum(m.nbytes() for m in self._waiting.values())

    def park(self, key: Any, model: Any) -> bool:
        """Moves a model's tensors to the host; False, and nothing moved, where it has no room or can't be
        moved. Older models leave for it."""
        if not _movable(model):
            return False
        need = model.nbytes()
        while self._waiting and need > self._room():
            self._waiting.popitem(last=False)
        if need > self._room():
            return False
        _move(model, self._to_host, self.device)
        self._waiting[key] = model
        return True

    def fetch(self, key: Any) -> Any:
        """The model, on the device again."""
        model = self._waiting.pop(key)
        _move(model, lambda t: t.to(model.device, non_blocking=True), self.device)
        return model

    def drop(self, keep: Callable[[Any], bool] = lambda model: False) -> int:
        """Lets waiting models go, but those that `keep`; how many went."""
        gone = [key for key, model in self._waiting.items() if not keep(model)]
        for key in gone:
            del self._waiting[key]
        return len(gone)

    def _to_host(self, tensor: Any) -> Any:
        import torch

        layout = {"pin_memory": self._pin, "device": "cpu"}
        return torch.empty_like(tensor, **layout).copy_(tensor, non_blocking=True)


def _movable(model: Any) -> bool:
    return not any(getattr(m, "is_quantized", False) for m in model.components().values())


def _tensors(model: Any) -> Iterator[Any]:
    """Every parameter and buffer once, also where two modules share it."""
    seen: set[int] = set()
    for module in model.components().values():
        for tensor in (*module.parameters(), *module.buffers()):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor


def _move(model: Any, copy: Callable[[Any], Any], device: str) -> None:
    """Puts a copy of every tensor in its place, all or none, and waits until the copies are whole."""
    import torch

    found = [(tensor, copy(tensor.detach())) for tensor in _tensors(model)]
    if device == "cuda":
        torch.cuda.synchronize()  # before any old storage is let go
    for tensor, moved in found:
        tensor.data = moved
