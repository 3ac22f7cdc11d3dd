"""The device that models run on, the memory that is free there, and the cores that this process may use."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from studio.errors import RequestError

MOST_ROWS = 128  # of one forward: more gain nothing, and the last batch is seldom full
_SPARE = 0.8  # of the free memory that rows may fill: what a row takes is measured on one alone


def pick_device(name: str) -> str:
    """cpu, cuda or mps; auto takes CUDA, then MPS, then the CPU. RequestError for one that isn't there."""
    if name == "cpu":
        return name
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next((d for d in ("cuda", "mps") if there[d]), "cpu")
    if name not in there:
        raise RequestError(f"--device must be auto, cpu, cuda or mps, not {name!r}.")
    if not there[name]:
        raise RequestError(
            f"This machine has no {name} device that torch can use; take --device auto or cpu."
        )
    return name


def default_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_precision(device: str) -> None:
    """On a GPU float32 is float32 and sums of half precision are float32: without this, convolutions round
    to 10 bits (TF32) and split sums to the type of their terms."""
    if device != "cuda":
        return
    import torch

    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def channels_last(module: Any, device: str) -> Any:
    """The module with the weights of its convolutions laid out as a GPU's convolutions read them."""
    import torch

    return module.to(memory_format=torch.channels_last) if device == "cuda" else module


def peak_bytes(call: Callable[[], Any]) -> int:
    """Bytes of the GPU that a call takes at its peak, beyond what was taken before it."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class RowMemory:
    """How many rows of one forward fit into a device's memory, by what one row took.

    free: bytes that are free, asked every time; measure: bytes that a call takes. On a CPU, whose memory
    isn't counted so, the rows asked for are taken.
    """

    def __init__(
        self,
        device: str,
        free: Callable[[], int] | None = None,
        measure: Callable[[Callable[[], Any]], int] | None = None,
    ) -> None:
        self._counts = device == "cuda" or measure is not None
        self._free, self._measure = free or (lambda: free_memory(device)), measure or peak_bytes
        self._known: dict[Any, int] = {}

    def rows(self, key: Any, one_row: Callable[[], Any] | None, otherwise: int) -> int:
        """Rows for the work `key`, of which `one_row` does one; `otherwise` where that can't be measured.
        Raises what `one_row` raises."""
        if not self._counts or one_row is None:
            return otherwise
        if key not in self._known:
            self._known[key] = max(1, self._measure(one_row))
        return max(1, min(MOST_ROWS, int(_SPARE * self._free()) // self._known[key]))


def whole_memory(device: str) -> int:
    """Bytes of memory that the device has."""
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[1]
    import psutil

    return psutil.virtual_memory().total


def device_name(device: str) -> str:
    """The device as a person knows it: the GPU's name, or how many cores this process may use."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    return f"{default_threads()} CPU cores" if device == "cpu" else "Apple GPU"


def release(device: str) -> None:
    """Gives memory that nothing uses any more back to the system."""
    import gc

    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()


def free_memory(device: str) -> int:
    """Free bytes on the device; on a GPU those too that torch keeps for later and nothing uses."""
    if device == "cuda":
        import torch

        kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + kept
    import psutil

    return psutil.virtual_memory().available
