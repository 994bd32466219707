"""Dynamic block-sparse training that is really faster, as a Lightning plugin."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from sparse_lightning import patching
from sparse_lightning.config import (
    DensitySchedule,
    DropFractionSchedule,
    MonitorOptions,
    UpdateSchedule,
)
from sparse_lightning.distributions import Floor
from sparse_lightning.linear import BlockSparseLinear
from sparse_lightning.loading import load_from_checkpoint, load_sparse
from sparse_lightning.mlp import BlockSparseMLP
from sparse_lightning.patching import SparsityReport, densify, sparsify
from sparse_lightning.sparsifier import Sparsifier
from sparse_lightning.topology import BlockTopology

if TYPE_CHECKING:
    from sparse_lightning.callbacks import (
        FinalDensityCheckpoint,
        SparsityCallback,
        SparsityMonitor,
    )
    from sparse_lightning.planning import Plan, plan

__version__ = version("sparse-lightning")

__all__ = [
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
    "SparsityMonitor",
    "SparsityReport",
    "UpdateSchedule",
    "densify",
    "load_from_checkpoint",
    "load_sparse",
    "plan",
    "sparsify",
]

# Imported only by those who ask: Lightning takes seconds, and a plan is made once.
_LATE = {
    "FinalDensityCheckpoint": "callbacks",
    "Plan": "planning",
    "SparsityCallback": "callbacks",
    "SparsityMonitor": "callbacks",
    "plan": "planning",
}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        found = getattr(import_module(f"sparse_lightning.{_LATE[name]}"), name)
        _tell_transformers()  # which Lightning may have imported
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _tell_transformers(model: Any = None) -> None:
    """Have Transformers save and load block-sparse layers, if it is imported.

    Args:
        model: whose layers have changed.
    """
    if sys.modules.get("transformers") is None:
        return
    try:
        pretrained = import_module("sparse_lightning.integrations.pretrained")
    except ImportError as error:
        warnings.warn(
            "`save_pretrained` must not be called for models with block-sparse layers, as this "
            f"version of transformers cannot load them: {error}. Upgrade it to 5.0 or later.",
            stacklevel=2,
        )
        return
    if model is not None:
        pretrained.note(model)


patching.when_layers_change.append(_tell_transformers)
_tell_transformers()
