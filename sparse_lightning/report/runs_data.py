"""Convert the histories of several runs to the data of the page that compares them.

A history is read, converted and closed before the next, because a sweep can have more histories
than a process may open. What a history lacks is None.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparse_lightning.history import History, read_history
from sparse_lightning.report.page_data import (
    MAX_BLOCKS_IN_ANIMATIONS,
    BlockCounts,
    animation,
    as_text,
    count_blocks,
    count_dense_weights,
    curves,
    evenly_spaced,
    flatten,
    gaps_text,
    metric_lines,
    recorded_moments,
    rounded,
    sum_counts,
)

MAX_FRAMES = 41  # one for each 2.5 % of a run
MAX_POINTS = 400  # per curve, as several runs share the pixels of a screen

_VALIDATION = re.compile(r"(?<![a-z])(val|valid|validation|eval|test)(?![a-z])")
_QUALITY = re.compile(r"loss|acc")
_HIGHER_IS_BETTER = re.compile(
    r"acc|(?<![a-z])(auc|auroc|f1|precision|recall|iou|dice|bleu|rouge|reward)(?![a-z])"
)


def runs_data(histories: Mapping[str, Path], title: str) -> dict[str, Any]:
    """Return the data of the page as primitives for JSON.

    Args:
        histories: history files by the name of the run.
        title: title of the page.

    Raises:
        ValueError: if a file is not a history, or holds no masks.
        OSError: if a file cannot be read.
    """
    n_blocks = sum(count_all_blocks(read_history(path)) for path in histories.values())
    n_frames = min(MAX_FRAMES, max(2, MAX_BLOCKS_IN_ANIMATIONS // max(1, n_blocks)))
    configs, runs = [], []
    for name, path in histories.items():
        history = read_history(path)
        configs.append(dict(flatten(history.about.get("config", {}))))
        runs.append({"name": name, **run_data(history, n_frames)})
    metrics = [name for run in runs for name in run["metrics"]]
    differing = differing_options(configs)
    for i, run in enumerate(runs):
        run["options"] = [values[i] for values in differing.values()]
    return {
        "title": title,
        "options": list(differing),
        "metrics": {name: best_is(name) for name in metrics},
        "metric": default_metric(metrics),
        "layers": list(dict.fromkeys(name for run in runs for name in run["layers"])),
        "runs": runs,
    }


def count_all_blocks(history: History) -> int:
    """Return the number of blocks of all layers, present or not."""
    return sum(math.prod(layer.grid) for layer in history.layers.values())


def run_data(history: History, n_frames: int) -> dict[str, Any]:
    """Return the data of one run as primitives for JSON.

    Args:
        history: history with at least one frame.
        n_frames: number of masks of each layer, at least 2, from the first step to the last.
    """
    steps = [frame.step for frame in history.frames]
    moments = recorded_moments(history)
    first, last = min(m.step for m in moments), max(m.step for m in moments)
    n_blocks = max(1, count_all_blocks(history))
    layer_counts = [count_blocks(layer, steps)[0] for layer in history.layers.values()]
    total = curves(sum_counts(layer_counts), n_blocks)
    weights = present_weights(history, layer_counts)
    dense = count_dense_weights(history)
    seconds = max(m.seconds for m in moments) - min(m.seconds for m in moments)
    points = evenly_spaced(len(steps), MAX_POINTS)
    shown = frames_by_progress(steps, first, last, n_frames)
    return {
        "gaps": gaps_text(history.gaps),
        "density": total["density"][-1],
        "weights": weights[-1],
        "dense_weights": dense,
        "flops": rounded(mean_over_steps(weights, steps, last) / max(1, dense)),
        # The start alone has no duration.
        "seconds": rounded(seconds) if len(moments) > 1 else None,
        "metrics": {name: _metric(name, *values) for name, values in metric_lines(history).items()},
        "curves": {
            "step": [steps[i] for i in points],
            "density": [total["density"][i] for i in points],
            "churn": [total["churn"][i] for i in points],
        },
        "frames": [steps[frame] for frame in shown],
        "layers": {
            name: {
                "grid": list(layer.grid),
                "block_size": layer.block_size,
                "nm": layer.nm,
                "animation": animation(layer, shown),
            }
            for name, layer in history.layers.items()
        },
    }


def differing_options(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the options that have not the same value in all runs, and their value in each.

    The values of an option are numbers if all of them are, so that they can be sorted, and texts
    otherwise. A run without the option has None. Runs whose configuration was not recorded do not
    make an option differ. An initial value that equals the final one in all runs, such as that of a
    constant density, is left out.

    >>> differing_options([{"drop": "magnitude", "seed": 1}, {"drop": "magnitude", "seed": 2}, {}])
    {'seed': [1, 2, None]}
    >>> differing_options([{"density.initial": d, "density.final": d} for d in (0.1, 0.2)])
    {'density.final': [0.1, 0.2]}
    """
    known = [config for config in configs if config]
    found: dict[str, list[Any]] = {}
    for key in dict.fromkeys(key for config in known for key in config):
        values = [config[key] for config in known if key in config]
        if len(values) == len(known) and all(value == values[0] for value in values):
            continue
        final = f"{key.removesuffix('initial')}final"
        if key.endswith(".initial") and values == [config.get(final) for config in known]:
            continue
        numbers = all(_is_number(value) for value in values)
        found[key] = [
            None if key not in config else config[key] if numbers else as_text(config[key])
            for config in configs
        ]
    return found


def default_metric(names: Sequence[str]) -> str | None:
    """Return the metric that is compared first; None if there is none.

    It is a loss or an accuracy of a validation if there is one, then the metric that most runs
    have, and then the first in alphabetical order, so accuracies come before losses.

    Args:
        names: names of the metrics, once for each run that logged them.

    >>> default_metric(["lr", "train_loss", "val_loss", "interval_loss", "train_loss"])
    'val_loss'
    """

    def rank(name: str) -> tuple[bool, bool, int, str]:
        lower = name.lower()
        return (
            _VALIDATION.search(lower) is None,
            _QUALITY.search(lower) is None,
            -names.count(name),
            name,
        )

    return min(names, key=rank, default=None)


def best_is(metric: str) -> str:
    """Return "highest" or "lowest", whichever value of a metric is the best by its name.

    >>> best_is("val/accuracy"), best_is("val_f1"), best_is("val_loss"), best_is("perplexity")
    ('highest', 'highest', 'lowest', 'lowest')
    """
    return "highest" if _HIGHER_IS_BETTER.search(metric.lower()) else "lowest"


def present_weights(history: History, layer_counts: Sequence[BlockCounts]) -> list[int]:
    """Return the number of present weights of all layers at each frame.

    Of blocks with a 2:4 pattern, only the weights that they keep are present.
    """
    of_layers = [
        [n * layer.weights_per_block for n in counts.present]
        for layer, counts in zip(history.layers.values(), layer_counts, strict=True)
    ]
    return [sum(values) for values in zip(*of_layers, strict=True)] or [0] * len(history.frames)


def mean_over_steps(values: Sequence[float], steps: Sequence[int], last: int) -> float:
    """Return the mean of values, each of which holds from its step to the next or to the last.

    >>> mean_over_steps([1.0, 0.5], [0, 10], 40), mean_over_steps([0.25], [0], 0)
    (0.625, 0.25)
    """
    lengths = np.diff([*steps, last])
    return float(np.average(values, weights=lengths)) if lengths.sum() else float(values[-1])


def frames_by_progress(steps: Sequence[int], first: int, last: int, n: int) -> list[int]:
    """Return the frames whose masks held at evenly spaced steps.

    Args:
        steps: steps of the frames.
        first: first step.
        last: last step.
        n: number of steps.

    >>> frames_by_progress([0, 10, 90], 0, 100, 5)
    [0, 1, 1, 1, 2]
    """
    moments = np.linspace(first, last, n)
    frames = np.searchsorted(steps, moments, side="right") - 1
    return [int(frame) for frame in np.maximum(frames, 0)]


def _metric(name: str, steps: list[int], values: list[float | None]) -> dict[str, Any]:
    finite = [value for value in values if value is not None]
    best = max if best_is(name) == "highest" else min
    points = evenly_spaced(len(steps), MAX_POINTS)
    return {
        "step": [steps[i] for i in points],
        "value": [values[i] for i in points],
        "last": values[-1],
        "best": best(finite, default=None),
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
