"""The configuration of the CUDA kernels: pure functions of dtypes and ints."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_lightning.kernels.hopper import programs as hopper_programs
from sparse_lightning.kernels.portable import programs as portable_programs
from sparse_lightning.kernels.portable.programs import dw_program, norms_program, split_k
from sparse_lightning.kernels.programs import DTYPES


def test_every_dtype_and_block_size_has_its_programs() -> None:
    # Blocks of 16 have one program for 32 and for 64 tokens.
    tilings, fp32, fp64 = 6 * 4 - 1, 2 * (2 * 4), 2 * (2 * 4)
    plain, epilogues = 2 * 2 * tilings, 2 * (2 + 3) * tilings
    nm = 2 * 2 * 3 * 4
    dw = 2 * 3 * 4 + 2 * 4
    for clusters, linear in (
        (False, plain + epilogues + nm + fp32 + fp64),
        (True, 2 * plain + epilogues + nm + 2 * fp32 + fp64),
    ):
        programs = list(portable_programs.all_programs(clusters=clusters))
        assert len(programs) == len(set(programs)) == 4 + dw + linear
        assert max(program.tiling.splits for program in programs) == 1 + clusters
    programs = list(hopper_programs.all_programs())
    linear = (4 * 2 + 2) * 7  # tiles by block size, with and without epilogues
    assert len(programs) == len(set(programs)) == 2 * (1 + linear + 2 + 2 + 4 + 5)


@given(
    dtype=st.sampled_from([*DTYPES]),
    block_size=st.sampled_from([16, 32, 64, 128]),
    tokens=st.integers(1, 10**6),
    row_blocks=st.integers(0, 2000),
    out_blocks=st.integers(1, 2000),
    sm_count=st.integers(1, 200),
    shared=st.sampled_from([100, 228]),
)
def test_tiles_are_shared_while_multiprocessors_are_idle(
    dtype: torch.dtype,
    block_size: int,
    tokens: int,
    row_blocks: int,
    out_blocks: int,
    sm_count: int,
    shared: int,
) -> None:
    sizes = (tokens, row_blocks * out_blocks, out_blocks, sm_count, shared * 1024)
    splits = portable_programs.linear_splits(dtype, block_size, *sizes)
    assert splits in (1, 2, 4)
    if splits > 1:
        assert dtype != torch.float64 and row_blocks * block_size >= 64 * splits
        tiling = portable_programs.linear_program(
            dtype, block_size, forward=True, tokens=tokens
        ).tiling
        tiles = -(-tokens // tiling.tm) * out_blocks * (block_size // tiling.tn)
        assert tiles * splits**2 <= 2 * 16 * sm_count


@given(
    capacity=st.integers(1, 10**5),
    out_blocks=st.integers(1, 1000),
    block_size=st.sampled_from([64, 128]),
    tokens=st.integers(1, 10**6),
    sm_count=st.integers(1, 200),
)
def test_clusters_of_dw_fit_the_device(
    capacity: int, out_blocks: int, block_size: int, tokens: int, sm_count: int
) -> None:
    split = hopper_programs.dw_split(capacity, out_blocks, block_size, tokens, sm_count)
    assert (split.split_k, split.multicast) in hopper_programs.DW_CLUSTERS[block_size]
    assert 1 <= split.clusters * split.split_k * split.multicast <= sm_count
    assert split.clusters <= capacity


@given(
    grid=st.tuples(st.integers(1, 600), st.integers(1, 600)),
    share=st.floats(0, 3),
    block_size=st.sampled_from([16, 32]),
    sm_count=st.integers(1, 200),
)
def test_a_group_of_narrow_dw_fits_a_work_item_and_a_cluster_the_device(
    grid: tuple[int, int], share: float, block_size: int, sm_count: int
) -> None:
    capacity = max(1, int(share * grid[0] * grid[1]))
    bands = hopper_programs.dw_bands(capacity, grid, block_size, sm_count)
    assert (bands.split_k, 1) in hopper_programs.DW_CLUSTERS[block_size]
    assert 1 <= bands.clusters * bands.split_k <= sm_count
    assert (
        bands.groups == bands.clusters if bands.split_k > 1 else bands.groups % bands.clusters == 0
    )
    assert bands.rows * block_size <= 512 and bands.cost >= 0
    n_bands = -(-grid[0] // bands.rows)
    blocks = -(-(capacity + n_bands * bands.cost) // bands.groups)
    assert blocks <= hopper_programs.NARROW_DW[block_size].max_blocks


def test_tokens_are_split_where_blocks_are_few() -> None:
    few, many = (hopper_programs.dw_split(n, 32, 128, 8192, 132) for n in (51, 512))
    assert few.split_k > 1 and many.split_k == 1


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_an_unsupported_dtype_is_rejected(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"float64; got {dtype}"):
        norms_program(dtype)


def test_an_unsupported_block_size_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"\(16, 32, 64, 128\); got 48"):
        dw_program(torch.float32, 48)


@given(
    tokens=st.integers(0, 10**7),
    tiles=st.integers(0, 10**6),
    tk=st.sampled_from([16, 32, 64]),
    sm_count=st.integers(1, 200),
)
def test_splits_cover_all_tokens_and_none_is_empty(
    tokens: int, tiles: int, tk: int, sm_count: int
) -> None:
    splits, split_tokens = split_k(tokens, tiles, tk, sm_count)
    assert split_tokens % tk == 0 and split_tokens >= 512
    assert splits * split_tokens >= tokens
    assert splits == 1 or (splits - 1) * split_tokens < tokens
    assert splits < 65_536  # the limit of a grid's second dimension
