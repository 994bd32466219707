"""Recording of whole blocks of the weight gradient, before a 2:4 pattern drops half of them.

A topology update decides by them which weights a block keeps. The op that computes the gradient of
`values` passes the blocks on, since as an output of the op they would cost memory in every step of
compiled code. CUDA graphs replay kernels without calling the op, so they record nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol
from weakref import WeakValueDictionary

from torch import Tensor


class Recorder(Protocol):
    """Receives the gradients of a layer's blocks."""

    def record_blocks(self, blocks: Tensor) -> None:
        """Receive `[capacity, B, B]`, which may be kept but not changed."""


# By the address of the layer's positions, since those are all that the op knows of a layer. A
# training that is abandoned is not kept alive.
_recorders: WeakValueDictionary[int, Recorder] = WeakValueDictionary()
_is_paused = False


def start(address: int, recorder: Recorder) -> None:
    """Pass the gradients of a layer's blocks to a recorder from now on, in each backward.

    Args:
        address: `positions.data_ptr()` of the layer, whose positions the recorder must keep alive.
        recorder: recorder, to which only a weak reference is held.
    """
    _recorders[address] = recorder


def stop(address: int) -> None:
    """Stop what `start` began for an address."""
    _recorders.pop(address, None)


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
            recorder.record_blocks(blocks)
