"""Block masks as images, as text, and in notebooks."""

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

# The colours of blocks on light and on dark backgrounds, in pictures and on the run page. Blue and
# orange are distinguishable with colour blindness. The order is that of `block_states`.
COLOURS = {
    "light": {"absent": "#edebe5", "dropped": "#f4d6bd", "grown": "#ee8a1d", "kept": "#27496d"},
    "dark": {"absent": "#1f262f", "dropped": "#5b3c22", "grown": "#f79a33", "kept": "#86aed6"},
}
# What the light ones mean, for captions of `mask_image`.
LEGEND = "dark blue: present, orange: just grown, pale orange: just dropped, light grey: absent"

_ENLARGED_SIDE = 512  # pixels; smaller masks are enlarged to at most this side
_MAX_SIDE = 1024  # pixels of the longer side of any image
# The light colours as rows of red, green and blue, uint8 `[4, 3]`.
LIGHT = np.array([list(bytes.fromhex(c[1:])) for c in COLOURS["light"].values()], dtype=np.uint8)


def mask_image(mask: Bools, before: Bools | None = None) -> Pixels:
    """Return a block mask as an image in the light colours, with the blocks that have changed.

    Each pixel is a block. A small mask is enlarged by an integer factor, so that its blocks are
    visible and have the same size. In the image of a large mask, each pixel is the mean colour of a
    square of blocks.

    Args:
        mask: bool `[out_blocks, in_blocks]`.
        before: an earlier mask of the same shape; if None, no block is shown as grown or dropped.

    Returns:
        uint8 `[height, width, 3]`, red, green and blue; the longer side is at most 1024.

    >>> mask_image(np.eye(2, dtype=bool))[::256, ::256, 0].tolist()
    [[39, 237], [237, 39]]
    >>> mask_image(np.arange(4096)[None] % 2 == 0).shape
    (1, 1024, 3)
    """
    longer = max(mask.shape)
    image = LIGHT[block_states(mask, mask if before is None else before)]
    side = -(-longer // _MAX_SIDE)
    if side > 1:
        image = _block_means(image, side, side).round().astype(np.uint8)
    scale = max(1, _ENLARGED_SIDE // longer)
    return image.repeat(scale, 0).repeat(scale, 1)


def block_states(mask: Bools, before: Bools) -> Pixels:
    """Return the state of each block as an index into the colours of a background, uint8.

    >>> block_states(np.array([[0, 0, 1, 1]], bool), np.array([[0, 1, 0, 1]], bool)).tolist()
    [[0, 1, 2, 3]]
    """
    return 2 * mask.astype(np.uint8) + before


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

    Of more than `limit` layers it shows that many, evenly spaced through the model, and says so.

    Attributes:
        masks: bool `[out_blocks, in_blocks]` of each layer, by its name.
        limit: largest number of layers that are shown.
    """

    masks: Mapping[str, Bools]
    limit: int = 4

    def __str__(self) -> str:
        shown = self._shown()
        parts = [f"{_caption(name, mask)}\n{mask_text(mask)}" for name, mask in shown.items()]
        return "\n\n".join([*parts, *self._rest()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Return the pictures, or the text without Pillow."""
        try:
            from PIL import Image
        except ImportError:
            return f"<pre>{html.escape(str(self))}</pre>"
        figures = []
        for name, mask in self._shown().items():
            file = io.BytesIO()
            Image.fromarray(mask_image(mask)).save(file, format="png", optimize=True)
            source = base64.b64encode(file.getvalue()).decode()
            figures.append(
                '<figure style="margin:0"><img style="height:200px" '
                f'src="data:image/png;base64,{source}"><figcaption>'
                f"{html.escape(_caption(name, mask))}</figcaption></figure>"
            )
        pictures = f'<div style="display:flex;flex-wrap:wrap;gap:1em">{"".join(figures)}</div>'
        return pictures + "".join(f"<p>{html.escape(text)}</p>" for text in self._rest())

    def _shown(self) -> dict[str, Bools]:
        names = list(self.masks)
        places = np.linspace(0, len(names) - 1, min(self.limit, len(names))).round().astype(int)
        return {names[i]: self.masks[names[i]] for i in places}

    def _rest(self) -> list[str]:
        """Return a sentence about the layers that are not shown, if there are any."""
        shown = self._shown()
        others = [name for name in self.masks if name not in shown]
        if not others:
            return []
        return [
            f"These are {len(shown)} of {len(self.masks)} layers. To see others, name them: "
            f"show(layers=[{others[0]!r}])."
        ]


def _caption(name: str, mask: Bools) -> str:
    rows, columns = mask.shape
    return f"{name}: {mask.sum():,} of {rows}x{columns} blocks, density {mask.mean():.3f}"


def _block_means(blocks: Bools | Pixels, rows: int, columns: int) -> NDArray[np.float64]:
    """Return the mean over each tile of `rows` x `columns` blocks; edge tiles may be smaller.

    Args:
        blocks: `[out_blocks, in_blocks]`, or `[out_blocks, in_blocks, channels]`.
        rows: block rows of a tile.
        columns: block columns of a tile.
    """
    sums = blocks.astype(np.float64)
    for axis, size in ((0, rows), (1, columns)):
        starts = np.arange(0, blocks.shape[axis], size)
        sums = np.add.reduceat(sums, starts, axis=axis)
        counts = np.minimum(size, blocks.shape[axis] - starts)
        sums /= counts.reshape(-1, *[1] * (blocks.ndim - 1 - axis))
    return sums
