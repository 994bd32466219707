"""The work of blocks, the sum of w * g, for many layers in one launch.

This is not an op: it is neither differentiated nor compiled by `torch.compile`, and it runs between
optimizer steps, where host time matters.
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

_THREAD_BLOCKS_PER_SM = 4  # summed over all layers
_LAYERS = 64  # per launch; arguments are limited to 4 KiB
_LAYER = struct.Struct("PPPPPii")
_MAX_CACHED = 64

# A kernel, its grid (thread blocks per layer, layers) and its table of layers.
_Launch = tuple[Kernel[Program], int, int, bytes]


@dataclass(eq=False)
class WorkSums:
    """The work of a layer's slots on this rank, and its sums over steps, in fp32.

    Attributes:
        work: work of the latest step, not yet part of the sums.
        saliency: sum of |work| over steps, or None.
        movement: sum of -work over steps, or None.
    """

    work: Tensor
    saliency: Tensor | None
    movement: Tensor | None

    @classmethod
    def zeros(cls, capacity: int, device: torch.device, wanted: Collection[str]) -> WorkSums:
        """Return zeros; only sums named in `wanted` are not None."""
        work = torch.zeros(capacity, dtype=torch.float32, device=device)
        names = ("saliency", "movement")
        return cls(work, *(torch.zeros_like(work) if n in wanted else None for n in names))

    def map(self, function: Callable[[Tensor], Tensor]) -> WorkSums:
        """Return the sums with a function applied to each tensor."""
        sums = (None if t is None else function(t) for t in (self.saliency, self.movement))
        return WorkSums(function(self.work), *sums)

    def accumulate(self) -> None:
        """Add `work` to the sums, and set it to zero."""
        size = self.work.abs()  # first: if it runs out of memory, nothing has been modified
        if self.saliency is not None:
            self.saliency += size
        if self.movement is not None:
            self.movement -= self.work
        self.work.zero_()


class BlockWork:
    """Sums the work of the blocks of several layers, on a GPU in one launch.

    Args:
        layers: each layer's `values`, `[capacity, B, B]`, and sums. The capacity and the device
            must not change. For sharded values, each rank handles its own slots.
    """

    def __init__(self, layers: Iterable[tuple[nn.Parameter, WorkSums]]) -> None:
        self.layers = [*layers]
        self._on_cpu = [layer for layer in self.layers if not layer[0].is_cuda]
        self._on_cuda = [layer for layer in self.layers if layer[0].is_cuda]
        # Keyed by addresses: gradients mostly return to addresses that they had a few steps
        # before, and preparing a launch costs host time.
        self._prepared: dict[tuple[int, ...], list[_Launch]] = {}

    @torch.no_grad()
    def add(self, scale: float) -> None:
        """Add the work of the previous step to the sums, and store that of this step.

        Layers without a gradient are skipped; work that is not finite counts as zero.

        Args:
            scale: factor that a loss scaler has applied to the gradients.
        """
        for values, sums in self._on_cpu:
            if values.grad is not None:
                sums.accumulate()
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
        launches = self._prepared.get(key)
        if launches is None:
            launches, copies = self._prepare(weights, gradients)
            if 0 not in key and not copies:
                if len(self._prepared) == _MAX_CACHED:
                    self._prepared.clear()
                self._prepared[key] = launches
        for kernel, thread_blocks, n_layers, table in launches:
            kernel.launch(thread_blocks, n_layers, scale, table)

    def _prepare(
        self, weights: list[Tensor], gradients: list[Tensor | None]
    ) -> tuple[list[_Launch], list[Tensor]]:
        """Return the launches, and the copies that they read where operands are not packed."""
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
                batch = rows[first : first + _LAYERS]
                thread_blocks = -(-_THREAD_BLOCKS_PER_SM * kernel.sm_count // len(batch))
                launches.append((kernel, thread_blocks, len(batch), b"".join(batch)))
        return launches, copies


def block_work(values: Tensor, gradient: Tensor) -> Tensor:
    """Return the sum of w * g of each slot, in fp32.

    Args:
        values: `[capacity, block_size, block_size]`.
        gradient: gradient of `values`, with the same shape and dtype.

    Returns:
        fp32 `[capacity]`.

    >>> block_work(torch.tensor([[[3.0, 1.0]]]), torch.tensor([[[2.0, -1.0]]]))
    tensor([5.])
    """
    # A batched dot product does not materialise `values * gradient`. In half precision, rounding
    # would lose what remains of terms that cancel.
    dtype = torch.promote_types(values.dtype, torch.float32)
    rows, columns = (tensor.detach().flatten(1).to(dtype) for tensor in (values, gradient))
    work: Tensor = torch.linalg.vecdot(rows, columns)
    return work.float()


def program(dtype: torch.dtype) -> Program:
    """Return the program of `block_work`."""
    options = compiler_options({"T": DTYPES[dtype], "LAYERS": _LAYERS})
    return Program("block_work.cu", options)


@build_once
def _kernel(dtype: torch.dtype, device: int) -> Kernel[Program]:
    return Kernel(program(dtype), "block_work", f"f4x{_LAYERS * _LAYER.size}s", device)
