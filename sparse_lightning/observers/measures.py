"""Metrics of block masks and topology updates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from sparse_lightning.linear import BlockSparseLinear
from sparse_lightning.names import group_similar, list_names, matches
from sparse_lightning.observers.mask_tracker import MaskTracker
from sparse_lightning.policy.updates import ModelUpdate, TopologyUpdate
from sparse_lightning.savings import count_parameters, relative_flops
from sparse_lightning.swap_report import DEAD_FEATURES, LayerReport
from sparse_lightning.topology import count_dead

# The key under which the density is logged, and offered to callbacks that monitor a metric.
DENSITY = "sparsity/density"


def layer_series(
    choice: str | Sequence[str], layers: Mapping[str, BlockSparseLinear], callback: str = ""
) -> dict[str, list[str]]:
    """Return which layers share scalars, by the name that these have in their keys.

    Args:
        choice: `monitor.layers`.
        layers: the block-sparse layers, by name.
        callback: number of the callback if the trainer has several, whose groups may be named
            alike; "" if it has one.
    """
    if choice == "groups":
        keys = [
            (name, f"{layer.out_features}x{layer.in_features}, {layer.block_size}")
            for name, layer in layers.items()
        ]
        groups = group_similar(keys)
        labels = Counter(label for label, *_ in groups)
        prefix = f"{callback}/" if callback else ""
        return {
            (prefix if len(names) > 1 else "")
            + (label if labels[label] == 1 else f"{label} ({key})"): names
            for label, names, key in groups
        }
    patterns = {"all": ["*"], "none": []}.get(choice, choice) if isinstance(choice, str) else choice
    return {n: [n] for n in layers if any(matches(pattern, n) for pattern in patterns)}


def check_layer_series(choice: str | Sequence[str], layers: Iterable[str]) -> None:
    """Warn about patterns of `monitor.layers` that match no layer, or raise if none matches.

    Args:
        choice: `monitor.layers`.
        layers: names of the block-sparse layers.

    Raises:
        ValueError: if there are patterns and layers, and no pattern matches a layer.
    """
    names = [*layers]
    if isinstance(choice, str) or not names:
        return
    unused = [pattern for pattern in choice if not any(matches(pattern, name) for name in names)]
    if not unused:
        return
    text = (
        f"`monitor.layers` must match block-sparse layers; got {', '.join(map(repr, unused))}, "
        f"which match{'es' if len(unused) == 1 else ''} none of {list_names(names)}."
    )
    if len(unused) == len(choice):
        raise ValueError(text)
    rank_zero_warn(text.replace(" must ", " should ", 1))


def update_scalars(
    model: nn.Module,
    update: ModelUpdate,
    masks: MaskTracker,
    series: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, float]:
    """Return the metrics of an update and of the model after it, by logger key.

    `series` says which layers share scalars, as `layer_series` returns it; None gives each its own.

    `blocks_dropped`, `blocks_grown`, `survival` and `churn` cover the layers that the update
    changed; the other model metrics cover all layers. Densities are shares of blocks; `ever_active`
    is the share of all blocks that were ever present (Rs in Liu et al. 2021, "In-Time
    Over-Parameterization"); a block row or column is dead if it has no block, so that its outputs
    are dead or its inputs unread; a threshold is the smallest score of a block that stayed, omitted
    if there is none. `parameters` counts the present weights of the whole model; `flops_per_token`
    is relative to the same model with all its linear layers dense, as `relative_flops` counts them.

    If blocks keep only some of their weights (`nm`), `weight_density` is the share of weights;
    `weights_exchanged` counts those that the update has exchanged within blocks that stayed, and
    `weight_churn` is their share of the weights of these blocks.
    """
    changes = [*update.layers.values()]
    dropped = sum(len(change.dropped) for change in changes)
    grown = sum(len(change.grown) for change in changes)
    present = [*masks.present.values()]
    scalars = {
        DENSITY: share_set(present),
        "sparsity/blocks_dropped": float(dropped),
        "sparsity/blocks_grown": float(grown),
        "sparsity/survival": _survival(changes),
        "sparsity/churn": _churn(changes),
        "sparsity/ever_active": share_set([*masks.ever.values()]),
        "sparsity/dead_rows": float(sum(count_dead(mask)[0] for mask in present)),
        "sparsity/dead_columns": float(sum(count_dead(mask)[1] for mask in present)),
        "sparsity/parameters": float(count_parameters(model)),
        "sparsity/flops_per_token": relative_flops(model),
    }
    if (density := weight_density(masks)) is not None:
        scalars["sparsity/weight_density"] = density
        scalars["sparsity/weights_exchanged"] = float(sum(c.new_weights for c in changes))
        scalars["sparsity/weight_churn"] = _weight_churn(changes)
    if update.density_target is not None:
        scalars["sparsity/density_target"] = update.density_target
    for label, names in ({n: [n] for n in update.layers} if series is None else series).items():
        changed = [name for name in names if name in update.layers]
        if not changed:
            continue
        changes = [update.layers[name] for name in changed]
        present = [masks.present[name] for name in names]
        thresholds = [drop_threshold(update.layers[n], update.drop_scores.get(n)) for n in changed]
        metrics = {
            "density": share_set(present),
            "survival": _survival(changes),
            "churn": _churn(changes),
            "ever_active": share_set([masks.ever[name] for name in names]),
            "dead_rows": float(sum(count_dead(mask)[0] for mask in present)),
            "dead_columns": float(sum(count_dead(mask)[1] for mask in present)),
        }
        if any(change.positions is not None for change in changes):
            metrics["weight_churn"] = _weight_churn(changes)
        if found := [threshold for threshold in thresholds if threshold is not None]:
            metrics["threshold"] = min(found)
        scalars |= {f"sparsity_{metric}/{label}": value for metric, value in metrics.items()}
    return scalars


def model_churn(update: ModelUpdate) -> float:
    """Return the share of present blocks that an update has grown, over all layers it changed."""
    return _churn([*update.layers.values()])


def _churn(changes: Sequence[TopologyUpdate]) -> float:
    grown = sum(len(change.grown) for change in changes)
    return grown / max(1, sum(change.n_after for change in changes))


def _weight_churn(changes: Sequence[TopologyUpdate]) -> float:
    """Return the share of the weights of 2:4 sparse blocks that stayed which were exchanged."""
    kept = 0
    for change in changes:
        if change.positions is not None:
            _, rows, columns = change.positions.shape
            kept += len(change.stayed) * rows * 4 * columns  # a byte describes four kept weights
    return sum(change.new_weights for change in changes) / max(1, kept)


def weight_density(masks: MaskTracker) -> float | None:
    """Return kept weights / all weights of the layers; None if all blocks are whole."""
    if all(kept == every for kept, every in masks.block_weights.values()):
        return None
    present = total = 0
    for name, mask in masks.present.items():
        kept, every = masks.block_weights[name]
        present += int(mask.sum()) * kept
        total += mask.numel() * every
    return present / max(1, total)


def _survival(changes: Sequence[TopologyUpdate]) -> float:
    dropped = sum(len(change.dropped) for change in changes)
    return 1 - dropped / max(1, sum(change.n_before for change in changes))


def count_set(masks: Sequence[Tensor]) -> int:
    """Return the number of entries that are True, over several masks together."""
    return sum(int(mask.sum()) for mask in masks)


def share_set(masks: Sequence[Tensor]) -> float:
    """Return the share of entries that are True, over several masks together."""
    return count_set(masks) / max(1, sum(mask.numel() for mask in masks))


def count_dead_features(
    layers: Mapping[str, BlockSparseLinear], masks: MaskTracker
) -> dict[str, int]:
    """Return how many features of each of `DEAD_FEATURES` layers have, if any."""
    counts = [0, 0]
    for name in layers.keys() & masks.present.keys():
        for i, n in enumerate(count_dead(masks.present[name])):
            counts[i] += n * layers[name].block_size
    return {kind: n for kind, n in zip(DEAD_FEATURES, counts, strict=True) if n}


def drop_threshold(update: TopologyUpdate, drop_scores: Tensor | None) -> float | None:
    """Return the smallest finite drop score of a block that stayed; None if there is none."""
    if drop_scores is None:
        return None
    rows, cols = update.stayed.long().unbind(1)
    scores = drop_scores[rows, cols]
    scores = scores[scores.isfinite()]
    return float(scores.min()) if len(scores) else None


@dataclass(frozen=True)
class LayerRow:
    """A layer at the end of a training; parameter counts include the bias.

    `weight_density` is None if blocks are whole.
    """

    name: str
    shape: str
    block_size: int
    density: float
    blocks: int
    dead_rows: int
    dead_columns: int
    ever_active: float
    initial_left: float
    parameters_before: int
    parameters_after: int
    weight_density: float | None = None


def layer_row(name: str, layer: BlockSparseLinear, masks: MaskTracker) -> LayerRow:
    """Describe a layer at the end of a training.

    `initial_left` is the share of the blocks present at the start that are so at the end.
    """
    first, present = masks.first[name], masks.present[name]
    report = LayerReport.from_layer(layer)
    rows, columns = count_dead(present)
    return LayerRow(
        name=name,
        shape=f"{layer.out_features}x{layer.in_features}",
        block_size=report.block_size,
        density=report.density,
        blocks=report.n_blocks,
        dead_rows=rows,
        dead_columns=columns,
        ever_active=share_set([masks.ever[name]]),
        initial_left=int((first & present).sum()) / max(1, int(first.sum())),
        parameters_before=report.parameters_before,
        parameters_after=report.parameters_after,
        weight_density=None if report.nm is None else report.weight_density,
    )


def compute_dtype(trainer: pl.Trainer, layer: BlockSparseLinear) -> torch.dtype:
    """Return the compute dtype of a layer."""
    mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    return mixed.get(str(trainer.precision), layer.values.dtype)
