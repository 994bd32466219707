"""Other block-sparse libraries, as installed, measured beside ours in the same run.

Each peer is a function of a problem and an op ("fwd", "dx" or "dw") that prepares its operands and
returns a `Contender`; NotImplementedError where it lacks the op or block size.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from sparse_lightning.bench.problem import Contender, Problem
from sparse_lightning.topology import BlockTopology


def torch_bsr(problem: Problem, op: str) -> Contender:
    """Return PyTorch's own BSR tensors, which run on its Triton kernels."""
    from torch.sparse import _triton_ops as triton_ops

    at, x, dy = problem.layer.topology, problem.x, problem.dy
    weight, size = problem.linear.weight.detach(), (at.block_size, at.block_size)
    if op == "dw":
        # `sampled_addmm` computes at the blocks that its first operand has.
        ones = at.unpack(torch.ones_like(problem.layer.values.detach())).to_sparse_bsr(size)
        dy_t = dy.T.contiguous()
        return Contender(
            lambda: triton_ops.sampled_addmm(ones, dy_t, x, beta=0.0, skip_checks=True),
            lambda out: (at.pack(out.to_dense()),),
        )
    matrix = (weight if op == "fwd" else weight.T.contiguous()).to_sparse_bsr(size)
    tokens = x if op == "fwd" else dy

    def product() -> Tensor:
        # What `linear` calls, but it fills a tensor like the result with zeros first, and may
        # silently use something else than the kernels.
        y = tokens.new_empty(tokens.shape[0], matrix.shape[0])
        triton_ops.bsr_dense_mm(matrix, tokens.T, out=y.T)
        return y

    return Contender(product)


def stk(problem: Problem, op: str) -> Contender:
    """Return stk (MegaBlocks), which has blocks of 128 only."""
    from stk.matrix import Matrix
    from stk.ops import dds, sdd

    at, x, dy = problem.layer.topology, problem.x, problem.dy
    if at.block_size != 128:
        raise NotImplementedError("has blocks of 128 only")
    rows, cols, blocks = _by_row(problem)
    offsets = at.row_offsets.clone()
    matrix = Matrix((at.out_features, at.in_features), blocks, rows.short(), cols.short(), offsets)
    if op == "dw":
        dy_t = dy.T  # it takes transposed views as they are
        return Contender(
            lambda: sdd(dy_t, x, matrix),
            lambda out: (_by_slot(problem, out.data),),
        )
    if op == "fwd":
        transposed = matrix.t()
        return Contender(lambda: dds(x, transposed))
    return Contender(lambda: dds(dy, matrix))


def blksprs(problem: Problem, op: str) -> Contender:
    """Return blksprs, where dense operands are sparse ones with every block present."""
    from blksprs.ops.matmul import matmul
    from blksprs.utils.blksprs_tensor import BlksprsTensor
    from blksprs.utils.validation import disable_validation

    # It reads sums back from the device: each call would wait, and be timed with its launch.
    disable_validation()
    at, x, dy = problem.layer.topology, problem.x, problem.dy
    size, mask = at.block_size, at.mask
    rows, cols, blocks = _by_row(problem)

    def everywhere(rows: int, cols: int) -> BlockTopology:
        ones = torch.ones(rows // size, cols // size, dtype=torch.bool, device=x.device)
        return BlockTopology.from_mask(ones, size)

    def dense(matrix: Tensor) -> tuple[BlksprsTensor, Tensor]:
        full = everywhere(*matrix.shape)
        return BlksprsTensor.wrap(full.pack(matrix)), _layout(full.mask)

    if op == "fwd":
        by_col = (cols.long() * at.grid[0] + rows.long()).argsort()
        sparse = blocks[by_col].transpose(1, 2).contiguous()
        left, right = dense(x), (BlksprsTensor.wrap(sparse), _layout(mask.T))
    elif op == "dx":
        left, right = dense(dy), (BlksprsTensor.wrap(blocks), _layout(mask))
    else:
        left, right = dense(dy.T.contiguous()), dense(x)
    out = everywhere(x.shape[0], at.out_features if op == "fwd" else at.in_features)
    out_layout = _layout(mask if op == "dw" else out.mask)
    cache: dict[str, Tensor] = {}

    def read(blocks: Tensor) -> tuple[Tensor]:
        return (_by_slot(problem, blocks) if op == "dw" else out.unpack(blocks),)

    return Contender(lambda: matmul(*left, *right, out_layout, size, cache), read)


Peer = Callable[[Problem, str], Contender]
PEERS: dict[str, Peer] = {"torch_bsr": torch_bsr, "stk": stk, "blksprs": blksprs}
_PACKAGES = {"torch_bsr": "triton", "stk": "stk", "blksprs": "blksprs"}


def installed() -> list[str]:
    """Return the names of the peers whose package is there."""
    return [name for name, package in _PACKAGES.items() if importlib.util.find_spec(package)]


def _by_row(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows, columns and values of the present blocks, in row-major order."""
    at = problem.layer.topology
    cols, slots = at.row_entries.long().unbind(1)
    rows = torch.repeat_interleave(at.row_offsets.diff().long())
    return rows, cols, problem.layer.values.detach()[slots]


def _by_slot(problem: Problem, blocks: Tensor) -> Tensor:
    """Return blocks that are in row-major order as `values` has them; no slot is empty."""
    slots = problem.layer.topology.row_entries[:, 1].long()
    out = torch.empty_like(blocks)
    out[slots] = blocks
    return out


def _layout(mask: Tensor) -> Tensor:
    return mask.unsqueeze(0).contiguous()
