"""Pictures of block masks: as pixels, and as text."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_LEAST, _MOST = 256, 1024  # pixels of the longer side


def mask_pixels(mask: NDArray[np.bool_], least: int = _LEAST, most: int = _MOST) -> Any:
    """Return a mask as a grey image, white where a block is present.

    A small mask is enlarged by a whole factor; of a large one each pixel is the density of the
    blocks that it stands for.

    Args:
        mask: bool `[out_blocks, in_blocks]`.
        least, most: pixels between which the longer side shall be, if whole factors allow it.

    Returns:
        uint8 `[height, width]`.

    >>> mask_pixels(np.array([[True, False]]), least=4)
    array([[255, 255,   0,   0],
           [255, 255,   0,   0]], dtype=uint8)
    >>> mask_pixels(np.array([[True, False, True, True]]), least=1, most=2)
    array([[128, 255]], dtype=uint8)
    """
    longer = max(mask.shape)
    factor = -(-longer // most)
    grey = np.rint(_mean_of(mask, factor, factor) * 255).astype(np.uint8)
    scale = max(1, least // max(grey.shape))
    return grey.repeat(scale, 0).repeat(scale, 1)


def mask_text(mask: NDArray[np.bool_], columns: int = 80) -> str:
    """Return a mask in letters: two block rows a line, or shades where blocks share a letter.

    Args:
        mask: bool `[out_blocks, in_blocks]`.
        columns: letters in a line, at most.

    >>> print(mask_text(np.array([[True, False, True], [True, True, False]])))
    █▄▀
    """
    factor = -(-mask.shape[1] // columns)
    density = _mean_of(mask, 2 * factor if factor > 1 else 1, factor)
    if factor > 1:
        # Nothing is blank but emptiness, and nothing full but fullness.
        shades = np.where(density == 1, 4, np.ceil(density * 3)).astype(int)
        lines = [[" ░▒▓█"[shade] for shade in row] for row in shades]
    else:
        halves = np.vstack([density, np.zeros((len(density) % 2, density.shape[1]))]).astype(int)
        lines = [
            [" ▀▄█"[top + 2 * bottom] for top, bottom in zip(*pair, strict=True)]
            for pair in zip(halves[::2], halves[1::2], strict=True)
        ]
    return "\n".join("".join(line).rstrip() for line in lines)


def _mean_of(mask: NDArray[np.bool_], rows: int, columns: int) -> NDArray[np.float64]:
    """Return the mean of each `rows` x `columns` blocks, at the edges of those that are there."""
    sums = mask.astype(np.float64)
    for axis, size in ((0, rows), (1, columns)):
        starts = np.arange(0, mask.shape[axis], size)
        sums = np.add.reduceat(sums, starts, axis=axis)
        counts = np.minimum(size, mask.shape[axis] - starts)
        sums /= counts[:, None] if axis == 0 else counts
    return sums
