"""What a training computes in a second, counted without asking the device."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

_TOKEN_IDS = (torch.int32, torch.int64)  # what nn.Embedding takes


class Throughput:
    """Counts tokens and samples of batches, and the time they take.

    Tokens are counted where a batch holds token ids: an int32 or int64 tensor of two dimensions,
    nested or not, or a `PackedSequence` of one; itself or in mappings, lists, tuples and
    dataclasses. Otherwise samples are all that is known; and of a batch in which there is no
    tensor, or that fails when it is looked at, not even these. Then nothing is counted any more,
    as a rate of some of the batches would be wrong. Times are the host's: read them where it has
    just waited for the device, as at an update.

    Args:
        ranks: that each train on as much.
        weights: present and dense weights of the model's linear layers.
        peak: FLOP/s of a rank's device; None if unknown.
    """

    def __init__(self, ranks: int, weights: tuple[int, int], peak: int | None) -> None:
        self.ranks, self.weights, self.peak = ranks, weights, peak
        self._counts = True
        self._begin_anew()

    def count(self, batch: Any) -> None:
        """Take in a batch that was trained on, whether or not an optimizer has stepped."""
        if not self._counts or batch is None:  # which Lightning skips
            return
        try:
            samples, tokens = _size(batch)
        except Exception as error:  # whatever a class of the user's raises
            self._give_up(batch, f"{type(error).__name__}: {error}")
            return
        if not samples:
            self._give_up(batch, "no tensor with a batch dimension was found in it")
            return
        self._samples += samples
        self._tokens += tokens

    def _give_up(self, batch: Any, why: str) -> None:
        self._counts = False
        self._tokens = self._samples = 0
        rank_zero_warn(
            "Samples and tokens a second are not logged in this training, as they cannot be "
            f"counted in a batch of type {type(batch).__name__} ({why}). Have the loader return "
            "tensors, in mappings, lists, tuples or dataclasses, to have them logged."
        )

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


def _size(batch: Any) -> tuple[int, int]:
    """Return samples and tokens of a batch; 0 for what it does not tell."""
    samples = 0
    for part in _parts(batch):
        if isinstance(part, PackedSequence):
            of_part = int(part.batch_sizes[0])  # on the CPU, wherever the data is
            tokens = len(part.data) if part.data.dim() == 1 else 0
            is_ids = bool(tokens) and part.data.dtype in _TOKEN_IDS
        elif part.dim():
            # Not `len`, which a nested tensor of the strided layout does not offer.
            of_part, tokens = part.size(0), part.numel()
            is_ids = part.dim() == 2 and part.dtype in _TOKEN_IDS
        else:
            continue
        if is_ids:
            return of_part, tokens
        samples = samples or of_part
    return samples, 0


def _parts(batch: Any) -> Iterator[Tensor | PackedSequence]:
    if isinstance(batch, (Tensor, PackedSequence)):
        yield batch
    elif isinstance(batch, Mapping):
        for part in batch.values():
            yield from _parts(part)
    elif isinstance(batch, (list, tuple)):
        for part in batch:
            yield from _parts(part)
    elif dataclasses.is_dataclass(batch):
        for each in dataclasses.fields(batch):
            yield from _parts(getattr(batch, each.name))
