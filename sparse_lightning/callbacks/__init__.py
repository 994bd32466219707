"""The Lightning callbacks."""

from sparse_lightning.callbacks.final import FinalDensityCheckpoint
from sparse_lightning.callbacks.sparsity import SparsityCallback

__all__ = ["FinalDensityCheckpoint", "SparsityCallback"]
