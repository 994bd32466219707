"""Dynamic block-sparse training that is really faster, as a Lightning plugin."""

from __future__ import annotations

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
from sparse_lightning.topology import BlockTopology

if TYPE_CHECKING:
    from sparse_lightning.callbacks import SparsityCallback, SparsityMonitor

__version__ = version("sparse-lightning")

__all__ = [
    "BlockSparseLinear",
    "BlockSparseMLP",
    "BlockTopology",
    "DensitySchedule",
    "DropFractionSchedule",
    "Floor",
    "MonitorOptions",
    "SparsityCallback",
    "SparsityMonitor",
    "SparsityReport",
    "UpdateSchedule",
    "densify",
    "sparsify",
]

_CALLBACKS = ("SparsityCallback", "SparsityMonitor")


def __getattr__(name: str) -> Any:
    # Lightning is imported only by those who ask for a callback: it takes seconds.
    if name in _CALLBACKS:
        from sparse_lightning import callbacks

        return getattr(callbacks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
