"""Block budgets of a model's layers over the course of the density schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from sparse_lightning.policy.distributions import (
    Distribution,
    Floor,
    Grid,
    by_score,
    scale_floors,
    share,
)
from sparse_lightning.policy.schedules import Timetable
from sparse_lightning.topology import count_blocks

# A schedule or distribution defined by the user is sampled at the ends of this many intervals.
_INTERVALS = 64


@dataclass(frozen=True)
class LayerBudgets:
    """The number of blocks of each layer as a function of the density schedule's progress.

    Attributes:
        grids: (out_blocks, in_blocks) of each managed layer, by name.
        density_at: function of (progress in [0, 1], final density) that returns a density.
        final: final density of the model.
        own_final: final density of each layer that has its own, by name.
        distribution: a name in `DISTRIBUTIONS`, a function, or its dotted path.
        floor: minimum number of blocks that every layer keeps.
        is_monotonic: whether each layer's budget only rises or only falls.
    """

    grids: Mapping[str, Grid]
    density_at: Callable[[float, float], float]
    final: float
    own_final: Mapping[str, float]
    distribution: str | Distribution
    floor: Floor
    is_monotonic: bool

    def at(self, progress: float) -> dict[str, int]:
        """Return the blocks of each layer at a progress in [0, 1].

        Under the "global" distribution these are initial budgets, which `by_score` replaces.

        Raises:
            ValueError: if a user's schedule or distribution returns an invalid value.
        """
        budgets = self._shares(progress)
        if not self.is_monotonic:
            # Between two samples a budget must not exceed both, as capacities rely on the samples.
            ends = math.floor(progress * _INTERVALS), math.ceil(progress * _INTERVALS)
            samples = [self._shares(k / _INTERVALS) for k in ends]
            for name, blocks in budgets.items():
                budgets[name] = min(blocks, max(sample[name] for sample in samples))
        return budgets

    def _shares(self, progress: float) -> dict[str, int]:
        """Return each layer's blocks as the schedule and the distribution alone determine them."""
        own = {name: self.density_at(progress, final) for name, final in self.own_final.items()}
        density = self.density_at(progress, self.final)
        return share(self.distribution, density, self.grids, own, self.floor.layer)

    def by_score(
        self,
        progress: float,
        scores: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        frozen: Collection[str] = (),
    ) -> dict[str, int]:
        """Return the blocks of each layer at a progress in [0, 1], under any distribution.

        Under "global", layers without scores keep their present blocks for now. The layers with
        scores compete for the model's budget, less a reserve for each layer without, proportional
        to its size. Frozen layers do not count toward that budget.

        Args:
            progress: progress of the density schedule.
            scores: drop scores `[out_blocks, in_blocks]` of the layers that may change, by name.
            masks: bool, of the same shapes, the present blocks of all layers.
            frozen: names of layers that will not change.
        """
        budgets = self.at(progress)
        if self.distribution != "global":
            return budgets
        present = {name: int(mask.sum()) for name, mask in masks.items()}
        budgets.update({name: present[name] for name in masks if name not in scores})
        sizes = {
            name: masks[name].numel()
            for name in self.grids
            if name not in self.own_final and name not in frozen
        }
        competing = [name for name in sizes if name in scores]
        if competing:
            density = self.density_at(progress, self.final)
            waiting = [name for name in sizes if name not in scores]
            reserved = sum(min(present[n], count_blocks(density, sizes[n])) for n in waiting)
            total = max(count_blocks(density, sum(sizes.values())), self._min_total(sizes.values()))
            shares = by_score(
                total - reserved,
                [scores[name] for name in competing],
                [masks[name] for name in competing],
                [self.floor.blocks(self.grids[name]) for name in competing],
            )
            budgets.update(zip(competing, shares, strict=True))
        return budgets

    def least_final(self) -> dict[str, int]:
        """Return the fewest blocks that each layer may have at the end of the density schedule.

        Under "global", a layer may lose all competitions and keep its floor only.
        """
        budgets = self.at(1.0)
        if self.distribution == "global":
            competing = [name for name in self.grids if name not in self.own_final]
            total = self.final_total() - sum(budgets[name] for name in self.own_final)
            floors = [self.floor.blocks(self.grids[name]) for name in competing]
            budgets.update(zip(competing, scale_floors(total, floors), strict=True))
        return budgets

    def final_total(self) -> int:
        """Return the blocks of all layers together at the end of the density schedule."""
        budgets = self.at(1.0)
        if self.distribution != "global":
            return sum(budgets.values())
        sizes = [
            rows * cols for name, (rows, cols) in self.grids.items() if name not in self.own_final
        ]
        total = count_blocks(self.density_at(1.0, self.final), sum(sizes)) if sizes else 0
        return max(total, self._min_total(sizes)) + sum(budgets[name] for name in self.own_final)

    def _min_total(self, sizes: Collection[int]) -> int:
        """Return the fewest blocks of layers with these numbers of blocks, by `floor.layer`."""
        return sum(math.ceil(self.floor.layer * size) for size in sizes)

    def capacities(self, progress: float = 0.0) -> dict[str, int]:
        """Return the most blocks that each layer will hold from a progress in [0, 1] on.

        A monotonic budget is largest at one of its two ends. Other budgets are sampled, and `at`
        limits them between two samples to the larger one.
        """
        points = [progress, 1.0]
        if not self.is_monotonic:
            first = math.floor(progress * _INTERVALS)
            points = [k / _INTERVALS for k in range(first, _INTERVALS + 1)]
        samples = [self._shares(point) for point in points]
        return {name: max(sample[name] for sample in samples) for name in self.grids}

    def exchanged(self, progress: float, fraction: float) -> int:
        """Return how many blocks an update exchanges at most, over all layers together.

        Args:
            progress: progress of the density schedule, in [0, 1].
            fraction: share of each layer's blocks to exchange, in [0, 1].
        """
        exchanged = 0
        for name, n_blocks in self.at(progress).items():
            absent = math.prod(self.grids[name]) - n_blocks
            exchanged += min(round(fraction * n_blocks), max(0, absent))
        return exchanged

    def largest_fall(self, timetable: Timetable) -> tuple[float, int]:
        """Return the share of blocks by which the steepest update shrinks the model, and its step.

        Returns:
            The share of the present blocks, in [0, 1), that is lost in the update at which the
            density falls by the largest factor, and that update's step; (0.0, 0) if the density
            never falls.
        """
        # Comparing densities is cheap; budgets are computed for a single update only.
        steps, points = [0], [timetable.density_progress(0)]
        while points[-1] < 1 and (step := timetable.next_update(steps[-1])) is not None:
            steps.append(step)
            points.append(timetable.density_progress(step))
        densities = [self.density_at(point, self.final) for point in points]
        ratios = [after / before for before, after in pairwise(densities)]
        if min(ratios, default=1.0) >= 1:
            return 0.0, 0
        i = ratios.index(min(ratios))
        before, after = (sum(self.at(point).values()) for point in points[i : i + 2])
        return max(0.0, 1 - after / max(1, before)), steps[i + 1]
