"""Atomic writes, locks, and checks of where a file can be written."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_POLL_SECONDS = 0.05


def check_writable(path: Path, argument: str, *, kind: str = "file") -> None:
    """Raise ValueError unless a file, or a folder (`kind="folder"`), can be written at a path.

    Args:
        path: the path to check.
        argument: name of the argument in the error message.
        kind: "file" or "folder".
    """
    is_other_kind = path.is_dir() if kind == "file" else path.is_file()
    if is_other_kind or not os.access(path.parent, os.W_OK):
        raise ValueError(
            f"`{argument}` must be a {kind} in a folder that can be written to; got '{path}'."
        )


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path; the file written there replaces `path` unless an error is raised.

    A concurrent reader sees either the old or the complete new file. Other files in the temporary
    file's folder, such as the external weights of an ONNX graph, are moved next to `path` first.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder, path.name)
        yield temporary
        for extra in Path(folder).iterdir():
            if extra != temporary:
                os.replace(extra, path.with_name(extra.name))
        os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_write(path) as file:
        file.write_text(text, encoding="utf-8")


@contextmanager
def locked(path: Path, seconds: float) -> Iterator[None]:
    """Hold a path's lock, where the system has locks; wait while another process holds it.

    Args:
        path: the path; the file of the lock is beside it and stays.
        seconds: the longest wait.

    Raises:
        TimeoutError: if another process still holds it.
        OSError: if the file of the lock cannot be written.
    """
    with path.with_name(f"{path.name}.lock").open("ab") as file:
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        end = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > end:
                    raise TimeoutError(
                        f"another process has held '{file.name}' for {seconds:.0f} s"
                    ) from None
                time.sleep(_POLL_SECONDS)
                continue
            except OSError:  # a file system without locks
                pass
            break
        try:
            yield
        finally:
            # Closing the file would not end a lock that a forked process shares.
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)
