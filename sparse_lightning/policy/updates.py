"""Topology updates: which blocks are dropped, which are grown, and into which slots."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparse_lightning.topology import BlockTopology


@dataclass(frozen=True, repr=False)
class TopologyUpdate:
    """The result of an update of one layer, on the CPU.

    Attributes:
        coords: int32 `[capacity, 2]`, the new coordinates of every slot.
        dropped: int64 `[n_dropped]`, slots whose block was dropped; grown blocks may reuse them.
        grown: int64 `[n_grown]`, slots that hold a grown block.
        n_before: number of present blocks before the update.
    """

    coords: Tensor
    dropped: Tensor
    grown: Tensor
    n_before: int

    def __repr__(self) -> str:
        changed = f"dropped={len(self.dropped)}, grown={len(self.grown)}"
        return f"TopologyUpdate(blocks={self.n_before} -> {self.n_after}, {changed})"

    @property
    def n_after(self) -> int:
        """Number of present blocks after the update."""
        return self.n_before - len(self.dropped) + len(self.grown)

    @property
    def survival(self) -> float:
        """Share of the previously present blocks that are still present."""
        return 1 - len(self.dropped) / self.n_before if self.n_before else 1.0

    @property
    def churn(self) -> float:
        """Share of the present blocks that the update has grown."""
        return len(self.grown) / self.n_after if self.n_after else 0.0

    @property
    def stayed(self) -> Tensor:
        """Int32 `[n, 2]`, the (block row, block column) of blocks present before and after."""
        stayed = self.coords[:, 0] >= 0
        stayed[self.grown] = False
        return self.coords[stayed]

    @functools.cached_property
    def changed(self) -> Tensor:
        """Int64, ascending: slots that were dropped, grown or both, whose state is reset."""
        slots: Tensor = torch.cat([self.dropped, self.grown]).unique()
        return slots


@dataclass(frozen=True, repr=False)
class ModelUpdate:
    """The result of an update of the model.

    Attributes:
        step: number of optimizer steps so far.
        number: number of updates, including this one.
        layers: result for each layer, by name.
        drop_scores: `[out_blocks, in_blocks]` on the CPU, the scores by which blocks were kept, by
            layer; valid at blocks that were present.
        magnitudes: fp32 of the same shape, Frobenius norm of each block before the update; 0 where
            absent.
        density_target: scheduled density of the model; None without a schedule.
    """

    step: int
    number: int
    layers: dict[str, TopologyUpdate]
    drop_scores: Mapping[str, Tensor] = field(default_factory=dict)
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)
    density_target: float | None = None

    def __repr__(self) -> str:
        return f"ModelUpdate(step={self.step}, number={self.number}, layers={self.layers})"


def exchange_blocks(
    mask: Tensor,
    drop_scores: Tensor,
    grow_scores: Tensor | None,
    n_target: int,
    fraction: float,
    *,
    floor: tuple[int, int] = (0, 0),
    regrow: bool = True,
) -> Tensor:
    """Keep the most useful blocks, drop the others, and grow the most promising ones.

    `k = round(fraction * n_target)` blocks are exchanged, but no more than are absent: the
    `n_target - k` present blocks with the highest drop scores stay, then the `k` other blocks with
    the highest grow scores become present. A block that was just dropped may be chosen again and
    then keeps its weights (as in RigL). Ties go to the lower index (row-major). A block with a NaN
    or infinite score is never chosen; if growth cannot fill its budget, the best dropped blocks
    stay. Blocks are chosen on the CPU, since each of the many small operations would cost a kernel
    launch on a GPU.

    Args:
        mask: bool `[out_blocks, in_blocks]`, the present blocks.
        drop_scores: scores of the same shape, read at present blocks.
        grow_scores: scores of the same shape, read at the other blocks; None for no growth.
        n_target: number of present blocks afterwards; fewer if too few blocks can be chosen.
        fraction: share of `n_target` to exchange, in [0, 1].
        floor: minimum number of blocks of each block row and of each block column, both among the
            blocks that stay and after growth; ignored if `n_target` is too small for it.
        regrow: whether a block that was just dropped may be chosen again.

    Returns:
        bool `[out_blocks, in_blocks]` on the CPU, the blocks that are present afterwards.

    Raises:
        ValueError: if `n_target` is below 1, the fraction is outside [0, 1], or the shape of the
            scores differs from that of the mask.

    Source: Evci et al. 2020, "Rigging the Lottery", algorithm 1; Liu et al. 2021 (GraNet) for a
    falling density.

    >>> mask = torch.tensor([[True, True], [False, False]])
    >>> drop, grow = torch.tensor([[2.0, 1.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    >>> exchange_blocks(mask, drop, grow, n_target=2, fraction=0.5).int().tolist()
    [[1, 0], [0, 1]]
    """
    for name, scores in (("drop_scores", drop_scores), ("grow_scores", grow_scores)):
        if scores is not None and scores.shape != mask.shape:
            raise ValueError(
                f"`{name}` must have one score per block, {list(mask.shape)}; "
                f"got {list(scores.shape)}."
            )
    if n_target < 1:
        raise ValueError(f"`n_target` must be at least 1; got {n_target}.")
    if not 0 <= fraction <= 1:
        raise ValueError(f"`fraction` must be in [0, 1]; got {fraction}.")
    mask = mask.cpu()
    floor = feasible_floor(floor, (mask.shape[0], mask.shape[1]), n_target)
    n_exchanged = 0 if grow_scores is None else round(fraction * n_target)
    n_exchanged = min(n_exchanged, max(0, mask.numel() - n_target))

    drop_scores = drop_scores.cpu()
    keep = choose_blocks(drop_scores, mask, n_target - n_exchanged, floor=floor)
    if grow_scores is not None:
        candidates = ~keep if regrow else ~mask
        keep = choose_blocks(grow_scores.cpu(), candidates, n_target, floor=floor, chosen=keep)
    # Present blocks fill what growth could not; those without a finite score come last.
    for scores in (drop_scores, torch.zeros_like(drop_scores)):
        if int(keep.sum()) < n_target:
            keep = choose_blocks(scores, mask, n_target, floor=floor, chosen=keep)
    return keep


def place_blocks(topology: BlockTopology, mask: Tensor) -> TopologyUpdate:
    """Assign slots to the blocks of a new mask; blocks that stay keep their slots.

    Args:
        topology: current topology; it is not modified.
        mask: bool `[out_blocks, in_blocks]`, the new block mask.

    Raises:
        ValueError: if the mask has the wrong shape or dtype, or more blocks than there are slots.

    >>> topology = BlockTopology.from_mask(torch.tensor([[True, True], [False, False]]), 16)
    >>> update = place_blocks(topology, torch.tensor([[True, False], [False, True]]))
    >>> update.dropped.tolist(), update.grown.tolist(), update.coords.tolist()
    ([1], [1], [[0, 0], [1, 1]])
    """
    if mask.shape != topology.grid or mask.dtype != torch.bool:
        raise ValueError(
            f"`mask` must be bool {list(topology.grid)}, one element per block; "
            f"got {mask.dtype} {list(mask.shape)}."
        )
    keep = mask.cpu()
    if int(keep.sum()) > topology.capacity:
        raise ValueError(
            f"`mask` must have at most {topology.capacity} blocks, the capacity of the layer; got "
            f"{int(keep.sum())}. Build the layer at the highest density that it is to reach."
        )
    coords = topology.coords.cpu().clone()
    rows, cols = coords.long().unbind(1)
    present = rows >= 0
    kept = present & keep[rows, cols]
    dropped = (present & ~kept).nonzero().squeeze(1)
    held = torch.zeros_like(keep)
    held[rows[kept], cols[kept]] = True
    new_blocks = (keep & ~held).nonzero()
    # Slots of dropped blocks are reused before slots that were already empty.
    free = torch.cat([dropped, (~present).nonzero().squeeze(1)])
    grown = free[: len(new_blocks)]
    coords[dropped] = -1
    coords[grown] = new_blocks.to(coords.dtype)
    n_before = int(present.sum())
    return TopologyUpdate(coords, dropped, grown, n_before)


def update_topology(
    topology: BlockTopology,
    drop_scores: Tensor,
    grow_scores: Tensor | None,
    n_target: int,
    fraction: float,
    *,
    floor: tuple[int, int] = (0, 0),
    regrow: bool = True,
) -> TopologyUpdate:
    """Exchange blocks of one layer (`exchange_blocks`) and assign their slots (`place_blocks`)."""
    keep = exchange_blocks(
        topology.mask,
        drop_scores,
        grow_scores,
        n_target,
        fraction,
        floor=floor,
        regrow=regrow,
    )
    return place_blocks(topology, keep)


def feasible_floor(floor: tuple[int, int], grid: tuple[int, int], n: int) -> tuple[int, int]:
    """Return a floor of rows and columns, or (0, 0) if `n` blocks are too few for it.

    An infeasible floor would take up every block, however useful the others are.

    >>> feasible_floor((1, 1), (2, 4), 4), feasible_floor((1, 1), (2, 4), 3)
    ((1, 1), (0, 0))
    """
    return floor if n >= max(floor[0] * grid[0], floor[1] * grid[1]) else (0, 0)


def choose_blocks(
    scores: Tensor,
    candidates: Tensor,
    n: int,
    *,
    floor: tuple[int, int] = (0, 0),
    chosen: Tensor | None = None,
) -> Tensor:
    """Choose the blocks with the highest scores such that rows and columns reach their floor.

    If the best blocks leave a row or column below its floor, its best blocks replace the least
    useful chosen ones, beginning with blocks in both a row and a column below the floor. If every
    block is a candidate and the floor is 1, this succeeds whenever `n` is at least the
    numbers of rows and of columns; otherwise it is best effort.

    Args:
        scores: `[rows, cols]`, on the CPU; a block with a NaN or infinite score is never chosen.
        candidates: bool `[rows, cols]`, the blocks that may be chosen.
        n: number of blocks including those in `chosen`; fewer if there are too few candidates.
        floor: minimum number of blocks of (each row, each column), including those in `chosen`.
        chosen: bool `[rows, cols]`, blocks that are chosen already and stay.

    Returns:
        bool `[rows, cols]`, the chosen blocks, including `chosen`.

    >>> scores = torch.tensor([[9.0, 8.0], [1.0, 2.0]])
    >>> choose_blocks(scores, torch.ones(2, 2, dtype=torch.bool), 2).int().tolist()
    [[1, 1], [0, 0]]
    >>> choose_blocks(scores, torch.ones(2, 2, dtype=torch.bool), 2, floor=(1, 1)).int().tolist()
    [[1, 0], [0, 1]]
    """
    if chosen is None:
        chosen = torch.zeros_like(candidates)
    candidates = candidates & ~chosen & scores.isfinite()
    n -= int(chosen.sum())
    cover = torch.zeros_like(candidates)
    while True:
        n_cover = int(cover.sum())
        best = cover | _best(scores, candidates & ~cover, n - n_cover)
        missing = _cover(scores, candidates & ~best, n - n_cover, floor, chosen | best)
        if not missing.any():
            break
        cover |= missing
    if n_cover == n and not _has_floor(chosen | best, floor):
        # The cover has used all `n` blocks, but relied on best blocks that it then replaced. Cover
        # every row and column from the start.
        cover = _cover(scores, candidates, n, floor, chosen)
        best = cover | _best(scores, candidates & ~cover, n - int(cover.sum()))
    return chosen | best


def _cover(
    scores: Tensor, candidates: Tensor, n: int, floor: tuple[int, int], present: Tensor
) -> Tensor:
    """Return up to `n` candidates that bring rows and columns up to their floor, greedily."""
    picked = torch.zeros_like(candidates)
    while n > 0:
        covered = present | picked
        rows = (covered.sum(1) < floor[0]).unsqueeze(1)
        cols = (covered.sum(0) < floor[1]).unsqueeze(0)
        if not (rows.any() or cols.any()):
            break
        gains = torch.where(candidates & ~picked, rows.int() + cols.int(), 0)
        gain = int(gains.max())
        if gain == 0:
            break
        # Blocks that are the best of their row and column can be picked together.
        eligible = torch.where(gains == gain, scores, -torch.inf)
        best_of_row = torch.zeros_like(picked).scatter(1, eligible.argmax(1, keepdim=True), True)
        best_of_col = torch.zeros_like(picked).scatter(0, eligible.argmax(0, keepdim=True), True)
        best = best_of_row & best_of_col if gain == 2 else best_of_row & rows | best_of_col & cols
        picked |= _best(scores, best & (gains == gain), n)
        n -= int((picked & ~covered).sum())
    return picked


def _has_floor(mask: Tensor, floor: tuple[int, int]) -> bool:
    return bool((mask.sum(1) >= floor[0]).all() and (mask.sum(0) >= floor[1]).all())


def _best(scores: Tensor, candidates: Tensor, n: int) -> Tensor:
    """Return the `n` candidates with the highest scores; ties go to the lower index (row-major)."""
    n_candidates = int(candidates.sum())
    n = min(n, n_candidates)
    if n <= 0:
        return torch.zeros_like(candidates)
    # Selecting the n-th highest score takes linear time, unlike sorting.
    flat_scores = torch.where(candidates, scores, -torch.inf).flatten()
    threshold = flat_scores.kthvalue(len(flat_scores) - n + 1).values
    above = candidates & (scores > threshold)
    ties = candidates & (scores == threshold)
    first = ties.flatten().cumsum(0).view_as(ties) <= n - int(above.sum())
    return above | (ties & first)
