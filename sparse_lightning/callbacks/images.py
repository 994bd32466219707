"""Pictures of block masks, as arrays of pixels."""

from __future__ import annotations

from typing import Any

import numpy as np

_ENLARGED = 512  # pixels that the longer side of a small mask may take; a block would be a speck
_MOST = 1024  # pixels of the longer side of any image


def mask_image(mask: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return a block mask as a grey image, white where blocks are present.

    A small mask is enlarged by a whole factor, so that every block is a square of one size. Of a
    large one each pixel is the share of present blocks in a square of blocks.

    Args:
        mask: bool `[out_blocks, in_blocks]`.

    Returns:
        uint8 `[height, width]`, the longer side at most 1024.

    >>> mask_image(np.eye(2, dtype=bool))[::256, ::256].tolist()
    [[255, 0], [0, 255]]
    >>> mask_image(np.arange(4096)[None] % 2 == 0).shape
    (1, 1024)
    """
    longer = max(mask.shape)
    if longer <= _MOST:
        scale = max(1, _ENLARGED // longer)
        image = mask.repeat(scale, 0).repeat(scale, 1).astype(np.uint8)
        return image * np.uint8(255)
    side = -(-longer // _MOST)
    rows, cols = (np.arange(0, length, side) for length in mask.shape)
    sums = np.add.reduceat(np.add.reduceat(mask.astype(np.float64), rows, 0), cols, 1)
    heights = np.diff(np.append(rows, mask.shape[0]))  # the last squares may be cut off
    widths = np.diff(np.append(cols, mask.shape[1]))
    shares: np.ndarray[Any, Any] = sums / np.outer(heights, widths)
    return (shares * 255).round().astype(np.uint8)
