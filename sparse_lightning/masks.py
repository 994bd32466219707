"""Block masks as grey images, as text, and in notebooks."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Pixels = NDArray[np.uint8]

_ENLARGED_SIDE = 512  # pixels; smaller masks are enlarged to at most this side
_MAX_SIDE = 1024  # pixels of the longer side of any image
# Both grey levels contrast with white and with black pages.
_ABSENT, _PRESENT = 224, 32


def mask_image(mask: Bools) -> Pixels:
    """Return a block mask as a grey image, dark where blocks are present.

    A small mask is enlarged by an integer factor, so all blocks have the same size. In the image of
    a large mask, each pixel is the share of present blocks in a square of blocks.

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
    side = -(-longer // _MAX_SIDE)
    shares = _block_means(mask, side, side)
    image = (_ABSENT + shares * (_PRESENT - _ABSENT)).round().astype(np.uint8)
    scale = max(1, _ENLARGED_SIDE // longer)
    return image.repeat(scale, 0).repeat(scale, 1)


def mask_text(mask: Bools, columns: int = 80) -> str:
    """Return a mask as text: two block rows per line, or shades if blocks share a character.

    Args:
        mask: bool `[out_blocks, in_blocks]`.
        columns: maximum number of characters in a line.

    >>> print(mask_text(np.array([[True, False, True], [True, True, False]])))
    █▄▀
    """
    factor = -(-mask.shape[1] // columns)
    density = _block_means(mask, 2 * factor if factor > 1 else 1, factor)
    if factor > 1:
        # Only density 0 is blank, and only density 1 is a full block.
        shades = np.where(density == 1, 4, np.ceil(density * 3)).astype(int)
        lines = [[" ░▒▓█"[shade] for shade in row] for row in shades]
    else:
        halves = np.vstack([density, np.zeros((len(density) % 2, density.shape[1]))]).astype(int)
        lines = [
            [" ▀▄█"[top + 2 * bottom] for top, bottom in zip(*pair, strict=True)]
            for pair in zip(halves[::2], halves[1::2], strict=True)
        ]
    return "\n".join("".join(line).rstrip() for line in lines)


@dataclass(frozen=True)
class MaskGallery:
    """Block masks of several layers: pictures in a notebook, and text elsewhere.

    Attributes:
        masks: bool `[out_blocks, in_blocks]` of each layer, by its name.
    """

    masks: Mapping[str, Bools]

    def __str__(self) -> str:
        parts = (f"{_caption(name, mask)}\n{mask_text(mask)}" for name, mask in self.masks.items())
        return "\n\n".join(parts)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Return the pictures, or the text without Pillow."""
        try:
            from PIL import Image
        except ImportError:
            return f"<pre>{html.escape(str(self))}</pre>"
        figures = []
        for name, mask in self.masks.items():
            file = io.BytesIO()
            Image.fromarray(mask_image(mask)).save(file, format="png", optimize=True)
            source = base64.b64encode(file.getvalue()).decode()
            figures.append(
                '<figure style="margin:0"><img style="height:200px" '
                f'src="data:image/png;base64,{source}"><figcaption>'
                f"{html.escape(_caption(name, mask))}</figcaption></figure>"
            )
        return f'<div style="display:flex;flex-wrap:wrap;gap:1em">{"".join(figures)}</div>'


def _caption(name: str, mask: Bools) -> str:
    rows, columns = mask.shape
    return f"{name}: {mask.sum():,} of {rows}x{columns} blocks, density {mask.mean():.3f}"


def _block_means(mask: Bools, rows: int, columns: int) -> NDArray[np.float64]:
    """Return the mean over each tile of `rows` x `columns` blocks; edge tiles may be smaller."""
    sums = mask.astype(np.float64)
    for axis, size in ((0, rows), (1, columns)):
        starts = np.arange(0, mask.shape[axis], size)
        sums = np.add.reduceat(sums, starts, axis=axis)
        counts = np.minimum(size, mask.shape[axis] - starts)
        sums /= counts[:, None] if axis == 0 else counts
    return sums
