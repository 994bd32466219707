"""The CUDA backend on a GPU: streams, graphs, devices, sizes, and invalid inputs."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable
from concurrent import futures
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparse_lightning import BlockSparseGLU, BlockSparseLinear, BlockSparseMLP, BlockTopology
from sparse_lightning.kernels import choice, ops, reference
from sparse_lightning.kernels.activations import ACTIVATIONS, activate, activation_backward
from sparse_lightning.kernels.hopper import launchers as hopper
from sparse_lightning.kernels.hopper import programs as hopper_programs
from sparse_lightning.kernels.hopper import tensor_maps
from sparse_lightning.kernels.launch import has_clusters
from sparse_lightning.kernels.portable import launchers as portable
from sparse_lightning.kernels.portable.programs import most_tokens
from sparse_lightning.policy.criteria import BlockScores, gradient, magnitude, seeded_generator
from sparse_lightning.policy.updates import update_topology
from tests.kernels.test_parity import (
    DTYPES,
    MASKS,
    Case,
    cases,
    check_parity,
    force_kernels,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
DEVICE = torch.device("cuda")


@pytest.fixture(params=choice.KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with each kind of kernels."""
    force_kernels(request.param, monkeypatch)
    return request.param


def make_layer(
    in_features: int = 256,
    out_features: int = 192,
    *,
    block_size: int = 16,
    density: float = 0.3,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device = DEVICE,
) -> BlockSparseLinear:
    return BlockSparseLinear(
        in_features, out_features, block_size=block_size, density=density, dtype=dtype
    ).to(device)


def run(layer: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Output and gradients of a layer."""
    x = x.detach().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], dy)]


def run_backward(layer: BlockSparseLinear, x: Tensor, dy: Tensor) -> list[Tensor | None]:
    """Like `run`, by `backward`, with the block norms if it computes them."""
    leaves = [x.detach().requires_grad_(), *layer.parameters(), layer.block_norms]
    for leaf in leaves:
        leaf.grad = None
    y = layer(leaves[0])
    y.backward(dy)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def norms_of(dy: Tensor, x: Tensor, block_size: int) -> Tensor:
    return ops.block_norms(dy, x, torch.tensor(True).to(x.device), block_size)


def assert_same(actual: list[Tensor], expected: list[Tensor], **tolerance: float) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, **tolerance)


def tokens(n: int, layer: BlockSparseLinear) -> tuple[Tensor, Tensor]:
    dtype, device = layer.values.dtype, layer.values.device
    return (
        torch.randn(n, layer.in_features, device=device, dtype=dtype),
        torch.randn(n, layer.out_features, device=device, dtype=dtype),
    )


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, derandomize=True)
@given(data=st.data())
def test_parity_of_a_thousand_topologies(data: st.DataObject) -> None:
    case = data.draw(cases([*MASKS], [16, 32, 64, 128], 9, 7))
    # The portable kernels compute products that the kind does not support.
    with choice.forced(data.draw(st.sampled_from(choice.KINDS))):
        check_parity(case, "cuda")


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned_memory", "kind")
def test_parity_with_many_tokens(block_size: int, dtype: torch.dtype) -> None:
    """dW splits this many tokens, and every tile is used more than once."""
    case = Case("random", (5, 9), block_size, dtype, lead=(2, 1111), spare=3)
    check_parity(case, "cuda")


# The kernels have tilings for up to 8, 16, 32, 64 and 128 tokens; tiles are as large as 256.
FEW_TOKENS = (1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257)


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned_memory", "kind")
def test_parity_with_few_tokens(block_size: int, dtype: torch.dtype) -> None:
    masks = itertools.cycle(["random", "skewed", "empty_row_and_column"])
    for n, mask in zip(FEW_TOKENS, masks, strict=False):
        check_parity(Case(mask, (7, 19), block_size, dtype, lead=(n,), spare=3), "cuda")


@pytest.mark.parametrize("splits", [2, 4])
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float64], ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_parity_of_shared_tiles_of_few_tokens(
    splits: int, block_size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some shares are empty. How many share a tile depends on the number of multiprocessors."""
    if not has_clusters(torch.cuda.current_device()):
        pytest.skip("needs clusters of thread blocks")
    force_kernels(choice.PORTABLE, monkeypatch)
    monkeypatch.setattr(
        portable, "linear_variant", lambda dtype, _, n, *__: (most_tokens(dtype, n), splits)
    )
    for mask, n in itertools.product(MASKS, (1, 9, 20, 40, 100, 300)):
        check_parity(Case(mask, (7, 19), block_size, dtype, lead=(n,), spare=3), "cuda")


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("poisoned_memory", "kind")
def test_parity_with_any_few_tokens(block_size: int, dtype: torch.dtype) -> None:
    for n in range(1, 258):
        check_parity(Case("random", (3, 5), block_size, dtype, lead=(n,), seed=n), "cuda")


TILES = [(b, tile) for b in (16, 32, 64, 128) for tile in hopper_programs.linear_tiles(b)]


@pytest.mark.parametrize(("block_size", "tile"), TILES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_parity_of_all_tiles_on_hopper(
    tile: tuple[int, int], block_size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size of a tile depends on the number of multiprocessors."""
    force_kernels(choice.HOPPER, monkeypatch)
    monkeypatch.setattr(hopper_programs, "linear_tile", lambda *_: tile)
    for mask, n in itertools.product(MASKS, (1, 130, 700)):
        check_parity(Case(mask, (11, 7), block_size, dtype, lead=(n,), spare=3), "cuda")


@pytest.mark.parametrize("grid", [(2, 600), (600, 2)], ids="{0[0]}x{0[1]} blocks".format)
@pytest.mark.parametrize("n", [1, 12, 20, 70])
@pytest.mark.usefixtures("poisoned_memory", "kind")
def test_parity_of_few_tokens_with_many_blocks_in_a_row(n: int, grid: tuple[int, int]) -> None:
    """More than a warp looks up at once."""
    check_parity(Case("all", grid, 16, torch.bfloat16, lead=(n,)), "cuda")


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.usefixtures("kind")
def test_results_are_as_exact_as_those_of_a_dense_layer(
    block_size: int, dtype: torch.dtype
) -> None:
    """Many tokens and features would reveal accumulation in too few bits."""
    layer = make_layer(2048, 1536, block_size=block_size, dtype=dtype)
    dense = layer.to_linear()
    x, dy = tokens(4096, layer)
    exact = run(dense.double(), x.double(), dy.double())
    dense.to(dtype)

    def errors(results: list[Tensor]) -> list[float]:
        return [
            float((result.double() - e).norm() / e.norm())
            for result, e in zip(results, exact, strict=True)
        ]

    y, dx, dvalues, dbias = run(layer, x, dy)
    expected = run(dense, x, dy)
    # Compare the weight gradients at the present blocks.
    exact[2], expected[2] = (layer.topology.pack(results[2]) for results in (exact, expected))
    # Rounding of operands and results dominates in half precision, the order of sums in fp32.
    factor = 2 if dtype == torch.float32 else 1.05
    for ours, theirs in zip(errors([y, dx, dvalues, dbias]), errors(expected), strict=True):
        assert ours <= factor * theirs


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("block_size", "tile"), TILES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_fused_activations(
    activation: str,
    block_size: int,
    dtype: torch.dtype,
    tile: tuple[int, int],
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Activations are computed from the rounded products, as without fusion."""
    if kind != choice.HOPPER and tile != (128, 128):
        pytest.skip("only the kernels for Hopper have tiles of several sizes")
    monkeypatch.setattr(hopper_programs, "linear_tile", lambda *_: tile)
    tolerance = {torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    if kind == choice.DENSE:  # nothing is fused: f(h) is rounded before it is multiplied
        tolerance *= 2
    layer = make_layer(5 * block_size, 3 * block_size, block_size=block_size, dtype=dtype)
    for n in (1, 12, 20, 70, 1000):
        x, dy = tokens(n, layer)
        operands = [o.detach() if isinstance(o, torch.Tensor) else o for o in layer._operands(x)]
        values, indices = operands[0], layer.topology.indices
        columns = values, *indices[3:]
        gate, h, other = (3 * torch.randn_like(t) for t in (dy, x, x))
        close = partial(torch.testing.assert_close, rtol=tolerance, atol=1e-5)

        y, a = ops.block_linear_act(5 * x, *operands[:2], *indices, activation)
        assert torch.equal(y, ops.block_linear(5 * x, *operands))
        close(a.double(), activate(y.double(), activation))
        u, a = ops.block_linear_glu(5 * x, *operands[:2], *indices, gate, activation)
        assert torch.equal(u, y)
        close(a.double(), activate(gate.double(), activation) * u.double())

        dx = ops.block_linear_dx(dy, values, *indices, None, None, 1).double()
        activated = activate(h.double(), activation)
        for recompute in True, False:
            dh, a = ops.block_linear_dh(dy, *columns, h, activation, recompute)
            close(dh.double(), activation_backward(dx, h.double(), activation))
            dg, du, b = ops.block_linear_dglu(dy, *columns, h, other, activation, recompute)
            gradient = activation_backward(dx * other.double(), h.double(), activation)
            close(dg.double(), gradient, atol=1e-4)
            close(du.double(), dx * activated)
            assert a.numel() == b.numel() == recompute * x.numel()
            if recompute:
                close(a.double(), activated)
                close(b.double(), activated * other.double())
        added = ops.block_linear_dx_add(dy, *columns, other)
        close(added.double(), dx + other.double())


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("n", [3, 500])
def test_an_mlp_equals_its_layers(gated: bool, n: int) -> None:
    up, down = make_layer(256, 192), make_layer(192, 256)
    mlp: nn.Module = (
        BlockSparseGLU(make_layer(256, 192), up, down)
        if gated
        else BlockSparseMLP(up, nn.GELU(), down)
    )
    plain = copy.deepcopy(mlp)
    for layer in plain.children():
        layer.register_forward_hook(lambda *_: None)  # so that it is called
    x, dy = (torch.randn(2, n, 256, device=DEVICE).bfloat16() for _ in range(2))
    for a, e in zip(run(mlp, x, dy), run(plain, x, dy), strict=True):
        torch.testing.assert_close(a, e, rtol=2e-2, atol=1e-2 * e.abs().max().item())


def check_dw(topology: BlockTopology, n: int) -> None:
    """Fail unless dW of random operands is right, in bf16."""
    out_features, in_features = (blocks * topology.block_size for blocks in topology.grid)
    x = torch.randn(n, in_features, device=DEVICE, dtype=torch.bfloat16)
    dy = torch.randn(n, out_features, device=DEVICE, dtype=torch.bfloat16)
    dw = ops.block_linear_dw(dy, x, *topology.indices)
    expected = topology.pack(dy.float().T @ x.float())
    torch.testing.assert_close(dw.float(), expected, rtol=1e-2, atol=1e-2 * n**0.5)


@pytest.mark.parametrize(
    ("block_size", "split_k", "multicast"),
    [(size, *cluster) for size in (64, 128) for cluster in hopper_programs.DW_CLUSTERS[size]],
)
@pytest.mark.parametrize("fill", [1.0, 0.6, 0.0], ids="filled to {:.0%}".format)
@pytest.mark.usefixtures("poisoned_memory")
def test_every_partition_of_dw_on_hopper(
    block_size: int, split_k: int, multicast: int, fill: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Includes fewer blocks than slots: the host knows only the number of slots."""
    force_kernels(choice.HOPPER, monkeypatch)
    mask = torch.rand(7, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[2], mask[4] = False, True
    capacity = int(mask.sum())
    mask &= torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)) < fill
    topology = BlockTopology.from_mask(mask, block_size, capacity=capacity).to_(DEVICE)
    fewest = -(-capacity // (multicast * (8 if block_size == 64 else 2)))
    # Many clusters split by rows, few split evenly, and fewer still need several rounds.
    for clusters in {1, (fewest + 1) // 2, fewest, fewest + 2, (fewest + capacity) // 2, capacity}:
        split = hopper_programs.Split(split_k, multicast, clusters)
        monkeypatch.setattr(hopper_programs, "dw_split", lambda *_, split=split: split)
        for n in (1, 1000):
            check_dw(topology, n)


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("split_k", [1, 2])
@pytest.mark.parametrize("in_blocks", [3, 40, 1100], ids="{} columns".format)
@pytest.mark.usefixtures("poisoned_memory")
def test_every_partition_of_dw_of_narrow_blocks_on_hopper(
    block_size: int, split_k: int, in_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Includes groups of several work items, and more columns than one lookup covers."""
    force_kernels(choice.HOPPER, monkeypatch)
    mask = torch.rand(37, in_blocks, generator=torch.Generator().manual_seed(0)) < 0.3
    mask[4:9] = False
    mask[1, -1] = True
    topology = BlockTopology.from_mask(mask, block_size, capacity=int(mask.sum()) + 3).to_(DEVICE)
    for clusters, groups in (1, 1), (3, 7), (50, 50):
        for rows, cost in (1, 0), (4, 9), (16, 100):
            bands = hopper_programs.Bands(split_k, clusters, groups, rows, cost)
            monkeypatch.setattr(hopper_programs, "dw_bands", lambda *_, bands=bands: bands)
            check_dw(topology, 100)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 33, 1000])
@pytest.mark.usefixtures("poisoned_memory", "kind")
def test_norms_of_more_tiles_than_thread_blocks(n: int, dtype: torch.dtype) -> None:
    """One thread block then computes several tiles, both full and partial ones."""
    x = torch.randn(n, 2048 + 48, device=DEVICE).to(dtype)
    dy = torch.randn(n, 4096 + 16, device=DEVICE).to(dtype)
    expected = reference.block_norms(dy.double(), x.double(), (257, 131))
    torch.testing.assert_close(norms_of(dy, x, 16).double(), expected, rtol=1e-4, atol=1e-5)
    unarmed = ops.block_norms(dy, x, torch.tensor(False).to(DEVICE), 16)
    assert unarmed.shape == (257, 131) and unarmed.count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_misaligned_memory(dtype: torch.dtype, kind: str) -> None:
    layer = make_layer(dtype=dtype)
    x, dy = tokens(33, layer)
    expected = run(layer, x, dy)

    def shifted(tensor: Tensor) -> Tensor:
        out = torch.empty(tensor.numel() + 1, device=DEVICE, dtype=dtype)[1:].view_as(tensor)
        assert out.data_ptr() % 16 != 0
        return out.copy_(tensor)

    layer.values = nn.Parameter(shifted(layer.values.data))
    layer.bias = nn.Parameter(shifted(layer.bias.data))
    # The dense library may choose another algorithm for misaligned memory.
    tolerance = {} if kind == choice.DENSE else {"rtol": 0, "atol": 0}
    assert_same(run(layer, shifted(x), shifted(dy)), expected, **tolerance)


# -- determinism --------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [7, 20, 100, 4096])
@pytest.mark.usefixtures("kind")
def test_two_runs_give_the_same_bits(n: int) -> None:
    layer = make_layer()
    layer.arm(True)
    x, dy = tokens(n, layer)
    first = run_backward(layer, x, dy)
    assert first[-1] is not None
    assert_same(run_backward(layer, x, dy), first, rtol=0, atol=0)


@pytest.mark.parametrize("n", [7, 20, 100, 300])
@pytest.mark.usefixtures("kind")
def test_results_do_not_depend_on_slots(n: int) -> None:
    layer = make_layer()
    x, dy = tokens(n, layer)
    y, dx, dvalues, dbias = run(layer, x, dy)
    order = torch.randperm(layer.topology.capacity, device=DEVICE)
    topology = layer.topology
    other = BlockSparseLinear(
        layer.in_features,
        layer.out_features,
        topology=BlockTopology(topology.coords[order], topology.grid, topology.block_size),
        device=DEVICE,
        dtype=layer.values.dtype,
    )
    other.load_state_dict({**other.state_dict(), "bias": layer.bias})
    with torch.no_grad():
        other.values.copy_(layer.values[order])
    assert_same(run(other, x, dy), [y, dx, dvalues[order], dbias], rtol=0, atol=0)


# -- streams, graphs, devices, the host ---------------------------------------------------------


@pytest.mark.usefixtures("kind")
def test_kernels_run_on_the_current_stream() -> None:
    layer = make_layer()
    x, dy = tokens(128, layer)
    expected = run(layer, x, dy)
    streams = [torch.cuda.Stream() for _ in range(2)]
    results = []
    torch.cuda.synchronize()
    for stream in streams:
        with torch.cuda.stream(stream):
            late_x, late_dy = torch.full_like(x, torch.nan), torch.full_like(dy, torch.nan)
            torch.cuda._sleep(20_000_000)  # a kernel on any other stream would read the NaNs
            late_x.copy_(x), late_dy.copy_(dy)
            results.append(run(layer, late_x, late_dy))
    torch.cuda.synchronize()
    for result in results:
        assert_same(result, expected, rtol=0, atol=0)


@pytest.mark.parametrize("is_captured", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("product", ["fwd", "fused fwd", "dx", "fused dx", "dw", "norms"])
@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize("kind", [choice.PORTABLE, choice.HOPPER])
def test_a_product_that_is_the_first_cuda_call_of_its_thread(
    kind: str, block_size: int, product: str, is_captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autograd's threads have no context yet if their memory comes from PyTorch's cache."""
    force_kernels(kind, monkeypatch)
    layer = make_layer(256, 384, block_size=block_size)
    x, dy = tokens(128, layer)
    values, bias, indices = layer.values.detach(), layer.bias.detach(), layer.topology.indices
    armed = torch.tensor(True).to(DEVICE)
    compute: Callable[[], Tensor] = {
        "fwd": lambda: ops.block_linear(x, values, bias, *indices, None, None, 1),
        "fused fwd": lambda: ops.block_linear_act(x, values, bias, *indices, "gelu")[1],
        "dx": lambda: ops.block_linear_dx(dy, values, *indices, None, None, 1),
        "fused dx": lambda: ops.block_linear_dh(dy, values, *indices[3:], x, "gelu", True)[0],
        "dw": lambda: ops.block_linear_dw(dy, x, *indices),
        "norms": lambda: ops.block_norms(dy, x, armed, block_size),
    }[product]
    expected = compute()  # loads the kernel
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph) if is_captured else contextlib.nullcontext():
        compute()  # leaves memory in the allocator's cache
        tensor_maps.tensor_map.cache_clear()
        stream = torch.cuda.current_stream()

        def run_on_stream() -> Tensor:
            torch.cuda.set_stream(stream)
            return compute()

        with futures.ThreadPoolExecutor(1) as thread:
            result = thread.submit(run_on_stream).result()
    if is_captured:
        graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


@pytest.mark.parametrize("n", [1, 20, 64, 4096])
@pytest.mark.usefixtures("kind")
def test_a_graph_follows_topology_updates(n: int) -> None:
    """It also follows arming, although neither the loading nor the captured step is armed."""
    layer = make_layer()
    x, dy = tokens(n, layer)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        assert run_backward(layer, x, dy)[-1] is None  # loads the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Keep the captured gradients: the eager runs below replace those of the leaves.
        *captured, norms = run_backward(layer, x, dy)
    assert norms is not None
    for step, armed in enumerate((False, True, True, False)):
        scores = [torch.rand(layer.topology.grid, device=DEVICE) for _ in range(2)]
        target = layer.topology.capacity - step
        layer.apply_update(update_topology(layer.topology, *scores, target, fraction=0.5))
        with torch.no_grad():
            present = (layer.topology.coords[:, 0] >= 0).view(-1, 1, 1)
            layer.values.copy_(torch.randn_like(layer.values) * present)
        layer.arm(armed)
        graph.replay()
        *expected, expected_norms = run_backward(layer, x, dy)
        assert_same(captured, expected, rtol=0, atol=0)
        if armed:
            assert (norms > 0).all()
            torch.testing.assert_close(norms, expected_norms, rtol=0, atol=0)
        else:
            assert norms.count_nonzero() == 0 and expected_norms is None


def test_a_graph_sums_the_norms_of_its_micro_batches() -> None:
    layer = make_layer()
    batches = [tokens(64, layer) for _ in range(2)]

    def step() -> Tensor | None:
        layer.block_norms.grad = None
        for x, dy in batches:
            layer(x).backward(dy)
        return layer.block_norms.grad

    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        step()  # loads the kernels
    torch.cuda.synchronize()
    layer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norms = step()
    assert norms is not None
    layer.arm(True)
    expected = step()
    assert expected is not None and (expected > 0).all()
    for _ in range(2):  # a replay does not accumulate over the previous one
        graph.replay()
        torch.testing.assert_close(norms, expected, rtol=0, atol=0)


def test_nothing_is_launched_for_norms_while_not_armed(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer()
    x, dy = tokens(64, layer)
    launched = []
    monkeypatch.setattr(portable, "norms", lambda *_: launched.append("portable"))
    monkeypatch.setattr(hopper, "norms", lambda *_: launched.append("hopper"))
    run_backward(layer, x, dy)
    assert not launched
    layer.arm(True)
    run_backward(layer, x, dy)
    assert len(launched) == 1


@pytest.mark.usefixtures("kind")
def test_a_step_does_not_wait_for_the_device() -> None:
    layer = make_layer(dtype=torch.float32)
    layer.arm(True)
    x = torch.randn(4096, layer.in_features, device=DEVICE, requires_grad=True)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = layer(x).square().mean()
        loss.backward()
        optimizer.step()

    step()  # loads the kernels and creates the optimizer state
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_the_device_of_the_tensors_is_used_not_the_current_one() -> None:
    first = make_layer()
    second = make_layer(device=torch.device("cuda:1"))
    second.load_state_dict(first.state_dict())
    x, dy = tokens(300, first)
    expected = run(first, x, dy)
    assert torch.cuda.current_device() == 0
    assert_same([t.to(DEVICE) for t in run(second, x.to(1), dy.to(1))], expected, rtol=0, atol=0)
    with torch.cuda.device(1):
        assert_same(run(first, x, dy), expected, rtol=0, atol=0)
    # One autograd graph spans both devices, and each device has its own backward thread.
    x.requires_grad_()
    (first(x).sum() + second(x.to(1)).sum().to(0)).backward()
    torch.testing.assert_close(second.values.grad.to(0), first.values.grad, rtol=0, atol=0)


# -- large sizes --------------------------------------------------------------------------------


def _free_memory() -> int:
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


@pytest.mark.slow
@pytest.mark.skipif(_free_memory() < 40 << 30, reason="needs 40 GB of GPU memory")
def test_more_than_two_to_the_31_activations() -> None:
    layer = make_layer(1024, 1024, block_size=64)
    n = 2**31 // 1024 + 333
    x, dy = tokens(n, layer)
    y, dx, dvalues, _ = run(layer, x, dy)
    ends = torch.cat([torch.arange(5), torch.arange(n - 200, n)]).to(DEVICE)
    weight = layer.dense_weight().float()
    expected = (x[ends].float() @ weight.T + layer.bias.float()).bfloat16()
    torch.testing.assert_close(y[ends], expected, rtol=1e-2, atol=1e-2)
    expected = (dy[ends].float() @ weight).bfloat16()
    torch.testing.assert_close(dx[ends], expected, rtol=1e-2, atol=1e-2)
    del y, dx
    dense = torch.zeros_like(weight)
    for part in torch.arange(n, device=DEVICE).split(2**18):
        dense += dy[part].float().T @ x[part].float()
    expected = layer.topology.pack(dense)
    assert (dvalues.float() - expected).norm() < 5e-3 * expected.norm()
    expected = dense.view(16, 64, 16, 64).square().sum((1, 3))
    torch.testing.assert_close(norms_of(dy, x, 64), expected, rtol=1e-2, atol=0)


@pytest.mark.slow
@pytest.mark.skipif(_free_memory() < 40 << 30, reason="needs 40 GB of GPU memory")
def test_more_than_two_to_the_31_values() -> None:
    out_blocks, in_blocks, size = 512, 257, 128
    everywhere = torch.ones(out_blocks, in_blocks, dtype=torch.bool)
    topology = BlockTopology.from_mask(everywhere, size).to_(DEVICE)
    values = torch.randn(topology.capacity, size, size, device=DEVICE, dtype=torch.bfloat16)
    assert values.numel() > 2**31
    x = torch.randn(16, in_blocks * size, device=DEVICE, dtype=torch.bfloat16)
    dy = torch.randn(16, out_blocks * size, device=DEVICE, dtype=torch.bfloat16)
    indices = topology.indices
    y = ops.block_linear(x, values, None, *indices, None, None, 1)
    last = values[-in_blocks:].transpose(0, 1).reshape(size, -1)  # the last block row
    _assert_near(y[:, -size:], x.float() @ last.float().T)
    dx = ops.block_linear_dx(dy, values, *indices, None, None, 1)
    last = values[in_blocks - 1 :: in_blocks].reshape(-1, size)  # the last block column
    _assert_near(dx[:, -size:], dy.float() @ last.float())
    dw = ops.block_linear_dw(dy, x, *indices)
    _assert_near(dw[-1], dy[:, -size:].float().T @ x[:, -size:].float())


def _assert_near(actual: Tensor, expected: Tensor) -> None:
    assert (actual.float() - expected).norm() < 5e-3 * expected.norm()


# -- the topology update ------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [16, 64])
def test_an_update_on_the_device_equals_one_on_the_cpu(block_size: int) -> None:
    layer = make_layer(1024, 768, block_size=block_size, dtype=torch.float32)
    twin = make_layer(1024, 768, block_size=block_size, dtype=torch.float32, device="cpu")
    twin.load_state_dict(layer.state_dict())
    for step in range(5):
        scores = torch.rand(layer.topology.grid)
        updates = [_decide(module, step, scores) for module in (layer, twin)]
        assert torch.equal(updates[0].coords, updates[1].coords)
        for module, update in zip((layer, twin), updates, strict=True):
            module.apply_update(update)
        for name, tensor in vars(twin.topology).items():
            if isinstance(tensor, Tensor):
                assert torch.equal(getattr(layer.topology, name).cpu(), tensor), name


def test_the_memory_of_an_update_follows_blocks_not_elements() -> None:
    layer = make_layer(8192, 8192, block_size=64, density=0.02, dtype=torch.float32)
    norms = torch.rand(layer.topology.grid, device=DEVICE)
    _decide(layer, 0, norms)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    layer.apply_update(_decide(layer, 1, norms))
    peak = torch.cuda.max_memory_allocated() - before
    n_blocks = 128 * 128
    assert peak < 200 * n_blocks < 8192 * 8192 // 20


def _decide(layer: BlockSparseLinear, step: int, norms: Tensor):
    scores = BlockScores(
        mask=layer.topology.mask,
        magnitude=layer.magnitudes(),
        generator=seeded_generator(0, step, "layer"),
        gathered={"gradient": norms.to(layer.values.device).sqrt()},
    )
    target = layer.topology.capacity
    return update_topology(layer.topology, magnitude(scores), gradient(scores), target, 0.3)


# -- invalid inputs -----------------------------------------------------------------------------


def _arguments(layer: BlockSparseLinear, x: Tensor) -> tuple[Tensor | None, ...]:
    return (x, layer.values, layer.bias, *layer.topology.indices, None, None, 1)


@pytest.mark.parametrize(
    ("spoil", "error", "says"),
    [
        (lambda x: x.cpu(), RuntimeError, r"same device; got .*\.to\(device\)"),
        (lambda x: x.float(), TypeError, r"dtype of values.*bfloat16; got torch\.float32"),
        (lambda x: x[:, 1:], ValueError, r"256 features; got \[3, 255\]"),
    ],
)
def test_wrong_inputs(spoil: Callable[[Tensor], Tensor], error: type, says: str) -> None:
    layer = make_layer()
    x, _ = tokens(3, layer)
    with pytest.raises(error, match=says), torch.no_grad():
        ops.block_linear(*_arguments(layer, spoil(x)))


def test_a_gradient_that_does_not_fit() -> None:
    layer = make_layer()
    x, dy = tokens(3, layer)
    with pytest.raises(ValueError, match=r"shape \[3, 192\].*got \[2, 192\]"):
        norms_of(dy[:2], x, 16)
    with pytest.raises(TypeError, match=r"dtype of x, torch\.bfloat16; got torch\.float32"):
        norms_of(dy.float(), x, 16)
    with pytest.raises(ValueError, match=r"`out_features` must be .*block_size=128; got 192"):
        norms_of(dy, x, 128)
    with pytest.raises(RuntimeError, match=r"same device"):
        ops.block_norms(dy, x, torch.tensor(True), 16)


def test_a_kernel_is_loaded_once_per_device() -> None:
    kernel = portable.norms_kernel(torch.bfloat16, 0)
    assert portable.norms_kernel(torch.bfloat16, 0) is kernel
