"""What users run to measure their machine: `sparse-lightning bench kernels`."""
