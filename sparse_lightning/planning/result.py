"""`Plan`: what `plan` returns, and how it reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from sparse_lightning.planning.costs import Check, Choice, Cost
from sparse_lightning.tables import Section, as_text


@dataclass(frozen=True)
class PlannedLayer:
    """A layer that can be block-sparse.

    Attributes:
        shape: (out_features, in_features).
        block_sizes: those of the plan that it can have.
        tokens: that its forward sees in a step; None if that was not measured.
    """

    shape: tuple[int, int]
    block_sizes: tuple[int, ...]
    tokens: int | None = None


@dataclass(frozen=True)
class Plan:
    """What `plan` found; `print` it.

    Attributes:
        model: the name of its class.
        layers: that would be block-sparse, with one block size of the plan or another.
        skipped: the linear layers that would stay dense, with the reason.
        unfit: block sizes of which there are no choices, with the reason.
        precision: of the training, as Lightning's.
        dense: what the model costs as it is.
        choices: what it costs with block-sparse layers, by block size and density.
        launch: seconds that the host takes to launch the dense step, below which none is expected
            to fall; 0 on a CPU. None if no input was given to measure with, as `measured`.
        measured: whether block-sparse products were measured on the spot; else their speed-ups are
            from a table of such a GPU.
        checks: choices that were tried.
        follows: layers that would have the blocks of one of `layers`, as copies:
            `{copy: original}`.
    """

    model: str
    layers: Mapping[str, PlannedLayer]
    skipped: Mapping[str, str]
    unfit: Mapping[int, str]
    precision: str
    dense: Cost
    choices: Sequence[Choice]
    launch: float | None = None
    measured: bool | None = None
    checks: Sequence[Check] = ()
    follows: Mapping[str, str] = field(default_factory=dict)

    @property
    def best(self) -> Choice | None:
        """The choice whose step should be the fastest; None if times are not known."""
        timed = [(choice.step, choice) for choice in self.choices if choice.step is not None]
        return min(timed, key=lambda pair: pair[0])[1] if timed else None

    def sections(self) -> list[Section]:
        """Return tables and remarks, to be printed."""
        found = [self._layers()]
        if self.follows:
            found.append(self._copies())
        if self.skipped or self.unfit:
            found.append(self._left_dense())
        found.append(self._costs())
        if self.checks:
            found.append(self._checks())
        return found

    def __str__(self) -> str:
        return as_text(self.sections())

    def _layers(self) -> Section:
        timed = self.launch is not None
        rows = _alike(
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
            ("layer", "number", "shape", "block sizes", *(["tokens a step"] if timed else [])),
            rows,
        )

    def _copies(self) -> Section:
        pairs = _alike((f"{copy}.{_FOLLOWS}.{of}", ()) for copy, of in self.follows.items())
        return Section(
            "Copies, which have the blocks of their originals",
            ("layer", "number"),
            [(name.replace(f".{_FOLLOWS}.", f" {_FOLLOWS} "), number) for name, number in pairs],
        )

    def _left_dense(self) -> Section:
        return Section(
            "Left dense",
            ("layer", "number", "reason") if self.skipped else (),
            _alike((name, (reason,)) for name, reason in self.skipped.items()),
            [
                f"There are no choices with blocks of {block_size}, which fit no layer, or not all "
                "that were named."
                for block_size in self.unfit
            ],
        )

    def _costs(self) -> Section:
        timed = self.launch is not None
        rows = [("dense", "", *_cells(self.dense), *(["1.00", ""] if timed else []))]
        for choice in self.choices:
            speedup = [f"{choice.speedup:.2f}", self._mark(choice)] if choice.speedup else []
            label = f"blocks of {choice.block_size}"
            rows.append((label, f"{choice.density:g}", *_cells(choice), *speedup))
        header = ("layers", "density", "parameters", "memory", "FLOPs a token")
        times = ("step", "speed-up", "remark") if timed else ()
        return Section("What the model costs", header + times, rows, self._remarks())

    def _mark(self, choice: Choice) -> str:
        if choice.speedup is None or choice.speedup < 1:
            return "slower than dense"
        if choice == self.best:
            return "fastest"
        rivals = [other for other in self.choices if other.density == choice.density]
        fastest = max(rivals, key=lambda other: other.speedup or 0.0)
        is_fastest = len(rivals) > 1 and choice == fastest
        return f"fastest at {choice.density:g}" if is_fastest else ""

    def _remarks(self) -> list[str]:
        remarks = [
            "Memory is that of weights, gradients and AdamW's two moments, each of the parameter's "
            f"dtype under {self.precision}; activations come on top. FLOPs are those of the linear "
            "layers, in forward and backward: 6 a weight."
        ]
        if self.launch is None:
            remarks.append("No times: without --input nothing was measured.")
        else:
            products = (
                "measured here one by one, as there is no table of such a device"
                if self.measured
                else "by the table of kernels measured on such a GPU"
            )
            remarks.append(
                f"The dense step was measured here: forward, backward and AdamW, {self.precision}. "
                "The other steps are expected from it, with the dense products of the layers "
                f"exchanged for block-sparse ones ({products}), and AdamW's part in proportion to "
                "the parameters. That kernels fuse activations in an nn.Sequential is left out."
            )
            if self.launch:
                remarks.append(
                    f"The host takes {_milliseconds(self.launch)} to launch a step; none is "
                    "expected to be faster."
                )
            if all((choice.speedup or 0) < 1 for choice in self.choices):
                remarks.append("No choice should be faster than the dense model, on this device.")
        remarks.append("At which density the model still learns what it should, no plan can tell.")
        return remarks

    def _checks(self) -> Section:
        return Section(
            "Expected and measured steps",
            ("layers", "density", "expected", "measured", "error", "speed-up"),
            [
                (
                    f"blocks of {check.block_size}",
                    f"{check.density:g}",
                    _milliseconds(check.expected),
                    _milliseconds(check.measured),
                    f"{check.error:+.1%}",
                    f"{(self.dense.step or 0.0) / check.measured:.2f}",
                )
                for check in self.checks
            ],
            ["The speed-up is the dense step over the measured one."],
        )


_FOLLOWS = "follows"


def _cells(cost: Cost) -> list[str]:
    cells = [f"{cost.parameters:,}", _scaled(cost.memory, "B"), _scaled(cost.flops, "FLOP")]
    return [*cells, *([_milliseconds(cost.step)] if cost.step is not None else [])]


def _milliseconds(seconds: float) -> str:
    """Write seconds as ms, with as many digits as can be told apart.

    >>> _milliseconds(0.1234), _milliseconds(0.0012345)
    ('123 ms', '1.23 ms')
    """
    ms = 1e3 * seconds
    return f"{ms:.{max(0, 3 - len(str(int(ms)))) if ms >= 1 else 3}f} ms"


def _scaled(number: int, unit: str) -> str:
    """Write a number with three digits or more, in thousands, millions, ...

    >>> _scaled(1234, "B"), _scaled(56_700_000, "FLOP")
    ('1.23 kB', '56.7 MFLOP')
    """
    value, prefixes = float(number), iter(("", "k", "M", "G", "T"))
    prefix = next(prefixes)
    while value >= 1000:
        value, prefix = value / 1000, next(prefixes, "P")
    return f"{value:.3g} {prefix}{unit}"


def _alike(rows: Iterable[tuple[str, tuple[str, ...]]]) -> list[tuple[str, ...]]:
    """Merge rows of layers that differ in a number of their names only; insert how many they are.

    >>> _alike([("layers.0.up.1", ("8x4",)), ("layers.1.up.1", ("8x4",)), ("head", ("2x4",))])
    [('layers.*.up.1', '2', '8x4'), ('head', '1', '2x4')]
    """
    groups: dict[tuple[str, tuple[str, ...]], list[list[str]]] = {}
    for name, cells in rows:
        parts = name.split(".")
        alike = ".".join("*" if part.isdigit() else part for part in parts)
        groups.setdefault((alike, cells), []).append(parts)
    return [
        (
            ".".join(part[0] if len({*part}) == 1 else "*" for part in zip(*names, strict=True)),
            str(len(names)),
            *cells,
        )
        for (_, cells), names in groups.items()
    ]
