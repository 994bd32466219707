"""`Course`: one optimizer of a training, and where its layers are in their schedule."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_lightning.kernels.block_work import BlockWork
from sparse_lightning.optimizer_state import (
    find_optimizer,
    prepare_keep,
    prepare_reset,
    state_rule,
    warm_start,
)
from sparse_lightning.policy.evolution import TopologyUpdate
from sparse_lightning.policy.schedules import Timetable
from sparse_lightning.stepping import StepWatch


@dataclass(eq=False)
class Course:
    """Where the layers of one optimizer are in their schedule, and the optimizer while attached.

    Attributes:
        steps: that it has taken with a gradient of one of its layers, and that were not skipped.
        length: `total_steps` of the training, when `end` was last set.
        end: steps that it will have taken when the training ends, as far as known.
        timetable: resolved by that.
        updated: steps after which the latest update was due.
        next_update: steps after which the next one is; None if there is none.
        progress: of the density, in [0, 1]; it never goes back, also where `end` grows.
        skipped: steps that did not count.
        waiting: layers whose update waits for a step that shows what it needs.
        pending: bool `[capacity]`, grown slots that have not had a gradient yet, by layer.
        optimizer: while attached.
        watch: of its steps.
        groups: which lists of parameters of what length it had when `held` was looked up.
        held: the layers' parameters that it holds, by layer.
        own: which of these follow its steps: those that no optimizer before it holds.
        unseen: those of `held` without a step in which the optimizer made its state.
        armed: layers whose dense gradient is gathered in the step that is under way.
        work: adds up the work of `own` layers; None until it is needed.
        seen: steps that it has taken since it was attached, up to those in which `silent` is found.
        silent: layers that have had no gradient in these.
        still_pending: what becomes of `pending` if the step that is under way counts.
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
    groups: list[tuple[int, int]] = field(default_factory=list)
    held: dict[str, nn.Parameter] = field(default_factory=dict)
    own: dict[str, nn.Parameter] = field(default_factory=dict)
    unseen: list[str] = field(default_factory=list)
    armed: list[str] = field(default_factory=list)
    work: BlockWork | None = None
    seen: int = 0
    silent: set[str] = field(default_factory=set)
    still_pending: dict[str, Tensor] = field(default_factory=dict)

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
    def from_state(cls, state: Mapping[str, Any]) -> Course:
        known = dict(state)
        table = known.pop("timetable")
        return cls(
            **{**known, "waiting": list(known["waiting"]), "pending": dict(known["pending"])},
            timetable=None if table is None else Timetable(**table),
        )

    def warm_up(self, scale: float) -> None:
        """Give grown slots a second moment from the gradients that are about to be applied.

        Args:
            scale: what the gradients are still multiplied by.
        """
        assert self.optimizer is not None
        self.still_pending = {}
        for name, pending in self.pending.items():
            if name not in self.held:  # it has been taken out of the optimizer
                continue
            values = self.held[name]
            found = find_optimizer([self.optimizer], values)
            assert found is not None, "it is held"
            with naming(name):
                left = warm_start(*found, values, pending.to(values.device), scale)
            if left.any():
                self.still_pending[name] = left

    def count(self) -> None:
        """Count a step that the optimizer has taken.

        Raises:
            ValueError: if it has made state that cannot follow the blocks of a layer, or that is
                not as its rule says.
        """
        assert self.optimizer is not None
        for name in self.unseen:
            with naming(name):
                state_rule(self.optimizer, self.held[name])
        self.unseen = [name for name in self.unseen if self.held[name].grad is None]
        self.steps += 1
        if self.pending:
            self.pending = self.still_pending

    def look_for_silent(self, steps: int) -> set[str]:
        """Look at the gradients of a step that the optimizer has taken.

        Args:
            steps: to look at, from when it was attached on.

        Returns:
            The layers that had none in all of them, once they are over; else nothing.
        """
        if self.seen >= steps:
            return set()
        own = {name for name, values in self.own.items() if values.requires_grad}
        self.silent = self.silent & own if self.seen else own
        self.silent = {name for name in self.silent if self.own[name].grad is None}
        self.seen += 1
        return self.silent if self.seen == steps else set()

    def prepare_update(
        self, name: str, update: TopologyUpdate, capacity: int
    ) -> Callable[[], None]:
        """Return what has the optimizer follow an update of a layer, and only writes in place."""
        assert self.optimizer is not None
        with naming(name):
            reset = prepare_reset(self.optimizer, self.held[name], update.changed)
        pending = torch.zeros(capacity, dtype=torch.bool, device="cpu")
        if name in self.pending:
            pending.copy_(self.pending[name])
        pending[update.dropped] = False
        pending[update.grown] = True
        is_pending = bool(pending.any())

        def write() -> None:
            reset()
            self.pending.pop(name, None)
            if is_pending:
                self.pending[name] = pending

        return write

    def prepare_keep(self, name: str, kept: Tensor) -> Callable[[], None]:
        """Return what has the optimizer follow a layer that gives up slots, and cannot fail.

        Args:
            name: of the layer.
            kept: int64 `[capacity]`, the slots that stay.
        """
        assert self.optimizer is not None
        with naming(name):
            keep = prepare_keep(self.optimizer, self.held[name], kept)
        pending = self.pending[name].cpu()[kept.cpu()] if name in self.pending else None

        def write() -> None:
            keep()
            if pending is not None:
                self.pending[name] = pending

        return write

    def let_go(self) -> None:
        """Let go of the optimizer; where the layers are in their schedule stays."""
        if self.watch is not None:
            self.watch.remove()
        self.optimizer = self.watch = self.work = None
        self.groups, self.unseen, self.armed = [], [], []
        self.held, self.own, self.seen = {}, {}, 0


@contextlib.contextmanager
def naming(layer: str) -> Iterator[None]:
    """Name the layer in what goes wrong with it."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise type(error)(f"{error} (layer '{layer}')") from error
