"""Defers signals while tensors that belong together are written.

A handler, such as the one that raises `KeyboardInterrupt` at Ctrl-C, may run between any two lines
of Python. A model that is half updated would then be trained further, or saved.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def deferred_signals() -> Iterator[None]:
    """Call the handlers of signals that arrive in the context only at its end.

    Only handlers written in Python are deferred: the others do not run between two of its lines.
    (One that C code has installed over a Python handler, as `faulthandler.register` does, is lost.)
    Python calls handlers in the main thread, so elsewhere there is nothing to defer.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    found = {number: signal.getsignal(number) for number in signal.valid_signals()}
    handlers = {number: handler for number, handler in found.items() if callable(handler)}
    arrived: list[int] = []

    def record(number: int, frame: FrameType | None) -> None:
        arrived.append(number)

    try:
        for number in handlers:
            signal.signal(number, record)
        yield
    finally:
        with contextlib.ExitStack() as stack:  # calls every handler, even if one raises
            is_restored = False
            while not is_restored:
                try:
                    for number, handler in handlers.items():
                        signal.signal(number, handler)
                    is_restored = True
                except BaseException as error:  # raised by a handler that was already restored
                    stack.callback(_raise, error)
            for arrival in reversed(arrived):
                stack.callback(signal.raise_signal, arrival)


def _raise(error: BaseException) -> None:
    raise error
