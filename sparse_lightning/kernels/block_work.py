"""The work of blocks, sum of w * g, as a training gathers it: for many layers in one launch.

Not an op as the others are: nobody differentiates or compiles it, and it runs between the steps of
a training, where the host's time counts.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse_lightning.kernels.launch import Kernel, build_once, packed
from sparse_lightning.kernels.programs import DTYPES, Program, compiler_options

_THREADS = 256
_THREAD_BLOCKS_A_PROCESSOR = 4  # of all layers together
_LAYERS = 64  # in a launch: the driver takes 4 KiB of arguments
_LAYER = struct.Struct("PPPPPii")


@dataclass(eq=False)
class WorkSums:
    """What is known of the work of a layer's slots; each fp32 `[capacity]`, on its device.

    Attributes:
        work: of the latest step, not yet in the sums.
        saliency: sum of |work| over steps, or None.
        movement: sum of -work over steps, or None.
    """

    work: Tensor
    saliency: Tensor | None
    movement: Tensor | None

    def __post_init__(self) -> None:
        tensors = self.work, self.saliency, self.movement
        # What a launch has to know: three addresses and the number of slots.
        self.fixed = *(0 if t is None else t.data_ptr() for t in tensors), len(self.work)

    @classmethod
    def zeros(cls, capacity: int, device: torch.device, wanted: Collection[str]) -> WorkSums:
        """Begin at zero, with those sums that are wanted by name."""
        work = torch.zeros(capacity, device=device)
        names = ("saliency", "movement")
        return cls(work, *(torch.zeros_like(work) if n in wanted else None for n in names))

    def each(self, function: Callable[[Tensor], Tensor]) -> WorkSums:
        """Return what a function makes of each tensor."""
        sums = (None if t is None else function(t) for t in (self.saliency, self.movement))
        return WorkSums(function(self.work), *sums)

    def take_in(self) -> None:
        """Add what `work` holds to the sums."""
        if self.saliency is not None:
            self.saliency += self.work.abs()
        if self.movement is not None:
            self.movement -= self.work
        self.work.zero_()


def add_block_work(layers: Iterable[tuple[nn.Parameter, WorkSums]], scale: float) -> None:
    """Take the work of an earlier step into the sums, and set that of this one.

    Work that is not finite counts as zero.

    Args:
        layers: `values` of each, `[capacity, B, B]`, and its sums; one without a gradient is
            passed over.
        scale: what the gradients are multiplied by.
    """
    on_cuda: dict[tuple[torch.dtype, int], list[tuple[Tensor, Tensor, WorkSums]]] = {}
    for values, sums in layers:
        gradient = values.grad
        if gradient is None or not values.numel():
            continue
        if values.is_cuda:
            kind = values.dtype, values.get_device()
            on_cuda.setdefault(kind, []).append((packed(values), packed(gradient), sums))
        else:
            sums.take_in()
            work = block_work(values, gradient) / scale
            sums.work.copy_(torch.where(work.isfinite(), work, 0))
    for (dtype, device), group in on_cuda.items():
        kernel = _kernel(dtype, device)
        for first in range(0, len(group), _LAYERS):
            _launch(kernel, group[first : first + _LAYERS], scale)


def block_work(values: Tensor, gradient: Tensor) -> Tensor:
    """Return the sum of w * g of each slot, in fp32.

    Args:
        values: `[capacity, block_size, block_size]`.
        gradient: of the same shape and dtype.

    Returns:
        fp32 `[capacity]`.

    >>> block_work(torch.tensor([[[3.0, 1.0]]]), torch.tensor([[[2.0, -1.0]]]))
    tensor([5.])
    """
    # A batched product of a row and a column: a sum of `values * gradient` would first write it.
    work: Tensor = torch.linalg.vecdot(values.detach().flatten(1), gradient.flatten(1))
    return work.float()


def program(dtype: torch.dtype) -> Program:
    """Return the program of `block_work`."""
    options = compiler_options({"T": DTYPES[dtype], "LAYERS": _LAYERS})
    return Program("block_work.cu", options, _THREADS, 0)


def _launch(
    kernel: Kernel[Program], layers: Sequence[tuple[Tensor, Tensor, WorkSums]], scale: float
) -> None:
    numbers = tuple(
        (values.data_ptr(), gradient.data_ptr(), *sums.fixed, values.nbytes)
        for values, gradient, sums in layers
    )
    thread_blocks = -(-_THREAD_BLOCKS_A_PROCESSOR * kernel.processors // len(layers))
    kernel.launch(thread_blocks, len(layers), scale, _table(numbers))


@functools.lru_cache
def _table(layers: tuple[tuple[int, ...], ...]) -> bytes:
    """Pack what the kernel takes; a training mostly finds its gradients where they were before."""
    return b"".join(
        _LAYER.pack(*pointers, slots, n_bytes // (16 * slots))
        for *pointers, slots, n_bytes in layers
    )


@build_once
def _kernel(dtype: torch.dtype, device: int) -> Kernel[Program]:
    return Kernel(program(dtype), "block_work", f"f4x{_LAYERS * _LAYER.size}s", device)
