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
from sparse_lightning.fusion import register_mlp
from sparse_lightning.integrations import connect_transformers
from sparse_lightning.linear import BlockSparseLinear
from sparse_lightning.loading import load_from_checkpoint, load_sparse
from sparse_lightning.mlp import BlockSparseGLU, BlockSparseMLP
from sparse_lightning.patching import densify, sparsify
from sparse_lightning.policy.distributions import Floor
from sparse_lightning.sparsifier import Sparsifier
from sparse_lightning.swap_report import SparsityReport
from sparse_lightning.topology import BlockTopology

if TYPE_CHECKING:
    from sparse_lightning.callbacks import FinalDensityCheckpoint, SparsityCallback
    from sparse_lightning.planning import Plan, plan

__version__ = version("sparse-lightning")

__all__ = [
    "BlockSparseGLU",
    "BlockSparseLinear",
    "BlockSparseMLP",
    "BlockTopology",
    "DensitySchedule",
    "DropFractionSchedule",
    "FinalDensityCheckpoint",
    "Floor",
    "MonitorOptions",
    "Plan",
    "Sparsifier",
    "SparsityCallback",
    "SparsityReport",
    "UpdateSchedule",
    "densify",
    "load_from_checkpoint",
    "load_sparse",
    "plan",
    "register_mlp",
    "sparsify",
]

# Imported on first access: importing Lightning takes seconds, and few programs need a plan.
_LAZY = {
    "FinalDensityCheckpoint": "callbacks",
    "Plan": "planning",
    "SparsityCallback": "callbacks",
    "plan": "planning",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"sparse_lightning.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


connect_transformers()
