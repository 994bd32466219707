"""What is gathered about a model's blocks while it trains, so that they can be scored.

Only what the criteria of the training need: norms of the dense gradient in the steps at an update,
the work of present blocks at every step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle, unserializable_hook

from sparse_lightning import ranks
from sparse_lightning.kernels.block_work import BlockWork, WorkSums
from sparse_lightning.linear import BlockSparseLinear
from sparse_lightning.policy.criteria import MOMENTUM_DECAY, MOMENTUM_STEPS, BlockScores
from sparse_lightning.policy.evolution import TopologyUpdate
from sparse_lightning.sharding import (
    all_slots,
    at_local_slots,
    is_sharded,
    local_part,
    local_slots,
    whole,
)

# What is summed over steps, by slot.
_OF_SLOTS = ("saliency", "movement")


class Evidence:
    """The squared block norms that backwards have accumulated for a layer's next step.

    While armed, the layer's backward gives them as the gradient of `layer.block_norms`, so whatever
    is accumulated into `values.grad` is accumulated there too, and what only differentiates
    something else is not. Gradients that are thrown away before the step must not count either, as
    those that a critic collects while its generator is trained. So before anything is accumulated
    in a backward, and at the step, `values.grad` is looked at: if it is None or all zero, by
    whatever means, then what had been accumulated beside it is dropped.

    Args:
        layer: whose backward is watched.
        values: its parameter, as the optimizer holds it: sharded, under `fully_shard`.
    """

    def __init__(self, layer: BlockSparseLinear, values: nn.Parameter) -> None:
        self.layer, self.values = layer, values
        self.armed = False
        self._handles: list[RemovableHandle] = []
        self._backward = -1

    def arm(self, on: bool) -> None:
        """Have the layer's backward compute block norms from now on, or no longer."""
        if on == self.armed:
            return
        self.armed = on
        self.layer.arm(on)
        self.layer.block_norms.grad = None
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if on:
            # Both are asked before they are accumulated; which of them is first is not defined, and
            # under fully_shard it is another tensor than `values` that backward sees.
            for leaf in (self.values, self.layer.block_norms):
                self._handles.append(leaf.register_hook(self._at_first))

    def take(self) -> Tensor | None:
        """Return the squared norms for the step that was just taken, and begin anew.

        Returns:
            fp32 `[out_blocks, in_blocks]`; None if there are none, or the step had no gradient.
        """
        self._drop_if_thrown_away()
        norms, self.layer.block_norms.grad = self.layer.block_norms.grad, None
        return norms

    @unserializable_hook  # type: ignore[no-untyped-call, untyped-decorator, unused-ignore]
    def _at_first(self, gradient: Tensor) -> None:
        backward = torch._C._current_graph_task_id()
        if backward != self._backward:
            self._backward = backward
            self._drop_if_thrown_away()

    @torch.no_grad()
    def _drop_if_thrown_away(self) -> None:
        gradient, norms = self.values.grad, self.layer.block_norms.grad
        if norms is None:
            return
        if gradient is None:
            self.layer.block_norms.grad = None
        elif not is_sharded(gradient):  # of which a rank's part may be zero, and the whole not
            # The device decides, so that the host need not wait for it.
            self.layer.block_norms.grad = torch.where(gradient.any(), norms, 0.0)


class Gatherer:
    """Gathers over training steps what an update rule needs of some layers' blocks.

    Before an optimizer steps, and once the gradients are final, a training calls `read`; after the
    step `confirm`, and `take` for the layers that are armed. At an update it reads `scores_of` some
    layers, and then tells `prepare_anew` what the update did.

    Args:
        layers: by name.
        needs: names in `criteria.GATHERED`.
        token_stride: dense gradients are of every so many-th token only.
    """

    def __init__(
        self, layers: Mapping[str, BlockSparseLinear], needs: frozenset[str], token_stride: int = 1
    ) -> None:
        self.layers, self.needs = layers, needs
        for layer in layers.values():
            layer.token_stride = token_stride
        # The dense gradient is gathered in this many steps before and at an update.
        self.window = MOMENTUM_STEPS if "momentum" in needs else int("gradient" in needs)
        # Whether `read` has something to do.
        self.reads_gradients = not needs.isdisjoint(_OF_SLOTS)
        self._evidence: dict[str, Evidence] = {}
        self._norms: dict[str, Tensor] = {}
        self._momentum: dict[str, Tensor] = {}
        self._sums: dict[str, WorkSums] = {}
        # Steps since the last update that each layer's sums are of.
        self._n_steps: dict[str, int] = {}
        # Which layers' sums hold the work of a step that is not over.
        self._fresh: set[str] = set()

    # Norms of the dense gradient.

    def arm(self, names: Collection[str], parameters: Mapping[str, nn.Parameter]) -> None:
        """Gather dense gradients in some layers, and no longer in the others of an optimizer.

        Args:
            names: of the layers, among `parameters`.
            parameters: the optimizer's, by layer.
        """
        for name, values in parameters.items():
            evidence = self._evidence.get(name)
            if evidence is None or evidence.values is not values:
                if evidence is not None:
                    evidence.arm(False)
                if name not in names:
                    continue
                evidence = self._evidence[name] = Evidence(self.layers[name], values)
            evidence.arm(name in names)

    def disarm(self) -> None:
        """Gather in no layer."""
        for evidence in self._evidence.values():
            evidence.arm(False)

    def drop_evidence(self, names: Iterable[str]) -> None:
        """Forget what backwards have accumulated for a step that was skipped."""
        for name in names:
            if name in self._evidence:
                self._evidence[name].take()

    @torch.no_grad()
    def take(self, names: Sequence[str]) -> None:
        """Take in what the step that is ending has shown of the dense gradient.

        Args:
            names: of the layers that are armed; the same on every rank, all of which must call.
        """
        found = {name: self._evidence[name].take() for name in names}
        if ranks.world_size() > 1:
            found = self._summed(found)
        self._norms.update({name: norms for name, norms in found.items() if norms is not None})
        for name, norms in found.items():
            if norms is None:
                self._norms.pop(name, None)
            elif "momentum" in self.needs:
                known = self._momentum.get(name)
                if known is None:  # NaN until something is known: so long the layer is not scored
                    known = torch.full_like(norms, torch.nan)
                known = known.to(norms.device)
                # A step whose gradient is not finite shows nothing.
                new = known.nan_to_num() * MOMENTUM_DECAY + norms
                self._momentum[name] = torch.where(norms.isfinite().all(), new, known)

    def _summed(self, found: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
        """Return the sums over ranks; None for what no rank has found."""
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

    def work_of(self, parameters: Mapping[str, nn.Parameter]) -> BlockWork:
        """Return what adds up the work of an optimizer's layers.

        It is to be made anew once a layer has given up slots, or was moved.

        Args:
            parameters: the optimizer's, by layer.
        """
        return BlockWork((values, self._sums_of(name)) for name, values in parameters.items())

    @torch.no_grad()
    def read(
        self, work: BlockWork, parameters: Mapping[str, nn.Parameter], grad_scale: float
    ) -> None:
        """Read the gradients that an optimizer is about to apply.

        Of several calls before `confirm`, as by an optimizer that evaluates its closure more than
        once, the last counts.

        Args:
            work: `work_of` these parameters.
            parameters: the optimizer's, by layer.
            grad_scale: what the gradients are still multiplied by.
        """
        for name in self._fresh & parameters.keys():
            self._sums[name].work.zero_()
        work.add(grad_scale)
        self._fresh -= parameters.keys()
        self._fresh |= {name for name, values in parameters.items() if values.grad is not None}

    def confirm(self, names: Collection[str]) -> None:
        """Count what was read for these layers: their optimizer has taken its step."""
        for name in self._fresh & set(names):
            self._n_steps[name] = self._n_steps.get(name, 0) + 1
        self._fresh -= set(names)

    def _take_in(self, name: str) -> None:
        """Add the work of the latest step to a layer's sums, unless that step is not over."""
        if name not in self._fresh:
            self._sums[name].take_in()

    def _sums_of(self, name: str) -> WorkSums:
        """Return the sums of a layer, on its device, which may have been another before."""
        values, sums = local_part(self.layers[name].values), self._sums.get(name)
        if sums is None:
            sums = WorkSums.zeros(len(values), values.device, self.needs)
        elif sums.work.device != values.device:
            sums = sums.each(lambda tensor: tensor.to(values.device))
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
        """Return what is known of the blocks of those layers that were scored, on the CPU.

        A layer was not scored if what is needed of it is missing or not finite: it had no gradient
        in the step, or one that was thrown away.

        Args:
            names: of layers; the same on every rank, all of which must call.
            needs: what is needed, of what is gathered.
            step: of their optimizer.
            generator: of a layer, for criteria that draw.
            ages: int32 `[capacity]`, steps since the block of each slot was grown, by layer.
        """
        known: dict[str, dict[str, Tensor]] = {}
        for name in names:
            tensors = self._known_of(name, needs)
            if tensors is not None:
                known[name] = {**tensors, "magnitude": self.layers[name].magnitudes()}
        copies = iter(on_cpu([t for tensors in known.values() for t in tensors.values()]))
        masks = on_cpu([self.layers[name].topology.slots for name in known])
        scores = {}
        for (name, tensors), slots in zip(known.items(), masks, strict=True):
            gathered = {need: next(copies) for need in tensors}
            magnitude = gathered.pop("magnitude")
            if not all(_is_evidence(need, tensor) for need, tensor in gathered.items()):
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
                read_values=functools.partial(_values_by_place, layer),
            )
        return scores

    def _known_of(self, name: str, needs: Collection[str]) -> dict[str, Tensor] | None:
        """Return what is needed of a layer, `[out_blocks, in_blocks]`; None without it."""
        layer, known = self.layers[name], {}
        for need in sorted(needs):
            if need in _OF_SLOTS:
                n_steps, sums = self._n_steps.get(name, 0), self._sums_of(name)
                if not n_steps:
                    return None
                self._take_in(name)
                of_slots = all_slots(getattr(sums, need), layer.values)
                of_slots = of_slots / (n_steps if need == "saliency" else 1)
                known[need] = layer.topology.scatter(of_slots, fill=0.0)
            else:
                squares = (self._momentum if need == "momentum" else self._norms).get(name)
                if squares is None:
                    return None
                known[need] = squares.sqrt()
        return known

    def prepare_anew(self, updates: Mapping[str, TopologyUpdate]) -> Callable[[], None]:
        """Return what forgets what an update has used, and what was known of blocks it changed.

        The function that is returned only writes in place.
        """
        changed = {}
        for name in updates.keys() & self._sums.keys():
            self._take_in(name)
            changed[name] = at_local_slots(updates[name].changed, self.layers[name].values)

        def write() -> None:
            for name in updates:
                self._n_steps.pop(name, None)
                self._norms.pop(name, None)
                self._momentum.pop(name, None)
            for name, slots in changed.items():
                sums = self._sums[name]
                if sums.saliency is not None:
                    sums.saliency.zero_()
                if sums.movement is not None:
                    sums.movement.index_fill_(0, slots, 0)

        return write

    def prepare_keep(self, name: str, kept: Tensor) -> Callable[[], None]:
        """Return what follows a layer that has given up slots, right after an update.

        The function that is returned takes no memory and cannot fail.

        Args:
            name: of the layer.
            kept: int64 `[capacity]`, what `BlockSparseLinear.shrink` returned.
        """
        sums = self._sums.get(name)
        left = None if sums is None else sums.each(lambda tensor: tensor[kept.to(tensor.device)])

        def write() -> None:
            if left is not None:
                self._sums[name] = left

        return write

    def forget(self) -> None:
        """Forget everything, also how many slots the layers had."""
        self.disarm()
        for known in (self._evidence, self._norms, self._momentum, self._sums, self._n_steps):
            known.clear()
        self._fresh.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return what has been gathered, as tensors on the CPU and primitives."""
        for name in self._sums:
            self._take_in(name)
        state: dict[str, Any] = {
            "n_steps": dict(self._n_steps),
            "momentum": {n: sums.to("cpu", copy=True) for n, sums in self._momentum.items()},
        }
        for need in _OF_SLOTS:
            of_layers = self._sums.items() if need in self.needs else ()
            state[need] = {
                name: all_slots(getattr(sums, need), self.layers[name].values).to("cpu", copy=True)
                for name, sums in of_layers
            }
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, of layers that have that many slots now."""
        self.forget()
        self._n_steps = {n: count for n, count in state["n_steps"].items() if n in self.layers}
        self._momentum = {n: s.clone() for n, s in state["momentum"].items() if n in self.layers}
        for need in _OF_SLOTS:
            for name in state[need]:
                if name in self.layers and need in self.needs:
                    mine = local_slots(self.layers[name].values)
                    getattr(self._sums_of(name), need).copy_(state[need][name][mine])


def _is_evidence(need: str, known: Tensor) -> bool:
    """Tell whether it says something of a layer's blocks; zero norms of gradients say nothing."""
    return bool(known.isfinite().all()) and (need in _OF_SLOTS or bool(known.any()))


def on_cpu(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors of one dtype on the CPU, in one transfer a device.

    >>> [tensor.tolist() for tensor in on_cpu([torch.tensor([[1], [2]]), torch.tensor(3)])]
    [[[1], [2]], 3]
    """
    copies: dict[int, Tensor] = {}
    for device in {tensor.device for tensor in tensors}:
        here = [i for i, tensor in enumerate(tensors) if tensor.device == device]
        flat = torch.cat([tensors[i].flatten() for i in here]).cpu()
        parts = flat.split([tensors[i].numel() for i in here])
        copies.update((i, part.view(tensors[i].shape)) for i, part in zip(here, parts, strict=True))
    return [copies[i] for i in range(len(tensors))]


@torch.no_grad()
def _values_by_place(layer: BlockSparseLinear) -> Tensor:
    """Return the weights of the present blocks, in the order of their places, row by row."""
    slots = layer.topology.slots.flatten()
    return whole(layer.values.detach())[slots[slots >= 0].long()]
