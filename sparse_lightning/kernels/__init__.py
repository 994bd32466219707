"""The block-sparse ops on PyTorch's dispatcher; the dispatcher is the backend switch."""

from sparse_lightning.kernels import cpu, cuda, ops
from sparse_lightning.kernels import flops as flops  # registers what the ops count

ops.implement("CPU", cpu)
ops.implement("CUDA", cuda)
