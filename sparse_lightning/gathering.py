"""Gathering of the statistics by which criteria score blocks, while a model trains.

Only what the update rule needs is gathered: norms of the dense gradient in the steps that lead up
to an update, and the work (w * g) of the present blocks in every step. Where 2:4 patterns within
blocks evolve, the whole gradient of the present blocks is gathered in the step of the update.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle, unserializable_hook

from sparse_lightning import ranks
from sparse_lightning.kernels import block_gradients
from sparse_lightning.kernels.block_work import BlockWork, WorkSums
from sparse_lightning.linear import BlockSparseLinear
from sparse_lightning.policy.criteria import MOMENTUM_DECAY, MOMENTUM_STEPS, BlockScores
from sparse_lightning.policy.updates import TopologyUpdate
from sparse_lightning.sharding import (
    gather_slots,
    gather_whole,
    is_sharded,
    local_part,
    local_slots,
    to_local_slots,
)

# Why the gradient of a layer cannot score its blocks.
GradientFlaw = Literal["missing", "not finite", "zero"]

# Statistics that are summed over steps, per slot.
_PER_SLOT = ("saliency", "movement")


class GradientAccumulator:
    """Accumulates what updates need of a layer's gradient, over the backward passes of one step.

    While armed, the layer's backward returns the squared block norms as the gradient of
    `layer.block_norms`, so they accumulate exactly when gradients accumulate into `values.grad`. If
    the layer is 2:4 sparse and its pattern evolves, the gradient of all weights of the present
    blocks is accumulated, too.

    Gradients that are cleared before the step, such as those that a critic receives while its
    generator is trained, must not count. So `values.grad` is checked at the step, and in each
    backward before anything is accumulated: if it is None, or all zero although what has been
    accumulated was not, the norms accumulated so far are discarded. A gradient that was zero from
    the start was not cleared: the present blocks do not reach the loss, and the norms say which
    absent ones would.

    Args:
        layer: layer whose backward computes the norms.
        values: parameter of the layer as the optimizer holds it: sharded under `fully_shard`.
        needs_norms: whether to accumulate norms.
    """

    def __init__(
        self,
        layer: BlockSparseLinear,
        values: nn.Parameter,
        needs_norms: bool = True,
    ) -> None:
        self.layer, self.values = layer, values
        self.needs_norms = needs_norms
        self.armed = False
        # Positions by whose address the gradient of blocks is recorded, and the sum of it.
        # Shrinking replaces them, and shared memory changes their address.
        self._positions: Tensor | None = None
        self._address = 0
        self._blocks: Tensor | None = None
        # What backward passes have recorded but not yet accumulated in `values.grad`, by their
        # number. Reentrant checkpoints run one within another.
        self._unfinished: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._backward = -1
        # Whether a sharded `values.grad` holds the latest backward's gradient: `fully_shard` keeps
        # those of micro-batches to itself until the one in which ranks are synchronised.
        self._is_reduced = False
        # Whether the backward passes so far had a gradient of `values` that is not zero: a bool
        # tensor on the device; None if autograd has passed none to `values` itself.
        self._had_gradient: Tensor | None = None

    @property
    def records_blocks(self) -> bool:
        """Whether the gradient of whole blocks is accumulated."""
        return self._positions is not None

    def arm(self, is_armed: bool, needs_blocks: bool = False) -> None:
        """Make the layer's backward compute block norms from now on, or stop it.

        Args:
            is_armed: whether to accumulate anything.
            needs_blocks: whether to accumulate the gradient of whole blocks of a 2:4 sparse layer.
        """
        positions = self.layer.topology.positions if is_armed and needs_blocks else None
        address = 0 if positions is None else positions.data_ptr()
        is_same = positions is self._positions and address == self._address
        if is_armed == self.armed and is_same:
            return
        self.armed = is_armed
        self.layer.arm(is_armed and self.needs_norms)
        self.layer.block_norms.grad = self._had_gradient = self._blocks = None
        self._unfinished.clear()
        if self._positions is not None:
            block_gradients.stop(self._address)
        self._positions, self._address = positions, address
        if positions is not None:
            block_gradients.start(address, self)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if is_armed:
            # These hooks run before the accumulation. Both leaves need one: autograd may reach
            # either first, and under fully_shard backward does not see `values` itself.
            for leaf, hook in (
                (self.values, self._on_values_gradient),
                (self.layer.block_norms, self._on_gradient),
            ):
                self._handles.append(leaf.register_hook(hook))
            if is_sharded(self.values):
                register = self.values.register_post_accumulate_grad_hook
                self._handles.append(register(self._on_reduced))  # type: ignore[no-untyped-call, unused-ignore]

    def collect(self) -> tuple[Tensor | None, Tensor | None]:
        """Return what was accumulated for the step that was just taken, and clear it.

        Returns:
            The squared norms, fp32 `[out_blocks, in_blocks]`, and the gradient of whole blocks,
            `[capacity, B, B]`; None for what there is none of, or if the step had no gradient.
        """
        self._discard_if_cleared()
        norms, self.layer.block_norms.grad = self.layer.block_norms.grad, None
        blocks, self._blocks = self._blocks, None
        self._unfinished.clear()  # of a backward that failed
        self._had_gradient = None
        return norms, blocks

    @torch.no_grad()
    def record_blocks(self, blocks: Tensor) -> None:
        """Add one product of the gradient of whole blocks, before `values` accumulates its part."""
        self._begin_backward()
        blocks = blocks.detach()
        if is_sharded(self.values):  # backward does not see `values` itself
            self._blocks = _sum_of(self._blocks, blocks)
        else:
            self._unfinished[self._backward] = _sum_of(self._unfinished.get(self._backward), blocks)

    @unserializable_hook  # type: ignore[no-untyped-call, untyped-decorator, unused-ignore]
    @torch.no_grad()
    def _on_values_gradient(self, gradient: Tensor) -> None:
        self._on_gradient(gradient)
        blocks = self._unfinished.pop(self._backward, None)
        if blocks is not None:
            self._blocks = _sum_of(self._blocks, blocks)
        has_gradient = gradient.any()
        before = self._had_gradient
        self._had_gradient = has_gradient if before is None else before | has_gradient

    @unserializable_hook  # type: ignore[no-untyped-call, untyped-decorator, unused-ignore]
    def _on_gradient(self, gradient: Tensor) -> None:
        self._begin_backward()

    @unserializable_hook  # type: ignore[no-untyped-call, untyped-decorator, unused-ignore]
    def _on_reduced(self, values: Tensor) -> None:
        self._is_reduced = True

    def _begin_backward(self) -> None:
        backward = torch._C._current_graph_task_id()
        if backward != self._backward:
            self._backward = backward
            self._discard_if_cleared()
            self._is_reduced = False

    @torch.no_grad()
    def _discard_if_cleared(self) -> None:
        """Discard the norms if the gradients that they belong to were cleared."""
        gradient, norms = self.values.grad, self.layer.block_norms.grad
        if norms is None and self._blocks is None:
            return
        if gradient is None:
            if self._is_reduced or not is_sharded(self.values):
                self.layer.block_norms.grad = self._had_gradient = self._blocks = None
        elif not is_sharded(gradient):  # a shard may be zero while the whole gradient is not
            is_cleared = ~gradient.any()
            if self._had_gradient is not None:
                is_cleared &= self._had_gradient
                self._had_gradient = self._had_gradient & ~is_cleared
            # `where` evaluates the condition on the device, without a synchronisation.
            if norms is not None:
                self.layer.block_norms.grad = torch.where(is_cleared, 0.0, norms)
            if self._blocks is not None:
                self._blocks = torch.where(is_cleared, 0.0, self._blocks)


def _sum_of(before: Tensor | None, new: Tensor) -> Tensor:
    """Return a sum, in at least fp32; a single term keeps its dtype, to save memory."""
    if before is None:
        return new
    return before.to(torch.promote_types(before.dtype, torch.float32)) + new


class Gatherer:
    """Gathers the statistics that an update rule needs about the blocks of some layers.

    Call `read_gradients` when gradients are final, right before an optimizer steps. After the step,
    call `confirm_step`, and `collect_norms` for the armed layers. At an update, `scores_of` returns
    what was gathered, and `prepare_clear` prepares the next interval.

    Args:
        layers: layers by name; the dictionary may change later.
        needs: names of the statistics to gather, from `criteria.GATHERED`.
        token_stride: dense gradients are computed from every `token_stride`-th token.
        needs_blocks: whether 2:4 sparse layers ever need the gradient of whole blocks.
    """

    def __init__(
        self,
        layers: Mapping[str, BlockSparseLinear],
        needs: frozenset[str],
        token_stride: int = 1,
        needs_blocks: bool = False,
    ) -> None:
        self.layers, self.needs = layers, needs
        self.needs_blocks = needs_blocks
        for layer in layers.values():
            layer.token_stride = token_stride
        self._needs_norms = not needs.isdisjoint(("momentum", "gradient"))
        # Whether `read_gradients` must be called.
        self.reads_gradients = not needs.isdisjoint(_PER_SLOT)
        self._accumulators: dict[str, GradientAccumulator] = {}
        self._norms: dict[str, Tensor] = {}
        self._blocks: dict[str, Tensor] = {}
        self._momentum: dict[str, Tensor] = {}
        self._sums: dict[str, WorkSums] = {}
        # Number of steps in each layer's sums, since the last update.
        self._n_steps: dict[str, int] = {}
        # Layers whose sums hold the work of a step that is not confirmed yet.
        self._unconfirmed: set[str] = set()

    # Norms of the dense gradient.

    @property
    def window(self) -> int:
        """Number of steps, ending with the update, in which the dense gradient is gathered."""
        if "momentum" in self.needs:
            return MOMENTUM_STEPS
        if self._needs_norms or not self.needs_blocks:
            return int(self._needs_norms)
        # Asked anew each time, as a state dict may have brought or removed a pattern.
        return int(any(layer.topology.positions is not None for layer in self.layers.values()))

    def arm(
        self,
        names: Collection[str],
        parameters: Mapping[str, nn.Parameter],
        *,
        blocks: bool = True,
    ) -> None:
        """Gather dense gradients in the named layers of an optimizer, and stop in its others.

        Args:
            names: names of the layers to arm, among `parameters`.
            parameters: parameters of the optimizer, by layer.
            blocks: whether to gather the gradient of whole blocks of 2:4 sparse layers, too.
        """
        needs_blocks = blocks and self.needs_blocks
        for name, values in parameters.items():
            accumulator = self._accumulators.get(name)
            if accumulator is None or accumulator.values is not values:
                if accumulator is not None:
                    accumulator.arm(False)
                if name not in names:
                    continue
                accumulator = GradientAccumulator(self.layers[name], values, self._needs_norms)
                self._accumulators[name] = accumulator
            accumulator.arm(name in names, needs_blocks)

    def records_blocks(self, name: str) -> bool:
        """Return whether the gradient of whole blocks of a layer is gathered in this step."""
        accumulator = self._accumulators.get(name)
        return accumulator is not None and accumulator.records_blocks

    def disarm(self) -> None:
        """Stop gathering dense gradients in all layers."""
        for accumulator in self._accumulators.values():
            accumulator.arm(False)

    def discard_norms(self, names: Iterable[str]) -> None:
        """Discard the norms that were accumulated for a step that was skipped."""
        for name in names:
            if name in self._accumulators:
                self._accumulators[name].collect()

    @torch.no_grad()
    def collect_norms(self, names: Sequence[str], loss_scale: float = 1.0) -> None:
        """Collect the norms of the dense gradient from the step that was just taken.

        Args:
            names: names of the armed layers; equal on every rank, and every rank must call this.
            loss_scale: factor of the loss in this step's backward passes. Without dividing by it,
                a momentum over steps of different scales would be dominated by the largest scale.
        """
        found = {}
        for name in names:
            found[name], blocks = self._accumulators[name].collect()
            self._blocks.pop(name, None)
            if blocks is not None:
                self._blocks[name] = blocks
        if not self._needs_norms:
            return
        if ranks.world_size() > 1:
            found = self._sum_norms_over_ranks(found)
        if loss_scale != 1:
            found = {n: None if sq is None else sq / loss_scale**2 for n, sq in found.items()}
        self._norms.update({name: norms for name, norms in found.items() if norms is not None})
        for name, norms in found.items():
            if norms is None:
                self._norms.pop(name, None)
            elif "momentum" in self.needs:
                before = self._momentum.get(name)
                if before is None:  # NaN prevents scoring until a finite step
                    before = torch.full_like(norms, torch.nan)
                before = before.to(norms.device)
                # A step with a non-finite gradient leaves the momentum unchanged.
                new = before.nan_to_num() * MOMENTUM_DECAY + norms
                self._momentum[name] = torch.where(norms.isfinite().all(), new, before)

    def _sum_norms_over_ranks(self, found: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
        """Return the sum of each layer's norms over ranks; None if no rank has any."""
        by_device: dict[torch.device, list[str]] = {}
        for name in found:
            by_device.setdefault(self.layers[name].values.device, []).append(name)
        summed: dict[str, Tensor | None] = {}
        for device, names in by_device.items():
            grids = [self.layers[name].topology.grid for name in names]
            sizes = [rows * cols for rows, cols in grids]
            flat = torch.zeros(sum(sizes) + len(names), dtype=torch.float32, device=device)
            *parts, counts = flat.split([*sizes, len(names)])
            for i, name in enumerate(names):
                norms = found[name]
                if norms is not None:
                    parts[i].copy_(norms.flatten())
                    counts[i] = 1
            *parts, counts = ranks.sum_over_ranks(flat).split([*sizes, len(names)])
            for name, grid, part, count in zip(names, grids, parts, counts.tolist(), strict=True):
                summed[name] = part.view(grid) if count else None
        return summed

    # The work of present blocks.

    def make_block_work(self, parameters: Mapping[str, nn.Parameter]) -> BlockWork:
        """Return the object that computes the work of an optimizer's blocks.

        Make a new one when a layer has another number of slots or another device.

        Args:
            parameters: parameters of the optimizer, by layer.
        """
        return BlockWork((values, self._sums_of(name)) for name, values in parameters.items())

    @torch.no_grad()
    def read_gradients(
        self, work: BlockWork, parameters: Mapping[str, nn.Parameter], grad_scale: float
    ) -> None:
        """Read the gradients that an optimizer is about to apply.

        The last call before `confirm_step` counts: an optimizer may evaluate its closure, and so
        compute gradients, several times.

        Args:
            work: result of `make_block_work` for these parameters.
            parameters: parameters of the optimizer, by layer.
            grad_scale: scale that the gradients still carry.
        """
        for name in self._unconfirmed & parameters.keys():
            self._sums[name].work.zero_()
        work.add(grad_scale)
        self._unconfirmed -= parameters.keys()
        self._unconfirmed |= {n for n, values in parameters.items() if values.grad is not None}

    def confirm_step(self, names: Collection[str]) -> None:
        """Count the gradients read for these layers, after their optimizer has taken its step."""
        for name in self._unconfirmed & set(names):
            self._n_steps[name] = self._n_steps.get(name, 0) + 1
        self._unconfirmed -= set(names)

    def _accumulate_work(self, name: str) -> None:
        """Add the work of the latest step to a layer's sums, if that step is confirmed."""
        if name not in self._unconfirmed:
            self._sums[name].accumulate()

    def _sums_of(self, name: str) -> WorkSums:
        """Return the sums of a layer, moved to its current device."""
        values, sums = local_part(self.layers[name].values), self._sums.get(name)
        if sums is None:
            sums = WorkSums.zeros(len(values), values.device, self.needs)
        elif sums.work.device != values.device:
            sums = sums.map(lambda tensor: tensor.to(values.device))
        self._sums[name] = sums
        return sums

    # An update.

    @torch.no_grad()
    def scores_of(
        self,
        names: Iterable[str],
        needs: Collection[str],
        step: int,
        generator: Callable[[str], torch.Generator],
        ages: Mapping[str, Tensor],
    ) -> dict[str, BlockScores]:
        """Return the statistics of the layers that can be scored, on the CPU.

        A layer cannot be scored if a needed statistic is missing or not finite, for example because
        it had no gradient in the step, or if the norms of its dense gradient are all zero, as
        growth would then take the blocks with the lowest indices.

        Args:
            names: names of the layers; equal on every rank, and every rank must call this.
            needs: names of the needed statistics, among those that are gathered.
            step: step of their optimizer.
            generator: maps the name of a layer to the generator for criteria that draw numbers.
            ages: int32 `[capacity]` per layer, steps since the block of each slot was grown.
        """
        found: dict[str, dict[str, Tensor]] = {}
        for name in names:
            tensors = self._statistics_of(name, needs)
            if tensors is not None:
                found[name] = {**tensors, "magnitude": self.layers[name].magnitudes()}
        copies = iter(copy_to_cpu([t for tensors in found.values() for t in tensors.values()]))
        slot_grids = copy_to_cpu([self.layers[name].topology.slots for name in found])
        scores = {}
        for (name, tensors), slots in zip(found.items(), slot_grids, strict=True):
            gathered = {need: next(copies) for need in tensors}
            magnitude = gathered.pop("magnitude")
            if _flaw_of(gathered) is not None:
                continue
            layer = self.layers[name]
            scores[name] = BlockScores(
                mask=slots >= 0,
                magnitude=magnitude,
                generator=generator(name),
                gathered=gathered,
                layer=name,
                step=step,
                age=layer.topology.scatter(ages[name], fill=0),
                read_values=functools.partial(_values_in_grid_order, layer),
            )
        return scores

    @torch.no_grad()
    def flaw_of(self, name: str) -> GradientFlaw:
        """Return why a layer could not be scored; every rank must call this."""
        statistics = self._statistics_of(name, self.needs)
        return "missing" if statistics is None else _flaw_of(statistics) or "missing"

    @torch.no_grad()
    def gradient_of_blocks(self, name: str) -> Tensor | None:
        """Return the gradient of all weights of a layer's blocks, `[capacity, B, B]`.

        It is the sum over ranks, every one of which must call this. None if no rank has any, or if
        it is not finite, as after an overflow.
        """
        layer, own = self.layers[name], self._blocks.get(name)
        device = layer.values.device
        if not ranks.any_over_ranks([own is not None], device)[0]:
            return None
        if own is None:
            capacity, block_size, _ = layer.topology.values_shape
            dtype = torch.promote_types(layer.values.dtype, torch.float32)
            own = torch.zeros(capacity, block_size, block_size, dtype=dtype, device=device)
        if ranks.world_size() > 1:
            own = own.to(torch.promote_types(own.dtype, torch.float32))
        blocks = ranks.sum_over_ranks(own)
        return blocks if bool(blocks.isfinite().all()) else None

    def _statistics_of(self, name: str, needs: Collection[str]) -> dict[str, Tensor] | None:
        """Return a layer's statistics, each `[out_blocks, in_blocks]`; None if one is missing."""
        layer, statistics = self.layers[name], {}
        for need in sorted(needs):
            if need in _PER_SLOT:
                n_steps, sums = self._n_steps.get(name, 0), self._sums_of(name)
                if not n_steps:
                    return None
                self._accumulate_work(name)
                per_slot = gather_slots(getattr(sums, need), layer.values)
                per_slot = per_slot / (n_steps if need == "saliency" else 1)
                statistics[need] = layer.topology.scatter(per_slot, fill=0.0)
            else:
                squares = (self._momentum if need == "momentum" else self._norms).get(name)
                if squares is None:
                    return None
                statistics[need] = squares.sqrt()
        return statistics

    def prepare_clear(self, updates: Mapping[str, TopologyUpdate]) -> Callable[[], None]:
        """Return a function that clears the statistics after an update.

        It clears what the update has used, and the movement of the changed slots. It only writes in
        place.
        """
        changed = {}
        for name in updates.keys() & self._sums.keys():
            self._accumulate_work(name)
            changed[name] = to_local_slots(updates[name].changed, self.layers[name].values)

        def write() -> None:
            for name in updates:
                self._n_steps.pop(name, None)
                self._norms.pop(name, None)
                self._blocks.pop(name, None)
                self._momentum.pop(name, None)
            for name, slots in changed.items():
                sums = self._sums[name]
                if sums.saliency is not None:
                    sums.saliency.zero_()
                if sums.movement is not None:
                    sums.movement.index_fill_(0, slots, 0)

        return write

    def prepare_slot_removal(self, name: str, kept: Tensor) -> Callable[[], None]:
        """Return a function that removes a layer's slots from the sums, right after an update.

        The returned function allocates no memory and cannot fail.

        Args:
            name: name of the layer.
            kept: int64 `[new capacity]`, the slots that remain.
        """
        sums = self._sums.get(name)
        kept_sums = None if sums is None else sums.map(lambda t: t[kept.to(t.device)])

        def write() -> None:
            if kept_sums is not None:
                self._sums[name] = kept_sums

        return write

    def reset(self) -> None:
        """Disarm all layers and discard everything, including the number of slots per layer."""
        self.disarm()
        for state in (
            *(self._accumulators, self._norms, self._blocks, self._momentum),
            *(self._sums, self._n_steps),
        ):
            state.clear()
        self._unconfirmed.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the gathered statistics as CPU tensors and primitives."""
        for name in self._sums:
            self._accumulate_work(name)
        state: dict[str, Any] = {
            "n_steps": dict(self._n_steps),
            "momentum": {n: sums.to("cpu", copy=True) for n, sums in self._momentum.items()},
        }
        for need in _PER_SLOT:
            layer_sums = self._sums.items() if need in self.needs else ()
            state[need] = {
                name: gather_slots(getattr(sums, need), self.layers[name].values).to(
                    "cpu", copy=True
                )
                for name, sums in layer_sums
            }
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state_dict`; the layers must have the saved number of slots."""
        self.reset()
        self._n_steps = {n: count for n, count in state["n_steps"].items() if n in self.layers}
        self._momentum = {n: s.clone() for n, s in state["momentum"].items() if n in self.layers}
        for need in _PER_SLOT:
            for name in state[need]:
                if name in self.layers and need in self.needs:
                    slots = local_slots(self.layers[name].values)
                    getattr(self._sums_of(name), need).copy_(state[need][name][slots])


def _flaw_of(statistics: Mapping[str, Tensor]) -> GradientFlaw | None:
    """Return why statistics cannot score blocks; None if they can.

    Work of zero counts, since no block is chosen by it alone, but not a dense gradient of zero.
    """
    if not all(bool(tensor.isfinite().all()) for tensor in statistics.values()):
        return "not finite"
    norms = (tensor for need, tensor in statistics.items() if need not in _PER_SLOT)
    return None if all(bool(tensor.any()) for tensor in norms) else "zero"


def copy_to_cpu(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors of one dtype to the CPU, with one transfer per device.

    >>> [tensor.tolist() for tensor in copy_to_cpu([torch.tensor([[1], [2]]), torch.tensor(3)])]
    [[[1], [2]], 3]
    """
    copies: dict[int, Tensor] = {}
    for device in {tensor.device for tensor in tensors}:
        indices = [i for i, tensor in enumerate(tensors) if tensor.device == device]
        flat = torch.cat([tensors[i].flatten() for i in indices]).cpu()
        parts = flat.split([tensors[i].numel() for i in indices])
        for i, part in zip(indices, parts, strict=True):
            copies[i] = part.view(tensors[i].shape)
    return [copies[i] for i in range(len(tensors))]


@torch.no_grad()
def _values_in_grid_order(layer: BlockSparseLinear) -> Tensor:
    """Return the weights of the present blocks, in row-major order of the grid."""
    slots = layer.topology.slots.flatten()
    values = layer.topology.expand(gather_whole(layer.values.detach()))
    return values[slots[slots >= 0].long()]
