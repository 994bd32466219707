"""`plan`: what block-sparse layers would save a model, before it is trained."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import nn

from sparse_lightning.bench.options import find_device
from sparse_lightning.export.graph import Input
from sparse_lightning.linear import dense_shape
from sparse_lightning.names import DEFAULT_EXCLUDE, check_choice, check_follow
from sparse_lightning.patching import sparsify
from sparse_lightning.planning.costs import Check, Choice, Product, expected_step, model_cost
from sparse_lightning.planning.measure import (
    PRECISIONS,
    Speedups,
    Training,
    dense_times,
    tokens_of,
)
from sparse_lightning.planning.result import Plan, PlannedLayer
from sparse_lightning.policy.distributions import share
from sparse_lightning.selection import select_layers, sparse_layers
from sparse_lightning.topology import BLOCK_SIZES, block_grid, check_block_size, check_density

DENSITIES = (0.5, 0.25, 0.1, 0.05)
# "global" shares by scores, which there are in a training only.
DISTRIBUTIONS = ("uniform", "erdos_renyi")
CHECKS = ("best", "all")

Model = nn.Module | Callable[[], nn.Module]


def plan(
    model: Model,
    inputs: str | Sequence[str] = (),
    *,
    block_sizes: Sequence[int] = BLOCK_SIZES,
    densities: Sequence[float] = DENSITIES,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
    distribution: str = "uniform",
    follow: Mapping[str, str] | None = None,
    precision: str | None = None,
    device: str | torch.device | None = None,
    check: str | None = None,
) -> Plan:
    """Say which layers of a model would be block-sparse, and what that would save.

    With inputs, the dense model's training step is measured on the device. The steps of
    block-sparse models are expected from it, and from how fast their products are: by the table of
    measured kernels, if there is one of such a GPU, else measured here. That kernels fuse
    activations is left out. Copies, as the layers of a target network, have the density of their
    originals.

    Args:
        model: dense; not changed, as a copy is measured. Or a function that builds it, which saves
            the copy; without inputs it is built on the meta device, if it can be.
        inputs: what its `forward` takes: sizes and perhaps a dtype, as "8,128,int64", once for
            each input. Without them nothing is measured.
        block_sizes, densities: to choose from.
        include, exclude: patterns of layers, as for `sparsify`.
        distribution: how the budget is shared, as for `sparsify`.
        follow: copies that are not to be told from their weights, as for `sparsify`; on the meta
            device no copy is.
        precision: "32-true", "bf16-mixed" or "bf16-true", as Lightning's; by default "bf16-mixed"
            on CUDA, "32-true" on a CPU.
        device: to measure on; by default CUDA, if it is there.
        check: "best" also makes training steps of the model with the best choice, and measures
            them; "all" with every choice.

    Raises:
        ValueError: for a model without layers that can be block-sparse, one that does not take
            the inputs, or an argument out of range.
        RuntimeError: if memory ends, or a model cannot be trained.

    >>> net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    >>> found = plan(net, block_sizes=[16, 32], densities=[0.25])
    >>> [choice.parameters for choice in found.choices], found.dense.parameters
    ([8512, 8512], 33088)
    """
    specs = _parse_inputs(inputs)
    where = find_device(str(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    precision = precision or ("bf16-mixed" if where.type == "cuda" else "32-true")
    follow = follow or {}
    check_follow(follow)
    _check(specs, block_sizes, densities, distribution, precision, check)
    dtype = PRECISIONS[precision][0]

    with _nothing_left_behind(where):
        dense = _built(model, where) if specs else _outline(model)
        if any(True for _ in sparse_layers(dense)):
            raise ValueError("`model` must be dense; got block-sparse layers. Call densify(model).")
        layers, follows, skipped, unfit = _find_layers(
            dense, sorted({*block_sizes}), include, exclude, follow
        )
        # Of each choice, the density of each layer.
        own: dict[Choice, dict[str, float]] = {}
        for block_size in sorted({*block_sizes} - unfit.keys()):
            grids = {
                name: block_grid(*layer.shape, block_size)
                for name, layer in layers.items()
                if block_size in layer.block_sizes
            }
            for density in sorted({*densities}, reverse=True):
                blocks = share(distribution, density, grids, {})
                shares = {name: blocks[name] / (i * j) for name, (i, j) in grids.items()}
                for name, original in follows.items():
                    if original in grids:
                        blocks[name], shares[name] = blocks[original], shares[original]
                cost = model_cost(dense, block_size, blocks, dtype)
                choice = Choice(**vars(cost), block_size=block_size, density=density, speedup=None)
                own[choice] = shares
        found = Plan(
            model=type(dense).__name__,
            layers=layers,
            follows=follows,
            skipped=skipped,
            unfit=unfit,
            precision=precision,
            dense=model_cost(dense, dtype=dtype),
            choices=[*own],
        )
        if not specs:
            return found
        try:
            found = _with_times(found, own, Training(dense, specs, precision, where))
            del dense

            def seconds(choice: Choice) -> float:
                gc.collect()  # a model may hold itself
                made = _built(model, where).to(where, dtype)
                sparsify(
                    made,
                    block_size=choice.block_size,
                    density=choice.density,
                    include=include,
                    exclude=exclude,
                    distribution=distribution,
                    follow=follow,
                )
                return Training(made, specs, precision, where).seconds()

            best = [found.best] if found.best else []
            tried = {"best": best, "all": found.choices, None: []}[check]
            return replace(found, checks=[_check_of(choice, seconds(choice)) for choice in tried])
        except torch.OutOfMemoryError as error:
            raise RuntimeError(
                f"A training step must fit into the memory of {where}; it did not: {error} Give "
                "smaller sizes as `--input`, or none: then nothing is measured."
            ) from error


def _with_times(found: Plan, own: Mapping[Choice, Mapping[str, float]], training: Training) -> Plan:
    """Return a plan with the dense model's measured step, and those expected of its choices."""
    times, work = dense_times(training, [*found.layers, *found.follows])
    speedups = Speedups(training.device)
    choices = []
    for choice, densities in own.items():

        def of(product: Product, density: float, block_size: int = choice.block_size) -> float:
            return speedups.of(product, block_size, density)

        kept = choice.trained / found.dense.trained
        step = expected_step(times, work, densities, of, kept)
        choices.append(replace(choice, step=step, speedup=times.step / step))
    layers = {
        name: replace(layer, tokens=tokens_of(work[name])) for name, layer in found.layers.items()
    }
    return replace(
        found,
        layers=layers,
        dense=replace(found.dense, step=times.step),
        choices=choices,
        launch=times.launch,
        measured=speedups.measured,
    )


def _check_of(choice: Choice, measured: float) -> Check:
    assert choice.step is not None
    return Check(choice.block_size, choice.density, choice.step, measured)


def _find_layers(
    model: nn.Module,
    block_sizes: Sequence[int],
    include: Sequence[str],
    exclude: Sequence[str],
    follow: Mapping[str, str],
) -> tuple[dict[str, PlannedLayer], dict[str, str], dict[str, str], dict[int, str]]:
    """Return a plan's `layers`, `follows`, `skipped` and `unfit`."""
    layers: dict[str, PlannedLayer] = {}
    follows: dict[str, str] = {}
    skipped: dict[str, str] = {}
    unfit: dict[int, str] = {}
    for block_size in block_sizes:
        try:
            found = select_layers(model, block_size, include, exclude, follow)
        except ValueError as error:
            unfit[block_size] = str(error)
            continue
        for name, linear in found.layers.items():
            shape = dense_shape(linear)
            before = layers[name].block_sizes if name in layers else ()
            layers[name] = PlannedLayer(shape, (*before, block_size))
        follows |= found.follows
        for name, reason in found.skipped.items():
            if reason == "frozen" and _is_on_meta(model, name):
                reason = "frozen; that it is a copy only `follow` tells, without its weights"
            skipped.setdefault(name, reason)
    if not layers:
        raise ValueError(unfit[block_sizes[0]])
    dense = {n: why for n, why in skipped.items() if n not in layers and n not in follows}
    return layers, follows, dense, unfit


def _is_on_meta(model: nn.Module, name: str) -> bool:
    return next(model.get_submodule(name).parameters()).is_meta


def _built(model: Model, device: torch.device) -> nn.Module:
    """Return a copy of a model, or what a function builds, on a device where that can be."""
    if isinstance(model, nn.Module):
        try:
            return copy.deepcopy(model)
        except Exception as error:  # the model is the user's
            raise ValueError(
                f"`model` must be one that can be copied; copying it raised "
                f"{type(error).__name__}: {error}. Give the function that builds it."
            ) from error
    if not callable(model):
        raise ValueError(
            f"`model` must be an nn.Module, or a function that builds one; got {model!r}."
        )
    made: object
    try:
        with nullcontext() if device.type == "cpu" else device:
            made = model()
    except Exception:  # of the user's code, any: it may count on the CPU
        if device.type == "cpu":
            raise
        made = model()
    if not isinstance(made, nn.Module):
        raise ValueError(f"`model` must build an nn.Module; got a {type(made).__name__} from it.")
    return made


def _outline(model: Model) -> nn.Module:
    """Return a model to look at."""
    return model if isinstance(model, nn.Module) else _built(model, torch.device("meta"))


@contextmanager
def _nothing_left_behind(device: torch.device) -> Iterator[None]:
    """Make a CUDA device the current one, keep the program's random state, and free memory."""
    on_cuda = device.type == "cuda"
    try:
        with torch.cuda.device(device) if on_cuda else nullcontext():
            generators = [torch.cuda.current_device()] if on_cuda else []
            with torch.random.fork_rng(devices=generators):
                yield
    finally:
        gc.collect()
        if on_cuda:
            torch.cuda.empty_cache()


def _parse_inputs(inputs: str | Sequence[str]) -> list[Input]:
    parsed = [Input.parse(text) for text in ([inputs] if isinstance(inputs, str) else inputs)]
    for one in parsed:
        for size in one.shape:
            if isinstance(size, str):
                raise ValueError(
                    f"`--input` must have numbers as sizes, since a step is measured; got "
                    f"'{size}' in '{one}'. Write how large it is in training."
                )
    return parsed


def _check(
    inputs: Sequence[Input],
    block_sizes: Sequence[int],
    densities: Sequence[float],
    distribution: str,
    precision: str,
    check: str | None,
) -> None:
    """Raise ValueError for what no plan can be made of."""
    check_choice("precision", precision, PRECISIONS)
    check_choice("distribution", distribution, DISTRIBUTIONS)
    if check is not None:
        check_choice("check", check, CHECKS)
        if not inputs:
            raise ValueError("`--check` must come with `--input`, for a step to measure; got none.")
    for name, values in (("block_sizes", block_sizes), ("densities", densities)):
        if not values:
            raise ValueError(f"`{name}` must hold at least one; got none.")
    for block_size in block_sizes:
        check_block_size(block_size)
    for density in densities:
        check_density(density, "densities")
