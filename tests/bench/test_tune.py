"""`sparse-lightning tune`: what it measures, prints and saves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparse_lightning.bench import tune
from sparse_lightning.cli import main
from sparse_lightning.kernels import choice
from sparse_lightning.kernels.choice import Measured


def test_it_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "`--device` must be an available CUDA GPU; got 'cpu'" in error


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--device", "nonsense"), "cuda or cpu; got 'nonsense'"),
        (("--device", "cuda:1"), "one of the 1 available GPUs; got 'cuda:1'"),
        (("--repeats", "0"), "`--repeats` must be at least 1; got 0"),
        (("--output", "/dev/null/new/table.json"), "in a folder that can be written to"),
    ],
)
def test_wrong_options(
    options: tuple[str, ...],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Options are checked before measuring, so a fake GPU suffices."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert main(["tune", *options]) == 2
    assert says in capsys.readouterr().err


def test_a_row_of_the_table() -> None:
    row = Measured("dw", "half", 32, (8, 16, 32), 0.25, {"portable": 1.5, "dense": 0.951})
    assert tune.table_row(row) == "| dw | half | 32 | 8x16x32 | 0.25 | 1.50 | n/a | 0.95 |"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "SHAPES", {torch.bfloat16: ((256, 512, 256),)})
    monkeypatch.setattr(tune, "BLOCK_SIZES", (32, 64))
    monkeypatch.setattr(tune, "DENSITIES", (0.5, 0.25))
    path = tmp_path / "new" / "table.json"
    assert main(["tune", "--repeats", "2", "--output", str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n| fwd | half |") == 4 and printed.count("\n| norms | half |") == 2
    assert f"Saved in {path}" in printed
    predicted = choice.read_table(path).predict("fwd", "half", 64, (256, 512, 256), 0.4)
    assert {"portable", "dense"} <= set(predicted) and min(predicted.values()) > 0
