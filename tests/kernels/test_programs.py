"""The configuration of the CUDA kernels: pure functions of ints."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_lightning.kernels.programs import (
    MAX_SHARED_BYTES,
    Program,
    all_programs,
    dw_program,
    linear_program,
    norms_program,
    token_parts,
)


def test_every_dtype_and_block_size_has_its_programs() -> None:
    programs = list(all_programs())
    assert len(programs) == len(set(programs)) == 4 * (1 + 3 * 4)


@pytest.mark.parametrize("program", [*all_programs()], ids=lambda p: f"{p.source} {p.options[0]}")
def test_a_program_can_be_launched_on_the_smallest_device(program: Program) -> None:
    assert 32 <= program.threads <= 1024 and program.threads % 32 == 0
    assert program.shared_bytes <= MAX_SHARED_BYTES


def test_shared_memory_by_hand() -> None:
    # Two stages of (128 x 64 + 64 x 64) bf16: 49,152 bytes; the result, 128 x 64 fp32: 32,768.
    assert linear_program(torch.bfloat16, 64, forward=True).shared_bytes == 49_152
    # Two stages of 16 x (64 + 128) fp64: 49,152; the result, 64 x 128 fp64: 65,536.
    assert dw_program(torch.float64, 128).shared_bytes == 65_536
    # The norms' result is fp32 for every dtype: 128 x 128 of them.
    assert norms_program(torch.float64).shared_bytes == 65_536


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_another_dtype_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"float64; got {dtype}"):
        norms_program(dtype)


def test_another_block_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(16, 32, 64, 128\); got 48"):
        dw_program(torch.float32, 48)


@given(
    tokens=st.integers(0, 10**7),
    tiles=st.integers(0, 10**6),
    tk=st.sampled_from([16, 32, 64]),
    processors=st.integers(1, 200),
)
def test_parts_cover_all_tokens_and_none_is_empty(
    tokens: int, tiles: int, tk: int, processors: int
) -> None:
    parts, tokens_a_part = token_parts(tokens, tiles, tk, processors)
    assert tokens_a_part % tk == 0 and tokens_a_part >= 512
    assert parts * tokens_a_part >= tokens
    assert parts == 1 or (parts - 1) * tokens_a_part < tokens
    assert parts < 65_536  # the limit of a grid's second dimension
