"""Results of trainings: the file that keeps them, tables, and a plot."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from quality import spread

from lm.settings import DENSE, Settings
from lm.training import Point, Result
from sparse_lightning.bench.environment import environment_line
from sparse_lightning.tables import Section

_COLOURS = (
    "#222222", "#1b6ca8", "#d1495b", "#3a8f5c", "#8a5aa8", "#c98a1b", "#4aa3a2", "#7a7a7a",
)  # fmt: skip


def append_result(file: Path, result: Result) -> None:
    """Append a result to a file of JSON lines."""
    with file.open("a") as out:
        out.write(json.dumps(asdict(result)) + "\n")


def read_results(file: Path) -> list[Result]:
    """Return the results in a file; none if it does not exist.

    Raises:
        ValueError: if the file has other lines.
    """
    if not file.exists():
        return []
    results = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            row["settings"] = Settings(**row["settings"])
            row["curve"] = [Point(**point) for point in row["curve"]]
            results.append(Result(**row))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"The results must be lines that `train` has written; got '{file}', whose line "
                f"{number} is another ({error}). Give another file."
            ) from error
    return results


# -- curves -------------------------------------------------------------------------------------


def loss_at(curve: Sequence[Point], axis: str, value: float) -> float | None:
    """Return the held-out loss at a value of an axis, by linear interpolation.

    Args:
        curve: the points of a training.
        axis: "tokens", "seconds" or "flops".
        value: the place on the axis.

    Returns:
        The loss; None if the training ended before.
    """
    for before, after in itertools.pairwise(curve):
        begin, end = getattr(before, axis), getattr(after, axis)
        if begin <= value <= end:
            share = (value - begin) / (end - begin)
            return before.held_out_loss + share * (after.held_out_loss - before.held_out_loss)
    return None


def seconds_to(curve: Sequence[Point], loss: float) -> float | None:
    """Return the seconds after which the held-out loss is first at most `loss`; None if never.

    Between two points, the loss is interpolated linearly.
    """
    for before, after in itertools.pairwise(curve):
        if after.held_out_loss <= loss:
            fall = before.held_out_loss - after.held_out_loss
            share = (before.held_out_loss - loss) / fall if fall > 0 else 0.0
            return before.seconds + max(0.0, share) * (after.seconds - before.seconds)
    return None


# -- tables -------------------------------------------------------------------------------------

Variant = list[Result]  # one result per seed


def group(results: Sequence[Result]) -> dict[str, dict[str, Variant]]:
    """Return the variants of each model by label, in order of appearance, without searches.

    If the dense model was trained for several lengths, each of these budgets counts as a model of
    its own, with the variants whose lengths are nearest to it. Trainings of one variant that take
    different numbers of steps are separate. Of several learning rates, a variant has the one with
    the lowest loss at its first seed.
    """
    trainings = [result for result in results if not result.settings.is_search]
    budgets: dict[str, list[float]] = {}
    for result in trainings:
        if result.settings.label == DENSE:
            lengths = budgets.setdefault(_model_title(result.settings), [])
            if result.curve[-1].tokens not in lengths:
                lengths.append(result.curve[-1].tokens)
    models: dict[str, dict[tuple[str, int], Variant]] = {}
    for result in trainings:
        settings = result.settings
        title = _model_title(settings)
        if len(budgets.get(title, ())) > 1:
            budget = min(budgets[title], key=partial(_distance, result.curve[-1].tokens))
            title += f", budget of {budget / 1e6:.3g} M tokens"
        variants = models.setdefault(title, {})
        variants.setdefault((settings.label, settings.steps), []).append(result)
    return {
        title: {
            _distinct(label, steps, variants): with_best_lr(v)
            for (label, steps), v in variants.items()
        }
        for title, variants in models.items()
    }


def _distance(a: float, b: float) -> float:
    """Return the distance of two lengths, as the logarithm of their ratio."""
    return abs(math.log(a / b))


def with_best_lr(variant: Variant) -> Variant:
    """Return the results with the learning rate whose loss is the lowest at the first seed."""
    seed = min(result.settings.seed for result in variant)
    first = [result for result in variant if result.settings.seed == seed]
    best = min(first, key=lambda result: result.curve[-1].held_out_loss).settings.lr
    return [result for result in variant if result.settings.lr == best]


def _model_title(settings: Settings) -> str:
    name = {"gpt": "GPT", "llama": "Llama"}[settings.model]
    return (
        f"{name}, {settings.width} wide, {settings.layers} layers, {settings.heads} heads, "
        f"vocabulary of {settings.vocabulary:,}, {settings.batch} x {settings.context} tokens a "
        f"step, {settings.precision}, data {settings.data}"
    )


def _distinct(label: str, steps: int, variants: dict[tuple[str, int], Variant]) -> str:
    """Return a label, with the length of the training if other lengths have the same label."""
    lengths = {other for name, other in variants if name == label}
    if len(lengths) == 1:
        return label
    return f"{label}, {variants[label, steps][0].curve[-1].tokens / 1e6:.0f} M tokens"


def tables(
    results: Sequence[Result], tokens: float | None = None, seconds: float | None = None
) -> list[Section]:
    """Return a table of losses and one of costs for each model.

    Args:
        results: the results of all trainings.
        tokens: number of tokens at which losses are compared; the dense model's by default.
        seconds: training time at which losses are compared; the dense model's by default.
    """
    sections = []
    for title, variants in group(results).items():
        sections += _model_tables(title, variants, tokens, seconds)
    return sections


def _model_tables(
    title: str, variants: dict[str, Variant], tokens: float | None, seconds: float | None
) -> list[Section]:
    is_dense = (variant for variant in variants.values() if variant[0].settings.label == DENSE)
    dense = {result.settings.seed: result.curve[-1] for result in next(is_dense, [])}
    if dense:
        tokens = mean([end.tokens for end in dense.values()]) if tokens is None else tokens
        seconds = mean([end.seconds for end in dense.values()]) if seconds is None else seconds

    # Trainings with the same seed see the same batches, so their losses are compared.
    def seconds_to_dense(result: Result) -> float | None:
        end = dense.get(result.settings.seed)
        return None if end is None else seconds_to(result.curve, end.held_out_loss)

    columns: list[tuple[str, Callable[[Result], float | None], int]] = [
        ("at its end", lambda result: result.curve[-1].held_out_loss, 3)
    ]
    if tokens is not None:
        at_tokens = partial(_loss_at, axis="tokens", value=tokens)
        columns.append((f"at {tokens / 1e6:.4g} M tokens", at_tokens, 3))
    if seconds is not None:
        at_seconds = partial(_loss_at, axis="seconds", value=seconds)
        columns.append((f"at {seconds:.4g} s", at_seconds, 3))
    remarks = [
        "Held-out loss in nats per token; mean ± sample sd over seeds. A dash means that the "
        "training ended before, or did not reach the loss."
    ]
    if dense:
        columns.append(("seconds to dense's loss", seconds_to_dense, 0))
    else:
        remarks.append("There is no dense training to compare with.")
    if any(variant[0].settings.start is not None for variant in variants.values()):
        remarks.append("What the dense training before took is not counted.")
    losses = [
        [label, *(cell([value(result) for result in variant], n) for _, value, n in columns)]
        for label, variant in variants.items()
    ]
    costs = [[label, *_costs(variant)] for label, variant in variants.items()]
    cost_header = ["model", "seeds", "lr", "M tokens", "tokens/s", "PFLOPs", "M parameters",
                   "density", "peak GiB"]  # fmt: skip
    environments = {environment_line(r.environment) for v in variants.values() for r in v}
    return [
        Section(f"{title}: losses", ["model", *(name for name, _, _ in columns)], losses, remarks),
        Section(f"{title}: costs", cost_header, costs, sorted(environments)),
    ]


def _loss_at(result: Result, axis: str, value: float) -> float | None:
    return loss_at(result.curve, axis, value)


def _costs(variant: Variant) -> list[str]:
    def show(value: Callable[[Result], float], decimals: int) -> str:
        return spread([value(result) for result in variant], decimals)

    rates = sorted({result.settings.lr for result in variant})
    return [
        " ".join(str(seed) for seed in sorted(result.settings.seed for result in variant)),
        " ".join(f"{rate:g}" for rate in rates),
        f"{variant[0].curve[-1].tokens / 1e6:.4g}",
        show(lambda result: result.tokens_per_second, 0),
        show(lambda result: result.curve[-1].flops / 1e15, 1),
        f"{mean([result.parameters for result in variant]) / 1e6:.1f}",
        f"{mean([result.density for result in variant]):.3g}",
        show(lambda result: result.peak_memory / 2**30, 1),
    ]


def mean(values: Sequence[float]) -> float:
    """Return the mean."""
    return sum(values) / len(values)


def cell(values: Sequence[float | None], decimals: int) -> str:
    """Return the mean and spread of values, and how many there are if some are missing.

    >>> cell([1.0, 3.0], 1), cell([None, 3.0], 1), cell([None], 1)
    ('2.0 ± 1.4', '3.0 (1 of 2 seeds)', '–')
    """
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    missing = f" ({len(known)} of {len(values)} seeds)" if len(known) < len(values) else ""
    return spread(known, decimals) + missing


# -- plot ---------------------------------------------------------------------------------------


def plot(results: Sequence[Result], file: Path) -> None:
    """Plot held-out losses over tokens, seconds and FLOPs; one row of panels for each model.

    Each seed is a line.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    models = group(results)
    figure = Figure(figsize=(15, 4.6 * len(models)), layout="constrained")
    panels: Any = figure.subplots(len(models), 3, squeeze=False, sharey="row")
    axes_titles = {"tokens": "tokens", "seconds": "seconds of training", "flops": "FLOPs"}
    for row, (title, variants) in zip(panels, models.items(), strict=True):
        row[0].set_ylabel("held-out loss, nats per token")
        row[1].set_title(title, fontsize=9)
        for axes, (axis, name) in zip(row, axes_titles.items(), strict=True):
            for (label, variant), colour in zip(
                variants.items(), itertools.cycle(_COLOURS), strict=False
            ):
                for result, shown in itertools.zip_longest(variant, [label]):
                    # The first points of all trainings are far above the interesting losses.
                    points = result.curve[len(result.curve) // 10 + 1 :]
                    axes.plot(
                        [getattr(point, axis) for point in points],
                        [point.held_out_loss for point in points],
                        color=colour, linewidth=1.2, label=shown,
                    )  # fmt: skip
            axes.set_xlabel(name)
            axes.grid(alpha=0.25)
        row[2].legend(fontsize=7)
    figure.savefig(file, dpi=150)
