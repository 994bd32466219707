"""`benchmarks/tilings.py`: what it tries, and its table."""

from __future__ import annotations

import pytest
import tilings
import torch

from sparse_lightning.kernels.portable.programs import dw_program, linear_program


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("op", ["fwd", "dx", "dw"])
@pytest.mark.parametrize("tokens", [1, 16, 32, 64, 128])
def test_the_tilings_in_use_are_among_those_tried(tokens: int, op: str, block_size: int) -> None:
    for splits in 1, 2:
        used = (
            dw_program(torch.bfloat16, block_size, tokens)
            if op == "dw"
            else linear_program(
                torch.bfloat16, block_size, forward=op == "fwd", tokens=tokens, splits=splits
            )
        )
        tried = list(tilings.candidates(op, tokens, block_size, (1, splits)[:splits]))
        assert used in tried and len(tried) == len(set(tried)) > 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_table_shows_the_tiling_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    given = "--tokens 3 --features 256 512 --block-sizes 16 --repeats 2 --show 2"
    assert tilings.main(given.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith(("| fwd", "| dx", "| dw"))]
    assert 6 <= len(rows) <= 9 and sum("**in use**" in row for row in rows) == 3
