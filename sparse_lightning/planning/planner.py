"""`plan`: estimate what block-sparse layers would save for a model before it is trained."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import nn

from sparse_lightning.arguments import Input, find_device
from sparse_lightning.linear import dense_shape
from sparse_lightning.names import DEFAULT_EXCLUDE, check_follow, check_option
from sparse_lightning.nm_pattern import check_nm, kept_share
from sparse_lightning.patching import sparsify
from sparse_lightning.planning.costs import (
    Check,
    Product,
    Setting,
    expected_peak,
    expected_step,
    gradient_bytes,
    model_cost,
)
from sparse_lightning.planning.measure import (
    PRECISIONS,
    ProductSpeedups,
    Training,
    WholeBlocks,
    count_tokens,
    dense_memory,
    dense_times,
    fused_layers,
)
from sparse_lightning.planning.result import Plan, PlannedLayer
from sparse_lightning.policy.distributions import share
from sparse_lightning.selection import SwapOptions, select_layers, sparse_layers
from sparse_lightning.topology import BLOCK_SIZES, block_grid, check_block_size, check_density

DENSITIES = (0.5, 0.25, 0.1, 0.05)
# "global" distributes blocks by scores, which exist only in a training.
DISTRIBUTIONS = ("uniform", "erdos_renyi")
CHECKS = ("best", "all")

Model = nn.Module | Callable[[], nn.Module]


def plan(
    model: Model,
    inputs: str | Sequence[str] = (),
    *,
    block_sizes: Sequence[int] = BLOCK_SIZES,
    densities: Sequence[float] = DENSITIES,
    nm: str | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
    distribution: str = "uniform",
    follow: Mapping[str, str] | None = None,
    precision: str | None = None,
    device: str | torch.device | None = None,
    check: str | None = None,
) -> Plan:
    """Return which layers of a model can be block-sparse, and what that would save.

    With inputs, the dense model's training step is measured on the device. The expected step of a
    block-sparse model follows from it and from the speed-ups of the layers' products, which come
    from tables of measured kernels or, where no table covers them, are measured. Activations
    that kernels fuse are taken to cost less than half as much as separate ones. Copies, such as the
    layers of a target network, have the density of their source layers.

    With `nm`, parameters, memory and FLOPs are those of the weights that blocks keep. The step is
    that of whole blocks, which today's kernels multiply, and the time in which each product makes
    whole blocks of the kept weights, or takes these out of whole blocks, which is measured on the
    device. The expected peak lacks the whole blocks that one product makes.

    Args:
        model: dense model, of which a copy is measured, or a function that builds it, which avoids
            the copy. Without inputs the function runs on the meta device, if possible.
        inputs: inputs of its `forward`: sizes and an optional dtype, as "8,128,int64", one string
            per input. Without them nothing is measured.
        block_sizes, densities: block sizes and densities to compare.
        nm: "2:4" to keep two of each four weights within blocks, as for `sparsify`; None to keep
            all.
        include, exclude: name patterns of layers, as for `sparsify`.
        distribution: distribution of the budget among layers, as for `sparsify`.
        follow: copies that cannot be recognised by their weights, as for `sparsify`; on the meta
            device none can be recognised.
        precision: "32-true", "bf16-mixed" or "bf16-true", as in Lightning; by default "bf16-mixed"
            on CUDA and "32-true" on a CPU.
        device: device to measure on; by default CUDA if available.
        check: "best" also measures training steps with the fastest setting, "all" with every one.

    Raises:
        ValueError: if no layer can be block-sparse, the model rejects the inputs, or an argument is
            out of range.
        RuntimeError: if memory is exhausted, or a model cannot be trained.

    >>> net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    >>> result = plan(net, block_sizes=[16, 32], densities=[0.25])
    >>> [setting.parameters for setting in result.settings], result.dense.parameters
    ([8512, 8512], 33088)
    """
    specs = _parse_inputs(inputs)
    device = find_device(str(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    precision = precision or ("bf16-mixed" if device.type == "cuda" else "32-true")
    follow = follow or {}
    check_follow(follow)
    _check(specs, block_sizes, densities, distribution, precision, check)
    nm = check_nm(nm)
    dtype = PRECISIONS[precision][0]

    with _restored_state(device):
        dense = _build(model, device) if specs else _outline(model)
        if any(True for _ in sparse_layers(dense)):
            raise ValueError("`model` must be dense; got block-sparse layers. Call densify(model).")
        layers, follows, skipped, unfit = _find_layers(
            dense, sorted({*block_sizes}), include, exclude, follow
        )
        layer_blocks: dict[Setting, dict[str, int]] = {}
        layer_densities: dict[Setting, dict[str, float]] = {}
        absent_gradients: dict[Setting, int] = {}
        for block_size in sorted({*block_sizes} - unfit.keys()):
            grids = {
                name: block_grid(*layer.shape, block_size)
                for name, layer in layers.items()
                if block_size in layer.block_sizes
            }
            for density in sorted({*densities}, reverse=True):
                blocks = share(distribution, density, grids, {})
                own = {name: blocks[name] / (rows * cols) for name, (rows, cols) in grids.items()}
                for name, source in follows.items():
                    if source in grids:
                        blocks[name], own[name] = blocks[source], own[source]
                cost = model_cost(dense, block_size, blocks, dtype, nm)
                setting = Setting(
                    **vars(cost), block_size=block_size, density=density, speedup=None
                )
                layer_blocks[setting], layer_densities[setting] = blocks, own
                absent_gradients[setting] = gradient_bytes(dense, block_size, blocks, dtype, nm)
        result = Plan(
            model=type(dense).__name__,
            layers=layers,
            follows=follows,
            skipped=skipped,
            unfit=unfit,
            precision=precision,
            dense=model_cost(dense, dtype=dtype),
            settings=[*layer_densities],
            nm=nm,
        )
        if not specs:
            return result
        try:
            training = Training(dense, specs, precision, device)
            result = _add_steps(result, layer_blocks, layer_densities, absent_gradients, training)
            del dense, training

            def check_setting(setting: Setting) -> Check:
                gc.collect()  # a model can contain reference cycles
                sparse = _build(model, device).to(device, dtype)
                sparsify(
                    sparse,
                    block_size=setting.block_size,
                    density=setting.density,
                    nm=nm,
                    include=include,
                    exclude=exclude,
                    distribution=distribution,
                    follow=follow,
                )
                assert setting.step is not None
                training = Training(sparse, specs, precision, device)
                seconds, memory = training.seconds(), training.peak_memory()
                return Check(
                    setting.block_size,
                    setting.density,
                    expected=setting.step,
                    measured=seconds,
                    expected_peak=setting.peak,
                    measured_peak=None if memory is None else memory.peak,
                )

            best = [result.best] if result.best else []
            to_check = {"best": best, "all": result.settings, None: []}[check]
            return replace(result, checks=[check_setting(setting) for setting in to_check])
        except torch.OutOfMemoryError as error:
            raise RuntimeError(
                f"A training step must fit into the memory of {device}; it did not: {error} Give "
                "smaller sizes as `--input`, or none: then nothing is measured."
            ) from error


def _add_steps(
    result: Plan,
    layer_blocks: Mapping[Setting, Mapping[str, int]],
    layer_densities: Mapping[Setting, Mapping[str, float]],
    absent_gradients: Mapping[Setting, int],
    training: Training,
) -> Plan:
    """Return a plan with the dense model's measured step, and the expected step of each setting."""
    names = [*result.layers, *result.follows]
    fused = dict(fused_layers(training.model, names))
    times, counts = dense_times(training, names, fused)
    memory = dense_memory(training, names, counts, fused)
    speedups, whole = ProductSpeedups(training.device), WholeBlocks(training.device)
    kept = kept_share(result.nm)
    speedups.prepare(
        (product, setting.block_size)
        for setting, densities in layer_densities.items()
        for name in densities
        for product in counts[name]
    )
    settings = []
    for setting, densities in layer_densities.items():

        def speedup(product: Product, density: float, size: int = setting.block_size) -> float:
            return speedups.get(product, size, density)

        def whole_blocks(name: str, product: Product, setting: Setting = setting) -> float:
            if result.nm is None:
                return 0.0
            return whole.seconds(product, setting.block_size, layer_blocks[setting][name])

        trained_share = setting.trained / result.dense.trained
        step = expected_step(times, counts, densities, speedup, trained_share, kept, whole_blocks)
        peak = None
        if memory is not None:
            absent = result.dense.memory - setting.memory
            shares = {name: kept * density for name, density in densities.items()}
            peak = expected_peak(memory, shares, absent, absent_gradients[setting])
        settings.append(replace(setting, step=step, speedup=times.step / step, peak=peak))
    layers = {
        name: replace(layer, tokens=count_tokens(counts[name]))
        for name, layer in result.layers.items()
    }
    return replace(
        result,
        layers=layers,
        dense=replace(result.dense, step=times.step, peak=memory.step.peak if memory else None),
        settings=settings,
        launch=times.launch,
        measured=speedups.measured,
    )


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
            found = select_layers(model, SwapOptions(block_size, include, exclude, follow=follow))
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
                reason = "frozen; without weights, copies must be named in `follow`"
            skipped.setdefault(name, reason)
    if not layers:
        raise ValueError(unfit[block_sizes[0]])
    dense = {n: why for n, why in skipped.items() if n not in layers and n not in follows}
    return layers, follows, dense, unfit


def _is_on_meta(model: nn.Module, name: str) -> bool:
    return next(model.get_submodule(name).parameters()).is_meta


def _build(model: Model, device: torch.device) -> nn.Module:
    """Return a copy of a model, or the model that a function builds, on the device if possible."""
    if isinstance(model, nn.Module):
        try:
            return copy.deepcopy(model)
        except Exception as error:  # user code can raise anything
            raise ValueError(
                f"`model` must be one that can be copied; copying it raised "
                f"{type(error).__name__}: {error}. Give the function that builds it."
            ) from error
    if not callable(model):
        raise ValueError(
            f"`model` must be an nn.Module, or a function that builds one; got {model!r}."
        )
    built: object
    try:
        with nullcontext() if device.type == "cpu" else device:
            built = model()
    except Exception:  # user code can require the CPU
        if device.type == "cpu":
            raise
        built = model()
    if not isinstance(built, nn.Module):
        raise ValueError(f"`model` must build an nn.Module; got a {type(built).__name__} from it.")
    return built


def _outline(model: Model) -> nn.Module:
    """Return the model itself, or the one that a function builds, without weights if possible."""
    return model if isinstance(model, nn.Module) else _build(model, torch.device("meta"))


@contextmanager
def _restored_state(device: torch.device) -> Iterator[None]:
    """Make a CUDA device current; on exit, restore it and the random state, and free memory."""
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
    for spec in parsed:
        for size in spec.shape:
            if isinstance(size, str):
                raise ValueError(
                    f"`--input` must have numbers as sizes, since a step is measured; got "
                    f"'{size}' in '{spec}'. Write its size in training."
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
    """Raise ValueError for arguments out of range."""
    check_option("precision", precision, PRECISIONS)
    check_option("distribution", distribution, DISTRIBUTIONS)
    if check is not None:
        check_option("check", check, CHECKS)
        if not inputs:
            raise ValueError("`--check` must come with `--input`, for a step to measure; got none.")
    for name, values in (("block_sizes", block_sizes), ("densities", densities)):
        if not values:
            raise ValueError(f"`{name}` must hold at least one; got none.")
    for block_size in block_sizes:
        check_block_size(block_size)
    for density in densities:
        check_density(density, "densities")
