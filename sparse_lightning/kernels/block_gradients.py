"""Recording of whole blocks of the weight gradient, before a 2:4 pattern drops half of them.

A topology update decides by them which weights a block keeps. The op that computes the gradient of
`values` passes the blocks on, since as an output of the op they would cost memory in every step of
compiled code. CUDA graphs replay kernels without calling the op, so they record nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch import Tensor

# By the address of the layer's positions, since those are all that the op knows of a layer.
_recorders: dict[int, Callable[[Tensor], None]] = {}
_is_paused = False


def start(positions: Tensor, recorder: Callable[[Tensor], None]) -> None:
    """Pass the gradients of a layer's blocks to a function from now on, in each backward.

    Args:
        positions: positions of the layer.
        recorder: function to call with `[capacity, B, B]`, which it may keep but not change.
    """
    _recorders[positions.data_ptr()] = recorder


def stop(positions: Tensor) -> None:
    """Stop what `start` began."""
    _recorders.pop(positions.data_ptr(), None)


def is_recording() -> bool:
    """Return whether the blocks of any layer are recorded."""
    return bool(_recorders)


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Record nothing in the context."""
    global _is_paused
    before, _is_paused = _is_paused, True
    try:
        yield
    finally:
        _is_paused = before


def record(positions: Tensor, blocks: Tensor) -> None:
    """Pass the gradients of a layer's blocks on, if they are wanted.

    Args:
        positions: positions of the layer.
        blocks: `[capacity, B, B]`, one product of the gradient.
    """
    if _recorders and not _is_paused:
        recorder = _recorders.get(positions.data_ptr())
        if recorder is not None:
            recorder(blocks)
