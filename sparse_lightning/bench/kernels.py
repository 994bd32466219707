"""Time every product against its dense counterpart, after checking its result."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from sparse_lightning.bench.peers import PEERS
from sparse_lightning.bench.problem import Contender, Problem
from sparse_lightning.bench.timing import Times, host_times
from sparse_lightning.kernels.choice import STEP
from sparse_lightning.kernels.timing import count_copies, device_times, speedup


@dataclass(frozen=True)
class Row:
    """Measurement of one op at one block size and density.

    Attributes:
        op: key of `problem.OPS`.
        tokens: number of tokens of the input.
        block_size: block size of the layer.
        density: density of the layer after rounding to whole blocks.
        sparse: `Times` of the block-sparse op in ms.
        dense: `Times` of the dense product in ms.
        tflops: TFLOP/s, from `Problem.flops` and the median time.
        speedup: median over the rounds of dense time / block-sparse time.
        peers: speed-up of each peer over the same dense product; None if the peer failed.
        peer_times: `Times` in ms of the peers that did not fail.
        remarks: reason for failure by peer.
    """

    op: str
    tokens: int
    block_size: int
    density: float
    sparse: Times
    dense: Times
    tflops: float
    speedup: float
    peers: dict[str, float | None] = field(default_factory=dict)
    peer_times: dict[str, Times] = field(default_factory=dict)
    remarks: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the row as plain data, for JSON."""
        return asdict(self)


def measure(problem: Problem, op: str, peers: Sequence[str], repeats: int) -> Row:
    """Check one op, its dense product and the peers, then time them in alternation.

    Args:
        problem: operands of the product.
        op: key of `problem.OPS`.
        peers: names in `peers.PEERS`.
        repeats: number of rounds.

    Raises:
        AssertionError: if the block-sparse or the dense result is wrong; nothing is timed then.
    """
    contenders = {"ours": problem.ours(op), "dense": problem.dense(op)}
    for name, contender in contenders.items():
        try:
            problem.check(op, contender)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
    remarks = {}
    for name in peers:
        try:
            contenders[name] = _checked_peer(problem, op, name)
        # A peer can raise anything; the message becomes its remark.
        except Exception as error:
            remarks[name] = (str(error).strip().splitlines() or [type(error).__name__])[0][:100]

    device = problem.x.device
    functions = [[contender.run] for contender in contenders.values()]
    if op == "host":
        times = host_times([run for (run,) in functions], repeats, device)
    else:
        if op in STEP and device.type == "cuda" and not peers:
            # Peers may do what a CUDA graph cannot capture, and all contenders are timed alike.
            for clone in problem.clones(count_copies(problem.layer.values.nbytes) - 1):
                functions[0].append(clone.ours(op).run)
                functions[1].append(clone.dense(op).run)
        times = device_times(functions, repeats, device)
    samples = dict(zip(contenders, times, strict=True))

    speedups = {name: speedup(samples["dense"], ours) for name, ours in samples.items()}
    sparse = Times.from_samples(samples["ours"])
    return Row(
        op=op,
        tokens=problem.x.shape[0],
        block_size=problem.layer.block_size,
        density=problem.layer.density,
        sparse=sparse,
        dense=Times.from_samples(samples["dense"]),
        tflops=problem.flops(op) / sparse.median / 1e9,
        speedup=speedups["ours"],
        peers={name: speedups.get(name) for name in peers},
        peer_times={name: Times.from_samples(samples[name]) for name in peers if name in samples},
        remarks=remarks,
    )


def _checked_peer(problem: Problem, op: str, name: str) -> Contender:
    if op not in ("fwd", "dx", "dw"):
        raise NotImplementedError(f"is compared on fwd, dx and dw only, not on {op}")
    contender = PEERS[name](problem, op)
    problem.check(op, contender)
    return contender


def measure_all(
    tokens: Sequence[int],
    features: tuple[int, int],
    ops: Sequence[str],
    block_sizes: Sequence[int],
    densities: Sequence[float],
    *,
    dtype: torch.dtype,
    device: torch.device,
    peers: Sequence[str],
    repeats: int,
    seed: int,
    nm: str | None = None,
) -> Iterator[Row]:
    """Yield the row of every case as soon as it is measured; `features` are those in and out."""
    for block_size, density in itertools.product(block_sizes, densities):
        shape = (max(tokens), *features)
        whole = Problem(shape, block_size, density, dtype=dtype, device=device, seed=seed, nm=nm)
        problems = [whole.with_tokens(n) for n in tokens]
        for op, problem in itertools.product(ops, problems):
            try:
                yield measure(problem, op, peers, repeats)
            except AssertionError as error:
                raise AssertionError(
                    f"{op} of {problem.x.shape[0]} tokens with blocks of {block_size} at density "
                    f"{density} is wrong: {error}"
                ) from None


def table_head(peers: Sequence[str]) -> str:
    """Return the header of the Markdown table."""
    columns = ["op", "tokens", "B", "density", "ms (10-90 %)", "TFLOP/s", "speed-up", *peers]
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


def table_row(row: Row) -> str:
    """Return a row of the Markdown table; the peers' columns hold their speed-ups."""
    time = f"{_ms(row.sparse.median)} ({_ms(row.sparse.low)}-{_ms(row.sparse.high)})"
    # Host time is not a measure of arithmetic throughput.
    tflops = "" if row.op == "host" else f"{row.tflops:.3g}"
    cells = [row.op, str(row.tokens), str(row.block_size), f"{row.density:.2f}", time, tflops]
    cells.append(f"{row.speedup:.2f}")
    cells += ["n/a" if ratio is None else f"{ratio:.2f}" for ratio in row.peers.values()]
    return f"| {' | '.join(cells)} |"


def _ms(time: float) -> str:
    """Return a time in ms with at least three digits.

    >>> _ms(0.01234), _ms(12.3456)
    ('0.0123', '12.346')
    """
    return f"{time:.4f}" if time < 0.1 else f"{time:.3f}"
