"""What a training computes in a second, counted without asking the device."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_TOKEN_IDS = (torch.int32, torch.int64)  # what nn.Embedding takes


class Throughput:
    """Counts tokens and samples of batches, and the time they take.

    Tokens are counted where a batch holds token ids: an int32 or int64 tensor of two dimensions,
    itself or in mappings, lists and tuples. Otherwise samples are all that is known. Times are the
    host's: read them where it has just waited for the device, as at an update.

    Args:
        ranks: that each train on as much.
        weights: present and dense weights of the model's linear layers.
        peak: FLOP/s of a rank's device; None if unknown.
    """

    def __init__(self, ranks: int, weights: tuple[int, int], peak: int | None) -> None:
        self.ranks, self.weights, self.peak = ranks, weights, peak
        self._begin_anew()

    def count(self, batch: Any) -> None:
        """Take in a batch that was trained on, whether or not an optimizer has stepped."""
        samples = 0
        for tensor in _tensors(batch):
            if tensor.dim() == 2 and tensor.dtype in _TOKEN_IDS:
                self._tokens += tensor.numel()
                self._samples += len(tensor)
                return
            if not samples and tensor.dim():
                samples = len(tensor)
        self._samples += samples

    def pause(self) -> None:
        """Stop the clock, as validation begins."""
        self._seconds += time.perf_counter() - self._begin

    def go_on(self) -> None:
        """Start the clock again."""
        self._begin = time.perf_counter()

    def read(self, weights: tuple[int, int]) -> dict[str, float]:
        """Return what was done a second, of all ranks together, and begin anew.

        Utilisation (MFU) is of FLOP/s that the device could do at most. A token takes 6 FLOPs a
        weight of a linear layer: two each for forward, gradient of the input and of the weight.
        `mfu` counts present weights; `mfu_dense` those of a dense model, as if it were as fast.

        Args:
            weights: present and dense ones, from now on.

        Returns:
            By name of a metric; empty if no batch was counted.
        """
        self.pause()
        scalars = {}
        if self._samples:
            scalars["sparsity/samples_per_second"] = self.ranks * self._samples / self._seconds
        if self._tokens:
            per_rank = self._tokens / self._seconds
            scalars["sparsity/tokens_per_second"] = self.ranks * per_rank
            if self.peak:
                present, dense = (6 * count * per_rank / self.peak for count in self.weights)
                scalars.update({"sparsity/mfu": present, "sparsity/mfu_dense": dense})
        self.weights = weights
        self._begin_anew()
        return scalars

    def _begin_anew(self) -> None:
        self._tokens = self._samples = 0
        self._seconds = 0.0
        self.go_on()


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (list, tuple, Mapping)):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(part)
