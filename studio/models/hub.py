"""The Hugging Face hub: downloads of safetensors alone, what a download would bring, a token kept secret.

A Hub belongs to a session. Its token lives in this process and goes to the hub alone; it is in no record, no
log and no message.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from studio.errors import Cancelled, RequestError, StudioError
from studio.models.catalog import CATALOG, Entry

_WANTED = "*.json *.txt *.model */*.json */*.txt */*.safetensors *.safetensors".split()
_IGNORED = (
    "*.fp16.* *.non_ema.* *.ckpt *.bin */*.onnx* *flax* *openvino* safety_checker/* consolidated*".split()
)
_PROBES = {"diffusion": "model_index.json", "clip": "open_clip_config.json", "language": "config.json"}


@dataclass(frozen=True)
class Offer:
    """What a download would bring: bytes in all (0: not known), the licence, and whether the hub asks for its
    acceptance first (`gated`). `note` says what else a person should know."""

    name: str
    source: str
    size: int
    licence: str
    gated: bool
    note: str = ""

    def __str__(self) -> str:
        size = f"{self.size / 1e9:.1f} GB" if self.size else "of a size that the hub does not tell"
        gated = "; its authors ask you to accept the licence on the hub first" if self.gated else ""
        return f"{self.name} ({self.source}): {size}, licence {self.licence}{gated}."


class Hub:
    """Where models that are not on this machine come from.

    `asks`: nothing is downloaded unless a person has agreed (`fetch` with `agreed`), as in the browser.
    """

    def __init__(self, *, asks: bool = False) -> None:
        self.asks, self._token = asks, None

    @property
    def has_token(self) -> bool:
        """Whether a token is set here, or stands where huggingface_hub keeps one."""
        from huggingface_hub import get_token

        return bool(self._token or get_token())

    def set_token(self, token: str, *, keep: bool = False) -> None:
        """Uses a token until this process ends; `keep` also checks it with the hub and stores it as `hf auth
        login` does. An empty one forgets the one that was set. RequestError for what is no token."""
        token = token.strip()
        if token and not (token.isascii() and token.startswith("hf_") and 8 <= len(token) <= 200):
            raise RequestError(
                "That is no Hugging Face token; it starts with hf_ and stands on huggingface.co under "
                "Settings, Access Tokens."
            )
        if keep and token:
            _store(token)
        self._token = token or None

    def fetch(
        self,
        hub_id: str,
        entry: Entry | None = None,
        *,
        agreed: bool = False,
        report: Callable[[int], None] | None = None,
    ) -> Path:
        """The snapshot folder of a hub model, from the cache or downloaded.

        report(bytes so far) is called while files come; what it raises ends the download. RequestError or
        StudioError when the model can't be had, or when nobody has agreed to the download yet.
        """
        from huggingface_hub import snapshot_download

        if self.asks and not agreed:
            return self._at_hand(hub_id, entry)
        if entry:
            _room_on_disk(entry)
        options: dict[str, Any] = {"tqdm_class": _meter(report)} if report else {}
        options |= {"token": self._token} if self._token else {}
        try:
            return Path(
                snapshot_download(hub_id, allow_patterns=_WANTED, ignore_patterns=_IGNORED, **options)
            )
        except Cancelled:
            raise
        except Exception as error:  # the hub, its HTTP client and Xet each bring classes of their own
            raise _download_fault(hub_id, error) from error

    def _at_hand(self, hub_id: str, entry: Entry | None) -> Path:
        from huggingface_hub import errors, snapshot_download

        options = {"allow_patterns": _WANTED, "ignore_patterns": _IGNORED, "local_files_only": True}
        try:
            return Path(snapshot_download(hub_id, **options))
        except errors.LocalEntryNotFoundError as error:
            told = f" ({entry.size / 1e9:.1f} GB, licence {entry.licence})" if entry else ""
            raise RequestError(
                f"{entry.name if entry else hub_id} is not on this machine yet; download it in the Models "
                f"tab{told}, or give a folder."
            ) from error
        except Exception as error:
            raise _download_fault(hub_id, error) from error

    def offer(self, name: str) -> Offer:
        """What a download of a catalogue name or hub id would bring; asks the hub for what is not in the
        catalogue, and downloads nothing."""
        entry = CATALOG.get(name)
        if entry:
            gated = "gated" in entry.licence
            licence = entry.licence.replace(" (gated)", "")
            return Offer(entry.name, entry.source, entry.size, licence, gated, entry.note)
        from huggingface_hub import HfApi

        try:
            info = HfApi(token=self._token).model_info(name, files_metadata=True)
        except Exception as error:
            raise _download_fault(name, error) from error
        files = [s for s in info.siblings or () if _is_wanted(s.rfilename)]
        if not any(s.rfilename.endswith(".safetensors") for s in files):
            raise RequestError(
                f"{name} holds no .safetensors file, the only kind of weights that Locus opens."
            )
        card = info.card_data.to_dict() if info.card_data else {}
        licence = str(card.get("license_name") or card.get("license") or "not stated")
        return Offer(name, name, sum(s.size or 0 for s in files), licence, bool(info.gated))


def _is_wanted(file: str) -> bool:
    return any(fnmatch(file, p) for p in _WANTED) and not any(fnmatch(file, p) for p in _IGNORED)


def _store(token: str) -> None:
    """Keeps a token where huggingface_hub keeps it, after the hub has accepted it."""
    from huggingface_hub import login

    try:
        login(token=token, add_to_git_credential=False, skip_if_logged_in=False)
    except Exception as error:
        raise StudioError(
            f"The token could not be kept: the hub did not accept it or can't be reached "
            f"({type(error).__name__}); it can be used without being kept."
        ) from None  # the cause may hold the token


def _meter(report: Callable[[int], None]) -> type:
    """A progress bar's class, as huggingface_hub wants one, that reports bytes and prints nothing."""
    from tqdm import tqdm

    lock, total = threading.Lock(), [0]

    class Meter(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            self.counts = kwargs.get("unit") == "B"
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            if self.counts:
                with lock:
                    total[0] += int(n or 0)
                report(total[0])
            return super().update(n)

    return Meter


def _download_fault(hub_id: str, error: Exception) -> StudioError:
    """What a failed download means to a person."""
    from huggingface_hub import errors as hub

    if isinstance(error, hub.GatedRepoError):
        return StudioError(
            f"{hub_id} is gated: accept its licence on its hub page, then enter a token in the Models tab or "
            "sign in with `hf auth login`."
        )
    if isinstance(error, hub.RepositoryNotFoundError):
        return StudioError(
            f"The hub has no model {hub_id!r}, or it is private; check the id, enter a token in the Models "
            "tab, or sign in with `hf auth login`."
        )
    if isinstance(error, hub.LocalEntryNotFoundError | hub.OfflineModeIsEnabled | ConnectionError):
        return RequestError(
            f"{hub_id} is not on this machine and the hub can't be reached; connect once to download it, "
            "or give a folder. atlas-sd works offline."
        )
    if isinstance(error, hub.HFValidationError):
        return RequestError(f"{hub_id!r} is no valid hub id; it has the form org/name.")
    if isinstance(error, OSError) and error.errno == 28:
        return StudioError(f"The disk is full while downloading {hub_id}; free some space and start again.")
    return StudioError(
        f"Downloading {hub_id} failed ({type(error).__name__}); try again, finished files are kept."
    )


def _room_on_disk(entry: Entry) -> None:
    from huggingface_hub import constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(entry.source, _PROBES[entry.family]), str):
        return
    folder = Path(constants.HF_HUB_CACHE)
    while not folder.exists():
        folder = folder.parent
    if (free := shutil.disk_usage(folder).free) < entry.size * 1.05:
        raise StudioError(
            f"{entry.name} needs {entry.size / 1e9:.1f} GB on disk and {folder} has {free / 1e9:.1f} GB "
            f"free; "
            "free some space, or set HF_HOME to a larger disk."
        )


def offline_state(entry: Entry) -> tuple[bool, str]:
    """(ready to use offline, where the weights are) of a catalogue entry."""
    if entry.embedded:
        ready = entry.path.is_dir() and any(entry.path.rglob("*.safetensors"))
        return ready, f"assets/{entry.source}"
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(entry.source, _PROBES[entry.family])
    return isinstance(cached, str), f"hub: {entry.source}" if not isinstance(cached, str) else str(
        Path(cached).parent
    )


def local_models(folder: Path) -> Iterator[Path]:
    """Folders and checkpoint files directly under the folder of one's own models."""
    known = ("model_index.json", "config.json", "open_clip_config.json")
    for place in sorted(folder.iterdir()) if folder.is_dir() else ():
        if place.suffix == ".safetensors" and place.is_file():
            yield place
        elif place.is_dir() and any((place / name).is_file() for name in known):
            beside = (
                place.parent / f"{place.name}.safetensors"
            )  # then it is only a checkpoint's configuration
            if not beside.is_file():
                yield place
