"""Dynamic block-sparse training that is really faster, as a Lightning plugin."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from sparse_lightning.config import (
    DensitySchedule,
    DropFractionSchedule,
    MonitorOptions,
    UpdateSchedule,
)
from sparse_lightning.distributions import Floor
from sparse_lightning.linear import BlockSparseLinear
from sparse_lightning.mlp import BlockSparseMLP
from sparse_lightning.patching import SparsityReport, densify, sparsify
from sparse_lightning.sparsifier import Sparsifier
from sparse_lightning.topology import BlockTopology

if TYPE_CHECKING:
    from sparse_lightning.callbacks import SparsityCallback, SparsityMonitor
    from sparse_lightning.planning import Plan, plan

__version__ = version("sparse-lightning")

__all__ = [
    "BlockSparseLinear",
    "BlockSparseMLP",
    "BlockTopology",
    "DensitySchedule",
    "DropFractionSchedule",
    "Floor",
    "MonitorOptions",
    "Plan",
    "Sparsifier",
    "SparsityCallback",
    "SparsityMonitor",
    "SparsityReport",
    "UpdateSchedule",
    "densify",
    "plan",
    "sparsify",
]

# Imported only by those who ask: Lightning takes seconds, and a plan is made once.
_LATE = {
    "Plan": "planning",
    "SparsityCallback": "callbacks",
    "SparsityMonitor": "callbacks",
    "plan": "planning",
}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(import_module(f"sparse_lightning.{_LATE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
