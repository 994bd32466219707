"""What is gathered about a model's blocks while it trains, so that they can be scored.

Only what the criteria of the training need: the dense gradient in the steps at an update, the work
of present blocks at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparse_lightning.criteria import (
    MOMENTUM_DECAY,
    MOMENTUM_STEPS,
    BlockScores,
    Criterion,
    dense_block_norms,
)
from sparse_lightning.evolution import TopologyUpdate
from sparse_lightning.kernels.block_work import BlockWork, WorkSums
from sparse_lightning.linear import BlockSparseLinear
from sparse_lightning.sharding import all_slots, at_local_slots, local_part, local_slots

# Dense gradients of a whole model, in bytes: more would defeat what sparsity saves.
MOST_EXACT_MEMORY = 4 << 30
# What is summed over steps, by slot.
_OF_SLOTS = ("saliency", "movement")


class Gatherer:
    """Gathers over training steps what criteria need of some layers' blocks.

    A training calls `arm` before a batch, `before_optimizer_step` once the gradients are final, and
    `end_step` after a step, `skip_step` after one that a GradScaler skipped. At an update
    `scores_of` a layer are read, and then `begin_anew` is told what the update did.

    Args:
        layers: by name.
        needs: names in `criteria.GATHERED`.
        exact: whether the gradients of micro-batches and ranks are summed before the norm is
            taken, which needs a dense gradient of every layer in memory; otherwise their squared
            norms are summed.
        token_stride: dense gradients are of every so many-th token only.

    Raises:
        ValueError: if `exact` needs more than `MOST_EXACT_MEMORY`.
    """

    def __init__(
        self,
        layers: Mapping[str, BlockSparseLinear],
        needs: frozenset[str],
        exact: bool = False,
        token_stride: int = 1,
    ) -> None:
        self.layers, self.needs = layers, needs
        needs_dense = bool(needs & {"gradient", "momentum"})
        for layer in layers.values():
            layer.score_by(exact and needs_dense, token_stride)
        if self.exact_memory > MOST_EXACT_MEMORY:
            raise ValueError(
                f"`exact` must need at most {MOST_EXACT_MEMORY >> 20} MiB for dense gradients; got "
                f"layers that need {self.exact_memory >> 20} MiB. Leave it out: the sum of squared "
                "norms chooses about as well."
            )
        # The dense gradient is gathered in this many steps before and at an update.
        self.window = MOMENTUM_STEPS if "momentum" in needs else int(needs_dense)
        # Whether `before_optimizer_step` has something to do.
        self.reads_gradients = not needs.isdisjoint(_OF_SLOTS)
        self._n_steps = 0
        self._momentum: dict[str, Tensor] = {}
        self._sums: dict[str, WorkSums] = {}
        # Of the optimizers seen so far, the sizes of their groups and the layers that they hold.
        self._held: WeakKeyDictionary[Optimizer, tuple[list[int], BlockWork]]
        self._held = WeakKeyDictionary()
        # Which sums hold work of the current step: until it is known that it was not skipped.
        self._fresh: list[WorkSums] = []

    @property
    def exact_memory(self) -> int:
        """Bytes that dense gradients take."""
        return sum(
            layer.block_scores.nbytes for layer in self.layers.values() if layer.scores_exactly
        )

    def arm(self, on: bool) -> None:
        """Start or stop to gather dense gradients in every layer at once, from zero."""
        for layer in self.layers.values():
            layer.armed.fill_(on)
            if not on:
                layer.block_scores.zero_()

    @torch.no_grad()
    def before_optimizer_step(self, optimizer: Optimizer, grad_scale: float) -> None:
        """Read the gradients that an optimizer is about to apply.

        Args:
            optimizer: whose step it is.
            grad_scale: what the gradients are still multiplied by.
        """
        if self.reads_gradients:
            work = self._work_of(optimizer)
            work.add(grad_scale)
            self._fresh += [sums for _, sums in work.layers]

    def _work_of(self, optimizer: Optimizer) -> BlockWork:
        # Looked up once: going through all parameters of a model would take its time every step.
        sizes = [len(group["params"]) for group in optimizer.param_groups]
        known = self._held.get(optimizer)
        if known is None or known[0] != sizes:
            ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
            names = [name for name, layer in self.layers.items() if id(layer.values) in ids]
            work = BlockWork((self.layers[name].values, self._sums_of(name)) for name in names)
            known = self._held[optimizer] = sizes, work
        return known[1]

    def _sums_of(self, name: str) -> WorkSums:
        """Return the sums of a layer, on its device, which may have been another before."""
        values, sums = local_part(self.layers[name].values), self._sums.get(name)
        if sums is None:
            sums = WorkSums.zeros(len(values), values.device, self.needs)
        elif sums.work.device != values.device:
            sums = sums.each(lambda tensor: tensor.to(values.device))
        self._sums[name] = sums
        return sums

    def skip_step(self) -> None:
        """Forget the step that is ending."""
        for sums in self._fresh:
            sums.work.zero_()
        self._fresh.clear()
        self.arm(False)

    def end_step(self, armed: bool, reduce: Callable[[Tensor], Tensor] | None) -> None:
        """Take in the step that is ending.

        Args:
            armed: whether dense gradients were gathered in it.
            reduce: sums a tensor over ranks; None on a single one.
        """
        self._n_steps += 1
        self._fresh.clear()
        if armed:
            self._take_in_gradients(reduce)

    @torch.no_grad()
    def _take_in_gradients(self, reduce: Callable[[Tensor], Tensor] | None) -> None:
        if reduce is not None:
            for layer in self.layers.values():
                layer.block_scores.copy_(reduce(layer.block_scores))
        if "momentum" in self.needs:
            for name, layer in self.layers.items():
                known, new = self._momentum.get(name), layer.block_scores
                self._momentum[name] = (
                    new.clone() if known is None else known.to(new.device) * MOMENTUM_DECAY + new
                )

    @torch.no_grad()
    def scores_of(self, name: str, generator: torch.Generator) -> BlockScores:
        """Return what is known of a layer's blocks, on the CPU.

        Args:
            name: of the layer.
            generator: for criteria that draw.
        """
        layer = self.layers[name]
        topology = layer.topology

        def norms(gathered: Tensor) -> Tensor:
            exactly = layer.scores_exactly
            return dense_block_norms(gathered, topology.grid) if exactly else gathered.sqrt()

        def of_slots(need: str, divisor: int) -> Tensor:
            sums = self._sums_of(name)
            sums.take_in()
            all_sums = all_slots(getattr(sums, need), layer.values)
            return topology.scatter(all_sums / divisor, fill=0.0)

        gathered = {
            "gradient": lambda: norms(layer.block_scores),
            "momentum": lambda: norms(self._momentum.get(name, layer.block_scores)),
            "saliency": lambda: of_slots("saliency", max(1, self._n_steps)),
            "movement": lambda: of_slots("movement", 1),
        }
        return BlockScores(
            mask=topology.mask.cpu(),
            magnitude=layer.magnitudes().cpu(),
            generator=generator,
            gathered={need: gathered[need]().cpu() for need in sorted(self.needs)},
        )

    def begin_anew(self, updates: Mapping[str, TopologyUpdate]) -> None:
        """Forget what an update has used, and what was known of blocks that it changed."""
        self.prepare_anew(updates)()

    def prepare_anew(self, updates: Mapping[str, TopologyUpdate]) -> Callable[[], None]:
        """Return what `begin_anew` does, as a function that only writes in place."""
        changed = {}
        for name, sums in self._sums.items():
            sums.take_in()
            if sums.movement is not None and name in updates:
                slots = updates[name].changed
                changed[name] = at_local_slots(slots, self.layers[name].values)

        def write() -> None:
            self._n_steps = 0
            self._momentum.clear()
            for name, sums in self._sums.items():
                if sums.saliency is not None:
                    sums.saliency.zero_()
                if sums.movement is not None and name in changed:
                    sums.movement.index_fill_(0, changed[name], 0)

        return write

    def keep_slots(self, name: str, kept: Tensor) -> None:
        """Follow a layer that has given up slots, right after an update.

        Args:
            name: of the layer.
            kept: int64 `[capacity]`, what `BlockSparseLinear.shrink` returned.
        """
        self.prepare_keep(name, kept)()

    def prepare_keep(self, name: str, kept: Tensor) -> Callable[[], None]:
        """Return what `keep_slots` does, as a function that takes no memory and cannot fail."""
        sums = self._sums.get(name)
        left = None if sums is None else sums.each(lambda tensor: tensor[kept.to(tensor.device)])

        def write() -> None:
            if left is not None:
                self._sums[name] = left
            self._held.clear()

        return write

    def forget(self) -> None:
        """Forget everything, also how many slots the layers had."""
        self._n_steps = 0
        self._momentum.clear()
        self._sums.clear()
        self._held.clear()
        self._fresh.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return what has been gathered, as tensors on the CPU and primitives."""
        state: dict[str, Any] = {"n_steps": self._n_steps}
        state["momentum"] = {n: sums.to("cpu", copy=True) for n, sums in self._momentum.items()}
        for sums in self._sums.values():
            sums.take_in()
        for need in _OF_SLOTS:
            if need in self.needs:
                of_layers = ((name, getattr(sums, need)) for name, sums in self._sums.items())
                state[need] = {
                    name: all_slots(sums, self.layers[name].values).to("cpu", copy=True)
                    for name, sums in of_layers
                }
            else:
                state[need] = {}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned, of layers that have that many slots now."""
        self.forget()
        self._n_steps = state["n_steps"]
        self._momentum = {n: s.clone() for n, s in state["momentum"].items() if n in self.layers}
        for need in _OF_SLOTS:
            for name in state[need]:
                if name in self.layers and need in self.needs:
                    mine = local_slots(self.layers[name].values)
                    getattr(self._sums_of(name), need).copy_(state[need][name][mine])


def score(argument: str, criterion: Criterion, scores: BlockScores) -> Tensor:
    """Return what a criterion says of a layer's blocks.

    Raises:
        ValueError: unless it is one number a block.
    """
    result = criterion(scores)
    grid = scores.mask.shape
    if not isinstance(result, Tensor) or result.shape != grid:
        got = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(f"`{argument}` must return one score a block, {list(grid)}; got {got}.")
    return result.detach().to("cpu", torch.promote_types(result.dtype, torch.float32))
