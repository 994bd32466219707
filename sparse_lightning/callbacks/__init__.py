"""The Lightning callbacks."""

from sparse_lightning.callbacks.final import FinalDensityCheckpoint
from sparse_lightning.callbacks.sparsity import SparsityCallback
from sparse_lightning.observers.monitor import SparsityMonitor

__all__ = ["FinalDensityCheckpoint", "SparsityCallback", "SparsityMonitor"]
