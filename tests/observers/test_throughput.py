"""Any kind of batch can be trained on, and is counted if possible."""

from __future__ import annotations

import warnings
from collections import UserDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader

from sparse_lightning import SparsityCallback
from sparse_lightning.observers.throughput import Throughput
from tests.callbacks.helpers import Classifier, trainer

IDS = [torch.arange(3), torch.arange(5)]
FLOATS = [torch.randn(3, 4), torch.randn(5, 4)]


@dataclass
class Examples:
    """A user-defined batch class."""

    label: str
    ids: Any


class Graph:
    """A batch class whose tensors are attributes."""

    def __init__(self) -> None:
        self.x = torch.randn(4, 8)


class Stubborn(UserDict[str, Tensor]):
    """Raises when it is iterated over."""

    def values(self) -> Any:
        raise LookupError("not iterable")


def recursive() -> list[Any]:
    batch: list[Any] = []
    batch.append(batch)
    return batch


def nested(parts: list[Tensor], layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor(parts, layout=layout)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    ("batch", "samples", "tokens"),
    [
        (torch.zeros(2, 7, dtype=torch.int64), 2, 14),
        ({"x": torch.zeros(2, 3, 4), "ids": torch.zeros(2, 7, dtype=torch.int32)}, 2, 14),
        (nested(IDS, torch.strided), 2, 8),
        (nested(IDS, torch.jagged), 2, 8),
        (nested(FLOATS, torch.strided), 2, 0),
        ([nested(FLOATS, torch.jagged)], 2, 0),
        (pack_sequence(IDS[::-1]), 2, 8),
        (pack_sequence(FLOATS[::-1]), 2, 0),
        (Examples("a", torch.zeros(2, 7, dtype=torch.int64)), 2, 14),
        ({"graphs": [Examples("b", torch.zeros(3, 4))]}, 3, 0),
        (UserDict(ids=torch.zeros(2, 7, dtype=torch.int64)), 2, 14),
        (torch.eye(3).to_sparse(), 3, 0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_samples_and_tokens(batch: Any, samples: int, tokens: int) -> None:
    counted = Throughput(1, (1, 1), None)
    counted.count(batch)
    rates = counted.read((1, 1))
    assert ("sparsity/tokens_per_second" in rates) == (tokens > 0)
    if tokens:
        ratio = rates["sparsity/tokens_per_second"] / rates["sparsity/samples_per_second"]
        assert ratio == pytest.approx(tokens / samples)
    assert counted._samples == 0 and rates["sparsity/samples_per_second"] > 0


@pytest.mark.parametrize(
    "batch",
    [Graph(), Stubborn(), recursive(), ["a", "b"], {"rows": [[1, 2], [3]]}, torch.ones(())],
    ids=lambda value: type(value).__name__,
)
def test_an_uncountable_batch_is_trained_on_and_warns_once(batch: Any, tmp_path: Path) -> None:
    class Odd(Classifier):
        def transfer_batch_to_device(self, batch: Any, *args: Any) -> Any:
            return batch

    class Same(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> Any:
            return batch

    model = Odd()
    options = {"block_size": 16, "update": {"every_n_steps": 2, "until": 6}}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(SparsityCallback(**options), logger=CSVLogger(tmp_path), max_steps=8).fit(
            model, DataLoader(Same(), batch_size=None, collate_fn=lambda x: x)
        )
    messages = [str(w.message) for w in caught if "per second are not logged" in str(w.message)]
    assert len(messages) == 1 and type(batch).__name__ in messages[0]
    assert len(model.losses) == 8
    header = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()[0]
    assert "sparsity/density" in header and "a_second" not in header
