"""What a person reads when something is wrong: what was wrong, what was expected, what to do next."""

from __future__ import annotations


class StudioError(Exception):
    """A fault that is explained in one sentence; anything else is a bug and keeps its traceback in the log.

    `code` is the command line's exit status: 1 when running failed, 2 when the request itself is wrong.
    """

    code = 1

    def __init__(self, sentence: str) -> None:
        super().__init__(" ".join(sentence.split()))


class RequestError(StudioError):
    """The request is wrong: nothing was started and nothing was written."""

    code = 2


class Cancelled(Exception):
    """A job was stopped by its owner. `partial` holds what was finished by then, if anything."""

    partial: object | None = None


def sentence(error: Exception) -> str:
    """What a person reads of any error: its own sentence, or its kind with the start of what it says."""
    said = " ".join(str(error).split())
    return said if isinstance(error, StudioError) else f"{type(error).__name__}: {said[:200]}"
