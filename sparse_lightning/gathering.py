"""What is gathered about a model's blocks while it trains, so that they can be scored.

Only what the criteria of the training need: the dense gradient in the steps at an update, the work
of present blocks at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_lightning.criteria import (
    MOMENTUM_DECAY,
    MOMENTUM_STEPS,
    BlockScores,
    Criterion,
    block_work,
    dense_block_norms,
)
from sparse_lightning.evolution import TopologyUpdate
from sparse_lightning.linear import BlockSparseLinear

# Dense gradients of a whole model, in bytes: more would defeat what sparsity saves.
MOST_EXACT_MEMORY = 4 << 30


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

    Raises:
        ValueError: if `exact` needs more than `MOST_EXACT_MEMORY`.
    """

    def __init__(
        self, layers: Mapping[str, BlockSparseLinear], needs: frozenset[str], exact: bool
    ) -> None:
        self.layers, self.needs = layers, needs
        needs_dense = bool(needs & {"gradient", "momentum"})
        for layer in layers.values():
            layer.score_exactly(exact and needs_dense)
        if self.exact_memory > MOST_EXACT_MEMORY:
            raise ValueError(
                f"`exact` must need at most {MOST_EXACT_MEMORY >> 20} MiB for dense gradients; got "
                f"layers that need {self.exact_memory >> 20} MiB. Leave it out: the sum of squared "
                "norms chooses about as well."
            )
        # The dense gradient is gathered in this many steps before and at an update.
        self.window = MOMENTUM_STEPS if "momentum" in needs else int(needs_dense)
        self._n_steps = 0
        # What the current step adds, until it is known that it was not skipped.
        self._work: dict[str, Tensor] = {}
        self._momentum: dict[str, Tensor] = {}
        self._saliency: dict[str, Tensor] = {}
        self._movement: dict[str, Tensor] = {}

    @property
    def reads_gradients(self) -> bool:
        """Whether `before_optimizer_step` has something to do."""
        return bool(self.needs & {"saliency", "movement"})

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
    def before_optimizer_step(self, optimizer: torch.optim.Optimizer, grad_scale: float) -> None:
        """Read the gradients that an optimizer is about to apply.

        Args:
            optimizer: whose step it is.
            grad_scale: what the gradients are still multiplied by.
        """
        if not self.reads_gradients:
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, layer in self.layers.items():
            if id(layer.values) in held and layer.values.grad is not None:
                work = block_work(layer.values, layer.values.grad) / grad_scale
                work = torch.where(work.isfinite(), work, 0)
                self._work[name] = self._work[name] + work if name in self._work else work

    def skip_step(self) -> None:
        """Forget the step that is ending."""
        self._work.clear()
        self.arm(False)

    def end_step(self, armed: bool, reduce: Callable[[Tensor], Tensor] | None) -> None:
        """Take in the step that is ending.

        Args:
            armed: whether dense gradients were gathered in it.
            reduce: sums a tensor over ranks; None on a single one.
        """
        self._n_steps += 1
        if self._work:
            self._take_in_work()
        if armed:
            self._take_in_gradients(reduce)

    def _take_in_work(self) -> None:
        for name, work in self._work.items():
            if "saliency" in self.needs:
                _add(self._saliency, name, work.abs())
            if "movement" in self.needs:
                _add(self._movement, name, -work)
        self._work.clear()

    @torch.no_grad()
    def _take_in_gradients(self, reduce: Callable[[Tensor], Tensor] | None) -> None:
        if reduce is not None:
            for layer in self.layers.values():
                layer.block_scores.copy_(reduce(layer.block_scores))
        if "momentum" in self.needs:
            for name, layer in self.layers.items():
                if name in self._momentum:
                    self._momentum[name] *= MOMENTUM_DECAY
                _add(self._momentum, name, layer.block_scores)

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

        def of_slots(sums: dict[str, Tensor], divisor: int) -> Tensor:
            if name not in sums:
                return torch.zeros(topology.grid)
            return topology.scatter(sums[name] / divisor, fill=0.0)

        gathered = {
            "gradient": lambda: norms(layer.block_scores),
            "momentum": lambda: norms(self._momentum.get(name, layer.block_scores)),
            "saliency": lambda: of_slots(self._saliency, max(1, self._n_steps)),
            "movement": lambda: of_slots(self._movement, 1),
        }
        return BlockScores(
            mask=topology.mask.cpu(),
            magnitude=layer.magnitudes().cpu(),
            generator=generator,
            gathered={need: gathered[need]().cpu() for need in sorted(self.needs)},
        )

    def begin_anew(self, updates: Mapping[str, TopologyUpdate]) -> None:
        """Forget what an update has used, and what was known of blocks that it changed."""
        self._n_steps = 0
        self._momentum.clear()
        self._saliency.clear()
        for name, update in updates.items():
            if name in self._movement:
                movement = self._movement[name]
                movement[update.changed.to(movement.device)] = 0

    def keep_slots(self, name: str, kept: Tensor) -> None:
        """Follow a layer that has given up slots, right after an update.

        Args:
            name: of the layer.
            kept: int64 `[capacity]`, what `BlockSparseLinear.shrink` returned.
        """
        if name in self._movement:
            movement = self._movement[name]
            self._movement[name] = movement[kept.to(movement.device)]

    def state_dict(self) -> dict[str, Any]:
        """Return what has been gathered, as tensors on the CPU and primitives."""
        return {
            "n_steps": self._n_steps,
            **{
                need: {name: sums.cpu() for name, sums in getattr(self, f"_{need}").items()}
                for need in ("momentum", "saliency", "movement")
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._n_steps = state["n_steps"]
        for need in ("momentum", "saliency", "movement"):
            sums = getattr(self, f"_{need}")
            sums.update({name: s.clone() for name, s in state[need].items() if name in self.layers})


def _add(sums: dict[str, Tensor], name: str, addend: Tensor) -> None:
    """Add in place to what may not exist yet, or have been loaded on another device."""
    known = sums.get(name)
    sums[name] = addend.clone() if known is None else known.to(addend.device).add_(addend)


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
