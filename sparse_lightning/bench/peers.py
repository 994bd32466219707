"""Other block-sparse libraries, timed in the same run if they are installed.

Each peer is a function of a problem and an op ("fwd", "dx" or "dw") that prepares the operands and
returns a `Contender`. It raises NotImplementedError if it does not support the op or block size.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_lightning.bench.problem import Contender, Problem
from sparse_lightning.topology import BlockTopology


def torch_bsr(problem: Problem, op: str) -> Contender:
    """Return the product of PyTorch's BSR tensors, which use its Triton kernels."""
    from torch.sparse import _triton_ops as triton_ops

    topology, x, dy = problem.layer.topology, problem.x, problem.dy
    weight, size = problem.linear.weight.detach(), (topology.block_size, topology.block_size)
    if op == "dw":
        # `sampled_addmm` computes only the blocks present in its first operand.
        ones = topology.unpack(torch.ones_like(problem.layer.values.detach())).to_sparse_bsr(size)
        dy_t = dy.T.contiguous()
        return Contender(
            lambda: triton_ops.sampled_addmm(ones, dy_t, x, beta=0.0, skip_checks=True),
            lambda out: (topology.pack(out.to_dense()),),
        )
    matrix = (weight if op == "fwd" else weight.T.contiguous()).to_sparse_bsr(size)
    tokens = x if op == "fwd" else dy

    def product() -> Tensor:
        # `linear` calls this too, but it zero-fills an output tensor first, and may silently use
        # code other than the Triton kernels.
        y = tokens.new_empty(tokens.shape[0], matrix.shape[0])
        triton_ops.bsr_dense_mm(matrix, tokens.T, out=y.T)
        return y

    return Contender(product)


def stk(problem: Problem, op: str) -> Contender:
    """Return the product of stk (MegaBlocks), which supports only blocks of 128."""
    from stk.matrix import Matrix
    from stk.ops import dds, sdd

    topology, x, dy = problem.layer.topology, problem.x, problem.dy
    if topology.block_size != 128:
        raise NotImplementedError("supports blocks of 128 only")
    shape = (topology.out_features, topology.in_features)
    rows, cols, blocks = _row_major(problem)
    offsets = topology.row_offsets.clone()
    matrix = Matrix(shape, blocks, rows.short(), cols.short(), offsets)
    if op == "dw":
        dy_t = dy.T  # stk accepts transposed views without a copy
        return Contender(
            lambda: sdd(dy_t, x, matrix),
            lambda out: (_slot_order(problem, out.data),),
        )
    if op == "fwd":
        transposed = matrix.t()
        return Contender(lambda: dds(x, transposed))
    return Contender(lambda: dds(dy, matrix))


def blksprs(problem: Problem, op: str) -> Contender:
    """Return the product of blksprs, whose dense operands are block-sparse with all blocks."""
    from blksprs.ops.matmul import matmul
    from blksprs.utils.blksprs_tensor import BlksprsTensor
    from blksprs.utils.validation import disable_validation

    # Validation reads sums back from the device, so every call would synchronize.
    disable_validation()
    topology, x, dy = problem.layer.topology, problem.x, problem.dy
    size, mask = topology.block_size, topology.mask
    rows, cols, blocks = _row_major(problem)

    def full_topology(rows: int, cols: int) -> BlockTopology:
        ones = torch.ones(rows // size, cols // size, dtype=torch.bool, device=x.device)
        return BlockTopology.from_mask(ones, size)

    def dense(matrix: Tensor) -> tuple[BlksprsTensor, Tensor]:
        full = full_topology(*matrix.shape)
        return BlksprsTensor.wrap(full.pack(matrix)), _layout(full.mask)

    if op == "fwd":
        column_major = (cols.long() * topology.grid[0] + rows.long()).argsort()
        sparse = blocks[column_major].transpose(1, 2).contiguous()
        left, right = dense(x), (BlksprsTensor.wrap(sparse), _layout(mask.T))
    elif op == "dx":
        left, right = dense(dy), (BlksprsTensor.wrap(blocks), _layout(mask))
    else:
        left, right = dense(dy.T.contiguous()), dense(x)
    width = topology.out_features if op == "fwd" else topology.in_features
    out = full_topology(x.shape[0], width)
    out_layout = _layout(mask if op == "dw" else out.mask)
    cache: dict[str, Tensor] = {}

    def read(blocks: Tensor) -> tuple[Tensor]:
        return (_slot_order(problem, blocks) if op == "dw" else out.unpack(blocks),)

    return Contender(lambda: matmul(*left, *right, out_layout, size, cache), read)


def cusparselt(problem: Problem, op: str) -> Contender:
    """Return the product of PyTorch's 2:4 sparse tensors by cuSPARSELt, over the whole matrix."""
    return _semi_structured(problem, op, torch.sparse.SparseSemiStructuredTensorCUSPARSELT)


def cutlass(problem: Problem, op: str) -> Contender:
    """Return the product of PyTorch's 2:4 sparse tensors by CUTLASS, over the whole matrix."""
    return _semi_structured(problem, op, torch.sparse.SparseSemiStructuredTensorCUTLASS)


def _semi_structured(problem: Problem, op: str, tensor_class: Any) -> Contender:
    if problem.layer.nm is None:
        raise NotImplementedError("needs 2:4 sparse blocks (--nm 2:4)")
    if op != "fwd":
        # PyTorch's training makes W 2:4 sparse both ways, and so another matrix, in every step.
        raise NotImplementedError("multiplies forward only by this W")
    weight, x = tensor_class.from_dense(problem.linear.weight.detach()), problem.x
    return Contender(lambda: F.linear(x, weight))


Peer = Callable[[Problem, str], Contender]
PEERS: dict[str, Peer] = {
    "torch_bsr": torch_bsr,
    "stk": stk,
    "blksprs": blksprs,
    "cusparselt": cusparselt,
    "cutlass": cutlass,
}
_PACKAGES = {"torch_bsr": "triton", "stk": "stk", "blksprs": "blksprs"}
# PyTorch has these, but only for 2:4 sparse matrices.
_FOR_NM = ("cusparselt", "cutlass")


def installed_peers(nm: str | None = None) -> list[str]:
    """Return the names of the peers that are installed and multiply blocks of a pattern."""
    found = [name for name, package in _PACKAGES.items() if importlib.util.find_spec(package)]
    return [*found, *(_FOR_NM if nm is not None else ())]


def _row_major(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows, columns and values of the present blocks in row-major order."""
    topology = problem.layer.topology
    cols, slots = topology.row_entries.long().unbind(1)
    rows = torch.repeat_interleave(topology.row_offsets.diff().long())
    return rows, cols, topology.expand(problem.layer.values.detach())[slots]


def _slot_order(problem: Problem, blocks: Tensor) -> Tensor:
    """Return row-major blocks in the slot order of `values`; all slots must be filled."""
    slots = problem.layer.topology.row_entries[:, 1].long()
    out = torch.empty_like(blocks)
    out[slots] = blocks
    return out


def _layout(mask: Tensor) -> Tensor:
    return mask.unsqueeze(0).contiguous()
