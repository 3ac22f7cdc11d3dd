"""The device that models run on, the memory that is free there, and the cores that this process may use."""

from __future__ import annotations

import os

from studio.errors import RequestError


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
    """Free bytes on the device."""
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0]
    import psutil

    return psutil.virtual_memory().available
