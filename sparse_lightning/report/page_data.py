"""Convert a history to the data of the page: numbers for JSON, and packed animations of the masks.

Curves and the table include every update. So do the animations, unless the page would open slowly;
then a displayed frame combines several updates.
"""

from __future__ import annotations

import base64
import math
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparse_lightning.history import Frame, Gap, History, LayerHistory, Metrics, quantise
from sparse_lightning.names import group_similar

MAX_FRAMES = 200  # 25 seconds at the default speed
MAX_POINTS = 1000  # per curve, about the pixels of a screen
# Limits of blocks times frames over all layers. If an update replaces a tenth of the blocks, a
# frame takes half a bit per block after compression; a score takes 3 bits.
MAX_BLOCKS_IN_ANIMATIONS = 120_000_000
_MAX_BLOCKS_IN_SCORES = 8_000_000

_STAGE = re.compile(r"^(train|training|val|valid|validation|test)[/_.]|[/_.](step|epoch)$")


@dataclass
class BlockCounts:
    """Counts of blocks and dead features of one layer, or of all, at each frame of a history.

    Attributes:
        present: number of present blocks.
        grown: number of blocks grown in the frame.
        dropped: number of blocks dropped in the frame.
        ever: number of blocks that were present in this or any earlier frame.
        dead_outputs: number of output features whose block rows have no block.
        unread_inputs: number of input features whose block columns have no block.
    """

    present: list[int] = field(default_factory=list)
    grown: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    ever: list[int] = field(default_factory=list)
    dead_outputs: list[int] = field(default_factory=list)
    unread_inputs: list[int] = field(default_factory=list)

    def replaced(self) -> list[int]:
        """Return how many blocks were replaced by others at each frame."""
        return [min(pair) for pair in zip(self.grown, self.dropped, strict=True)]


def count_blocks(layer: LayerHistory, steps: list[int]) -> tuple[BlockCounts, NDArray[np.int64]]:
    """Count the blocks of a layer at every frame.

    Args:
        layer: history of the layer.
        steps: steps of its frames.

    Returns:
        The counts, and the step of each block's last change, int64 `[out_blocks * in_blocks]`.
    """
    rows, columns = layer.grid
    first = layer.mask(0)
    before, ever = first.reshape(-1), first.reshape(-1).copy()
    last_change = np.full(first.size, steps[0])
    in_row, in_column = first.sum(1), first.sum(0)
    present = n_ever = int(first.sum())
    counts = BlockCounts()
    for step, mask in zip(steps, layer.masks(), strict=True):
        after = mask.reshape(-1)
        flips = np.flatnonzero(after ^ before)
        last_change[flips] = step
        is_grown = after[flips]
        grown = int(is_grown.sum())
        present += 2 * grown - len(flips)
        first_grown = flips[is_grown & ~ever[flips]]
        ever[first_grown] = True
        n_ever += len(first_grown)
        change = np.where(is_grown, 1, -1)
        in_row = in_row + np.bincount(flips // columns, change, rows).astype(int)
        in_column = in_column + np.bincount(flips % columns, change, columns).astype(int)
        counts.present.append(present)
        counts.grown.append(grown)
        counts.dropped.append(len(flips) - grown)
        counts.ever.append(n_ever)
        counts.dead_outputs.append(int((in_row == 0).sum()) * layer.block_size)
        counts.unread_inputs.append(int((in_column == 0).sum()) * layer.block_size)
        before = after
    return counts, last_change


def sum_counts(layer_counts: Sequence[BlockCounts]) -> BlockCounts:
    """Return the counts of all layers together."""
    return BlockCounts(
        *(
            [sum(values) for values in zip(*(getattr(c, key) for c in layer_counts), strict=True)]
            for key in BlockCounts.__annotations__
        )
    )


def curves(counts: BlockCounts, n_blocks: int) -> dict[str, list[float]]:
    """Return the curves over the steps by name.

    `density` and `ever` are shares of all blocks; `churn` (replaced) and `survival` are shares of
    the blocks that were present before the frame.
    """
    before = [max(1, n) for n in (counts.present[0], *counts.present[:-1])]
    replaced, dropped = counts.replaced(), counts.dropped
    return {
        "density": [rounded(n / n_blocks) for n in counts.present],
        "churn": [rounded(n / b) for n, b in zip(replaced, before, strict=True)],
        "survival": [rounded(1 - n / b) for n, b in zip(dropped, before, strict=True)],
        "ever": [rounded(n / n_blocks) for n in counts.ever],
        "dead_outputs": list(counts.dead_outputs),
        "unread_inputs": list(counts.unread_inputs),
    }


def evenly_spaced(n: int, limit: int) -> list[int]:
    """Return at most `limit` evenly spaced indices below `n`, including the first and the last.

    >>> evenly_spaced(5, 9), evenly_spaced(9, 3), evenly_spaced(9, 1)
    ([0, 1, 2, 3, 4], [0, 4, 8], [8])
    """
    if n <= limit:
        return list(range(n))
    if limit == 1:
        return [n - 1]
    return [round(i * (n - 1) / (limit - 1)) for i in range(limit)]


def panel_name(metric: str) -> str:
    """Return the title of a metric's panel: its name without the training stage and the layer.

    >>> panel_name("train_loss"), panel_name("val/loss"), panel_name("sparsity_density/fc.0")
    ('loss', 'loss', 'sparsity_density')
    >>> panel_name("sparsity/parameters")
    'sparsity/parameters'
    """
    if re.match(r"sparsity_\w+/", metric):
        return metric.partition("/")[0]
    return _STAGE.sub("", metric) or metric


def gaps_text(gaps: Sequence[Gap]) -> str:
    """Return a sentence about the gaps of a history; "" if there is none.

    >>> gaps_text([Gap(None, 10), Gap(20, 20), Gap(1050, None)])
    'Records are damaged or missing before step 10, and at step 20, and after step 1,050.'
    """
    places = []
    for gap in gaps:
        if gap.after is None:
            places.append(f"before step {gap.before:,}")
        elif gap.before is None:
            places.append(f"after step {gap.after:,}")
        elif gap.after == gap.before:
            places.append(f"at step {gap.after:,}")
        else:
            places.append(f"between steps {gap.after:,} and {gap.before:,}")
    return f"Records are damaged or missing {', and '.join(places)}." if places else ""


def recorded_moments(history: History) -> list[Frame | Metrics]:
    """Return the frames and the metrics, whose steps and times a history knows."""
    return [*history.frames, *history.metrics]


def metric_lines(history: History) -> dict[str, tuple[list[int], list[float | None]]]:
    """Return the steps and values of each metric; None for a value that is not finite."""
    lines: dict[str, tuple[list[int], list[float | None]]] = {}
    for metrics in history.metrics:
        for name, value in metrics.values.items():
            steps, values = lines.setdefault(name, ([], []))
            if steps and steps[-1] == metrics.step:  # recorded again after a validation
                steps.pop()
                values.pop()
            steps.append(metrics.step)
            values.append(_finite(value))
    return lines


def page_data(history: History, title: str) -> dict[str, Any]:
    """Return the data of the page as primitives for JSON.

    Args:
        history: history with at least one frame.
        title: title of the page.
    """
    steps = [frame.step for frame in history.frames]
    sizes = [math.prod(layer.grid) for layer in history.layers.values()]
    limit = min(MAX_FRAMES, max(24, MAX_BLOCKS_IN_ANIMATIONS // max(1, sum(sizes))))
    shown = evenly_spaced(len(steps), limit)
    points = evenly_spaced(len(steps), MAX_POINTS)
    scored = sorted({frame for layer in history.layers.values() for frame in layer.scores})
    limit = max(2, _MAX_BLOCKS_IN_SCORES // max(1, sum(sizes)))
    scored = [scored[i] for i in evenly_spaced(len(scored), limit)]
    layer_counts, ages, layers = [], [], []
    for name, layer in history.layers.items():
        counts, last_change = count_blocks(layer, steps)
        layer_counts.append(counts)
        ages.append(steps[-1] - last_change)
        layers.append(
            {
                "name": name,
                "grid": list(layer.grid),
                "block_size": layer.block_size,
                "nm": layer.nm,
                "row": _table_row([layer], [counts], ages[-1:]),
                "animation": animation(layer, shown),
                "scores": _scores(layer, scored, shown, steps),
            }
        )
    total = sum_counts(layer_counts)
    moments = recorded_moments(history)
    return {
        "title": title,
        "about": [[key, as_text(value)] for key, value in flatten(history.about)],
        "steps": [min(m.step for m in moments), max(m.step for m in moments)],
        "seconds": [min(m.seconds for m in moments), max(m.seconds for m in moments)],
        "updates": sum(frame.number > 0 for frame in history.frames),
        "gaps": gaps_text(history.gaps),
        "density": _density(history, layer_counts),
        "weights": _weights(history, layer_counts),
        "recorded": len(steps),
        "frames": [
            {"step": frame.step, "number": frame.number, "seconds": frame.seconds}
            for frame in (history.frames[i] for i in shown)
        ],
        "layers": layers,
        "groups": _groups(history, layer_counts, ages),
        "curves": {
            "step": [steps[i] for i in points],
            "total": _select(points, curves(total, max(1, sum(sizes)))),
            "layers": [
                _select(points, curves(counts, size))
                for counts, size in zip(layer_counts, sizes, strict=True)
            ],
        },
        "metrics": _metrics(history),
    }


def _groups(
    history: History, layer_counts: list[BlockCounts], ages: list[NDArray[np.int64]]
) -> list[dict[str, Any]]:
    """Return the layers that are alike in all but the numbers in their names, and their row."""
    layers = list(history.layers.values())
    index = {name: i for i, name in enumerate(history.layers)}
    kinds = [
        (name, (layer.grid, layer.block_size, layer.nm)) for name, layer in history.layers.items()
    ]
    groups = []
    for label, names, (grid, block_size, nm) in group_similar(kinds):
        members = [index[name] for name in names]
        row = _table_row(
            [layers[i] for i in members],
            [layer_counts[i] for i in members],
            [ages[i] for i in members],
        )
        kind = {"grid": list(grid), "block_size": block_size, "nm": nm}
        groups.append({"name": label, "layers": members, **kind, "row": row})
    return groups


def _table_row(
    layers: list[LayerHistory], layer_counts: list[BlockCounts], ages: list[NDArray[np.int64]]
) -> dict[str, Any]:
    """Return the row of the table for one or several layers at the last frame."""
    masks = np.concatenate([layer.mask(-1).reshape(-1) for layer in layers])
    latest = [layer.scores[max(layer.scores)].reshape(-1) for layer in layers if layer.scores]
    scores = np.concatenate([np.empty(0), *latest])
    finite = scores[np.isfinite(scores)]
    present_ages = np.concatenate(ages)[masks]
    total = sum_counts(layer_counts)
    density = total.present[-1] / masks.size
    kept = layers[0].weights_per_block / layers[0].block_size ** 2
    return {
        "present": total.present[-1],
        "density": rounded(density),
        **({} if layers[0].nm is None else {"weight_density": rounded(density * kept)}),
        "ever": rounded(total.ever[-1] / masks.size),
        "dead_outputs": total.dead_outputs[-1],
        "unread_inputs": total.unread_inputs[-1],
        "replaced": sum(sum(counts.replaced()) for counts in layer_counts),
        "age": rounded(float(present_ages.mean())) if len(present_ages) else None,
        "score": rounded(float(finite.mean())) if len(finite) else None,
    }


def animation(layer: LayerHistory, shown: Sequence[int]) -> str:
    """Return the first mask, and the changes between displayed frames, as packed bits."""
    masks = chain([np.zeros(layer.grid, dtype=bool)], map(layer.mask, shown))
    return _packed(np.packbits(mask ^ before) for before, mask in pairwise(masks))


def _scores(
    layer: LayerHistory, scored: list[int], shown: list[int], steps: list[int]
) -> dict[str, Any]:
    """Return scores in 255 levels (0: no score), and the displayed frames from which they apply."""
    ranges, levels = [], []
    for frame in scored:
        lowest, highest, frame_levels = quantise(layer.scores[frame].reshape(-1))
        ranges.append([lowest, highest])
        levels.append(frame_levels)
    return {
        "from": [int(np.searchsorted(shown, frame)) for frame in scored],
        "steps": [steps[frame] for frame in scored],
        "ranges": ranges,
        "levels": _packed(levels),
    }


def _weights(history: History, layer_counts: list[BlockCounts]) -> dict[str, int]:
    """Return the number of weights if dense, and of those kept at the first frame and the last."""
    pairs = list(zip(history.layers.values(), layer_counts, strict=True))
    return {
        "dense": count_dense_weights(history),
        "first": sum(counts.present[0] * layer.weights_per_block for layer, counts in pairs),
        "last": sum(counts.present[-1] * layer.weights_per_block for layer, counts in pairs),
    }


def _density(history: History, layer_counts: list[BlockCounts]) -> list[float]:
    """Return the share of the weights that present blocks cover at the first frame and the last."""
    pairs = list(zip(history.layers.values(), layer_counts, strict=True))
    dense = max(1, count_dense_weights(history))
    return [
        sum(counts.present[i] * layer.block_size**2 for layer, counts in pairs) / dense
        for i in (0, -1)
    ]


def count_dense_weights(history: History) -> int:
    """Return the number of weights of the layers if they were dense."""
    return sum(math.prod(layer.grid) * layer.block_size**2 for layer in history.layers.values())


def _metrics(history: History) -> list[dict[str, Any]]:
    metrics_data = []
    for name, (steps, values) in metric_lines(history).items():
        points = evenly_spaced(len(steps), MAX_POINTS)
        metrics_data.append(
            {
                "panel": panel_name(name),
                "name": name,
                "step": [steps[i] for i in points],
                "value": [values[i] for i in points],
            }
        )
    return metrics_data


def flatten(about: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yield the values of nested mappings, with their keys joined by dots.

    >>> list(flatten({"density": {"final": 0.1, "begin": 0}, "seed": 3}))
    [('density.final', 0.1), ('density.begin', 0), ('seed', 3)]
    """
    for key, value in about.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def as_text(value: Any) -> str:
    """Return the text shown for a value of the configuration."""
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _finite(value: Any) -> float | None:
    return rounded(value) if isinstance(value, int | float) and math.isfinite(value) else None


def rounded(value: float) -> float:
    """Return a number with six significant digits, to save space."""
    return float(f"{value:.6g}")


def _select(points: list[int], lines: Mapping[str, list[float]]) -> dict[str, list[float]]:
    return {name: [values[i] for i in points] for name, values in lines.items()}


def _packed(arrays: Iterable[NDArray[np.uint8]]) -> str:
    stream = zlib.compressobj()
    parts = [stream.compress(array.tobytes()) for array in arrays]
    return base64.b64encode(b"".join([*parts, stream.flush()])).decode()
