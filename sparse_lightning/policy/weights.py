"""Which weights a 2:4 pattern keeps within blocks that stay, at a topology update."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_lightning import nm_pattern
from sparse_lightning.policy.updates import best_of


def exchange_weights(
    values: Tensor, positions: Tensor, gradient: Tensor, slots: Tensor, fraction: float
) -> Tensor:
    """Exchange the least useful kept weights for more promising ones of the same four.

    As blocks are, weights are dropped by magnitude and grown by the gradient (RigL). `k =
    round(fraction * number of kept weights)` are exchanged, at most one in each group of four: in
    the `k` groups whose smaller kept weight is the smallest, it gives way to the one with the
    largest gradient among the three that are not the larger kept weight. That may be itself, and
    then it stays. Ties go to the lower index.

    Args:
        values: `[capacity, B, B / 2]`, the kept weights.
        positions: uint8 `[capacity, B, B / 8]`, on any device, which becomes that of the result.
        gradient: `[capacity, B, B]`, of all weights of the blocks.
        slots: bool `[capacity]`, the slots in which weights may be exchanged.
        fraction: share of the kept weights of these slots to exchange, in [0, 1].

    Returns:
        uint8 `[capacity, B, B / 8]`, the new positions.

    Source: Evci et al. 2020, "Rigging the Lottery", algorithm 1, with a budget for each group.

    >>> positions = torch.tensor([[[0b0100_0100]]]).byte()  # the first two of each four
    >>> values = torch.tensor([[[3.0, 1.0, 4.0, 2.0]]])
    >>> gradient = torch.tensor([[[0.0, 0.0, 0.0, 9.0, 0.0, 0.0, 9.0, 0.0]]])
    >>> slots = torch.tensor([True])
    >>> new = exchange_weights(values, positions, gradient, slots, fraction=0.25)
    >>> nm_pattern.to_columns(new).tolist()  # of the first group, only
    [[[[0, 3], [0, 1]]]]
    """
    columns = nm_pattern.to_columns(positions)  # [capacity, B, B / 4, 2]
    magnitudes = values.detach().abs().reshape(columns.shape).to(positions.device)
    magnitudes = magnitudes.to(torch.promote_types(magnitudes.dtype, torch.float32))
    may_change = slots.to(positions.device).view(-1, 1, 1).expand(columns.shape[:-1])
    n_exchanged = round(fraction * 2 * int(may_change.sum()))
    smallest, which = magnitudes.min(-1)
    exchanged = best_of(-smallest, may_change, n_exchanged).nonzero(as_tuple=True)

    which = which[exchanged].unsqueeze(1)
    kept = columns[exchanged].gather(1, 1 - which)
    steepness = gradient.detach().unflatten(-1, (-1, nm_pattern.GROUP)).to(positions.device)
    steepness = steepness[exchanged].abs().to(magnitudes.dtype).scatter(1, kept, -1)
    grown = steepness.argmax(1, keepdim=True)
    # Where no gradient says otherwise, the weight stays.
    dropped = columns[exchanged].gather(1, which)
    is_better = steepness.gather(1, grown) > steepness.gather(1, dropped)
    columns[exchanged] = torch.cat([kept, torch.where(is_better, grown, dropped)], 1).sort(1).values
    return nm_pattern.from_columns(columns)
