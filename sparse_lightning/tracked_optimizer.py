"""`TrackedOptimizer`: one optimizer of a training, and the schedule position of its layers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_lightning.kernels.block_work import BlockWork
from sparse_lightning.linear import BlockSparseLinear
from sparse_lightning.optimizer_state import (
    check_state,
    discard_dense_state,
    find_optimizer,
    prepare_reset,
    prepare_slot_removal,
    state_rule,
    warm_start,
)
from sparse_lightning.policy.schedules import Timetable
from sparse_lightning.policy.updates import TopologyUpdate
from sparse_lightning.sharding import check_whole_blocks, prepare_slot_change
from sparse_lightning.stepping import StepWatch
from sparse_lightning.topology import BlockTopology


@dataclass(eq=False)
class TrackedOptimizer:
    """The schedule position of one optimizer's layers and, while attached, the optimizer.

    Attributes:
        steps: number of counted steps: not skipped, and with a gradient for a layer.
        length: latest `total_steps` that `set_length` has applied.
        end: expected number of counted steps at the end of the training.
        timetable: timetable resolved for `end`.
        updated: step at which the latest topology update was due.
        next_update: step at which the next update is due; None if no updates remain.
        progress: progress of the density in [0, 1]; it never decreases, even if `end` grows.
        skipped: number of steps that did not count.
        waiting: layers whose due update is postponed until a step yields their scores.
        pending: bool per layer, grown slots that have not had a gradient yet, `[capacity]`, or
            grown weights, in the shape of `values`, for a 2:4 sparse layer.
        optimizer: the optimizer while attached, else None.
        watch: watch on the steps of `optimizer`.
        state_at_last_step: `optimizer.state` in the latest step; `load_state_dict` replaces this
            dictionary.
        loss_scale: scale of the loss in the current step, if layers are armed.
        groups: id and length of each parameter list when `held` was determined.
        held: `values` of the layers that the optimizer holds, by layer.
        owned: those of `held` that no earlier optimizer holds; they follow `steps`.
        unchecked: layers of `held` whose state the optimizer has not created yet.
        armed: layers whose dense gradient is gathered in the current step.
        work: accumulates the work of `owned` layers; None until it is needed.
        observed_steps: steps observed by `find_layers_without_gradient`.
        without_gradient: layers that had no gradient in any of these steps.
        next_pending: value that `pending` takes if the current step counts.
    """

    steps: int = 0
    length: int | None = None
    end: int | None = None
    timetable: Timetable | None = None
    updated: int = 0
    next_update: int | None = None
    progress: float = 0.0
    skipped: int = 0
    waiting: list[str] = field(default_factory=list)
    pending: dict[str, Tensor] = field(default_factory=dict)
    optimizer: Optimizer | None = None
    watch: StepWatch | None = None
    state_at_last_step: Mapping[Any, Any] | None = None
    loss_scale: float = 1.0
    groups: list[tuple[int, int]] = field(default_factory=list)
    held: dict[str, nn.Parameter] = field(default_factory=dict)
    owned: dict[str, nn.Parameter] = field(default_factory=dict)
    unchecked: list[str] = field(default_factory=list)
    armed: list[str] = field(default_factory=list)
    work: BlockWork | None = None
    observed_steps: int = 0
    without_gradient: set[str] = field(default_factory=set)
    next_pending: dict[str, Tensor] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "length": self.length,
            "end": self.end,
            "timetable": None if self.timetable is None else self.timetable.as_dict(),
            "updated": self.updated,
            "next_update": self.next_update,
            "progress": self.progress,
            "skipped": self.skipped,
            "waiting": list(self.waiting),
            "pending": {name: pending.cpu() for name, pending in self.pending.items()},
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> TrackedOptimizer:
        fields = dict(state)
        table = fields.pop("timetable")
        return cls(
            **{**fields, "waiting": list(fields["waiting"]), "pending": dict(fields["pending"])},
            timetable=None if table is None else Timetable(**table),
        )

    def set_length(self, total_steps: int | None, timetable: Timetable) -> None:
        """Set the length of the training, before its first step or where it is resumed.

        Args:
            total_steps: optimizer steps of the training, or None.
            timetable: timetable for a training that has not begun.
        """
        if self.timetable is None:
            self.length = self.end = total_steps
            self.timetable = timetable
            self.next_update = timetable.next_update(self.steps)
        elif self.length != total_steps and total_steps is not None:
            # A resumed training of another length keeps the times of its density and updates.
            self.length = total_steps
            self.set_end(replace(self.timetable, total_steps=total_steps - self.skipped))

    def set_end(self, timetable: Timetable) -> None:
        """Replace the timetable by one that ends at another step."""
        self.end, self.timetable = timetable.total_steps, timetable
        self.next_update = timetable.next_update(self.updated)

    def find_held(
        self, layers: Mapping[str, BlockSparseLinear], earlier: Iterable[TrackedOptimizer]
    ) -> list[str]:
        """Find the layers that the optimizer holds, if its parameter groups have changed.

        Args:
            layers: candidate layers, by name.
            earlier: optimizers attached before; layers that they hold are not owned by this one.

        Returns:
            The layers whose learned state was discarded, since it had an earlier shape.

        Raises:
            ValueError, RuntimeError: for state or a parameter that cannot follow the blocks.
        """
        assert self.optimizer is not None
        param_groups = self.optimizer.param_groups
        groups = [(id(group["params"]), len(group["params"])) for group in param_groups]
        if groups == self.groups:
            return []
        ids = {id(parameter) for group in param_groups for parameter in group["params"]}
        held = {n: layer.values for n, layer in layers.items() if id(layer.values) in ids}
        discarded = []
        for name in (name for name in held if name not in self.held):
            dense_shape = layers[name].out_features, layers[name].in_features
            if discard_dense_state(self.optimizer, held[name], dense_shape):
                discarded.append(name)
            with name_layer_in_errors(name):
                check_state(self.optimizer, held[name])
                check_whole_blocks(held[name])
                _check_steps_after_backward(held[name])
        self.groups, self.held, self.work = groups, held, None
        self.unchecked = [*held]
        others = {name for tracked in earlier for name in tracked.held}
        self.owned = {name: values for name, values in held.items() if name not in others}
        return discarded

    def trainable(self) -> list[str]:
        """Return the names of the owned layers that are not frozen."""
        return [name for name, values in self.owned.items() if values.requires_grad]

    def warm_up(self, grad_scale: float) -> None:
        """Initialise the second moments of grown slots from the gradients about to be applied.

        Args:
            grad_scale: scale that the gradients still carry.
        """
        assert self.optimizer is not None
        self.next_pending = {}
        for name, pending in self.pending.items():
            if name not in self.held:  # removed from the optimizer since
                continue
            values = self.held[name]
            found = find_optimizer([self.optimizer], values)
            assert found is not None, "the optimizer holds this parameter"
            with name_layer_in_errors(name):
                remaining = warm_start(*found, values, pending.to(values.device), grad_scale)
            if remaining.any():
                self.next_pending[name] = remaining

    def count(self) -> None:
        """Count a step that the optimizer has taken.

        Raises:
            ValueError: if the optimizer has created state that cannot follow the blocks of a layer,
                or that contradicts its `StateRule`.
        """
        assert self.optimizer is not None
        for name in self.unchecked:
            with name_layer_in_errors(name):
                state_rule(self.optimizer, self.held[name])
        self.unchecked = [name for name in self.unchecked if self.held[name].grad is None]
        self.steps += 1
        if self.pending:
            self.pending = self.next_pending

    def find_layers_without_gradient(self, n_steps: int) -> set[str]:
        """Observe the gradients of a step that the optimizer has taken.

        Args:
            n_steps: number of steps to observe after attaching.

        Returns:
            At the last of these steps, the layers that had a gradient in none of them; else none.
        """
        if self.observed_steps >= n_steps:
            return set()
        trainable = set(self.trainable())
        candidates = self.without_gradient & trainable if self.observed_steps else trainable
        self.without_gradient = {name for name in candidates if self.owned[name].grad is None}
        self.observed_steps += 1
        return self.without_gradient if self.observed_steps == n_steps else set()

    def prepare_block_update(
        self, name: str, update: TopologyUpdate, topology: BlockTopology
    ) -> Callable[[], None]:
        """Return a function that applies a layer's update to the optimizer state, in place.

        Args:
            name: name of the layer.
            update: update of the layer.
            topology: its topology, which may already be the new one.
        """
        assert self.optimizer is not None
        with name_layer_in_errors(name):
            values, moves = self.held[name], update.moves
            reset = prepare_reset(self.optimizer, values, update.changed, moves)
        shape = topology.values_shape[: 1 if topology.nm is None else 3]
        pending = torch.zeros(shape, dtype=torch.bool, device="cpu")
        if name in self.pending:
            pending.copy_(self.pending[name])
        if update.moves is not None:
            prepare_slot_change(pending, update.dropped, update.moves, start=True)()
        pending[update.dropped] = False
        pending[update.grown] = True
        has_pending = bool(pending.any())

        def write() -> None:
            reset()
            self.pending.pop(name, None)
            if has_pending:
                self.pending[name] = pending

        return write

    def prepare_slot_removal(self, name: str, kept: Tensor) -> Callable[[], None]:
        """Return a function that removes a layer's slots from the state, and cannot fail.

        Args:
            name: name of the layer.
            kept: int64 `[new capacity]`, the slots that remain.
        """
        assert self.optimizer is not None
        with name_layer_in_errors(name):
            remove_state = prepare_slot_removal(self.optimizer, self.held[name], kept)
        pending = self.pending[name].cpu()[kept.cpu()] if name in self.pending else None

        def write() -> None:
            remove_state()
            if pending is not None:
                self.pending[name] = pending

        return write

    def detach(self) -> None:
        """Release the optimizer; the schedule position stays."""
        if self.watch is not None:
            self.watch.remove()
        self.optimizer = self.watch = self.work = None
        self.groups, self.unchecked, self.armed = [], [], []
        self.held, self.owned, self.observed_steps = {}, {}, 0


@contextlib.contextmanager
def name_layer_in_errors(layer: str) -> Iterator[None]:
    """Append the name of a layer to errors raised in the context."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise type(error)(f"{error} (layer '{layer}')") from error


def _check_steps_after_backward(values: nn.Parameter) -> None:
    if hasattr(values, "_in_backward_optimizers"):
        raise ValueError(
            "`values` must not be in an optimizer that steps within backward, when other gradients "
            "are not yet computed; got a parameter with `_in_backward_optimizers`. Leave it out of "
            "`_apply_optimizer_in_backward`, and step one optimizer after backward."
        )
