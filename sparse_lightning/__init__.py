"""Dynamic block-sparse training that is really faster, as a Lightning plugin."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sparse_lightning import patching
from sparse_lightning.config import (
    DensitySchedule,
    DropFractionSchedule,
    MonitorOptions,
    UpdateSchedule,
)
from sparse_lightning.linear import BlockSparseLinear
from sparse_lightning.loading import load_from_checkpoint, load_sparse
from sparse_lightning.mlp import BlockSparseMLP
from sparse_lightning.patching import SparsityReport, densify, sparsify
from sparse_lightning.policy.distributions import Floor
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
        return getattr(import_module(f"sparse_lightning.{_LATE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _tell_transformers(model: Any = None) -> None:
    """Have Transformers save and load block-sparse layers, if it is imported.

    Args:
        model: whose layers have changed.
    """
    if "transformers.modeling_utils" not in sys.modules:
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


class _AfterTransformers(MetaPathFinder):
    """Tells Transformers when it is imported after this package, as sorted imports have it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "transformers.modeling_utils":  # of which every model is made
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_tell(module: ModuleType) -> None:
            execute(module)
            _tell_transformers()

        spec.loader.exec_module = execute_and_tell  # type: ignore[method-assign]
        return spec


patching.when_layers_change.append(_tell_transformers)
_tell_transformers()
sys.meta_path.insert(0, _AfterTransformers())
