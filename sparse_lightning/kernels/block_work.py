"""The work of blocks, sum of w * g, as a training gathers it: for many layers in one launch.

Not an op as the others are: nobody differentiates or compiles it, and it runs between the steps of
a training, where the host's time counts.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse_lightning.kernels.launch import Kernel, build_once, packed
from sparse_lightning.kernels.programs import DTYPES, Program, compiler_options
from sparse_lightning.sharding import local_part

_THREADS = 256
_THREAD_BLOCKS_A_PROCESSOR = 4  # of all layers together
_LAYERS = 64  # in a launch: the driver takes 4 KiB of arguments
_LAYER = struct.Struct("PPPPPii")
_MOST_KNOWN = 64

# A kernel, its grid (thread blocks a layer, layers) and its table of layers.
_Launch = tuple[Kernel[Program], int, int, bytes]


@dataclass(eq=False)
class WorkSums:
    """What is known of the work of the slots that this rank holds of a layer; fp32, on its device.

    Attributes:
        work: of the latest step, not yet in the sums.
        saliency: sum of |work| over steps, or None.
        movement: sum of -work over steps, or None.
    """

    work: Tensor
    saliency: Tensor | None
    movement: Tensor | None

    @classmethod
    def zeros(cls, capacity: int, device: torch.device, wanted: Collection[str]) -> WorkSums:
        """Begin at zero, with those sums that are wanted by name."""
        work = torch.zeros(capacity, dtype=torch.float32, device=device)
        names = ("saliency", "movement")
        return cls(work, *(torch.zeros_like(work) if n in wanted else None for n in names))

    def each(self, function: Callable[[Tensor], Tensor]) -> WorkSums:
        """Return what a function makes of each tensor."""
        sums = (None if t is None else function(t) for t in (self.saliency, self.movement))
        return WorkSums(function(self.work), *sums)

    def take_in(self) -> None:
        """Add what `work` holds to the sums."""
        size = self.work.abs()  # before anything is written, as it may fail for want of memory
        if self.saliency is not None:
            self.saliency += size
        if self.movement is not None:
            self.movement -= self.work
        self.work.zero_()


class BlockWork:
    """Adds up the work of the blocks of some layers; on a GPU of all in one launch.

    Args:
        layers: of each `values`, `[capacity, B, B]`, whose capacity and device stay, and its sums.
            Of sharded ones, a rank does its own slots.
    """

    def __init__(self, layers: Iterable[tuple[nn.Parameter, WorkSums]]) -> None:
        self.layers = [*layers]
        self._on_cpu = [layer for layer in self.layers if not layer[0].is_cuda]
        self._on_cuda = [layer for layer in self.layers if layer[0].is_cuda]
        # By where weights and gradients are: a training mostly finds its gradients where they were
        # some steps before, and to look at each more closely costs the host its time.
        self._known: dict[tuple[int, ...], list[_Launch]] = {}

    @torch.no_grad()
    def add(self, scale: float) -> None:
        """Take the work of an earlier step into the sums, and set that of this one.

        A layer without a gradient is passed over; work that is not finite counts as zero.

        Args:
            scale: what the gradients are multiplied by.
        """
        for values, sums in self._on_cpu:
            if values.grad is not None:
                sums.take_in()
                work = block_work(local_part(values), local_part(values.grad)) / scale
                sums.work.copy_(torch.where(work.isfinite(), work, 0))
        if self._on_cuda:
            self._add_on_cuda(scale)

    def _add_on_cuda(self, scale: float) -> None:
        weights = [local_part(values) for values, _ in self._on_cuda]
        gradients = [
            None if values.grad is None else local_part(values.grad) for values, _ in self._on_cuda
        ]
        key = (
            *(0 if g is None or not g.is_contiguous() else g.data_ptr() for g in gradients),
            *(values.data_ptr() for values in weights),
        )
        launches = self._known.get(key)
        if launches is None:
            launches, copies = self._prepare(weights, gradients)
            if 0 not in key and not copies:
                if len(self._known) == _MOST_KNOWN:
                    self._known.clear()
                self._known[key] = launches
        for kernel, thread_blocks, n_layers, table in launches:
            kernel.launch(thread_blocks, n_layers, scale, table)

    def _prepare(
        self, weights: list[Tensor], gradients: list[Tensor | None]
    ) -> tuple[list[_Launch], list[Tensor]]:
        """Return what is to be launched, and the copies that it reads in place of operands."""
        tables: dict[tuple[torch.dtype, int], list[bytes]] = {}
        copies: list[Tensor] = []
        for (_, sums), values, gradient in zip(self._on_cuda, weights, gradients, strict=True):
            if gradient is None or not values.numel():
                continue
            operands = packed(values), packed(gradient)
            copies += [o for o in operands if o is not values and o is not gradient]
            pointers = (
                0 if tensor is None else tensor.data_ptr()
                for tensor in (*operands, sums.work, sums.saliency, sums.movement)
            )
            row = _LAYER.pack(*pointers, len(values), values[0].nbytes // 16)
            tables.setdefault((values.dtype, values.get_device()), []).append(row)
        launches = []
        for kind, rows in tables.items():
            kernel = _kernel(*kind)
            for first in range(0, len(rows), _LAYERS):
                part = rows[first : first + _LAYERS]
                thread_blocks = -(-_THREAD_BLOCKS_A_PROCESSOR * kernel.processors // len(part))
                launches.append((kernel, thread_blocks, len(part), b"".join(part)))
        return launches, copies


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
    # In half precision the sum would be rounded, and what is left of terms that cancel be lost.
    dtype = torch.promote_types(values.dtype, torch.float32)
    rows, columns = (tensor.detach().flatten(1).to(dtype) for tensor in (values, gradient))
    work: Tensor = torch.linalg.vecdot(rows, columns)
    return work.float()


def program(dtype: torch.dtype) -> Program:
    """Return the program of `block_work`."""
    options = compiler_options({"T": DTYPES[dtype], "LAYERS": _LAYERS})
    return Program("block_work.cu", options, _THREADS, 0)


@build_once
def _kernel(dtype: torch.dtype, device: int) -> Kernel[Program]:
    return Kernel(program(dtype), "block_work", f"f4x{_LAYERS * _LAYER.size}s", device)
