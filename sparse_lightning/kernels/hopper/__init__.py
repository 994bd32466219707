"""The kernels for Hopper, compute capability 9.0: bf16 and fp16, by TMA and WGMMA."""
