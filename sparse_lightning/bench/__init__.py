"""Measure block-sparse products on this machine: `sparse-lightning bench kernels` and `tune`."""
