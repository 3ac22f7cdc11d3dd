"""A UNet compiled by torch, for forwards that nothing watches.

A compiled graph is made without the hooks that come later, so a watched or patched forward, and one that is
differentiated, goes through the module itself: traces and attributions are never compiled, images are.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from studio.errors import StudioError
from studio.models.hooks import hook_count


class CompiledUNet:
    """A UNet with a compiled twin of the same weights. backend: torch's name of the compiler."""

    def __init__(self, unet: Any, backend: str = "inductor") -> None:
        self.unet, self.used = unet, 0
        self._compiled = torch.compile(unet, backend=backend, dynamic=None)

    def __call__(self, *args: Any, **options: Any) -> Any:
        """The UNet's output; StudioError when it can't be compiled here."""
        if torch.is_grad_enabled() or hook_count(self.unet):
            return self.unet(*args, **options)
        try:
            with warnings.catch_warnings():  # of diffusers' own cached look-ups, which never change
                warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
                found = self._compiled(*args, **options)
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
                raise
            why = " ".join(str(error).split())[:160]
            raise StudioError(
                f"The UNet can't be compiled on this machine ({type(error).__name__}: {why}); run without "
                "--compile."
            ) from error
        self.used += 1
        return found
