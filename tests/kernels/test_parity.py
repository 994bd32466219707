"""Every op of every backend against the reference in fp64, over one list of cases.

A new backend needs one more parameter of the `device` fixture. `check_parity` is the whole check;
the last tests show that it catches wrong kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_lightning import BlockTopology
from sparse_lightning.kernels import choice, cpu, ops, reference
from sparse_lightning.kernels.hopper import programs as hopper_programs
from sparse_lightning.kernels.operands import BlockLists

METHODS = ("by block", "batched", "densify")  # what cpu.choose returns
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LEADS = ((), (0,), (1,), (7,), (2, 3, 5), (2, 0, 3), (300,))


CUDA_KERNELS = [pytest.param(kind, marks=pytest.mark.gpu) for kind in choice.KINDS]


@pytest.fixture(params=[*METHODS, *CUDA_KERNELS])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device of a backend, once for each of its methods or kernel kinds."""
    if request.param not in METHODS:
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA GPU")
        force_kernels(request.param, monkeypatch)
        return "cuda"
    monkeypatch.setattr(cpu, "choose", lambda *_: request.param)
    # Small enough that some cases are computed in one piece and others in several.
    monkeypatch.setattr(cpu, "_BATCH_BYTES", 16 << 10)
    monkeypatch.setattr(cpu, "_BAND_BYTES", 16 << 10)
    return "cpu"


def force_kernels(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Force one kind of kernels, or skip the test if this GPU does not support the kind."""
    if kind == choice.HOPPER and torch.cuda.get_device_capability() != hopper_programs.CAPABILITY:
        pytest.skip("needs a Hopper GPU")
    monkeypatch.setattr(choice, "_forced", kind)


@dataclass(frozen=True)
class Case:
    """One problem: `mask` is a key of `MASKS`, `lead` the dimensions before the features."""

    mask: str = "random"
    grid: tuple[int, int] = (5, 3)
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    lead: tuple[int, ...] = (7,)
    contiguous: bool = True
    bias: bool = True
    spare: int = 2
    seed: int = 0
    nm: str | None = None

    def __str__(self) -> str:
        flags = ("" if self.contiguous else "-strided") + ("-bias" if self.bias else "")
        shape = "x".join(map(str, self.lead)) or "scalar"
        name = str(self.dtype).removeprefix("torch.")
        pattern = "" if self.nm is None else f"-{self.nm}"
        return f"{self.mask}-{self.block_size}-{name}-{shape}{flags}{pattern}"


def _random(grid: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.rand(grid, generator=generator) < 0.4


def _skewed(grid: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Row r keeps a share (r + 1)^-1.5 of its blocks, a power law; the last rows may be empty."""
    share = torch.arange(1, grid[0] + 1).float().pow(-1.5).unsqueeze(1)
    return torch.rand(grid, generator=generator) < share


def _empty_row_and_column(grid: tuple[int, int], generator: torch.Generator) -> Tensor:
    mask = torch.rand(grid, generator=generator) < 0.7
    mask[grid[0] // 2] = False
    mask[:, grid[1] // 2] = False
    return mask


def _one(grid: tuple[int, int], generator: torch.Generator) -> Tensor:
    mask = torch.zeros(grid, dtype=torch.bool)
    mask[-1, 0] = True
    return mask


MASKS = {
    "random": _random,
    "skewed": _skewed,
    "empty_row_and_column": _empty_row_and_column,
    "one": _one,
    "none": lambda grid, _: torch.zeros(grid, dtype=torch.bool),
    "all": lambda grid, _: torch.ones(grid, dtype=torch.bool),
}

GRIDS = [(3, 5), (4, 4), (5, 3), (2, 6), (3, 4), (6, 2)]

# Every mask with all dtypes and block sizes; every mask with shapes, strides and bias in the dtypes
# whose code paths differ; then edge cases that only a few combinations reach.
CASES = [
    *(
        Case(mask, block_size=size, dtype=dtype)
        for mask in MASKS
        for size in (16, 32, 64, 128)
        for dtype in DTYPES
    ),
    *(
        Case(mask, grid, 16, dtype, lead, contiguous, bias)
        for mask, grid in zip(MASKS, GRIDS, strict=True)
        for dtype in (torch.float32, torch.bfloat16)
        for lead in LEADS
        for contiguous, bias in ((True, False), (False, True))
    ),
    *(
        Case(mask, (3, 2), block_size=size, dtype=dtype, lead=(tokens,), nm="2:4")
        for mask, tokens in (("empty_row_and_column", 1), ("random", 17), ("all", 300))
        for size in (16, 32, 64, 128)
        for dtype in DTYPES
    ),
    Case("none", spare=0, nm="2:4"),
    Case("random", grid=(9, 11), spare=40, lead=(3, 11), contiguous=False, nm="2:4"),
    Case(grid=(1, 1), spare=0),
    Case("all", grid=(1, 7), spare=0),
    Case("all", grid=(7, 1), spare=0),
    Case("none", spare=0),
    Case("random", grid=(9, 11), spare=40, lead=(33,)),
    Case("random", grid=(9, 11), dtype=torch.float16, spare=40, lead=(3, 11), contiguous=False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_parity(case: Case, device: str) -> None:
    check_parity(case, device)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(data=st.data())
def test_parity_of_any_topology(data: st.DataObject) -> None:
    case = data.draw(cases(["random", "skewed", "empty_row_and_column"], [16, 32], 8, 5))
    with pytest.MonkeyPatch.context() as patch:
        method = data.draw(st.sampled_from(METHODS))
        patch.setattr(cpu, "choose", lambda *_: method)
        check_parity(case, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tokens", [3, 300])
def test_the_order_of_slots_changes_no_bit(
    tokens: int, method: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "choose", lambda *_: method)
    problem = Problem(Case(grid=(6, 9), block_size=32, dtype=dtype, lead=(tokens,)), "cpu")
    x, dy, values, topology = problem.x, problem.dy, problem.values, problem.topology
    order = torch.randperm(topology.capacity, generator=torch.Generator().manual_seed(1))
    moved = BlockTopology(topology.coords[order], topology.grid, topology.block_size)

    def products(values: Tensor, topology: BlockTopology) -> tuple[Tensor, Tensor, Tensor]:
        rest = *topology.indices, None, None, 1
        y, dx = ops.block_linear(x, values, None, *rest), ops.block_linear_dx(dy, values, *rest)
        return y, dx, ops.block_linear_dw(dy, x, *topology.indices)

    y, dx, dw = products(values, topology)
    assert_equal = torch.testing.assert_close
    assert_equal(products(values[order], moved), (y, dx, dw[order]), rtol=0, atol=0)


def cases(
    masks: Sequence[str], block_sizes: Sequence[int], max_blocks: int, max_tokens: int
) -> st.SearchStrategy[Case]:
    """Cases with these masks and block sizes, with limits for each dimension of grid and tokens."""
    blocks = st.integers(1, max_blocks)
    return st.builds(
        Case,
        mask=st.sampled_from(masks),
        grid=st.tuples(blocks, blocks),
        block_size=st.sampled_from(block_sizes),
        dtype=st.sampled_from(DTYPES),
        lead=st.lists(st.integers(0, max_tokens), max_size=3).map(tuple),
        contiguous=st.booleans(),
        bias=st.booleans(),
        spare=st.integers(0, 5),
        seed=st.integers(0, 2**32),
        nm=st.sampled_from([None, "2:4"]),
    )


def check_parity(case: Case, device: str, kernels: Any = ops) -> None:
    """Fail unless the four ops of `kernels` agree with the reference in fp64 on one case."""
    problem = Problem(case, device)
    x, dy, values, bias = problem.x, problem.dy, problem.values, problem.bias
    topology = problem.topology
    coords, grid, size = topology.coords.cpu(), topology.grid, case.block_size
    untouched = [t.clone() for t in (x, dy, values, topology.coords)]

    indices = topology.indices
    fp32 = torch.promote_types(case.dtype, torch.float32)

    def sums(n_blocks: int) -> tuple[int, torch.dtype]:
        # Half precision is summed block by block in its own dtype only if a test forces it.
        if case.dtype != fp32 and cpu.choose("fwd", 300, 64, 0.1, case.dtype) == "by block":
            return n_blocks, case.dtype
        return n_blocks * size, fp32

    # The reference in fp64 gets the same numbers as the ops. Only the ops get NaN in empty slots.
    x64, dy64 = x.cpu().double(), dy.cpu().double()
    values64 = values.cpu().double().nan_to_num(0.0)
    columns = None if topology.positions is None else columns_of(topology.positions.cpu())
    if columns is not None:
        values64 = values64.new_zeros(len(values), size, size).scatter_(2, columns, values64)
    bias64 = None if bias is None else bias.cpu().double()
    squares = x64.square(), dy64.square(), values64.square()
    bias2 = None if bias64 is None else bias64.square()
    armed, leaf = torch.tensor(True, device=device), torch.full(grid, torch.nan, device=device)

    y = kernels.block_linear(x, values, bias, *indices, leaf, armed, 1)
    assert leaf.isnan().all(), "forward must not write to the leaf of the norms"
    expected = reference.block_linear(x64, values64, bias64, coords, grid)
    size_y = reference.block_linear(squares[0], squares[2], bias2, coords, grid).sqrt()
    assert_close("block_linear", y, expected, size_y, case, *sums(grid[1]))

    dx = kernels.block_linear_dx(dy, values, *indices, leaf, armed, 1)
    expected = reference.block_linear_dx(dy64, values64, coords, grid)
    size_dx = reference.block_linear_dx(squares[1], squares[2], coords, grid).sqrt()
    assert_close("block_linear_dx", dx, expected, size_dx, case, *sums(grid[0]))

    dw = kernels.block_linear_dw(dy, x, *indices)
    expected = reference.block_linear_dw(dy64, x64, coords, size)
    size_dw = reference.block_linear_dw(squares[1], squares[0], coords, size).sqrt()
    if columns is not None:
        expected, size_dw = expected.gather(2, columns), size_dw.gather(2, columns)
    assert_close("block_linear_dw", dw, expected, size_dw, case, math.prod(case.lead), fp32)
    assert dw[topology.coords[:, 0] < 0].count_nonzero() == 0, "block_linear_dw: empty slots"

    third = [t.reshape(-1, t.shape[-1])[::3] for t in (dy, x)]
    for operands in ((dy, x), third):
        norms = kernels.block_norms(*operands, armed, size)
        assert norms.dtype == torch.float32, f"block_norms: {norms.dtype}"
        expected = reference.block_norms(*(t.double().cpu() for t in operands), grid)
        torch.testing.assert_close(norms.cpu().double(), expected, rtol=1e-4, atol=1e-5)
        zeros = kernels.block_norms(*operands, torch.tensor(False, device=device), size)
        assert zeros.dtype == torch.float32 and zeros.shape == grid
        assert zeros.count_nonzero() == 0, "the norms must be zeros if not armed"

    for tensor, copy in zip((x, dy, values, topology.coords), untouched, strict=True):
        torch.testing.assert_close(tensor, copy, rtol=0, atol=0, equal_nan=True)


def columns_of(positions: Tensor) -> Tensor:
    """Return the column within its block of each kept weight, by the bits of its position."""
    columns = []
    for entry in range(4 * positions.shape[-1]):
        group, byte = entry // 2, entry // 4
        bits = positions[..., byte].long() >> (2 * (entry % 4))
        columns.append(4 * group + (bits & 3))
    return torch.stack(columns, -1)


class Problem:
    """The tensors of a case, with shuffled slots and NaN in empty slots."""

    def __init__(self, case: Case, device: str) -> None:
        generator = torch.Generator().manual_seed(case.seed)
        (rows, cols), size = case.grid, case.block_size
        mask = MASKS[case.mask](case.grid, generator)
        packed = BlockTopology.from_mask(mask, size, capacity=int(mask.sum()) + case.spare)
        shuffled = packed.coords[torch.randperm(packed.capacity, generator=generator)]
        topology = BlockTopology(shuffled, case.grid, size)
        topology = topology.with_random_positions(case.nm, generator)
        self.topology = topology.to_(torch.device(device))

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, case.dtype)

        def tokens(features: int) -> Tensor:
            if case.contiguous:
                return normal(*case.lead, features)
            # No stride is contiguous: features come from a transpose, tokens from a slice.
            wide = normal(2 * features, *(2 * n for n in case.lead)).movedim(0, -1)
            return wide[tuple(slice(None, None, 2) for _ in range(wide.dim()))]

        self.x, self.dy = tokens(cols * size), tokens(rows * size)
        self.values = normal(*self.topology.values_shape)
        self.values[self.topology.coords[:, 0] < 0] = torch.nan
        self.bias = normal(rows * size) if case.bias else None


def assert_close(
    op: str,
    actual: Tensor,
    expected: Tensor,
    size: Tensor,
    case: Case,
    terms: int,
    sums_in: torch.dtype,
) -> None:
    """Fail unless every element is within rounding of the fp64 result.

    `size` is the root of the sum of squared terms of each element, the magnitude of partial sums.
    Rounding the result contributes `eps`, or half the spacing of the dtype's smallest numbers;
    summing `terms` in the precision `sums_in` contributes about the root of their number.
    """
    assert actual.dtype == case.dtype, f"{op}: {actual.dtype}"
    assert actual.shape == expected.shape, f"{op}: {list(actual.shape)}"
    eps, sum_eps = torch.finfo(case.dtype).eps, torch.finfo(sums_in).eps
    tolerance = 2 * eps * (expected.abs() + size) + 2 * math.sqrt(terms) * sum_eps * size
    tolerance += eps * torch.finfo(case.dtype).smallest_normal
    error = (actual.cpu().double() - expected).abs()
    # Comparisons with NaN are False, so NaN counts as wrong.
    wrong = ~(error <= tolerance)
    assert not wrong.any(), f"{op}: {int(wrong.sum())} of {wrong.numel()} elements are wrong"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_threads_without_tokens(
    method: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some functions of PyTorch fail on empty input only if they run on several threads."""
    monkeypatch.setattr(cpu, "choose", lambda *_: method)
    monkeypatch.setattr(cpu, "_BATCH_TOKENS", 8)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for n in (0, 1, 20):
            check_parity(Case(grid=(9, 7), dtype=dtype, lead=(n,)), "cpu")
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spare", [3, 500])
def test_mostly_empty_slots(method: str, spare: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled layer whose density falls keeps its slots."""
    monkeypatch.setattr(cpu, "choose", lambda *_: method)
    check_parity(Case("skewed", grid=(9, 11), spare=spare, lead=(40,)), "cpu")


def test_blocks_whose_products_exceed_the_range_of_fp16_are_summed() -> None:
    """As in a dense product, only the sum must be finite."""
    x = torch.full((1, 128), 32.0, dtype=torch.float16)
    topology = BlockTopology.from_mask(torch.ones(1, 2, dtype=torch.bool), 64)
    values = torch.cat([torch.full((1, 64, 64), c, dtype=torch.float16) for c in (40.0, -39.0)])
    lists = BlockLists.of(topology.indices, forward=True)
    (y,) = cpu.multiply(x, values, None, lists, forward=True, method="batched")
    assert torch.equal(y, torch.full_like(y, 64 * 32.0))


# -- tests of the check itself ----------------------------------------------------------------


def _mutants() -> dict[str, dict[str, Any]]:
    """Wrong kernels, each with one likely mistake."""

    def after(op: str, spoil: Any) -> dict[str, Any]:
        def wrong(*args: Any) -> Any:
            out = getattr(ops, op)(*args).clone()
            return out if (new := spoil(out, *args)) is None else new

        return {op: wrong}

    def before(op: str, change: Any) -> dict[str, Any]:
        return {op: lambda *args: getattr(ops, op)(*change(*args))}

    def unwritten_rows(y: Tensor, x: Tensor, values: Tensor, *args: Any) -> None:
        empty = args[2].diff() == 0
        y.unflatten(-1, (-1, values.shape[1]))[..., empty, :] = torch.nan

    def in_list_order(x: Tensor, values: Tensor, *args: Any) -> tuple[Any, ...]:
        slots = args[3][:, 1].long()  # of `row_entries`
        return x, torch.empty_like(values).index_copy_(0, slots, values), *args

    def without_last_block(dy: Tensor, values: Tensor, *args: Any) -> tuple[Any, ...]:
        last = args[4][args[3][-1] - 1, 1].long()  # of `col_entries`
        return dy, values.index_fill(0, last, 0), *args

    def nan_at_last(out: Tensor, *_: Any) -> None:
        out.view(-1)[-1] = torch.nan

    def last_token_is_zero(y: Tensor, *_: Any) -> None:
        y[-1] = 0

    def not_even_armed(dy: Tensor, x: Tensor, armed: Tensor, block_size: int) -> Tensor:
        return ops.block_norms(dy, x, torch.ones_like(armed), block_size)

    def unwritten_unless_armed(norms: Tensor, dy: Tensor, x: Tensor, armed: Tensor, _: int) -> None:
        if not armed:
            norms.view(-1)[-1] = torch.nan

    def nan_leaks(y: Tensor, x: Tensor, values: Tensor, *_: Any) -> Tensor:
        return y + 0 * values.sum()

    return {
        "forward leaves an empty row unwritten": after("block_linear", unwritten_rows),
        "forward drops the last token": after("block_linear", last_token_is_zero),
        "forward transposes the blocks": before(
            "block_linear", lambda x, values, *rest: (x, values.transpose(1, 2), *rest)
        ),
        "forward ignores the slots": before("block_linear", in_list_order),
        "forward forgets the bias": before("block_linear", lambda *a: (*a[:2], None, *a[3:])),
        "forward reads empty slots": after("block_linear", nan_leaks),
        "forward returns another dtype": after("block_linear", lambda y, *_: y.double()),
        "forward spoils its input": before("block_linear", lambda x, *rest: (x.mul_(1.5), *rest)),
        "dx leaves one element unwritten": after("block_linear_dx", nan_at_last),
        "dx transposes the blocks": before(
            "block_linear_dx", lambda dy, values, *rest: (dy, values.transpose(1, 2), *rest)
        ),
        "dx loses the last block": before("block_linear_dx", without_last_block),
        "dw drops the last token": before(
            "block_linear_dw", lambda dy, x, *rest: (dy[:-1], x[:-1], *rest)
        ),
        "dw transposes the blocks": after("block_linear_dw", lambda dw, *_: dw.transpose(1, 2)),
        "dw leaves empty slots unwritten": after(
            "block_linear_dw", lambda dw, dy, x, coords, *_: dw.masked_fill(_empty(coords), 1e-30)
        ),
        "dw poisons empty slots": after(
            "block_linear_dw", lambda dw, dy, x, c, *_: dw.masked_fill(_empty(c), torch.nan)
        ),
        "norms ignore the flag": {"block_norms": not_even_armed},
        "norms are unwritten unless armed": after("block_norms", unwritten_unless_armed),
        "norms leave one element unwritten": after("block_norms", nan_at_last),
        "norms drop the last token": before(
            "block_norms", lambda dy, x, *rest: (dy[:-1], x[:-1], *rest)
        ),
        "norms are not squared": after("block_norms", lambda norms, *_: norms.sqrt()),
        "norms have another dtype": after("block_norms", lambda norms, *_: norms.double()),
        "norms are always zeros": after("block_norms", lambda norms, *_: norms.zero_()),
    }


def _empty(coords: Tensor) -> Tensor:
    return (coords[:, 0] < 0).view(-1, 1, 1)


@pytest.mark.parametrize("mistake", _mutants())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_parity_check_catches(mistake: str, dtype: torch.dtype) -> None:
    case = Case("empty_row_and_column", grid=(5, 5), dtype=dtype)
    right = {op: getattr(ops, op) for op in ops.OPS}
    check_parity(case, "cpu", SimpleNamespace(**right))
    with pytest.raises(AssertionError):
        check_parity(case, "cpu", SimpleNamespace(**{**right, **_mutants()[mistake]}))


def test_the_parity_check_catches_a_token_rounded_away() -> None:
    """The tolerance is tight enough to detect one wrong token among three hundred."""
    case = replace(Case(), lead=(300,))
    wrong = SimpleNamespace(**{op: getattr(ops, op) for op in ops.OPS})
    wrong.block_linear_dw = lambda dy, x, *rest: ops.block_linear_dw(dy[1:], x[1:], *rest)
    with pytest.raises(AssertionError, match="block_linear_dw"):
        check_parity(case, "cpu", wrong)
