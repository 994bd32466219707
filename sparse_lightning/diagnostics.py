"""Texts of the engine's warnings about trainings that may not do what was intended.

`sudden_fall`, `no_step` and `density_shortfall` return None if there is nothing to warn about.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from torch.optim import Optimizer

from sparse_lightning.gathering import GradientFlaw
from sparse_lightning.linear import BlockSparseLinear
from sparse_lightning.names import common_patterns, list_names
from sparse_lightning.optimizer_state import class_name
from sparse_lightning.policy.budgets import LayerBudgets
from sparse_lightning.policy.schedules import Timetable
from sparse_lightning.tracked_optimizer import TrackedOptimizer

# When a sparsifier is attached.


def discarded_state(names: Sequence[str]) -> str:
    """Warn about layers whose optimizer state was discarded."""
    return (
        "The optimizer had state of layers from before they were block-sparse or had their current "
        "number of slots. That state does not apply to their blocks and was reset for: "
        f"{list_names(names)}. Make layers block-sparse before the optimizer's first step, and "
        "keep it attached, to lose none."
    )


def nonfinite_values(names: Sequence[str]) -> str:
    """Warn about layers that hold NaN or infinite weights."""
    return (
        f"Block-sparse layers hold weights that are NaN or infinite: {list_names(names)}. If they "
        "come from a checkpoint, it is damaged, or its training had diverged: resume from another."
    )


def changed_copies(new: Mapping[str, str], former: Sequence[str]) -> Iterable[str]:
    """Yield warnings about changes of the copies during a training.

    Args:
        new: layers that have become copies, `{copy: source}`.
        former: layers that are copies no longer, and were never evolved themselves.
    """
    if new:
        pairs = ", ".join(f"{copy} follows {source}" for copy, source in sorted(new.items()))
        yield f"Copies of block-sparse layers were found in training: {pairs}."
    if former:
        yield (
            f"Block-sparse layers that followed others are trained now: {list_names(former)}. "
            "They no longer follow, and their blocks stay."
        )


def frozen_layers(names: Sequence[str]) -> str:
    """Warn about layers that were frozen after the swap."""
    return (
        f"Block-sparse layers are frozen: {list_names(names)}. While frozen, they cannot adapt to "
        "the blocks that they have lost. Layers stay dense if they are frozen before the swap: "
        "under Lightning in __init__ or setup, or by a callback before SparsityCallback in the "
        "list."
    )


def late_layers(names: Sequence[str]) -> str:
    """Warn about block-sparse layers that were added to the model after the swap."""
    return (
        "Block-sparse layers are evolved only if they exist when the Sparsifier is created; the "
        f"blocks of these stay: {list_names(names)}. Create the Sparsifier after them, or freeze "
        "those that are copies of others."
    )


def sudden_fall(budgets: LayerBudgets, timetable: Timetable) -> str | None:
    """Warn if one update drops more than half of the blocks."""
    share, step = budgets.largest_fall(timetable)
    if share <= 0.5:
        return None
    return (
        f"One topology update, at step {step}, drops {share:.0%} of the blocks, as there are few "
        "updates while the density falls. Set a smaller `update.every_n_steps`, or let the density "
        "fall longer."
    )


def no_exchange(reason: str) -> str:
    """Warn that no update changes a block, for a reason that ends with a remedy."""
    return (
        f"No topology update will change a block: {reason}. If the blocks are to stay, set "
        "`drop_fraction=0`."
    )


def rise_without_growth(rising: Sequence[str]) -> str:
    """Warn about layers whose budget rises although no block can be grown."""
    return (
        "The density is scheduled to rise but `grow` is 'none', so no block can be added: the "
        f"density stays for {list_names(rising)}. Set grow='gradient', 'momentum' or 'random', or "
        "a density that does not rise."
    )


# During the training.


def layers_in_no_optimizer(names: Sequence[str]) -> str:
    """Warn about layers that can train but are in no attached optimizer."""
    return (
        "Block-sparse layers are in no optimizer that is attached, so their blocks stay: "
        f"{list_names(names)}. Call `attach` with the optimizer that holds them; if they are "
        "copies of others, declare their sources by `follow`."
    )


def optimizer_without_layers(names: Sequence[str], optimizer: Optimizer | None) -> str:
    """Warn about an attached optimizer without layers if other layers are in no optimizer."""
    return (
        f"The attached optimizer, {class_name(optimizer)}, holds none of the block-sparse layers, "
        "so its steps do not count. These layers are in no optimizer that is attached: "
        f"{list_names(names)}. Call `attach` with the optimizer that holds them."
    )


def unattached_optimizer(names: Sequence[str], optimizer: Optimizer) -> str:
    """Warn about an optimizer that steps layers but is not attached."""
    return (
        f"Block-sparse layers are stepped by {class_name(optimizer)}, an optimizer that is not "
        f"attached: {list_names(names)}. Its steps do not count, and its state does not follow the "
        "blocks. If it has replaced the attached optimizer, call `detach()` and then `attach` with "
        "it; if both step, call `attach` with it, too."
    )


def whole_blocks(names: Sequence[str], nm: str) -> str:
    """Return a warning about layers with whole blocks where a pattern is configured."""
    return (
        f"These layers have whole blocks, although nm={nm!r} is configured: {list_names(names)}. "
        "They were block-sparse before, or got their blocks from a state dict, and keep what they "
        "have. For the pattern, start from dense weights: `sparse-lightning export --to dense`."
    )


def unscored_weights(names: Sequence[str]) -> str:
    """Return a warning about layers whose pattern within blocks could not evolve."""
    return (
        "An update could not exchange weights within the 2:4 sparse blocks of these layers: "
        f"{list_names(names)}. The gradient of whole blocks was missing or not finite in its step. "
        "It is missing where a CUDA graph replays the step, as with "
        "torch.compile(mode='reduce-overhead'), and where gradients reach `values` past the layer. "
        "Set `regrow_inner=False` to keep the patterns as they are."
    )


def loaded_blocks(names: Sequence[str]) -> str:
    """Warn about layers into which other blocks were loaded, without their optimizer state."""
    return (
        "A state dict replaced blocks of layers in training, so the optimizer's state of these "
        f"blocks was reset: {list_names(names)}. To keep it, load the optimizer's state dict, too."
    )


def layers_without_gradient(names: Collection[str], n_steps: int) -> str:
    """Warn about layers that had no gradient in the first steps."""
    return (
        f"Block-sparse layers had no gradient in {n_steps} steps, while others had: "
        f"{list_names(sorted(names))}. Check that `forward` calls these layers, and that the loss "
        "depends on their outputs. A copy of other layers, such as a target network, must be "
        "frozen or in no optimizer: it then follows their blocks."
    )


def unscored_layers(flaws: Mapping[str, GradientFlaw], step: int) -> str:
    """Warn about layers whose update is postponed because they could not be scored.

    Args:
        flaws: what is wrong with the gradient of each layer, by name.
        step: step of the update.
    """
    sentences = [
        f"Block-sparse layers were not scored at step {step}, so their blocks stay until a step "
        "scores them."
    ]
    for flaw, kind in _FLAWS.items():
        names = [name for name, found in flaws.items() if found == flaw]
        if names:
            sentences.append(f"{kind}: {list_names(names)}.")
    if "zero" in flaws.values():
        sentences.append(
            "A gradient of zero is often that of layers which the present blocks cut off from the "
            "loss, as where no output is live in both the gate and the up projection of an MLP: "
            "set a higher `density` or `layer_density`, or a smaller `block_size`."
        )
    return " ".join(sentences)


_FLAWS: dict[GradientFlaw, str] = {
    "missing": "No gradient of the loss that was applied",
    "not finite": "A gradient that is not finite",
    "zero": "A gradient of exactly zero",
}


def unwritten_copies(names: Sequence[str]) -> str:
    """Warn about copies whose values did not change between two updates."""
    return (
        "Copies of layers were not written to between two topology updates: "
        f"{list_names(names)}. This is right for a target or a teacher that is synchronised from "
        "time to time: it keeps the blocks of its source. But a reference model whose outputs must "
        f"not change has to be excluded: exclude={common_patterns(names)}."
    )


def external_copies(names: Sequence[str]) -> str:
    """Warn about layers with changing copies outside the model that do not follow."""
    return (
        f"There are copies of block-sparse layers outside the model: {list_names(names)}. They do "
        "not follow its blocks, which is right for snapshots. Keep an average or a target inside "
        "the model, or give `attach(..., copies=...)`."
    )


def fixed_memory() -> str:
    """Warn that layers cannot shrink on several ranks without `rewrap`."""
    return (
        "The memory of block-sparse layers does not follow their density, as their gradients are "
        "reduced over ranks in buckets of fixed sizes. Give `attach(..., rewrap=...)` a function "
        "that wraps the model again."
    )


# When a sparsifier is detached.


def never_attached() -> str:
    """Warn about a sparsifier that is detached without ever having been attached."""
    return (
        "The Sparsifier was never attached to an optimizer, so no block has moved. Call "
        "`attach(optimizer)` before the training."
    )


def no_step(
    layers: Mapping[str, BlockSparseLinear], attached: Sequence[TrackedOptimizer]
) -> str | None:
    """Warn if no step since `attach` counted, although layers can train."""
    trains = any(layer.values.requires_grad for layer in layers.values())
    if not trains or any(tracked.observed_steps for tracked in attached):
        return None
    return (
        "No step was seen in which block-sparse layers had a gradient since `attach` was called "
        f"with {', '.join(class_name(tracked.optimizer) for tracked in attached)}, so no block has "
        "moved. Attach the same optimizer object that steps the layers."
    )


def density_shortfall(
    layers: Mapping[str, BlockSparseLinear],
    follows: Mapping[str, str],
    budgets: LayerBudgets,
    attached: Sequence[TrackedOptimizer],
) -> str | None:
    """Warn if the layers do not have the final density, with the reasons.

    Args:
        layers: layers that are evolved, by name.
        follows: copies of these, `{copy: source}`.
        budgets: block budgets of the layers.
        attached: attached optimizers.
    """
    if budgets.distribution == "global":  # the layers, copies included, share one budget
        counted = {name: layers[follows.get(name, name)] for name in budgets.grids}
        expected = budgets.final_total()
    else:
        counted = dict(layers)
        final = budgets.at(1.0)
        expected = sum(final[name] for name in counted)
    present = sum(layer.topology.n_blocks for layer in counted.values())
    if present == expected:
        return None
    grids = [budgets.grids[name] for name in counted]
    n_cells = sum(rows * columns for rows, columns in grids)
    owners = [tracked for tracked in attached if tracked.owned]
    reasons = []
    for tracked in owners:
        table = tracked.timetable
        if table is None or tracked.progress >= 1:
            continue
        skipped = f", and {tracked.skipped} more did not count" if tracked.skipped else ""
        owner = f" by the optimizer of '{next(iter(tracked.owned))}'" if len(owners) > 1 else ""
        reasons.append(
            f"{tracked.steps} steps were taken{owner}{skipped}, where the schedule takes "
            f"{table.density_until}"
        )
    trainable = {name for tracked in owners for name in tracked.trainable()}
    unchanged = sorted(layers.keys() - trainable)
    unchanged += [name for tracked in owners for name in tracked.waiting]
    if unchanged:
        names = list_names(unchanged)
        reasons.append(f"layers were frozen, in no optimizer or not scored: {names}")
    reason = "; ".join(reasons) or "the update rule decided so"
    return (
        f"The training has ended with block-sparse layers at density {present / n_cells:.3f}, "
        f"where {expected / n_cells:.3f} was asked for: {reason}."
    )
