"""The configuration of the CUDA kernels: pure functions of ints."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_lightning.kernels.hopper import programs as hopper_programs
from sparse_lightning.kernels.portable import programs as portable_programs
from sparse_lightning.kernels.portable.programs import (
    dw_program,
    linear_program,
    norms_program,
    token_parts,
)
from sparse_lightning.kernels.programs import Program


def test_every_dtype_and_block_size_has_its_programs() -> None:
    programs = list(portable_programs.all_programs())
    assert len(programs) == len(set(programs)) == 4 * (1 + 3 * 4)
    programs = list(hopper_programs.all_programs())
    assert len(programs) == len(set(programs)) == 2 * (1 + 4 * 4 + 2 + 2 + 4 + 5)


@pytest.mark.parametrize(
    "program", [*portable_programs.all_programs()], ids=lambda p: f"{p.source} {p.options[0]}"
)
def test_a_portable_program_can_be_launched_on_the_smallest_device(program: Program) -> None:
    assert 32 <= program.threads <= 1024 and program.threads % 32 == 0
    assert program.shared_bytes <= portable_programs.MAX_SHARED_BYTES


@pytest.mark.parametrize(
    "program", [*hopper_programs.all_programs()], ids=lambda p: f"{p.source} {p.options[2]}"
)
def test_a_program_for_hopper_can_be_launched_there(program: Program) -> None:
    assert program.threads % 128 == 0 and program.threads <= 1024
    assert program.shared_bytes <= hopper_programs.MAX_SHARED_BYTES


def test_shared_memory_by_hand() -> None:
    # Two stages of (128 x 64 + 64 x 64) bf16: 49,152 bytes; the result, 128 x 64 fp32: 32,768.
    assert linear_program(torch.bfloat16, 64, forward=True).shared_bytes == 49_152
    # Two stages of 16 x (64 + 128) fp64: 49,152; the result, 64 x 128 fp64: 65,536.
    assert dw_program(torch.float64, 128).shared_bytes == 65_536
    # The norms' result is fp32 for every dtype: 128 x 128 of them.
    assert norms_program(torch.float64).shared_bytes == 65_536


@pytest.mark.parametrize("block_size", [64, 128])
def test_forward_on_hopper_fills_the_shared_memory_there_is(block_size: int) -> None:
    program = hopper_programs.linear_program(torch.bfloat16, block_size, forward=True)
    most, granule = hopper_programs.MAX_SHARED_BYTES, 128 * block_size
    assert most - granule < program.shared_bytes <= most


@pytest.mark.parametrize("block_size", [16, 32])
def test_forward_of_narrow_blocks_on_hopper_has_room_for_four_slabs(block_size: int) -> None:
    program = hopper_programs.linear_program(torch.bfloat16, block_size, forward=True)
    t = program.tiling
    assert program.shared_bytes <= hopper_programs.MAX_SHARED_BYTES
    slab = 2 * t.tk * (t.tm + t.tn)  # if all blocks are present
    assert program.shared_bytes >= 4 * slab


@given(
    capacity=st.integers(1, 10**5),
    out_blocks=st.integers(1, 1000),
    block_size=st.sampled_from([64, 128]),
    tokens=st.integers(1, 10**6),
    processors=st.integers(1, 200),
)
def test_clusters_of_dw_fit_the_device(
    capacity: int, out_blocks: int, block_size: int, tokens: int, processors: int
) -> None:
    split = hopper_programs.dw_split(capacity, out_blocks, block_size, tokens, processors)
    assert (split.parts, split.sharers) in hopper_programs.DW_CLUSTERS[block_size]
    assert 1 <= split.clusters * split.parts * split.sharers <= processors
    assert split.clusters <= capacity


@given(
    grid=st.tuples(st.integers(1, 600), st.integers(1, 600)),
    share=st.floats(0, 3),
    block_size=st.sampled_from([16, 32]),
    processors=st.integers(1, 200),
)
def test_a_group_of_narrow_dw_fits_a_job_and_a_cluster_the_device(
    grid: tuple[int, int], share: float, block_size: int, processors: int
) -> None:
    capacity = max(1, int(share * grid[0] * grid[1]))
    cut = hopper_programs.dw_bands(capacity, grid, block_size, processors)
    assert (cut.parts, 1) in hopper_programs.DW_CLUSTERS[block_size]
    assert 1 <= cut.clusters * cut.parts <= processors
    assert cut.groups == cut.clusters if cut.parts > 1 else cut.groups % cut.clusters == 0
    assert cut.rows * block_size <= 512 and cut.cost >= 0
    bands = -(-grid[0] // cut.rows)
    blocks = -(-(capacity + bands * cut.cost) // cut.groups)
    assert blocks <= hopper_programs.NARROW_DW[block_size].blocks


def test_tokens_are_split_where_blocks_are_few() -> None:
    few, many = (hopper_programs.dw_split(n, 32, 128, 8192, 132) for n in (51, 512))
    assert few.parts > 1 and many.parts == 1


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
