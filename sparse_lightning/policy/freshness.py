"""Whether a weight has been trained, judged by its elements alone."""

from __future__ import annotations

import torch
from torch import Tensor

_SAMPLE = 512  # rows and columns that are examined
# Standard normal deviate that rows or columns must exceed: one fresh weight in a million does.
_THRESHOLD = 5.0


@torch.no_grad()
def looks_trained(weight: Tensor) -> bool:
    """Return whether rows or columns of a weight differ in norm more than an initialiser's do.

    Initialisers draw all elements of a weight from one distribution. Its rows and columns then
    differ only by chance, and by how much follows from the elements, whatever their distribution
    and scale. Training adds outer products of gradients and inputs, which change some rows and
    columns far more than others. Training for a few steps, or with tiny ones, is not noticed.

    The variance of the norms over its expected value follows a chi-squared distribution, whose
    cube root is nearly normal (Wilson & Hilferty 1931).

    Args:
        weight: `[out_features, in_features]`, at least 2 x 2, floating point, on any device. At
            most 512 rows and columns are examined, in about a millisecond. A weight on the meta
            device counts as fresh, and so does one with NaN or infinity.

    >>> fresh = torch.randn(64, 64)
    >>> looks_trained(fresh), looks_trained(fresh * torch.linspace(0.5, 1.5, 64))
    (False, True)
    """
    if weight.is_meta:
        return False
    # In double precision, as the squares of half-precision elements underflow.
    squares = weight[:_SAMPLE, :_SAMPLE].to("cpu", torch.float64).square()
    if squares.std() <= 1e-6 * squares.mean():
        return False  # zeros or constants, which differ by rounding only
    n = squares.numel()
    deviates = []
    for dim, size in enumerate(squares.shape):
        averaged = n // size
        # The variance of the mean of `averaged` elements, drawn without replacement.
        expected = squares.var() / averaged * (n - averaged) / (n - 1)
        ratio = squares.mean(1 - dim).var() / expected
        width = 2 / (9 * (size - 1))
        deviates.append((ratio ** (1 / 3) - (1 - width)) / width**0.5)
    return any(bool(deviate > _THRESHOLD) for deviate in deviates)
