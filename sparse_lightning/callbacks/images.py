"""Pictures of block masks, as arrays of pixels."""

from __future__ import annotations

from typing import Any

import numpy as np

_ENLARGED = 512  # pixels that the longer side of a small mask may take; a block would be a speck
_MOST = 1024  # pixels of the longer side of any image
# Grey levels that both stand out from a page, be it white or black.
_ABSENT, _PRESENT = 224, 32


def mask_image(mask: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return a block mask as a grey image, dark where blocks are present.

    A small mask is enlarged by a whole factor, so that every block is a square of one size. Of a
    large one each pixel is the share of present blocks in a square of blocks.

    Args:
        mask: bool `[out_blocks, in_blocks]`.

    Returns:
        uint8 `[height, width]`, the longer side at most 1024.

    >>> mask_image(np.eye(2, dtype=bool))[::256, ::256].tolist()
    [[32, 224], [224, 32]]
    >>> mask_image(np.arange(4096)[None] % 2 == 0).shape
    (1, 1024)
    """
    longer = max(mask.shape)
    shares = mask.astype(np.float64)
    if longer > _MOST:
        shares = _averaged(shares, -(-longer // _MOST))
    image = (_ABSENT + shares * (_PRESENT - _ABSENT)).round().astype(np.uint8)
    scale = max(1, _ENLARGED // longer)
    enlarged: np.ndarray[Any, Any] = image.repeat(scale, 0).repeat(scale, 1)
    return enlarged


def _averaged(mask: np.ndarray[Any, Any], side: int) -> np.ndarray[Any, Any]:
    """Return the means of squares of `side` blocks; those at the end may be cut off."""
    rows, cols = (np.arange(0, length, side) for length in mask.shape)
    sums = np.add.reduceat(np.add.reduceat(mask, rows, 0), cols, 1)
    heights = np.diff(np.append(rows, mask.shape[0]))
    widths = np.diff(np.append(cols, mask.shape[1]))
    means: np.ndarray[Any, Any] = sums / np.outer(heights, widths)
    return means
