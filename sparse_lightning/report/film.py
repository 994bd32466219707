"""Draw how the blocks of a few layers change: as a strip in a PNG, or as an animation in a GIF."""

from __future__ import annotations

import os
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_lightning.files import atomic_write
from sparse_lightning.history import History, LayerHistory, read_history
from sparse_lightning.masks import COLOURS, LIGHT, Bools, block_states
from sparse_lightning.report.page_data import MAX_FRAMES, evenly_spaced, gaps_text

if TYPE_CHECKING:
    from PIL import Image

LAYERS = 4  # drawn if none is named
COLUMNS = 6  # of a strip
_STRIP_SIDE = 320  # pixels of the longer side of a mask
_ANIMATION = 560, 960  # pixels of a mask's width and of the masks' heights together
_MILLISECONDS = 125  # of a frame, the default speed of the run page
_LAST_MILLISECONDS = 2000  # of the last frame, before the animation starts over

_TEXT = 18  # pixels
_LINE = 26  # pixels from a line of text to the next
_GAP = 20  # pixels
_LINED = 6  # pixels of a block from which on lines separate the blocks
_INK, _SOFT, _PAPER = "#1c2430", "#5a6472", "#ffffff"


def write_film(
    history: str | os.PathLike[str], output: str | os.PathLike[str], layers: Sequence[str] = ()
) -> dict[str, Any]:
    """Write a strip or an animation of layers' block masks atomically, in the page's light colours.

    A strip has a row for each layer and a column for each of at most six frames, an animation at
    most 200 frames; they are evenly spaced from the first to the last. Colours show what changed
    since the frame shown before. Tall masks are drawn transposed, as on the run page, and each
    pixel is the mean colour of the blocks that it covers.

    Args:
        history: history file recorded by the training.
        output: file to write, `.png` for a strip or `.gif` for an animation; an existing file is
            replaced.
        layers: names of the layers; if empty, four that are evenly spaced through the model.

    Returns:
        What is shown, as primitives: the layers' names, and updates, steps and gaps as in
        `page_data`.

    Raises:
        ValueError: for another ending or an unknown layer, or if `history` is not a history file,
            or holds no masks.
        RuntimeError: if pillow is not installed.
        OSError: if a file cannot be read or written.
    """
    output = Path(output)
    kind = output.suffix.lower()
    if kind not in (".png", ".gif"):
        raise ValueError(
            "`--film` must end in .png, for a strip of masks, or in .gif, for an animation; "
            f"got '{output}'."
        )
    if find_spec("PIL") is None:
        raise RuntimeError(
            "A film needs pillow, which is not installed. "
            "Install it with: pip install 'sparse-lightning[report]'"
        )
    known = read_history(Path(history))
    names = _choose(known, layers)
    shown = evenly_spaced(len(known.frames), COLUMNS if kind == ".png" else MAX_FRAMES)
    changes = list(pairwise([shown[0], *shown]))
    with atomic_write(output) as file:
        if kind == ".png":
            _draw(known, names, changes, (_STRIP_SIDE, _STRIP_SIDE)).save(file, format="png")
        else:
            box = _ANIMATION[0], max(1, _ANIMATION[1] // len(names))
            pictures = (_draw(known, names, [change], box) for change in changes)
            next(pictures).save(
                file,
                format="gif",
                save_all=True,
                append_images=pictures,
                duration=[_MILLISECONDS] * (len(changes) - 1) + [_LAST_MILLISECONDS],
                loop=0,
            )
    return {
        "layers": names,
        "updates": sum(frame.number > 0 for frame in known.frames),
        "steps": [known.frames[0].step, known.frames[-1].step],
        "gaps": gaps_text(known.gaps),
    }


def _choose(history: History, layers: Sequence[str]) -> list[str]:
    names = list(history.layers)
    for name in layers:
        if name not in history.layers:
            near = get_close_matches(name, names, n=3) or names[:3]
            raise ValueError(
                f"`--layer` must be a layer of the history; got '{name}'. "
                f"There are {len(names)}, among them {', '.join(near)}."
            )
    return list(layers) or [names[i] for i in evenly_spaced(len(names), LAYERS)]


def _draw(
    history: History, names: Sequence[str], changes: Sequence[tuple[int, int]], box: tuple[int, int]
) -> Image.Image:
    """Return a picture with a row for each layer and a column for each change.

    Args:
        history: the history.
        names: names of the layers.
        changes: for each column the frame that it shows, after the one with which it is compared.
        box: width and height in pixels into which each mask fits.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(_TEXT)
    texts: list[tuple[int, int, str, str]] = []  # x, y, text and colour
    swatches: list[tuple[int, int, str]] = []  # x, y and colour
    masks: list[tuple[Image.Image, tuple[int, int]]] = []
    y = _GAP
    for name in names:
        layer = history.layers[name]
        texts.append((_GAP, y, f"{name}: {_sides(layer)}", _INK))
        y += _LINE
        for column, (before, frame) in enumerate(changes):
            x = _GAP + column * (box[0] + _GAP)
            mask = layer.mask(frame)
            step = history.frames[frame].step
            texts.append((x, y, f"step {step:,} · density {mask.mean():.2f}", _SOFT))
            image = _mask(mask, layer.mask(before), box)
            masks.append((image, (x, y + _LINE)))
        y += _LINE + image.height + _GAP
    x = _GAP
    for state in ("kept", "grown", "dropped", "absent"):
        swatches.append((x, y + 2, COLOURS["light"][state]))
        texts.append((x + _LINE, y, state, _INK))
        x += _LINE + int(font.getlength(state)) + _GAP
    place = "column" if len(changes) > 1 else "frame"
    texts.append((x, y, f"changes since the previous {place}", _SOFT))
    right = max(x + font.getlength(text) for x, _, text, _ in texts)
    right = max(right, *(x + image.width for image, (x, _) in masks))
    picture = Image.new("RGB", (int(right) + _GAP, y + _LINE + _GAP), _PAPER)
    pen = ImageDraw.Draw(picture)
    for x, y, text, colour in texts:
        pen.text((x, y), text, fill=colour, font=font)
    for x, y, colour in swatches:
        pen.rectangle((x, y, x + _TEXT, y + _TEXT), fill=colour)
    for image, corner in masks:
        picture.paste(image, corner)
    return picture


def _mask(mask: Bools, before: Bools, box: tuple[int, int]) -> Image.Image:
    """Return a mask, transposed if it is tall, as large as fits into a box's width and height."""
    from PIL import Image, ImageDraw

    if _is_tall(mask.shape):
        mask, before = mask.T, before.T
    rows, columns = mask.shape
    scale = min(box[0] / columns, box[1] / rows)
    size = max(1, round(columns * scale)), max(1, round(rows * scale))
    image = Image.fromarray(LIGHT[block_states(mask, before)])
    if scale < 1:
        return image.resize(size, Image.Resampling.BOX)
    image = image.resize(size, Image.Resampling.NEAREST)
    if scale >= _LINED:
        pen = ImageDraw.Draw(image)
        for x in (round(i * size[0] / columns) for i in range(1, columns)):
            pen.line([(x, 0), (x, size[1])], fill=_PAPER)
        for y in (round(i * size[1] / rows) for i in range(1, rows)):
            pen.line([(0, y), (size[0], y)], fill=_PAPER)
    return image


def _is_tall(grid: tuple[int, ...]) -> bool:
    return grid[0] > grid[1]


def _sides(layer: LayerHistory) -> str:
    """Return how many rows and columns a drawn mask has, and what they are."""
    (rows, columns), size = sorted(layer.grid), layer.block_size
    down, across = ("inputs", "outputs") if _is_tall(layer.grid) else ("outputs", "inputs")
    return f"{rows} x {columns} blocks of {size} x {size}, {down} down, {across} across"
