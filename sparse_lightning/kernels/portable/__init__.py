"""The portable kernels: every device from compute capability 8.0 on, and every dtype."""
