"""`benchmarks/llama.py`: its table."""

from __future__ import annotations

import llama
import pytest


@pytest.mark.parametrize("eager", [True, False])
def test_a_row_for_each_model(eager: bool, capsys: pytest.CaptureFixture[str]) -> None:
    given = "--device cpu --width 64 --hidden 128 --layers 1 --heads 2 --kv-heads 2 --batch 1"
    given += " --context 8 --vocabulary 96 --steps 1 --rounds 1 --block-sizes 16 32 --all 0.5"
    assert llama.main([*given.split(), "--densities", "0.5", *["--eager"] * eager]) == 0
    rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows[2:] == [
        "dense",
        "MLPs at 0.5, blocks of 16",
        "MLPs at 0.5, blocks of 32",
        "dense, MLPs 0.5 as wide",
        "all layers at 0.5, blocks of 16",
        "all layers at 0.5, blocks of 32",
    ]
