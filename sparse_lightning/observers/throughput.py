"""`Throughput`: samples, tokens and FLOPs per second, counted without synchronising the device."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

_TOKEN_ID_DTYPES = (torch.int32, torch.int64)  # those that nn.Embedding accepts


class Throughput:
    """Counts the tokens and samples of batches, and measures the time they take.

    Tokens are counted if a batch holds token ids: a two-dimensional int32 or int64 tensor, nested
    or not, or a `PackedSequence` of one; the batch itself or within mappings, lists, tuples and
    dataclasses. Otherwise only samples are counted. After a batch without a tensor, or one that
    raises when it is inspected, counting stops, since rates over some of the batches would be
    wrong. Times are host times: read them after the host has synchronised with the device, as at
    an update.

    Args:
        ranks: number of ranks, which are assumed to train on equally large batches.
        weights: numbers of present and dense weights in the model's linear layers.
        peak: peak FLOP/s of a rank's device; None if unknown.
    """

    def __init__(self, ranks: int, weights: tuple[int, int], peak: int | None) -> None:
        self.ranks, self.weights, self.peak = ranks, weights, peak
        self._is_counting = True
        # Samples, tokens and seconds of the whole training, until the latest `read`.
        self._total_samples = self._total_tokens = 0
        self._total_seconds = 0.0
        self._restart()

    def count(self, batch: Any) -> None:
        """Count a training batch, whether or not an optimizer steps after it."""
        if not self._is_counting or batch is None:  # Lightning skips a batch that is None
            return
        try:
            samples, tokens = _count_samples_and_tokens(batch)
        except Exception as error:  # a batch of the user's own class may raise anything
            self._stop_counting(batch, f"{type(error).__name__}: {error}")
            return
        if not samples:
            self._stop_counting(batch, "it holds no tensor with a batch dimension")
            return
        self._samples += samples
        self._tokens += tokens

    def _stop_counting(self, batch: Any, reason: str) -> None:
        self._is_counting = False
        self._tokens = self._samples = 0
        rank_zero_warn(
            "Samples and tokens per second are not logged in this training, because they cannot be "
            f"counted in a batch of type {type(batch).__name__} ({reason}). To have them logged, "
            "have the loader return tensors, in mappings, lists, tuples or dataclasses."
        )

    def pause(self) -> None:
        """Stop the clock."""
        self._seconds += time.perf_counter() - self._started

    def resume(self) -> None:
        """Start the clock again."""
        self._started = time.perf_counter()

    def read(self, weights: tuple[int, int]) -> dict[str, float]:
        """Return the rates since the last call, over all ranks together, and reset the counts.

        Model FLOPs utilisation (MFU) is relative to the peak FLOP/s of the device. A token takes 6
        FLOPs per weight of a linear layer: two each for the forward pass, the gradient of the input
        and the gradient of the weight. `mfu` counts present weights, as `linear_weights` does;
        `mfu_dense` counts the weights of the dense model, as if it ran at the same speed.

        Args:
            weights: numbers of present and dense weights in linear layers from now on.

        Returns:
            The rates by logger key; empty if no batch was counted.
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
        self._total_samples += self._samples
        self._total_tokens += self._tokens
        self._total_seconds += self._seconds
        self._restart()
        return scalars

    def mean(self) -> dict[str, float]:
        """Return the mean rates of the training until the latest `read`, over all ranks together.

        Returns:
            "samples_per_second" and "tokens_per_second", as far as they were counted throughout.
        """
        counts = {"samples": self._total_samples, "tokens": self._total_tokens}
        return {
            f"{name}_per_second": self.ranks * count / self._total_seconds
            for name, count in counts.items()
            if count and self._is_counting
        }

    def _restart(self) -> None:
        self._tokens = self._samples = 0
        self._seconds = 0.0
        self.resume()


def _count_samples_and_tokens(batch: Any) -> tuple[int, int]:
    """Return the number of samples and of tokens in a batch, 0 where it is unknown."""
    samples = 0
    for tensor in _tensors_in(batch):
        if isinstance(tensor, PackedSequence):
            size = int(tensor.batch_sizes[0])  # always on the CPU
            tokens = len(tensor.data) if tensor.data.dim() == 1 else 0
            is_ids = bool(tokens) and tensor.data.dtype in _TOKEN_ID_DTYPES
        elif tensor.dim():
            # Nested tensors of the strided layout do not support `len`.
            size, tokens = tensor.size(0), tensor.numel()
            is_ids = tensor.dim() == 2 and tensor.dtype in _TOKEN_ID_DTYPES
        else:
            continue
        if is_ids:
            return size, tokens
        samples = samples or size
    return samples, 0


def _tensors_in(batch: Any) -> Iterator[Tensor | PackedSequence]:
    if isinstance(batch, (Tensor, PackedSequence)):
        yield batch
    elif isinstance(batch, Mapping):
        for part in batch.values():
            yield from _tensors_in(part)
    elif isinstance(batch, (list, tuple)):
        for part in batch:
            yield from _tensors_in(part)
    elif dataclasses.is_dataclass(batch):
        for field in dataclasses.fields(batch):
            yield from _tensors_in(getattr(batch, field.name))
