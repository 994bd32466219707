"""The block-sparse ops on PyTorch's dispatcher, which selects the backend by device."""

from sparse_lightning.kernels import cpu, cuda, ops
from sparse_lightning.kernels import flops as flops  # registers the FLOP formulas

ops.implement("CPU", cpu)
ops.implement("CUDA", cuda)
