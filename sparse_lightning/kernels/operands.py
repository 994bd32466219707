"""Bundles of a layer's arguments for the ops and the backends."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from sparse_lightning.topology import Indices


class BlockLists(NamedTuple):
    """The blocks that each output block of a product sums over.

    Attributes:
        offsets: int32 `[output blocks + 1]`, where the list of each output block begins in
            `entries`.
        entries: int32 `[capacity, 2]`, the (input block, slot) of each block; empty slots last.
        slots: int32 `[out_blocks, in_blocks]`, the slot of each block of W, in the orientation of
            W for both directions; -1 if the block is absent.
    """

    offsets: Tensor
    entries: Tensor
    slots: Tensor

    @classmethod
    def of(cls, indices: Indices, *, forward: bool) -> BlockLists:
        """Return the lists of a layer for x W^T (`forward`) or x W."""
        if forward:
            return cls(indices.row_offsets, indices.row_entries, indices.slots)
        return cls(indices.col_offsets, indices.col_entries, indices.slots)


class LayerOperands(NamedTuple):
    """One layer's arguments for the ops, in the order of their schemas.

    `norms` is the leaf whose gradient is the block norms and `armed` the flag that enables them;
    both are None if no norms are requested. `ops` describes them, `BlockTopology` the indices.
    """

    values: Tensor
    bias: Tensor | None
    coords: Tensor
    row_offsets: Tensor
    row_entries: Tensor
    col_offsets: Tensor
    col_entries: Tensor
    slots: Tensor
    positions: Tensor | None
    norms: Tensor | None
    armed: Tensor | None
    token_stride: int

    @property
    def indices(self) -> Indices:
        """The index tensors."""
        return Indices(*self[2:9])

    @property
    def norm_operands(self) -> tuple[Tensor | None, Tensor | None, int]:
        """`norms`, `armed` and `token_stride`."""
        return self[9:]
