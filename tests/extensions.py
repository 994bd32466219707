"""Examples of user extensions: schedules, distributions, update times and rules."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from sparse_lightning.policy.distributions import Grid
from sparse_lightning.policy.rules import Decision, UpdateRequest


def name_of(options: object) -> str:
    """Return a test ID that is the same in every process, without the addresses of functions."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(options))


def quadratic(progress: float, initial: float, final: float) -> float:
    return final + (initial - final) * (1 - progress) ** 2


def bump(progress: float, initial: float, final: float) -> float:
    """Rise to twice the initial value and fall again."""
    return initial * (1 + 4 * progress * (1 - progress)) if progress < 1 else final


def too_dense(progress: float, initial: float, final: float) -> float:
    return initial + progress


def first_full(density: float, grids: Sequence[Grid], least: float) -> list[int]:
    """Keep the first layer dense."""
    first, *others = [rows * cols for rows, cols in grids]
    return [first, *(max(1, round(density * blocks)) for blocks in others)]


def back_and_forth(density: float, grids: Sequence[Grid], least: float) -> list[int]:
    """Give a layer the most blocks at density 0.5."""
    return [max(1, round(2 * min(density, 1 - density) * rows * cols)) for rows, cols in grids]


def one_too_few(density: float, grids: Sequence[Grid], least: float) -> list[int]:
    return [1] * (len(grids) - 1)


def every_tenth_part(total_steps: int) -> list[int]:
    return [total_steps * k // 10 for k in range(1, 8)]


class Still:
    """A rule that does not change any layer."""

    def __init__(self, patience: int = 3) -> None:
        self.patience = patience

    def __call__(self, request: UpdateRequest) -> Decision:
        return Decision({})


class Demanding(Still):
    def __init__(self, patience: int) -> None:
        super().__init__(patience)


class Uncallable:
    pass


def fewest(request: UpdateRequest) -> Decision:
    """A rule as a function: every layer keeps its first blocks."""
    masks: dict[str, Any] = {}
    budgets = request.budgets({name: s.magnitude for name, s in request.layers.items()})
    for name, scores in request.layers.items():
        mask = torch.zeros_like(scores.mask).flatten()
        mask[scores.mask.flatten().nonzero()[: budgets[name]]] = True
        masks[name] = mask.view_as(scores.mask)
    return Decision(masks)


still = Still(5)
