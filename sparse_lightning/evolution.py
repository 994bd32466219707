"""One topology update: which blocks are dropped, which are grown, and into which slots."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_lightning.topology import BlockTopology


@dataclass(frozen=True)
class TopologyUpdate:
    """The outcome of an update of one layer.

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

    @property
    def n_after(self) -> int:
        """Present blocks after."""
        return self.n_before - len(self.dropped) + len(self.grown)

    @property
    def survival(self) -> float:
        """Share of the earlier blocks that are still present."""
        return 1 - len(self.dropped) / self.n_before if self.n_before else 1.0

    @property
    def changed(self) -> Tensor:
        """Int64, ascending: the slots that were dropped, grown or both; their state starts anew."""
        slots: Tensor = torch.cat([self.dropped, self.grown]).unique()
        return slots


@dataclass(frozen=True)
class ModelUpdate:
    """The outcome of an update of every layer: at which step, as which one, and what it did."""

    step: int
    number: int
    layers: dict[str, TopologyUpdate]


def update_topology(
    topology: BlockTopology,
    drop_scores: Tensor,
    grow_scores: Tensor | None,
    n_target: int,
    fraction: float,
) -> TopologyUpdate:
    """Decide an update: keep the most useful blocks, drop the rest, grow the most promising.

    `k = round(fraction * n_target)` blocks are exchanged, at most as many as are absent: the
    `n_target - k` present blocks of highest drop score stay, then the `k` others of highest grow
    score become present. A block that was just dropped may be chosen again and then stays as it
    was (as in RigL). Ties go to the lower index (row-major). A NaN or infinite score is never
    chosen: a place that growth cannot fill goes to the best of the blocks it would have replaced.

    Args:
        topology: the present blocks; not changed.
        drop_scores: `[out_blocks, in_blocks]`, read at present blocks.
        grow_scores: `[out_blocks, in_blocks]`, read at the others; None for no growth.
        n_target: present blocks afterwards, at most the capacity. Without enough blocks that may
            be chosen, fewer.
        fraction: of `n_target` to exchange, in [0, 1].

    Raises:
        ValueError: if `n_target` is above the capacity or below 1, the fraction is outside
            [0, 1], or the scores have another shape than the grid.

    Source: Evci et al. 2020, "Rigging the Lottery", algorithm 1; Liu et al. 2021 (GraNet) for a
    density that falls meanwhile.

    >>> topology = BlockTopology.from_mask(torch.tensor([[True, True], [False, False]]), 16)
    >>> drop, grow = torch.tensor([[2.0, 1.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    >>> update = update_topology(topology, drop, grow, n_target=2, fraction=0.5)
    >>> update.dropped.tolist(), update.grown.tolist(), update.coords.tolist()
    ([1], [1], [[0, 0], [1, 1]])
    """
    _check(topology, drop_scores, grow_scores, n_target, fraction)
    mask = topology.mask.flatten()
    total, n_before = mask.numel(), topology.n_blocks
    n_exchanged = 0 if grow_scores is None else round(fraction * n_target)
    n_exchanged = min(n_exchanged, total - n_target)

    usefulness = drop_scores.flatten()
    keep = _best(usefulness, mask, n_target - n_exchanged)
    if grow_scores is not None:
        keep |= _best(grow_scores.flatten(), ~keep, n_target - int(keep.sum()))
    # What growth could not fill falls back to present blocks, and the unscorable come last.
    keep |= _best(usefulness, mask & ~keep, n_target - int(keep.sum()))
    keep |= _best(torch.zeros_like(usefulness), mask & ~keep, n_target - int(keep.sum()))

    coords = topology.coords.clone()
    rows, cols = coords.long().unbind(1)
    present = rows >= 0
    kept = present & keep[torch.where(present, rows * topology.grid[1] + cols, 0)]
    dropped = (present & ~kept).nonzero().squeeze(1)
    new_blocks = (keep & ~mask).nonzero().squeeze(1)
    # Slots of dropped blocks are recycled before slots that were empty already.
    free = torch.cat([dropped, (~present).nonzero().squeeze(1)])
    grown = free[: len(new_blocks)]
    coords[dropped] = -1
    width = topology.grid[1]
    coords[grown] = torch.stack([new_blocks // width, new_blocks % width], 1).to(coords.dtype)
    return TopologyUpdate(coords, dropped, grown, n_before)


def _best(scores: Tensor, candidates: Tensor, n: int) -> Tensor:
    """Return a bool mask of the `n` candidates of highest finite score, ties by lower index."""
    chosen = torch.zeros_like(candidates)
    candidates = candidates & scores.isfinite()
    n = min(n, int(candidates.sum()))
    if n > 0:
        ranked = torch.where(candidates, scores, -torch.inf).argsort(descending=True, stable=True)
        chosen[ranked[:n]] = True
    return chosen


def _check(
    topology: BlockTopology,
    drop_scores: Tensor,
    grow_scores: Tensor | None,
    n_target: int,
    fraction: float,
) -> None:
    for name, scores in (("drop_scores", drop_scores), ("grow_scores", grow_scores)):
        if scores is not None and scores.shape != topology.grid:
            raise ValueError(
                f"`{name}` must have one score a block, {list(topology.grid)}; "
                f"got {list(scores.shape)}."
            )
    if not 1 <= n_target <= topology.capacity:
        raise ValueError(
            f"`n_target` must be in 1..{topology.capacity}, the capacity of the layer; got "
            f"{n_target}. Build the layer at the highest density it shall reach."
        )
    if not 0 <= fraction <= 1:
        raise ValueError(f"`fraction` must be in [0, 1]; got {fraction}.")
