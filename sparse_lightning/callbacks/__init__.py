"""The Lightning callbacks."""

from sparse_lightning.callbacks.monitor import SparsityMonitor
from sparse_lightning.callbacks.sparsity import SparsityCallback

__all__ = ["SparsityCallback", "SparsityMonitor"]
