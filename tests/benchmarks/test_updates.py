"""`benchmarks/updates.py`: what it measures and prints."""

from __future__ import annotations

import math

import pytest
import torch
from updates import RULES, main, measure

SMALL = [
    "--device",
    "cpu",
    "--width",
    "64",
    "--layers",
    "1",
    "--tokens",
    "16",
    "--block-size",
    "16",
]


def test_a_row_for_each_pair_of_rules(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(SMALL) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"torch {torch.__version__}" in lines[0]
    assert lines[1].startswith("1 MLPs 64 -> 256 -> 64, 16 tokens, blocks of 16, density 0.25")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[5:]]
    assert [tuple(row[:3]) for row in rows] == [tuple(map(str, rule)) for rule in RULES]
    for *_, step, host, update in rows:
        # The times of such a small network are noise, and an update's can be negative.
        assert float(host) > 0 and float(step) > 0 and math.isfinite(float(update))


def test_only_gathering_costs_a_window() -> None:
    sizes = {"width": 64, "layers": 1, "tokens": 16, "block_size": 16, "density": 0.25}
    cost = measure("magnitude", "gradient", 1, **sizes, device=torch.device("cpu"))
    assert cost["window"] == 0.0 and cost["step"] > 0
    assert measure("magnitude", "momentum", 4, **sizes, device=torch.device("cpu"))["window"] != 0.0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--width", "100"], "multiple of block_size=16; got 100"),
        (["--density", "0"], "`--density` must be"),
        (["--layers", "0"], "`--layers` must be at least 1; got 0"),
        (["--device", "tpu"], "`--device` must be cuda or cpu; got 'tpu'"),
    ],
)
def test_options_out_of_range(
    options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, *options]) == 2
    assert says in capsys.readouterr().err
