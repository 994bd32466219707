"""The benchmark prints a row only for a layer that computes the right thing."""

from __future__ import annotations

import re
import sys

import pytest
import torch

from sparse_lightning import BlockSparseLinear
from sparse_lightning.bench import kernels


def test_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--shape 64 128 64 --block-sizes 16 32 --densities 0.5 --threads 1 --repeats 3"
    monkeypatch.setattr(sys, "argv", ["kernels", *arguments.split()])
    kernels.main()
    printed = capsys.readouterr().out
    assert re.search(r"1 threads, torch .*, commit \w+", printed)
    assert re.findall(r"^\| (\d+) \| (0\.\d+) ", printed, re.MULTILINE) == [
        ("16", "0.50"),
        ("32", "0.50"),
    ]


def test_a_wrong_layer_is_not_timed() -> None:
    layer = BlockSparseLinear(64, 64, block_size=16, density=0.5)
    dense = layer.to_linear()
    x, dy = torch.randn(8, 64, requires_grad=True), torch.randn(8, 64)
    kernels.check_parity(layer, dense, x, dy)
    with torch.no_grad():
        layer.values[3, 5, 7] += 1
    with pytest.raises(AssertionError):
        kernels.check_parity(layer, dense, x, dy)
