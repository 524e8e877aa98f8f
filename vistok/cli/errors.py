"""What a user is told when a command fails."""

from __future__ import annotations

import errno

DISK_FULL = "disk full: nothing half-written is left behind; free some space and run the command again"
# Writers that do not pass the system's own error on: safetensors and torch.save say it in words only.
DISK_FULL_WORDS = ("No space left on device", "PytorchStreamWriter failed writing")


def explain(error: BaseException) -> str | None:
    """One line with the cause and the remedy, or `None` for a defect of ours, whose traceback is of use."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; nothing half-written is left behind"
    if getattr(error, "errno", None) == errno.ENOSPC or any(words in str(error) for words in DISK_FULL_WORDS):
        return DISK_FULL
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which need not be imported yet
        return "out of memory on the device; ask for fewer images at a time, or use --device cpu"
    if isinstance(error, BrokenPipeError) or not isinstance(
        error, (ValueError, OSError, ModuleNotFoundError, FloatingPointError)
    ):
        return None
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split())
