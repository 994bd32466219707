"""2:4 sparsity within blocks: two of each four neighbouring weights in a row are kept.

Sparse tensor cores multiply this pattern. The kept weights of a block are stored side by side, as
`[B, B / 2]`: entries 2g and 2g + 1 of a row belong to the g-th group of four columns. *Positions*
say which columns those are: uint8 `[capacity, B, B / 8]`. A byte describes two groups, the first
one in its low four bits; of these, the low two are the column, 0 to 3, of the first kept weight and
the high two that of the second, which is always greater.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

PATTERNS = ("2:4",)

# Number of weights of which two are kept.
GROUP = 4
# The four bits of each pair of columns.
_PAIRS = (0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110)
# YAML 1.1 reads an unquoted 2:4 as a number of base 60.
_SEXAGESIMAL = {2 * 60 + 4: "2:4"}


def check_nm(nm: object) -> str | None:
    """Return a pattern as one of `PATTERNS`, or None for whole blocks.

    Args:
        nm: "2:4", None, or 124, as which YAML reads 2:4 without quotes.

    Raises:
        ValueError: for anything else.

    >>> check_nm("2:4"), check_nm(124), check_nm(None)
    ('2:4', '2:4', None)
    """
    if isinstance(nm, int) and not isinstance(nm, bool):
        nm = _SEXAGESIMAL.get(nm, nm)
    if nm is None or nm in PATTERNS:
        return nm
    raise ValueError(
        "`nm` must be '2:4', which keeps two of each four weights within blocks, or None; got "
        f"{nm!r}."
    )


def kept_share(nm: str | None) -> float:
    """Return the share of the weights of a block that a pattern keeps.

    >>> kept_share("2:4"), kept_share(None)
    (0.5, 1.0)
    """
    return 1.0 if nm is None else 2 / GROUP


def to_columns(positions: Tensor) -> Tensor:
    """Return the column within its group of each kept weight.

    Args:
        positions: uint8 `[..., n]`.

    Returns:
        int64 `[..., 2 * n, 2]`, ascending in the last dimension.
    """
    groups = torch.stack([positions & 15, positions >> 4], -1).flatten(-2)
    return torch.stack([groups & 3, groups >> 2], -1).long()


def from_columns(columns: Tensor) -> Tensor:
    """Return the positions, uint8 `[..., n]`, of columns `[..., 2 * n, 2]`, which must ascend."""
    groups: Tensor = (columns[..., 0] | columns[..., 1] << 2).to(torch.uint8)
    groups = groups.unflatten(-1, (-1, 2))
    return groups[..., 0] | groups[..., 1] << 4


def expand(values: Tensor, positions: Tensor) -> Tensor:
    """Return whole blocks, with zeros where no weight is kept.

    Args:
        values: `[capacity, B, B / 2]`, any dtype.
        positions: uint8 `[capacity, B, B / 8]`.

    Returns:
        `[capacity, B, B]`.

    >>> expand(torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]), torch.tensor([[[0b1110_0100]]]).byte())
    tensor([[[1., 2., 0., 0., 0., 0., 3., 4.]]])
    """
    columns = to_columns(positions)
    blocks = values.new_zeros(*columns.shape[:-1], GROUP)
    return blocks.scatter_(-1, columns, values.reshape(columns.shape)).flatten(-2)


def compress(blocks: Tensor, positions: Tensor) -> Tensor:
    """Return the kept weights, `[capacity, B, B / 2]`, of whole blocks `[capacity, B, B]`.

    >>> blocks = torch.tensor([[[1.0, 2.0, 5.0, 5.0, 5.0, 5.0, 3.0, 4.0]]])
    >>> compress(blocks, torch.tensor([[[0b1110_0100]]]).byte())
    tensor([[[1., 2., 3., 4.]]])
    """
    kept: Tensor = blocks.unflatten(-1, (-1, GROUP)).gather(-1, to_columns(positions))
    return kept.flatten(-2)


def largest_positions(blocks: Tensor) -> Tensor:
    """Return the positions of the two largest weights of each group, by magnitude.

    Args:
        blocks: `[capacity, B, B]`. Of equal weights, those on the left are kept.

    >>> largest_positions(torch.tensor([[[0.0, -3.0, 1.0, 2.0, 5.0, 5.0, 5.0, 5.0]]])).tolist()
    [[[77]]]
    """
    sizes = blocks.detach().abs().unflatten(-1, (-1, GROUP))
    return from_columns(
        sizes.argsort(dim=-1, descending=True, stable=True)[..., :2].sort(-1).values
    )


def first_positions(capacity: int, block_size: int) -> Tensor:
    """Return the positions of the first two weights of each group, in `capacity` blocks.

    >>> first_positions(1, 16)[0, 0].tolist()
    [68, 68]
    """
    shape = capacity, block_size, block_size // (2 * GROUP)
    return torch.full(shape, _PAIRS[0] | _PAIRS[0] << 4, dtype=torch.uint8, device="cpu")


def random_positions(
    capacity: int, block_size: int, generator: torch.Generator | None = None
) -> Tensor:
    """Draw the positions of `capacity` blocks, each pair of a group being equally likely.

    `generator` is a CPU generator; without one, it is PyTorch's default generator.
    """
    shape = capacity, block_size, block_size // GROUP
    drawn = torch.randint(6, shape, generator=generator, dtype=torch.uint8, device="cpu")
    groups = torch.tensor(_PAIRS, dtype=torch.uint8, device="cpu")[drawn.int()]
    return groups[..., 0::2] | groups[..., 1::2] << 4


def are_valid(positions: Tensor) -> bool:
    """Return whether each group has two columns, in ascending order."""
    columns = to_columns(positions)
    return bool((columns[..., 0] < columns[..., 1]).all())


class Moves(NamedTuple):
    """Where the kept weights go when the positions of some groups change.

    Attributes:
        groups: int64 `[n]`, the groups that change, by their number in `values`.
        sources: int64 `[n, 2]`, for each weight that a group keeps from now on, which of the two
            weights it kept before it is; -1 if it is neither, but new.
    """

    groups: Tensor
    sources: Tensor

    @property
    def is_new(self) -> Tensor:
        """Bool `[n, 2]`, which of the weights are new."""
        return self.sources < 0


def find_moves(before: Tensor, after: Tensor) -> Moves:
    """Return the moves between two sets of positions, uint8 `[capacity, B, B / 8]`.

    >>> before, after = torch.tensor([[[0b0100_0100]]]), torch.tensor([[[0b0100_1101]]])
    >>> find_moves(before.byte(), after.byte())
    Moves(groups=tensor([0]), sources=tensor([[ 1, -1]]))
    """
    before, after = before.flatten(), after.flatten()
    changed = (before != after).nonzero().squeeze(1)
    old, new = (to_columns(positions[changed].unsqueeze(1)) for positions in (before, after))
    differs = (old != new).any(-1)  # [bytes, 2]
    groups = (2 * changed).unsqueeze(1) + torch.arange(2, device=changed.device)
    is_same = new[differs].unsqueeze(2) == old[differs].unsqueeze(1)  # [n, new, old]
    sources = torch.where(is_same.any(2), is_same.int().argmax(2), -1)
    return Moves(groups[differs], sources)


def moved_pairs(tensor: Tensor, moves: Moves, start: float) -> Tensor:
    """Return the contents of the groups that change, `[n, 2]`, after their move.

    Args:
        tensor: one element per kept weight, in the shape of `values`.
        moves: moves of its groups.
        start: content for new weights.
    """
    pairs, index = pairs_of(tensor, moves)
    moved = pairs[index].gather(1, moves.sources.clamp(min=0))
    return moved.masked_fill_(moves.is_new, start)


def pairs_of(tensor: Tensor, moves: Moves) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return a view of a tensor by pairs of kept weights, and the index of those that move.

    Args:
        tensor: one element per kept weight, in the shape of `values`.
        moves: moves of its groups.
    """
    if tensor.is_contiguous():
        return tensor.view(-1, 2), (moves.groups,)
    pairs = tensor.unflatten(-1, (-1, 2))
    return pairs, torch.unravel_index(moves.groups, pairs.shape[:-1])
