"""`benchmarks/plans.py`: its table."""

from __future__ import annotations

import plans
import pytest
import torch
from torch import nn

import sparse_lightning
from sparse_lightning.arguments import find_builder
from sparse_lightning.planning import measure


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))


def test_a_row_for_each_setting_and_mode(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = plans.Case("small", f"{__name__}:build", "8,64", ["*"], lambda model: [model])
    monkeypatch.setattr(plans, "CASES", {"mlp": small})
    monkeypatch.setattr(measure, "_SECONDS_PER_ROUND", 0.01)
    given = "--device cpu --models mlp --block-sizes 16 32 --densities 0.5"
    assert plans.main(given.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[3:9]]
    assert [row[:4] for row in rows] == [
        row
        for mode in ("eager", "compile")
        for row in (["small", mode, "dense", ""], ["", "", "16", "0.5"], ["", "", "32", "0.5"])
    ]
    assert lines[-1].endswith("of 4 expected steps are within 15% of the measured ones.")


def test_the_cases_exist() -> None:
    """The layers that a case includes are those in its blocks."""
    for case in plans.CASES.values():
        with torch.device("meta"):
            model = find_builder("CASES", case.build)()
        blocks = list(case.blocks(model))
        swapped = sparse_lightning.sparsify(model, include=case.include).layers
        inside = {layer for block in blocks for layer in block.modules()}
        assert swapped and all(model.get_submodule(name) in inside for name in swapped)
