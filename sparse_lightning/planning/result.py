"""`Plan`: the result of `plan`, and its tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sparse_lightning.names import merge_similar
from sparse_lightning.nm_pattern import kept_share
from sparse_lightning.planning.costs import Check, Cost, Setting
from sparse_lightning.swap_report import WEIGHT_DENSITY
from sparse_lightning.tables import Section, as_text


@dataclass(frozen=True)
class PlannedLayer:
    """A layer that can be block-sparse.

    Attributes:
        shape: (out_features, in_features).
        block_sizes: block sizes of the plan that divide its shape.
        tokens: number of tokens that its forward processes in a step; None if not measured.
    """

    shape: tuple[int, int]
    block_sizes: tuple[int, ...]
    tokens: int | None = None


@dataclass(frozen=True)
class Plan:
    """The result of `plan`; print it to read its tables.

    Attributes:
        model: class name of the model.
        layers: layers that can be block-sparse with at least one block size of the plan.
        skipped: linear layers that stay dense, with the reason.
        unfit: block sizes without settings, with the reason.
        precision: precision of the training, as in Lightning.
        dense: cost of the dense model.
        settings: cost with block-sparse layers for each block size and density.
        launch: seconds in which the host launches the dense step, a lower bound of every expected
            step; 0 on a CPU. None, like `measured`, if no input was given to measure with.
        measured: whether speed-ups of block-sparse products were measured for this plan; otherwise
            all come from tables for the GPU.
        checks: comparisons of expected with measured steps.
        follows: copies that would have the blocks of one of `layers`: `{copy: source}`.
        nm: "2:4" if only two of each four weights within blocks are kept; None if all are.
    """

    model: str
    layers: Mapping[str, PlannedLayer]
    skipped: Mapping[str, str]
    unfit: Mapping[int, str]
    precision: str
    dense: Cost
    settings: Sequence[Setting]
    launch: float | None = None
    measured: bool | None = None
    checks: Sequence[Check] = ()
    follows: Mapping[str, str] = field(default_factory=dict)
    nm: str | None = None

    @property
    def best(self) -> Setting | None:
        """The setting with the shortest expected step; None if no step was measured."""
        timed = [(setting.step, setting) for setting in self.settings if setting.step is not None]
        return min(timed, key=lambda pair: pair[0])[1] if timed else None

    def sections(self) -> list[Section]:
        """Return the tables and remarks to print."""
        sections = [self._layer_section()]
        if self.follows:
            sections.append(self._copy_section())
        if self.skipped or self.unfit:
            sections.append(self._dense_section())
        sections.append(self._cost_section())
        if self.checks:
            sections.append(self._check_section())
        return sections

    def __str__(self) -> str:
        return as_text(self.sections())

    def _layer_section(self) -> Section:
        timed = self.launch is not None
        rows = merge_similar(
            (
                name,
                (
                    f"{layer.shape[0]}x{layer.shape[1]}",
                    " ".join(map(str, layer.block_sizes)),
                    *([f"{layer.tokens:,}"] if timed else []),
                ),
            )
            for name, layer in self.layers.items()
        )
        return Section(
            f"{self.model}: layers that can be block-sparse",
            ("layer", "number", "shape", "block sizes", *(["tokens per step"] if timed else [])),
            rows,
        )

    def _copy_section(self) -> Section:
        pairs = merge_similar(
            (f"{copy}.{_FOLLOWS}.{source}", ()) for copy, source in self.follows.items()
        )
        return Section(
            "Copies, which keep the same blocks as their source layers",
            ("layer", "number"),
            [(name.replace(f".{_FOLLOWS}.", f" {_FOLLOWS} "), number) for name, number in pairs],
        )

    def _dense_section(self) -> Section:
        return Section(
            "Layers that stay dense",
            ("layer", "number", "reason") if self.skipped else (),
            merge_similar((name, (reason,)) for name, reason in self.skipped.items()),
            [
                f"There are no settings with blocks of {block_size}, which do not divide any layer "
                "or not all layers that were named."
                for block_size in self.unfit
            ],
        )

    def _cost_section(self) -> Section:
        timed = self.launch is not None
        blank = ("",) if self.nm is None else ("", "")
        rows = [("dense", *blank, *_cells(self.dense), *(["1.00", ""] if timed else []))]
        for setting in self.settings:
            speedup = [f"{setting.speedup:.2f}", self._remark(setting)] if setting.speedup else []
            rows.append((*self._setting_cells(setting), *_cells(setting), *speedup))
        peak = ("peak memory",) if self.dense.peak else ()
        header = (*self._setting_header, "parameters", "memory", "FLOPs")
        times = ("step", *peak, "speed-up", "remark") if timed else ()
        return Section("Cost of the model", header + times, rows, self._remarks())

    @property
    def _setting_header(self) -> tuple[str, ...]:
        return "layers", "density", *([] if self.nm is None else [WEIGHT_DENSITY])

    def _setting_cells(self, setting: Setting | Check) -> list[str]:
        label, density = f"blocks of {setting.block_size}", f"{setting.density:g}"
        if self.nm is None:
            return [label, density]
        return [f"{label} at {self.nm}", density, f"{setting.density * kept_share(self.nm):g}"]

    def _remark(self, setting: Setting) -> str:
        if setting.speedup is None or setting.speedup < 1:
            return "slower than dense"
        if setting == self.best:
            return "fastest"
        rivals = [other for other in self.settings if other.density == setting.density]
        fastest = max(rivals, key=lambda other: other.speedup or 0.0)
        is_fastest = len(rivals) > 1 and setting == fastest
        return f"fastest at {setting.density:g}" if is_fastest else ""

    def _remarks(self) -> list[str]:
        remarks = [
            "Memory includes weights, gradients and AdamW's two moments, each in the parameter's "
            f"dtype under {self.precision}, but no activations. FLOPs are those of the linear "
            "layers in forward and backward: 6 per weight for a token, or for a sample that has no "
            "tokens."
        ]
        if self.nm is not None:
            remarks.append(
                f"Blocks keep two of each four weights ({self.nm}): parameters, memory and FLOPs "
                "are those of the kept weights, and which ones these are takes two bits more for "
                "each. Kernels multiply whole blocks, so FLOPs do not tell the time."
            )
        if self.dense.peak:
            remarks.append(
                "Peak memory is the most that a step allocates, with activations: measured for the "
                "dense model, and expected for the others."
            )
        if self.launch is None:
            remarks.append("Step times are unknown: without --input nothing was measured.")
        else:
            products = (
                "measured one by one, where no table covers them"
                if self.measured
                else "by tables of kernels measured on such a GPU"
            )
            remarks.append(
                f"The dense step was measured: forward, backward and AdamW, {self.precision}. The "
                "other steps are expected from it, with the dense products of the layers replaced "
                f"by block-sparse ones ({products}) and AdamW's time in proportion to the "
                "parameters."
            )
            if self.nm is not None:
                remarks.append(
                    "The expected steps include the measured time in which products make whole "
                    "blocks of the kept weights."
                )
            if self.launch:
                remarks.append(
                    f"The host takes {_milliseconds(self.launch)} to launch a step; no step is "
                    "expected to be shorter."
                )
            if all((setting.speedup or 0) < 1 for setting in self.settings):
                remarks.append("No setting is expected to be faster than dense on this device.")
        remarks.append("A plan does not predict how well the model learns at a density.")
        return remarks

    def _check_section(self) -> Section:
        return Section(
            "Expected and measured steps",
            (
                *(*self._setting_header, "expected", "measured", "error", "speed-up"),
                *(("peak, expected", "measured", "error") if self.dense.peak else ()),
            ),
            [
                (
                    *self._setting_cells(check),
                    _milliseconds(check.expected),
                    _milliseconds(check.measured),
                    f"{check.error:+.1%}",
                    f"{(self.dense.step or 0.0) / check.measured:.2f}",
                    *_peak_cells(check),
                )
                for check in self.checks
            ],
            ["The speed-up is the dense step divided by the measured step."],
        )


_FOLLOWS = "follows"


def _cells(cost: Cost) -> list[str]:
    cells = [f"{cost.parameters:,}", _scaled(cost.memory, "B"), _scaled(cost.flops, "FLOP")]
    cells += [_milliseconds(cost.step)] if cost.step is not None else []
    return [*cells, *([_scaled(cost.peak, "B")] if cost.peak is not None else [])]


def _peak_cells(check: Check) -> list[str]:
    if check.expected_peak is None or check.measured_peak is None:
        return []
    sizes = [_scaled(size, "B") for size in (check.expected_peak, check.measured_peak)]
    return [*sizes, f"{check.peak_error:+.1%}"]


def _milliseconds(seconds: float) -> str:
    """Format seconds as milliseconds with three significant digits.

    >>> _milliseconds(0.1234), _milliseconds(0.0012345)
    ('123 ms', '1.23 ms')
    """
    ms = 1e3 * seconds
    return f"{ms:.{max(0, 3 - len(str(int(ms)))) if ms >= 1 else 3}f} ms"


def _scaled(number: int, unit: str) -> str:
    """Format a number with three significant digits and an SI prefix.

    >>> _scaled(1234, "B"), _scaled(56_700_000, "FLOP")
    ('1.23 kB', '56.7 MFLOP')
    """
    value, prefixes = float(number), iter(("", "k", "M", "G", "T"))
    prefix = next(prefixes)
    while value >= 1000:
        value, prefix = value / 1000, next(prefixes, "P")
    return f"{value:.3g} {prefix}{unit}"
