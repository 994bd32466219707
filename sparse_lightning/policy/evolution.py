"""One topology update: which blocks are dropped, which are grown, and into which slots."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparse_lightning.topology import BlockTopology


@dataclass(frozen=True, repr=False)
class TopologyUpdate:
    """The outcome of an update of one layer, on the CPU.

    Attributes:
        coords: int32 `[capacity, 2]`, the new coordinates of every slot.
        dropped: int64 `[n_dropped]`, slots whose block was dropped (some are given to grown ones).
        grown: int64 `[n_grown]`, slots that hold a grown block.
        n_before: present blocks before.
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
        """Present blocks after."""
        return self.n_before - len(self.dropped) + len(self.grown)

    @property
    def survival(self) -> float:
        """Share of the earlier blocks that are still present."""
        return 1 - len(self.dropped) / self.n_before if self.n_before else 1.0

    @property
    def churn(self) -> float:
        """Share of the present blocks that have just been grown."""
        return len(self.grown) / self.n_after if self.n_after else 0.0

    @property
    def stayed(self) -> Tensor:
        """Int32 `[n, 2]`, the (block row, block column) of blocks present before and after."""
        stayed = self.coords[:, 0] >= 0
        stayed[self.grown] = False
        return self.coords[stayed]

    @functools.cached_property
    def changed(self) -> Tensor:
        """Int64, ascending: the slots that were dropped, grown or both; their state starts anew."""
        slots: Tensor = torch.cat([self.dropped, self.grown]).unique()
        return slots


@dataclass(frozen=True, repr=False)
class ModelUpdate:
    """The outcome of an update of every layer: at which step, as which one, and what it did.

    Attributes:
        step: optimizer steps so far.
        number: updates so far, this one included.
        layers: what it did, by layer.
        drop_scores: `[out_blocks, in_blocks]` on the CPU, what blocks were kept for, by layer; read
            at blocks that were present.
        magnitudes: fp32 of the same shape, their Frobenius norms before the update; 0 if absent.
        density_target: the scheduled density of all these layers together, if there is one.
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
    """Decide an exchange: keep the most useful blocks, drop the rest, grow the most promising.

    `k = round(fraction * n_target)` blocks are exchanged, at most as many as are absent: the
    `n_target - k` present blocks of highest drop score stay, then the `k` others of highest grow
    score become present. A block that was just dropped may be chosen again and then stays as it
    was (as in RigL). Ties go to the lower index (row-major). A NaN or infinite score is never
    chosen: a place that growth cannot fill goes to the best of the blocks it would have replaced.
    The choice is made on the CPU, whatever device the arguments are on: so many small steps would
    each cost a launch there.

    Args:
        mask: bool `[out_blocks, in_blocks]`, the present blocks.
        drop_scores: of the same shape, read at present blocks.
        grow_scores: of the same shape, read at the others; None for no growth.
        n_target: present blocks afterwards. Without enough blocks that may be chosen, fewer.
        fraction: of `n_target` to exchange, in [0, 1].
        floor: blocks that each block row and each block column shall hold, if there are enough
            for all (`choose_blocks`): both when blocks stay and when they are grown.
        regrow: whether a block that was just dropped may be chosen again.

    Returns:
        bool `[out_blocks, in_blocks]` on the CPU, the blocks that are present afterwards.

    Raises:
        ValueError: if `n_target` is below 1, the fraction is outside [0, 1], or scores have
            another shape than the mask.

    Source: Evci et al. 2020, "Rigging the Lottery", algorithm 1; Liu et al. 2021 (GraNet) for a
    density that falls meanwhile.

    >>> mask = torch.tensor([[True, True], [False, False]])
    >>> drop, grow = torch.tensor([[2.0, 1.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    >>> exchange_blocks(mask, drop, grow, n_target=2, fraction=0.5).int().tolist()
    [[1, 0], [0, 1]]
    """
    for name, scores in (("drop_scores", drop_scores), ("grow_scores", grow_scores)):
        if scores is not None and scores.shape != mask.shape:
            raise ValueError(
                f"`{name}` must have one score a block, {list(mask.shape)}; "
                f"got {list(scores.shape)}."
            )
    if n_target < 1:
        raise ValueError(f"`n_target` must be at least 1; got {n_target}.")
    if not 0 <= fraction <= 1:
        raise ValueError(f"`fraction` must be in [0, 1]; got {fraction}.")
    mask = mask.cpu()
    floor = within_reach(floor, (mask.shape[0], mask.shape[1]), n_target)
    n_exchanged = 0 if grow_scores is None else round(fraction * n_target)
    n_exchanged = min(n_exchanged, max(0, mask.numel() - n_target))

    usefulness = drop_scores.cpu()
    keep = choose_blocks(usefulness, mask, n_target - n_exchanged, floor=floor)
    if grow_scores is not None:
        candidates = ~keep if regrow else ~mask
        keep = choose_blocks(grow_scores.cpu(), candidates, n_target, floor=floor, chosen=keep)
    # What growth could not fill falls back to present blocks, and the unscorable come last.
    for scores in (usefulness, torch.zeros_like(usefulness)):
        if int(keep.sum()) < n_target:
            keep = choose_blocks(scores, mask, n_target, floor=floor, chosen=keep)
    return keep


def place_blocks(topology: BlockTopology, mask: Tensor) -> TopologyUpdate:
    """Find slots for the blocks that shall be present: those that stay keep theirs.

    Args:
        topology: the present blocks; not changed.
        mask: bool `[out_blocks, in_blocks]`, the blocks that shall be present.

    Raises:
        ValueError: if the mask has another shape or dtype, or more blocks than there are slots.

    >>> topology = BlockTopology.from_mask(torch.tensor([[True, True], [False, False]]), 16)
    >>> update = place_blocks(topology, torch.tensor([[True, False], [False, True]]))
    >>> update.dropped.tolist(), update.grown.tolist(), update.coords.tolist()
    ([1], [1], [[0, 0], [1, 1]])
    """
    if mask.shape != topology.grid or mask.dtype != torch.bool:
        raise ValueError(
            f"`mask` must be bool {list(topology.grid)}, one place a block; "
            f"got {mask.dtype} {list(mask.shape)}."
        )
    keep = mask.cpu()
    if int(keep.sum()) > topology.capacity:
        raise ValueError(
            f"`mask` must have at most {topology.capacity} blocks, the capacity of the layer; got "
            f"{int(keep.sum())}. Build the layer at the highest density it shall reach."
        )
    coords = topology.coords.cpu().clone()
    rows, cols = coords.long().unbind(1)
    present = rows >= 0
    kept = present & keep[rows, cols]
    dropped = (present & ~kept).nonzero().squeeze(1)
    held = torch.zeros_like(keep)
    held[rows[kept], cols[kept]] = True
    new_blocks = (keep & ~held).nonzero()
    # Slots of dropped blocks are recycled before slots that were empty already.
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
    """Decide an update of one layer: `exchange_blocks` of its blocks, then `place_blocks`."""
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


def within_reach(floor: tuple[int, int], grid: tuple[int, int], n: int) -> tuple[int, int]:
    """Return a floor of rows and columns; none if `n` blocks are too few for it.

    Every block would go into trying, wherever the useful ones are.

    >>> within_reach((1, 1), (2, 4), 4), within_reach((1, 1), (2, 4), 3)
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
    """Choose the blocks of highest score, but so that no block row or column stays empty.

    The best blocks are chosen. Where they leave a row or column below its floor, blocks there
    take the places of the least useful others, best first, and those in both such a row and such a
    column before all. With candidates everywhere and a floor of 1 that always succeeds if `n` is
    at least the number of rows and of columns; otherwise as far as it goes.

    Args:
        scores: `[rows, cols]`, on the CPU; a NaN or infinite one is never chosen.
        candidates: bool `[rows, cols]`, what may be chosen.
        n: blocks to have, with those in `chosen`; fewer if there are not as many candidates.
        floor: (of each row, of each column) in blocks, counting those in `chosen`.
        chosen: bool `[rows, cols]`, blocks that are chosen already, and stay.

    Returns:
        bool `[rows, cols]`, the chosen blocks, `chosen` among them.

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
    if n_cover == n and not _reaches(chosen | best, floor):
        # All places went to rows and columns that were empty while others, later given up, were
        # not: cover from the start.
        cover = _cover(scores, candidates, n, floor, chosen)
        best = cover | _best(scores, candidates & ~cover, n - int(cover.sum()))
    return chosen | best


def _cover(
    scores: Tensor, candidates: Tensor, n: int, floor: tuple[int, int], present: Tensor
) -> Tensor:
    """Return up to `n` candidates that bring rows and columns up to their floor, greedily."""
    picked = torch.zeros_like(candidates)
    while n > 0:
        together = present | picked
        rows = (together.sum(1) < floor[0]).unsqueeze(1)
        cols = (together.sum(0) < floor[1]).unsqueeze(0)
        if not (rows.any() or cols.any()):
            break
        useful = rows.int() + cols.int()
        useful = torch.where(candidates & ~picked, useful, 0)
        gain = int(useful.max())
        if gain == 0:
            break
        # The best of its row and column can be taken at once with all others that are.
        here = torch.where(useful == gain, scores, -torch.inf)
        of_row = torch.zeros_like(picked).scatter(1, here.argmax(1, keepdim=True), True)
        of_col = torch.zeros_like(picked).scatter(0, here.argmax(0, keepdim=True), True)
        pick = (of_row & of_col) if gain == 2 else (of_row & rows) | (of_col & cols)
        picked |= _best(scores, pick & (useful == gain), n)
        n -= int((picked & ~together).sum())
    return picked


def _reaches(mask: Tensor, floor: tuple[int, int]) -> bool:
    return bool((mask.sum(1) >= floor[0]).all() and (mask.sum(0) >= floor[1]).all())


def _best(scores: Tensor, candidates: Tensor, n: int) -> Tensor:
    """Return the `n` candidates of highest score, ties by lower index (row-major)."""
    n_candidates = int(candidates.sum())
    n = min(n, n_candidates)
    if n <= 0:
        return torch.zeros_like(candidates)
    # By the n-th highest score: a selection takes linear time, where sorting does not.
    of_candidates = torch.where(candidates, scores, -torch.inf).flatten()
    least = of_candidates.kthvalue(len(of_candidates) - n + 1).values
    above = candidates & (scores > least)
    ties = candidates & (scores == least)
    first = ties.flatten().cumsum(0).view_as(ties) <= n - int(above.sum())
    return above | (ties & first)
