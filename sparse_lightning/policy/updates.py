"""Topology updates: which blocks are dropped, which are grown, and into which slots."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sparse_lightning.nm_pattern import Moves, find_moves
from sparse_lightning.topology import BlockTopology


@dataclass(frozen=True, repr=False)
class TopologyUpdate:
    """The result of an update of one layer, on the CPU.

    Attributes:
        coords: int32 `[capacity, 2]`, the new coordinates of every slot.
        dropped: int64 `[n_dropped]`, slots whose block was dropped; grown blocks may reuse them.
        grown: int64 `[n_grown]`, slots that hold a grown block.
        n_before: number of present blocks before the update.
        positions: uint8 `[capacity, block_size, block_size / 8]`, the new positions of the weights
            in 2:4 sparse blocks, on any device; None if they stay or if blocks are whole.
        moves: how weights move within the blocks that stay, on the device of `positions`; None if
            they stay where they are.
    """

    coords: Tensor
    dropped: Tensor
    grown: Tensor
    n_before: int
    positions: Tensor | None = None
    moves: Moves | None = None

    def __repr__(self) -> str:
        changed = f"dropped={len(self.dropped)}, grown={len(self.grown)}"
        if self.moves is not None:
            changed += f", new_weights={self.new_weights}"
        return f"TopologyUpdate(blocks={self.n_before} -> {self.n_after}, {changed})"

    @property
    def is_empty(self) -> bool:
        """Whether the update changes nothing."""
        return not len(self.changed) and not (self.moves is not None and len(self.moves.groups))

    @functools.cached_property
    def new_weights(self) -> int:
        """Number of weights that were taken in within blocks that stay, each for another one."""
        return 0 if self.moves is None else int(self.moves.is_new.sum())

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
    or infinite score is never chosen; if growth cannot fill its budget or reach the floor, the best
    dropped blocks stay. Blocks are chosen on the CPU, since each of the many small operations would
    cost a kernel launch on a GPU.

    The floor is reached whenever `n_target` of the blocks that may be present afterwards can reach
    it: the present ones and, if the fraction is above 0 or blocks are to be added, absent ones with
    a finite grow score. More than `k` blocks grow for its sake only if the present ones cannot
    reach it. A row or column with too few such blocks gets all of them.

    Args:
        mask: bool `[out_blocks, in_blocks]`, the present blocks.
        drop_scores: scores of the same shape, read at present blocks.
        grow_scores: scores of the same shape, read at the other blocks; None for no growth.
        n_target: number of present blocks afterwards; fewer if too few blocks can be chosen.
        fraction: share of `n_target` to exchange, in [0, 1].
        floor: minimum number of blocks of each block row and of each block column after the update
            and, where possible, among the blocks that stay; ignored if `n_target` is too small for
            all rows or for all columns.
        regrow: whether a block that was just dropped may be chosen again by its grow score.

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
    possible = mask
    if grow_scores is not None:
        grow_scores = grow_scores.cpu()
        keep = choose_blocks(
            grow_scores, ~keep if regrow else ~mask, n_target, floor=floor, chosen=keep
        )
        if fraction > 0 or n_target > int(mask.sum()):
            possible = mask | grow_scores.isfinite()
    # Present blocks fill what growth could not; those without a finite score come last.
    for scores in (drop_scores, torch.zeros_like(drop_scores)):
        if int(keep.sum()) < n_target:
            keep = choose_blocks(scores, mask, n_target, floor=floor, chosen=keep)
    # These steps do not know of each other, so together they may miss a floor that is within reach.
    # Then all blocks are chosen at once, if possible without growing others than these steps did.
    for candidates in (mask | keep, possible | keep):
        if _has_floor(keep, floor, possible):
            break
        preference = _preference(keep, mask, drop_scores, grow_scores)
        keep = choose_blocks(preference, candidates, n_target, floor=floor)
    return keep


def first_blocks(scores: Tensor, n: int, *, floor: tuple[int, int] = (0, 0)) -> Tensor:
    """Choose the blocks with which a layer starts, as an update would that only drops blocks.

    Args:
        scores: `[out_blocks, in_blocks]`, one score per block. Blocks of which it is not positive,
            such as those without any weight, are chosen only if there are too few others, and no
            floor asks for them.
        n: number of blocks, at least 1.
        floor: as in `exchange_blocks`.

    Returns:
        bool `[out_blocks, in_blocks]` on the CPU, with exactly `n` blocks.

    >>> scores = torch.tensor([[9.0, 8.0], [1.0, 2.0]])
    >>> first_blocks(scores, 2, floor=(1, 1)).int().tolist()
    [[1, 0], [0, 1]]
    """
    useful = scores > 0  # not where it is NaN
    if int(useful.sum()) < n:
        useful = torch.ones_like(useful)
    return exchange_blocks(useful, scores, None, n, 0.0, floor=floor)


def _preference(
    keep: Tensor, mask: Tensor, drop_scores: Tensor, grow_scores: Tensor | None
) -> Tensor:
    """Return finite scores, fp64: highest in `keep`, and there and elsewhere at present blocks.

    Each of these four groups keeps the order of its scores, including ties; those that are not
    finite are its lowest.
    """
    scores = drop_scores if grow_scores is None else torch.where(mask, drop_scores, grow_scores)
    ranks = scores.nan_to_num(-torch.inf, -torch.inf, -torch.inf).unique(return_inverse=True)[1]
    preference: Tensor = ((2 * keep.int() + mask.int()) * mask.numel() + ranks).double()
    return preference


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


def difference(before: BlockTopology, after: BlockTopology) -> TopologyUpdate:
    """Return the update that leads from one topology to another of equal slots, on the CPU."""
    coords, old = after.coords.cpu(), before.coords.cpu()
    differs = (old != coords).any(1)
    was_present, is_present = old[:, 0] >= 0, coords[:, 0] >= 0
    dropped, grown = ((differs & mask).nonzero().squeeze(1) for mask in (was_present, is_present))
    update = TopologyUpdate(coords, dropped, grown, int(was_present.sum()))
    if before.positions is None or after.positions is None:
        return update
    return with_positions(update, before.positions.cpu(), after.positions.cpu())


def with_positions(update: TopologyUpdate, before: Tensor, after: Tensor) -> TopologyUpdate:
    """Return an update that also changes the positions of the weights within blocks.

    Args:
        update: update of the blocks.
        before, after: uint8 `[capacity, block_size, block_size / 8]`, on one device.
    """
    # Only weights of blocks that stay can move: those of dropped and grown blocks are reset, and
    # empty slots have none, though a state dict may give them other positions.
    stays = update.coords[:, 0] >= 0
    stays[update.changed] = False
    compared = torch.where(stays.to(before.device).view(-1, 1, 1), before, after)
    return replace(update, positions=after, moves=find_moves(compared, after))


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
    useful chosen ones, beginning with blocks in both a row and a column below the floor. This
    succeeds whenever `n` blocks can reach the floor; a row or column with too few candidates counts
    as having reached it with all of them. Otherwise, as few blocks are missing as possible, added
    up over rows and columns.

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
        best = cover | best_of(scores, candidates & ~cover, n - n_cover)
        missing = _cover(scores, candidates & ~best, n - n_cover, floor, chosen | best)
        if not missing.any():
            break
        cover |= missing
    if n_cover == n and not _has_floor(chosen | best, floor, chosen | candidates):
        # The cover has used all `n` blocks, but relied on best blocks that it then replaced. Cover
        # every row and column from the start.
        cover = _cover(scores, candidates, n, floor, chosen)
        best = cover | best_of(scores, candidates & ~cover, n - int(cover.sum()))
    return chosen | best


def _cover(
    scores: Tensor, candidates: Tensor, n: int, floor: tuple[int, int], present: Tensor
) -> Tensor:
    """Return up to `n` candidates that bring rows and columns up to their floor.

    The fewest are a maximum matching of rows and columns below their floor, whose blocks each serve
    both a row and a column, and one block for each that it leaves out. The matching is greedy, by
    score, and is extended only as far as `n` demands.
    """
    if _has_floor(present, floor, present | candidates):
        return torch.zeros_like(candidates)
    matching = _greedy_cover(scores, candidates, n, floor, present, both=True)
    while True:
        rows, cols = _missing(present | matching, floor)
        n_left = n - int(matching.sum())
        if not 0 < n_left < int(rows.sum() + cols.sum()):
            break
        larger = _augmented(matching, scores, candidates, rows > 0, cols > 0)
        if larger is None:
            break
        matching = larger
    others = candidates & ~matching
    return matching | _greedy_cover(scores, others, n_left, floor, present | matching, both=False)


def _greedy_cover(
    scores: Tensor,
    candidates: Tensor,
    n: int,
    floor: tuple[int, int],
    present: Tensor,
    *,
    both: bool,
) -> Tensor:
    """Return up to `n` of the best candidates whose row and column are both below their floor.

    Without `both`, only one of the two is, and none of the candidates serves both.
    """
    picked = torch.zeros_like(candidates)
    while n > 0:
        covered = present | picked
        missing_rows, missing_cols = _missing(covered, floor)
        rows, cols = (missing_rows > 0).unsqueeze(1), (missing_cols > 0).unsqueeze(0)
        useful = candidates & ~picked & (rows & cols if both else rows | cols)
        if not useful.any():
            break
        # Blocks that are the best of their row and column can be picked together.
        eligible = torch.where(useful, scores, -torch.inf)
        best_of_row = torch.zeros_like(picked).scatter(1, eligible.argmax(1, keepdim=True), True)
        best_of_col = torch.zeros_like(picked).scatter(0, eligible.argmax(0, keepdim=True), True)
        best = best_of_row & best_of_col if both else best_of_row & rows | best_of_col & cols
        picked |= best_of(scores, best & useful, n)
        n -= int((picked & ~covered).sum())
    return picked


def _augmented(
    matching: Tensor, scores: Tensor, candidates: Tensor, rows: Tensor, cols: Tensor
) -> Tensor | None:
    """Return a matching of rows and columns with one block more, or None if it is a maximum.

    It is the symmetric difference of the given one and a shortest augmenting path, whose blocks are
    in turn added and removed. Breadth-first search, from the rows below their floor, finds it.

    Args:
        matching: bool `[rows, cols]`.
        scores: of the same shape; of a row's candidates, the search tries the best first.
        candidates: bool of the same shape, the blocks that may be in the matching.
        rows: bool `[rows]`, those below their floor.
        cols: bool `[cols]`, those below their floor.
    """
    queue: list[int] = rows.nonzero().flatten().tolist()
    paths: dict[int, list[tuple[int, int]]] = {row: [] for row in queue}
    unseen = torch.ones_like(cols)
    for row in queue:
        found = (candidates[row] & ~matching[row] & unseen).nonzero().flatten()
        unseen[found] = False
        for col in found[scores[row, found].argsort(descending=True, stable=True)].tolist():
            path = [*paths[row], (row, col)]
            if cols[col]:
                changed = torch.zeros_like(matching)
                changed[tuple(torch.tensor(path).T)] = True
                return matching ^ changed
            for next_row in matching[:, col].nonzero().flatten().tolist():
                if next_row not in paths:
                    paths[next_row] = [*path, (next_row, col)]
                    queue.append(next_row)
    return None


def _missing(mask: Tensor, floor: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return how many blocks each row and each column lacks, int32 `[rows]` and `[cols]`."""
    in_rows, in_cols = mask.sum(1, dtype=torch.int32), mask.sum(0, dtype=torch.int32)
    return (floor[0] - in_rows).clamp(min=0), (floor[1] - in_cols).clamp(min=0)


def _has_floor(mask: Tensor, floor: tuple[int, int], possible: Tensor) -> bool:
    """Return whether each row and column has its floor, or all of its blocks in `possible`."""
    rows, cols = _missing(mask, floor)
    if not (rows.any() or cols.any()):  # the usual case, decided without counting in `possible`
        return True
    least_rows, least_cols = _missing(possible, floor)
    return bool((rows <= least_rows).all() and (cols <= least_cols).all())


def best_of(scores: Tensor, candidates: Tensor, n: int) -> Tensor:
    """Return the `n` candidates with the highest scores; ties go to the lower index (row-major)."""
    if n >= int(candidates.sum()):
        return candidates
    if n <= 0:
        return torch.zeros_like(candidates)
    # Selecting the n-th highest score takes linear time, unlike sorting.
    flat_scores = torch.where(candidates, scores, -torch.inf).flatten()
    threshold = flat_scores.kthvalue(len(flat_scores) - n + 1).values
    above = candidates & (scores > threshold)
    ties = candidates & (scores == threshold)
    first = ties.flatten().cumsum(0).view_as(ties) <= n - int(above.sum())
    return above | (ties & first)
