"""What the page shows, told from a history: plain numbers for JSON, and packed films of the masks.

Curves and the table count every update. The films show every update too, unless there are so many
that the page would be slow to open: then a shown frame takes several updates together.
"""

from __future__ import annotations

import base64
import math
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparse_lightning.history import Frame, History, LayerHistory, Metrics, quantise

MOST_FRAMES = 200  # more than a film of seconds needs
MOST_POINTS = 1000  # of a curve: more than a screen is wide
# Of all layers together. An exchanged tenth of the blocks takes half a bit of each, a score 3.
_MOST_BLOCKS_IN_FILMS = 120_000_000
_MOST_BLOCKS_IN_SCORES = 8_000_000

_STAGE = re.compile(r"^(train|training|val|valid|validation|test)[/_.]|[/_.](step|epoch)$")


@dataclass
class Track:
    """What is counted of one layer, or of all together, at each frame of a history.

    Attributes:
        present: blocks.
        grown: blocks that came with the frame.
        dropped: blocks that went with it.
        ever: blocks that were present at any frame until then.
        dead_rows: block rows without a block.
        dead_columns: block columns without a block.
    """

    present: list[int] = field(default_factory=list)
    grown: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    ever: list[int] = field(default_factory=list)
    dead_rows: list[int] = field(default_factory=list)
    dead_columns: list[int] = field(default_factory=list)

    def exchanged(self) -> list[int]:
        """Return how many blocks gave way to others at each frame."""
        return [min(pair) for pair in zip(self.grown, self.dropped, strict=True)]


def follow(layer: LayerHistory, steps: list[int]) -> tuple[Track, NDArray[np.int64]]:
    """Count the blocks of a layer at every frame.

    Args:
        layer: of a history.
        steps: of its frames.

    Returns:
        The counts, and since which step each block has been as it is, int64
        `[out_blocks * in_blocks]`.
    """
    rows, columns = layer.grid
    mask = layer.first.reshape(-1).copy()
    ever, since = mask.copy(), np.full(mask.size, steps[0])
    in_row, in_column = layer.first.sum(1), layer.first.sum(0)
    present, n_ever = int(mask.sum()), int(mask.sum())
    track = Track()
    for step, flips in zip(steps, layer.flips, strict=True):
        mask[flips] ^= True
        since[flips] = step
        came = mask[flips]
        grown = int(came.sum())
        present += 2 * grown - len(flips)
        new = flips[came & ~ever[flips]]
        ever[new] = True
        n_ever += len(new)
        change = np.where(came, 1, -1)
        in_row = in_row + np.bincount(flips // columns, change, rows).astype(int)
        in_column = in_column + np.bincount(flips % columns, change, columns).astype(int)
        track.present.append(present)
        track.grown.append(grown)
        track.dropped.append(len(flips) - grown)
        track.ever.append(n_ever)
        track.dead_rows.append(int((in_row == 0).sum()))
        track.dead_columns.append(int((in_column == 0).sum()))
    return track, since


def curves(track: Track, n_blocks: int) -> dict[str, list[float]]:
    """Return what is drawn over the steps, by name.

    Shares are in [0, 1]: `density` and `ever` of all blocks, `churn` (exchanged) and `survival` of
    those present before the frame.
    """
    before = [max(1, n) for n in (track.present[0], *track.present[:-1])]
    exchanged, dropped = track.exchanged(), track.dropped
    return {
        "density": [_short(n / n_blocks) for n in track.present],
        "churn": [_short(n / b) for n, b in zip(exchanged, before, strict=True)],
        "survival": [_short(1 - n / b) for n, b in zip(dropped, before, strict=True)],
        "ever": [_short(n / n_blocks) for n in track.ever],
        "dead_rows": list(track.dead_rows),
        "dead_columns": list(track.dead_columns),
    }


def evenly(count: int, most: int) -> list[int]:
    """Return at most `most` of `count` indices, evenly spaced, the first and the last among them.

    >>> evenly(5, 9), evenly(9, 3), evenly(9, 1)
    ([0, 1, 2, 3, 4], [0, 4, 8], [8])
    """
    if count <= most:
        return list(range(count))
    if most == 1:
        return [count - 1]
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def panel_of(metric: str) -> str:
    """Return the name of the panel that a metric is drawn in: of its stage and layer, none.

    >>> panel_of("train_loss"), panel_of("val/loss"), panel_of("sparsity_density/fc.0")
    ('loss', 'loss', 'sparsity_density')
    >>> panel_of("sparsity/parameters")
    'sparsity/parameters'
    """
    if re.match(r"sparsity_\w+/", metric):
        return metric.partition("/")[0]
    return _STAGE.sub("", metric) or metric


def tell(history: History, title: str) -> dict[str, Any]:
    """Return all that the page shows, as JSON can hold it.

    Args:
        history: of one frame or more.
        title: of the page.
    """
    steps = [frame.step for frame in history.frames]
    sizes = [layer.first.size for layer in history.layers.values()]
    most = min(MOST_FRAMES, max(24, _MOST_BLOCKS_IN_FILMS // max(1, sum(sizes))))
    shown = evenly(len(steps), most)
    points = evenly(len(steps), MOST_POINTS)
    scored = evenly_of(
        sorted({frame for layer in history.layers.values() for frame in layer.scores}),
        max(2, _MOST_BLOCKS_IN_SCORES // max(1, sum(sizes))),
    )
    tracks, layers = [], []
    for name, layer in history.layers.items():
        track, since = follow(layer, steps)
        tracks.append(track)
        layers.append(
            {
                "name": name,
                "grid": list(layer.grid),
                "block_size": layer.block_size,
                "row": _row(layer, track, steps[-1] - since),
                "film": _film(layer, shown),
                "scores": _scores(layer, scored, shown, steps),
            }
        )
    total = Track(*(_sum(getattr(t, key) for t in tracks) for key in Track.__annotations__))
    moments: list[Frame | Metrics] = [*history.frames, *history.metrics]
    return {
        "title": title,
        "about": [[key, _text(value)] for key, value in _flat(history.about)],
        "steps": [min(steps[0], *(m.step for m in moments)), max(m.step for m in moments)],
        "seconds": [min(m.seconds for m in moments), max(m.seconds for m in moments)],
        "updates": sum(frame.number > 0 for frame in history.frames),
        "weights": _weights(history, tracks),
        "recorded": len(steps),
        "frames": [
            {"step": frame.step, "number": frame.number, "seconds": frame.seconds}
            for frame in (history.frames[i] for i in shown)
        ],
        "layers": layers,
        "curves": {
            "step": [steps[i] for i in points],
            "total": _at(points, curves(total, max(1, sum(sizes)))),
            "layers": [
                _at(points, curves(track, size)) for track, size in zip(tracks, sizes, strict=True)
            ],
        },
        "metrics": _metrics(history),
    }


def evenly_of(items: list[int], most: int) -> list[int]:
    """Return at most `most` of the items, as `evenly` chooses them."""
    return [items[i] for i in evenly(len(items), most)]


def _row(layer: LayerHistory, track: Track, ages: NDArray[np.int64]) -> dict[str, Any]:
    """Return what the table says of a layer, at the last frame."""
    mask = layer.mask(-1).reshape(-1)
    scores = layer.scores[max(layer.scores)] if layer.scores else np.empty(0)
    finite = scores[np.isfinite(scores)]
    return {
        "present": track.present[-1],
        "density": _short(track.present[-1] / mask.size),
        "ever": _short(track.ever[-1] / mask.size),
        "dead_rows": track.dead_rows[-1],
        "dead_columns": track.dead_columns[-1],
        "exchanged": sum(track.exchanged()),
        "age": _short(float(ages[mask].mean())) if mask.any() else None,
        "score": _short(float(finite.mean())) if len(finite) else None,
    }


def _film(layer: LayerHistory, shown: list[int]) -> str:
    """Return the first mask, and what changed until each further shown frame, as packed bits."""
    parts, before = [], np.zeros(layer.grid, dtype=bool)
    wanted = set(shown)
    for frame, mask in enumerate(layer.masks()):
        if frame in wanted:
            parts.append(np.packbits(mask ^ before).tobytes())
            before = mask.copy()
    return _packed(b"".join(parts))


def _scores(
    layer: LayerHistory, scored: list[int], shown: list[int], steps: list[int]
) -> dict[str, Any]:
    """Return the scores in 255 levels, 0 for none, and from which shown frame on they are known."""
    known = [frame for frame in scored if frame in layer.scores]
    from_frame = [int(np.searchsorted(shown, frame)) for frame in known]
    ranges, levels = [], []
    for frame in known:
        lowest, highest, of_frame = quantise(layer.scores[frame].reshape(-1))
        ranges.append([lowest, highest])
        levels.append(of_frame.tobytes())
    return {
        "from": from_frame,
        "steps": [steps[frame] for frame in known],
        "ranges": ranges,
        "levels": _packed(b"".join(levels)),
    }


def _weights(history: History, tracks: list[Track]) -> dict[str, int]:
    """Return how many weights the layers hold at most, at the first frame, and at the last."""
    pairs = list(zip(history.layers.values(), tracks, strict=True))
    return {
        "dense": sum(layer.first.size * layer.block_size**2 for layer, _ in pairs),
        "first": sum(track.present[0] * layer.block_size**2 for layer, track in pairs),
        "last": sum(track.present[-1] * layer.block_size**2 for layer, track in pairs),
    }


def _metrics(history: History) -> list[dict[str, Any]]:
    lines: dict[str, tuple[list[int], list[float | None]]] = {}
    for metrics in history.metrics:
        for name, value in metrics.values.items():
            steps, values = lines.setdefault(name, ([], []))
            if steps and steps[-1] == metrics.step:  # known anew, after a validation
                steps.pop(), values.pop()
            steps.append(metrics.step)
            values.append(_finite(value))
    found = []
    for name, (steps, values) in lines.items():
        points = evenly(len(steps), MOST_POINTS)
        found.append(
            {
                "panel": panel_of(name),
                "name": name,
                "step": [steps[i] for i in points],
                "value": [values[i] for i in points],
            }
        )
    return found


def _flat(about: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in about.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _finite(value: Any) -> float | None:
    return _short(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _short(value: float) -> float:
    """Return six digits of a number: more are not seen."""
    return float(f"{value:.6g}")


def _at(points: list[int], of: Mapping[str, list[float]]) -> dict[str, list[float]]:
    return {name: [values[i] for i in points] for name, values in of.items()}


def _sum(lists: Iterable[list[int]]) -> list[int]:
    return [sum(each) for each in zip(*lists, strict=True)]


def _packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data)).decode()
