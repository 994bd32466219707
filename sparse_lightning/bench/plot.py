"""Plot the speed-up over the density: one panel per op, one line per block size."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_lightning.bench.kernels import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#1b6ca8", "#d1495b", "#3a8f5c", "#8a5aa8")


def break_even(densities: Sequence[float], speedups: Sequence[float]) -> float | None:
    """Return the density at which the speed-up crosses 1, by linear interpolation in log-log.

    Return None if it does not cross 1.

    >>> round(break_even([0.5, 0.125], [0.5, 2.0]), 3)
    0.25
    >>> break_even([0.5, 0.25], [2.0, 4.0]) is None
    True
    """
    points = sorted(zip(densities, speedups, strict=True), reverse=True)
    for (d0, s0), (d1, s1) in itertools.pairwise(points):
        if (s0 - 1) * (s1 - 1) <= 0 and s0 != s1:
            share = math.log(s0) / (math.log(s0) - math.log(s1))
            return math.exp(math.log(d0) + share * (math.log(d1) - math.log(d0)))
    return None


def check_format(path: Path) -> None:
    """Raise ValueError unless matplotlib can write files with the path's suffix.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in formats:
        raise ValueError(
            f"`--plot` must end in one of {', '.join(sorted(formats))}; got '{path.name}'."
        )


def plot(rows: Sequence[Row], environment: dict[str, str], title: str, path: Path) -> None:
    """Plot the speed-ups of all rows into an image file, and mark the break-even densities.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    ops = list(dict.fromkeys(row.op for row in rows))
    figure = Figure(figsize=(4.6 * len(ops), 4.6), layout="constrained")
    panels: Any = figure.subplots(1, len(ops), squeeze=False, sharey=True)[0]
    for op, axes in zip(ops, panels, strict=True):
        _panel(axes, op, [row for row in rows if row.op == op])
    panels[0].set_ylabel("speed-up over the dense product")
    lines = {line.get_label(): line for axes in panels for line in axes.get_lines()}
    lines = {label: line for label, line in lines.items() if not label.startswith("_")}
    figure.legend(list(lines.values()), list(lines), loc="outside right center", fontsize=8)
    about = ", ".join(environment[k] for k in ("device", "commit") if k in environment)
    figure.suptitle(f"{title}\n{about}", fontsize=10)
    figure.savefig(path, dpi=150)


def _panel(axes: Axes, op: str, rows: Sequence[Row]) -> None:
    axes.axhline(1, color="0.35", linewidth=1)
    densities: list[float] = []
    for density in sorted({round(row.density, 3) for row in rows}, reverse=True):
        # Block sizes round a density differently; labels of nearby densities would overlap.
        if not densities or density < 0.85 * densities[-1]:
            densities.append(density)
    sizes = sorted({row.block_size for row in rows})
    for i, (size, colour) in enumerate(zip(sizes, _COLOURS, strict=False)):
        line = [row for row in rows if row.block_size == size]
        x, y = [row.density for row in line], [row.speedup for row in line]
        axes.plot(x, y, "o-", color=colour, markersize=4, label=f"blocks of {size}")
        crossing = break_even(x, y)
        if crossing is not None:
            axes.plot(crossing, 1, "D", color=colour, markersize=7, markeredgecolor="white")
            axes.annotate(
                f"{crossing:.2f}", (crossing, 1), (0, (-13, 7)[i % 2]), textcoords="offset points",
                color=colour, fontsize=8, ha="center",
            )  # fmt: skip
        for name, style in zip(line[0].peers, (":", "--", "-."), strict=False):
            points = [(row.density, row.peers[name]) for row in line if row.peers[name]]
            if points:
                axes.plot(
                    *zip(*points, strict=True), style, color=colour, linewidth=1, alpha=0.7,
                    label=f"{name}, {size}",
                )  # fmt: skip
    axes.set(title=op, xscale="log", yscale="log", xlabel="density")
    axes.invert_xaxis()
    axes.set_xticks(densities, [f"{d:g}" for d in densities], minor=False, fontsize=8)
    axes.set_xticks([], minor=True)
    ticks = [0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16]
    low, high = axes.get_ylim()
    shown = [tick for tick in ticks if low <= tick <= high]
    axes.set_yticks(shown, [f"{tick:g}x" for tick in shown])
    axes.set_yticks([], minor=True)
    axes.grid(alpha=0.25)
