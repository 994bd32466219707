"""`BlockTopology`: which blocks of a weight are present, and in which slot each is stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_lightning import nm_pattern

BLOCK_SIZES = (16, 32, 64, 128)

# The state vector is [format, block_size, out_blocks, in_blocks, capacity, row, col, row, ...]. The
# format is negative if the dense weight is stored transposed, as in Transformers' `Conv1D`. In
# format 2 the positions of a 2:4 pattern follow, with two bytes in each number: means of equal
# state dicts, in fp32, then stay exact.
STATE_FORMAT = 1
_STATE_FORMAT_NM = 2
_STATE_HEADER = 5
# Largest grid accepted from a state vector: 17 billion weights in the smallest blocks.
_MAX_BLOCKS = 2**26


class Indices(NamedTuple):
    """The index tensors of a topology, in the order in which the ops take them.

    `BlockTopology` describes the fields.
    """

    coords: Tensor
    row_offsets: Tensor
    row_entries: Tensor
    col_offsets: Tensor
    col_entries: Tensor
    slots: Tensor
    positions: Tensor | None


class BlockTopology:
    """The present blocks of an `[out_features, in_features]` weight.

    The weight is a grid of `block_size` x `block_size` blocks. A present block is stored in a
    *slot* of the `values` tensor `[capacity, block_size, block_size]`. `coords` gives the block in
    each slot; the other index tensors are derived from it. `assign_` updates all of them in place,
    so compiled graphs and CUDA graphs stay valid.

    With `positions`, blocks are 2:4 sparse: `values` is `[capacity, block_size, block_size / 2]`
    and holds two of each four neighbouring weights of a row.

    Attributes:
        coords: int32 `[capacity, 2]`, (block row, block column) of each slot; (-1, -1) if empty.
        row_offsets: int32 `[out_blocks + 1]`, where each block row begins in `row_entries`.
        row_entries: int32 `[capacity, 2]`, the (block column, slot) of each block, sorted by row
            and then column; empty slots follow as (-1, slot).
        col_offsets: int32 `[in_blocks + 1]`, where each block column begins in `col_entries`.
        col_entries: int32 `[capacity, 2]`, the (block row, slot) of each block, sorted by column
            and then row; empty slots follow as (-1, slot).
        slots: int32 `[out_blocks, in_blocks]`, the slot of each block; -1 if the block is absent.
        positions: uint8 `[capacity, block_size, block_size / 8]`, which weights of each block are
            kept, as `sparse_lightning.nm_pattern` describes; None if blocks are whole.
        grid: (out_blocks, in_blocks).
        block_size: number of rows and columns of a block.
        n_blocks: number of present blocks.

    Args:
        coords: integer `[capacity, 2]`, as above. The tensor is copied.
        grid: (out_blocks, in_blocks).
        block_size: 16, 32, 64 or 128.
        positions: as above. The tensor is copied.

    Raises:
        ValueError: if a coordinate is outside the grid or appears twice, or if the block size is
            not supported.

    >>> topology = BlockTopology.from_mask(torch.eye(2, dtype=torch.bool), block_size=16)
    >>> topology
    BlockTopology(32x32, block_size=16, n_blocks=2/4, capacity=2)
    >>> topology.row_entries.tolist()
    [[0, 0], [1, 1]]
    """

    def __init__(
        self,
        coords: Tensor,
        grid: tuple[int, int],
        block_size: int,
        positions: Tensor | None = None,
    ) -> None:
        check_block_size(block_size)
        if coords.dim() != 2 or coords.shape[1] != 2:
            raise ValueError(
                f"`coords` must have shape [capacity, 2]; got {list(coords.shape)}. "
                "Give one (row, column) pair a slot, or use BlockTopology.from_mask."
            )
        if min(grid) < 1:
            raise ValueError(f"`grid` must have at least one block each way; got {grid}.")
        self.block_size = block_size
        self.grid = (int(grid[0]), int(grid[1]))
        capacity, device = coords.shape[0], coords.device
        out_blocks, in_blocks = self.grid

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.int32, device=device)

        self.coords = empty(capacity, 2)
        self.row_offsets, self.row_entries = empty(out_blocks + 1), empty(capacity, 2)
        self.col_offsets, self.col_entries = empty(in_blocks + 1), empty(capacity, 2)
        self.row_offsets[0] = self.col_offsets[0] = 0
        self.slots = empty(out_blocks, in_blocks)
        self.positions: Tensor | None = None
        if positions is not None:
            _check_positions(positions, capacity, block_size)
            self.positions = positions.to(device, copy=True)
        self._shared = False
        self.assign_(coords)

    @classmethod
    def from_mask(
        cls, mask: Tensor, block_size: int, *, capacity: int | None = None
    ) -> BlockTopology:
        """Build the topology whose present blocks are the True entries of a block mask.

        Args:
            mask: bool `[out_features / block_size, in_features / block_size]`.
            block_size: 16, 32, 64 or 128.
            capacity: number of slots; the number of present blocks if None.

        Raises:
            TypeError: if `mask` is not bool.
            ValueError: if `mask` is not 2-D or holds more blocks than `capacity`.
        """
        if mask.dtype != torch.bool:
            raise TypeError(f"`mask` must be a bool tensor; got {mask.dtype}. Use mask != 0.")
        if mask.dim() != 2:
            raise ValueError(f"`mask` must be 2-D [out_blocks, in_blocks]; got {list(mask.shape)}.")
        present = mask.nonzero()
        n_blocks = present.shape[0]
        if capacity is None:
            capacity = n_blocks
        if n_blocks > capacity:
            raise ValueError(
                f"`capacity` must be at least the number of blocks; got {capacity} for "
                f"{n_blocks} blocks. Raise it or drop blocks from the mask."
            )
        coords = torch.full((capacity, 2), -1, dtype=torch.int32, device=mask.device)
        coords[:n_blocks] = present.to(torch.int32)
        return cls(coords, (mask.shape[0], mask.shape[1]), block_size)

    @classmethod
    def random(
        cls,
        out_features: int,
        in_features: int,
        block_size: int,
        density: float | None = None,
        *,
        n_blocks: int | None = None,
        capacity: int | None = None,
        nm: str | None = None,
        generator: torch.Generator | None = None,
    ) -> BlockTopology:
        """Draw the present blocks uniformly, without replacement.

        Args:
            out_features: rows of the weight, a multiple of `block_size`.
            in_features: columns of the weight, a multiple of `block_size`.
            block_size: 16, 32, 64 or 128.
            density: present blocks / all blocks, in (0, 1]; rounded to at least one block.
            n_blocks: the exact number of blocks, instead of `density`.
            capacity: number of slots; the number of blocks if None.
            nm: "2:4" to keep two random weights of each four within blocks; None to keep all.
            generator: CPU generator; PyTorch's default generator if None.

        Raises:
            ValueError: if the features are not divisible by the block size, or the density or
                number of blocks is out of range.
        """
        grid = block_grid(out_features, in_features, block_size)
        total = grid[0] * grid[1]
        if (density is None) == (n_blocks is None):
            raise ValueError("Exactly one of `density` and `n_blocks` must be given.")
        if n_blocks is None:
            assert density is not None
            n_blocks = count_blocks(density, total)
        if not 0 <= n_blocks <= total:
            raise ValueError(f"`n_blocks` must be in 0..{total}; got {n_blocks}.")
        mask = torch.zeros(total, dtype=torch.bool, device="cpu")
        mask[torch.randperm(total, generator=generator, device="cpu")[:n_blocks]] = True
        topology = cls.from_mask(mask.view(grid), block_size, capacity=capacity)
        return topology.with_random_positions(nm, generator)

    def with_random_positions(
        self, nm: str | None, generator: torch.Generator | None = None
    ) -> BlockTopology:
        """Return the same blocks with the pattern `nm`, each pair of weights being equally likely.

        Args:
            nm: "2:4"; or None, which returns this topology.
            generator: CPU generator; PyTorch's default generator if None.
        """
        if nm_pattern.check_nm(nm) is None:
            return self
        positions = nm_pattern.random_positions(self.capacity, self.block_size, generator)
        return BlockTopology(self.coords, self.grid, self.block_size, positions)

    def with_first_positions(self, nm: str | None) -> BlockTopology:
        """Return the same blocks with the pattern `nm`, keeping the first weights of each four.

        Args:
            nm: "2:4"; or None, which returns this topology.
        """
        if nm_pattern.check_nm(nm) is None:
            return self
        positions = nm_pattern.first_positions(self.capacity, self.block_size)
        return BlockTopology(self.coords, self.grid, self.block_size, positions)

    def with_largest_positions(self, nm: str | None, weight: Tensor) -> BlockTopology:
        """Return the same blocks with the pattern `nm`, keeping the largest weights of each four.

        Args:
            nm: "2:4"; or None, which returns this topology.
            weight: `[out_features, in_features]`.
        """
        if nm_pattern.check_nm(nm) is None:
            return self
        positions = nm_pattern.largest_positions(self._blocks_of(weight))
        return BlockTopology(self.coords, self.grid, self.block_size, positions)

    def clone(self) -> BlockTopology:
        """Return a copy, whose indices are not in shared memory."""
        return BlockTopology(self.coords, self.grid, self.block_size, self.positions)

    def select(self, slots: Tensor) -> BlockTopology:
        """Return the topology that consists of these slots, int64 `[n]`, in their order."""
        positions = None if self.positions is None else self.positions[slots]
        return BlockTopology(self.coords[slots], self.grid, self.block_size, positions)

    @classmethod
    def from_state(cls, state: Tensor) -> BlockTopology:
        """Rebuild a topology, on the CPU, from the int32 vector of `to_state`.

        Raises:
            ValueError: if `to_state` cannot have written the vector.
        """
        is_vector = isinstance(state, Tensor) and state.dim() == 1 and state.dtype == torch.int32
        header = state[:_STATE_HEADER].tolist() if is_vector else []
        formats = STATE_FORMAT, _STATE_FORMAT_NM
        if len(header) < _STATE_HEADER or abs(header[0]) not in formats:
            raise ValueError(
                f"The saved topology must be an int32 vector of format {STATE_FORMAT} or "
                f"{_STATE_FORMAT_NM}; "
                f"got header {header}. "
                "Load it with the version of sparse_lightning that wrote it."
            )
        _, block_size, out_blocks, in_blocks, capacity = header
        if not 0 < out_blocks * in_blocks <= _MAX_BLOCKS:
            raise ValueError(
                f"The saved topology must have a grid of 1..{_MAX_BLOCKS} blocks; "
                f"got {out_blocks}x{in_blocks}. The checkpoint is damaged."
            )
        has_positions = abs(header[0]) == _STATE_FORMAT_NM
        per_slot = 2 + (block_size**2 // 16 if has_positions else 0)
        body = state[_STATE_HEADER:].cpu()
        if body.numel() != per_slot * capacity:
            raise ValueError(
                f"The saved topology must hold {capacity} slots by its header; "
                f"got {body.numel() // max(1, per_slot)}. The checkpoint is damaged."
            )
        coords, rest = body[: 2 * capacity].view(capacity, 2), body[2 * capacity :]
        positions = None
        if has_positions:
            positions = torch.stack([rest & 255, rest >> 8], -1).to(torch.uint8)
            positions = positions.view(capacity, block_size, block_size // 8)
            if not nm_pattern.are_valid(positions):
                raise ValueError(
                    "The saved topology must keep two of each four weights of a block; got another "
                    "number. The checkpoint is damaged."
                )
        return cls(coords, (out_blocks, in_blocks), block_size, positions)

    def to_state(self, transposed: bool = False) -> Tensor:
        """Return the topology as one int32 vector whose length depends only on the capacity.

        Args:
            transposed: whether the dense weight is stored as `[in_features, out_features]`. The
                vector records this for code that builds dense weights from a state dict.
        """
        number = STATE_FORMAT if self.positions is None else _STATE_FORMAT_NM
        header = torch.tensor(
            [
                -number if transposed else number,
                self.block_size,
                *self.grid,
                self.capacity,
            ],
            dtype=torch.int32,
            device=self.device,
        )
        if self.positions is None:
            return torch.cat([header, self.coords.flatten()])
        low, high = self.positions.flatten().int().view(-1, 2).unbind(1)
        return torch.cat([header, self.coords.flatten(), low | high << 8])

    def assign_(self, coords: Tensor, positions: Tensor | None = None) -> BlockTopology:
        """Assign new coordinates to the slots and rebuild the indices, in place.

        Args:
            coords: integer `[capacity, 2]`; (-1, -1) for an empty slot.
            positions: new positions of the weights in blocks; None to leave them.

        Raises:
            ValueError: if the capacity differs, a coordinate is outside the grid, or two slots
                hold the same block. The topology is then unchanged.
        """
        self._prepare_assign(coords, positions)()
        return self

    def _prepare_assign(
        self, coords: Tensor, positions: Tensor | None = None
    ) -> Callable[[], None]:
        """Validate the coordinates and return a function that performs the assignment.

        All allocation and validation happens here. The returned function only writes in place, so
        it cannot fail.
        """
        if coords.shape != self.coords.shape:
            raise ValueError(
                f"`coords` must keep the capacity {self.capacity}; got {coords.shape[0]} slots."
            )
        out_blocks, in_blocks = self.grid
        rows, cols = coords.to(torch.int64).unbind(1)
        present = rows >= 0
        inside = present & (rows < out_blocks) & (cols >= 0) & (cols < in_blocks)
        empty = (rows == -1) & (cols == -1)
        if not bool((inside | empty).all()):
            slot = int((~(inside | empty)).nonzero()[0, 0])
            raise ValueError(
                f"`coords` must be inside the {out_blocks}x{in_blocks} grid or be (-1, -1); "
                f"got {tuple(coords[slot].tolist())} in slot {slot}."
            )
        filled, unused = present.nonzero().squeeze(1), (~present).nonzero()
        n_blocks = len(filled)
        slots = torch.full(self.grid, -1, dtype=torch.int64, device=coords.device)
        slots[rows[filled], cols[filled]] = filled
        if int((slots >= 0).sum()) < n_blocks:
            raise ValueError("`coords` must not hold a block twice; got a repeated (row, column).")

        writes = [(self.coords, coords), (self.slots, slots)]
        empty_entries = torch.cat([torch.full_like(unused, -1), unused], 1)
        for offsets, entries, slot_of in (
            (self.row_offsets, self.row_entries, slots),
            (self.col_offsets, self.col_entries, slots.T),
        ):
            is_present = slot_of >= 0
            block_entries = torch.stack([is_present.nonzero()[:, 1], slot_of[is_present]], 1)
            writes.append((entries, torch.cat([block_entries, empty_entries])))
            writes.append((offsets[1:], is_present.sum(1).cumsum(0)))
        if positions is not None:
            if self.positions is None:
                raise ValueError("`positions` must be None for whole blocks; got some.")
            _check_positions(positions, self.capacity, self.block_size)
            writes.append((self.positions, positions))
        # A copy between devices that also converts the dtype would allocate memory.
        writes = [(target, source.to(target.dtype)) for target, source in writes]

        def write() -> None:
            for target, source in writes:
                target.copy_(source)
            self.n_blocks = n_blocks

        return write

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Spawned processes share the memory of pickled CPU tensors. Unless `share_memory_` was
        # called, clone the indices, so that a process cannot change those of another.
        keep_shared = state.get("_shared", False) and _is_shared(state["coords"])
        for name, value in state.items():
            unshare = not keep_shared and isinstance(value, Tensor) and _is_shared(value)
            self.__dict__[name] = value.clone() if unshare else value
        self._shared = keep_shared

    def share_memory_(self) -> BlockTopology:
        """Move the indices to shared memory, as `Tensor.share_memory_` does for a tensor.

        Processes started afterwards see each other's changes. `n_blocks` stays local to a process.
        """
        for value in vars(self).values():
            if isinstance(value, Tensor):
                value.share_memory_()
        self._shared = True
        return self

    @property
    def is_shared(self) -> bool:
        """Whether `share_memory_` has moved the indices to shared memory."""
        return self._shared

    def to_(self, device: torch.device) -> BlockTopology:
        """Move every index tensor to `device`; the topology object stays the same."""
        for name, value in [*vars(self).items()]:
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        self._shared = self._shared and _is_shared(self.coords)
        return self

    def pack(self, weight: Tensor) -> Tensor:
        """Return the kept weights of a dense weight by slot, with zeros in empty slots.

        Args:
            weight: `[out_features, in_features]`, any dtype.

        Returns:
            Tensor of `values_shape`, with the dtype and device of `weight`.
        """
        return self.compress(self._blocks_of(weight))

    def _blocks_of(self, weight: Tensor) -> Tensor:
        """Return the present blocks of a dense weight as `[capacity, block_size, block_size]`."""
        if weight.shape != (self.out_features, self.in_features):
            raise ValueError(
                f"`weight` must have shape [{self.out_features}, {self.in_features}]; "
                f"got {list(weight.shape)}."
            )
        rows, cols = self.coords.to(weight.device).long().unbind(1)
        blocks = _as_blocks(weight, self.grid, self.block_size)[rows, cols]
        return blocks.masked_fill((rows < 0).view(-1, 1, 1), 0)

    def unpack(self, values: Tensor) -> Tensor:
        """Return the dense weight made of the blocks in `values`, with zeros at absent weights.

        Args:
            values: tensor of `values_shape`, any dtype.

        Returns:
            `[out_features, in_features]`, with the dtype and device of `values`.
        """
        values = self.expand(values)
        weight = values.new_zeros(self.out_features, self.in_features)
        coords = self.coords.to(values.device).long()
        slots = (coords[:, 0] >= 0).nonzero().squeeze(1)
        rows, cols = coords[slots].unbind(1)
        _as_blocks(weight, self.grid, self.block_size)[rows, cols] = values[slots]
        return weight

    def expand(self, values: Tensor) -> Tensor:
        """Return whole blocks, `[capacity, block_size, block_size]`, of a tensor of `values_shape`.

        Weights that the pattern does not keep are zero. Without a pattern it returns the tensor.
        """
        if self.positions is None:
            return values
        return nm_pattern.expand(values, self.positions.to(values.device))

    def compress(self, blocks: Tensor) -> Tensor:
        """Return the weights that the pattern keeps of whole blocks; the inverse of `expand`."""
        if self.positions is None:
            return blocks
        return nm_pattern.compress(blocks, self.positions.to(blocks.device))

    def equals(self, other: BlockTopology) -> bool:
        """Return whether both have the same blocks and weights, slot by slot, on any devices."""
        if (self.grid, self.values_shape) != (other.grid, other.values_shape):
            return False
        return all(
            mine is None or theirs is None or torch.equal(mine, theirs.to(mine.device))
            for mine, theirs in (
                (self.coords, other.coords),
                (self.positions, other.positions),
            )
        )

    def scatter(self, slot_values: Tensor, fill: float) -> Tensor:
        """Arrange one number per slot on the block grid.

        Args:
            slot_values: `[capacity]`.
            fill: number for absent blocks.

        Returns:
            `[out_blocks, in_blocks]`, with the dtype of `slot_values`.
        """
        # Index -1 (absent) picks the appended fill.
        padded = torch.cat([slot_values, slot_values.new_full((1,), fill)])
        return padded[self.slots.to(slot_values.device).long()]

    @property
    def indices(self) -> Indices:
        """The index tensors, in the order in which the ops take them."""
        return Indices(
            self.coords,
            self.row_offsets,
            self.row_entries,
            self.col_offsets,
            self.col_entries,
            self.slots,
            self.positions,
        )

    @property
    def nm(self) -> str | None:
        """The pattern within blocks, "2:4"; None if blocks are whole."""
        return None if self.positions is None else "2:4"

    @property
    def values_shape(self) -> tuple[int, int, int]:
        """Shape of `values`: `[capacity, block_size, block_size]`, half as wide for 2:4."""
        width = self.block_size if self.positions is None else self.block_size // 2
        return self.capacity, self.block_size, width

    @property
    def weights_per_block(self) -> int:
        """Number of weights that a present block keeps."""
        return self.values_shape[1] * self.values_shape[2]

    @property
    def mask(self) -> Tensor:
        """The block mask: bool `[out_blocks, in_blocks]`, a new tensor."""
        return self.slots >= 0

    @property
    def capacity(self) -> int:
        """The number of slots, filled or empty."""
        return self.coords.shape[0]

    @property
    def density(self) -> float:
        """Present blocks / all blocks."""
        return self.n_blocks / (self.grid[0] * self.grid[1])

    @property
    def weight_density(self) -> float:
        """Kept weights / all weights."""
        return self.density * self.weights_per_block / self.block_size**2

    @property
    def out_features(self) -> int:
        return self.grid[0] * self.block_size

    @property
    def in_features(self) -> int:
        return self.grid[1] * self.block_size

    @property
    def device(self) -> torch.device:
        return self.coords.device

    def __repr__(self) -> str:
        return (
            f"BlockTopology({self.out_features}x{self.in_features}, "
            f"block_size={self.block_size}, "
            f"n_blocks={self.n_blocks}/{self.grid[0] * self.grid[1]}, capacity={self.capacity}"
            + (")" if self.nm is None else f", nm={self.nm!r})")
        )


def is_transposed_state(state: Tensor) -> bool:
    """Return whether a `to_state` vector describes a dense weight that is stored transposed."""
    return int(state[0]) < 0


def check_block_size(block_size: int) -> None:
    """Raise ValueError unless the block size is one of `BLOCK_SIZES`."""
    if type(block_size) is not int or block_size not in BLOCK_SIZES:
        raise ValueError(f"`block_size` must be one of {BLOCK_SIZES}; got {block_size!r}.")


def check_density(density: float, argument: str = "density") -> None:
    """Raise ValueError unless the density is a number in (0, 1]."""
    is_number = isinstance(density, (int, float)) and not isinstance(density, bool)
    if not (is_number and 0 < density <= 1):
        raise ValueError(
            f"`{argument}` must be a number in (0, 1], the share of blocks that are present; "
            f"got {density!r}."
        )


def block_grid(out_features: int, in_features: int, block_size: int) -> tuple[int, int]:
    """Return (out_blocks, in_blocks), the block grid of a weight.

    Raises:
        ValueError: if a dimension is not a positive multiple of the block size.

    >>> block_grid(64, 96, 32)
    (2, 3)
    """
    check_block_size(block_size)
    for name, size in (("out_features", out_features), ("in_features", in_features)):
        if size < 1 or size % block_size:
            raise ValueError(
                f"`{name}` must be a positive multiple of block_size={block_size}; got {size}. "
                "Pad the layer or choose a smaller block size."
            )
    return out_features // block_size, in_features // block_size


def count_blocks(density: float, total: int) -> int:
    """Return the number of blocks nearest to a density, at least one.

    >>> count_blocks(0.1, 256), count_blocks(0.001, 16)
    (26, 1)
    """
    check_density(density)
    return max(1, round(density * total))


def count_dead(mask: Tensor) -> tuple[int, int]:
    """Return the number of block rows and of block columns without any block.

    The outputs of such a row are dead, and the inputs of such a column are unread.

    >>> count_dead(torch.tensor([[True, False, False], [True, False, True]]))
    (0, 1)
    """
    return int((~mask.any(1)).sum()), int((~mask.any(0)).sum())


def _check_positions(positions: Tensor, capacity: int, block_size: int) -> None:
    """Raise ValueError unless positions are uint8 `[capacity, block_size, block_size / 8]`."""
    expected = capacity, block_size, block_size // 8
    if positions.dtype != torch.uint8 or tuple(positions.shape) != expected:
        raise ValueError(
            f"`positions` must be uint8 {list(expected)}; "
            f"got {positions.dtype} {list(positions.shape)}."
        )


def _is_shared(tensor: Tensor) -> bool:
    """Return whether a CPU tensor is in shared memory; `is_shared` is True for any CUDA tensor."""
    return tensor.device.type == "cpu" and tensor.is_shared()


def _as_blocks(weight: Tensor, grid: tuple[int, int], block_size: int) -> Tensor:
    """View a `[out, in]` weight as `[out_blocks, in_blocks, block_size, block_size]`."""
    rows: Tensor = weight.unflatten(0, (grid[0], block_size))
    blocks: Tensor = rows.unflatten(2, (grid[1], block_size))
    return blocks.transpose(1, 2)
