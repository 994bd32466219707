"""The kernel choice: tables, their files, which of them a device uses, and the kinds chosen."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_lightning import BlockSparseLinear, BlockTopology
from sparse_lightning.kernels import choice, cpu, cuda, speedups
from sparse_lightning.kernels.choice import KINDS
from sparse_lightning.kernels.hopper import launchers as hopper
from sparse_lightning.kernels.portable import launchers as portable
from sparse_lightning.kernels.speedups import (
    DeviceSpeedups,
    Measured,
    Table,
    measured_file,
    read_rows,
    tuned_file,
    write_rows,
)

SHAPE = (8192, 4096, 4096)
GPU = "NVIDIA H100 80GB"


def row(density: float, op: str = "fwd", shape: Any = SHAPE, **ratios: float) -> Measured:
    return Measured(op, "half", 64, shape, density, ratios)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Simulate a Hopper GPU without shipped tables; return the path of its tuned table."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: GPU)
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("SPARSE_LIGHTNING_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(speedups, "SHIPPED_TABLES", tmp_path)
    choice.clear_table_cache()
    yield tuned_file(GPU)
    choice.clear_table_cache()


def choose(
    op: str = "fwd",
    capacity: int = 1024,
    tokens: int = 8192,
    dtype: torch.dtype = torch.bfloat16,
) -> str:
    return choice.choose(op, dtype, 64, capacity, (64, 64), tokens, 0)


# -- predictions ------------------------------------------------------------------------------


def test_speedups_are_interpolated_along_density_and_tokens() -> None:
    """Linearly in logs; not every combination need be measured."""
    rows = [row(0.5, portable=1.0), row(0.125, portable=4.0)]
    table = Table([*rows, row(0.5, shape=(512, 4096, 4096), portable=4.0)])

    def speedup(density: float, tokens: int = 8192) -> float:
        return table.predict("fwd", "half", 64, (tokens, 4096, 4096), density)["portable"]

    assert speedup(0.25) == pytest.approx(2.0)
    assert speedup(0.5) == 1.0 and speedup(0.125) == 4.0
    assert speedup(0.9) == speedup(1.0) == 1.0 and speedup(0.01) == 4.0
    assert speedup(0.5, 2048) == pytest.approx(2.0)
    assert speedup(0.5, 1) == 4.0 and speedup(0.5, 10**6) == 1.0
    assert speedup(0.125, 2048) == pytest.approx(4.0)


def test_layers_in_between_depend_on_their_neighbours() -> None:
    sizes = (512, 2048, 8192, 32768)
    rows = [
        row(0.5, shape=(64, *features), portable=100.0 if 32768 in features else 2.0)
        for features in itertools.product(sizes, sizes)
    ]
    predicted = Table(rows).predict("fwd", "half", 64, (64, 1024, 1024), 0.5)["portable"]
    assert predicted == pytest.approx(2.0, rel=0.1)
    lone = Table([row(0.5, shape=(64, 512, 512), portable=3.0)])
    assert lone.predict("fwd", "half", 64, (64, 4096, 16384), 0.5) == {"portable": 3.0}
    assert lone.predict("dx", "half", 64, SHAPE, 0.5) == {}


TOKENS, DENSITIES = (1, 16, 256, 4096), (0.05, 0.1, 0.5)
FEATURES = ((512, 512), (512, 2048), (2048, 2048), (8192, 512))


@st.composite
def grids(draw: st.DrawFn) -> dict[tuple[int, float, tuple[int, int]], float]:
    """Speed-ups that grow with tokens and fall with density, as those of sums do."""
    values = {}
    for features in FEATURES:
        by_tokens = [draw(st.floats(0.1, 2.0)) for _ in TOKENS]
        by_density = [draw(st.floats(0.1, 2.0)) for _ in DENSITIES]
        for i, j in itertools.product(range(len(TOKENS)), range(len(DENSITIES))):
            value = sum(by_tokens[: i + 1]) + sum(by_density[j:])
            values[TOKENS[i], DENSITIES[j], features] = value
    return values


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    grid=grids(),
    features=st.sampled_from([*FEATURES, (1024, 1024), (4096, 700), (100, 100_000)]),
    tokens=st.lists(st.integers(1, 10_000), min_size=2, max_size=2),
    densities=st.lists(st.floats(0.01, 1.0), min_size=2, max_size=2),
)
def test_predictions(
    grid: Mapping[Any, float], features: Any, tokens: list[int], densities: list[float]
) -> None:
    table = Table(row(d, shape=(t, *f), portable=s) for (t, d, f), s in grid.items())

    def predict(t: int, d: float, f: Any = features) -> float:
        return table.predict("fwd", "half", 64, (t, *f), d)["portable"]

    # Exact where measured.
    for (t, d, f), value in grid.items():
        assert predict(t, d, f) == pytest.approx(value, rel=1e-5)
    # Between the smallest and the largest of the cells around it, at all layers.
    around = [
        value
        for (t, d, _), value in grid.items()
        if _is_neighbour(t, tokens[0], TOKENS) and _is_neighbour(d, densities[0], DENSITIES)
    ]
    assert min(around) - 1e-5 <= predict(tokens[0], densities[0]) <= max(around) + 1e-5
    # Monotone data stay monotone.
    (few, many), (low, high) = sorted(tokens), sorted(densities)
    assert predict(few, low) <= predict(many, low) + 1e-5
    assert predict(few, high) <= predict(few, low) + 1e-5


def _is_neighbour(measured: float, x: float, points: tuple[float, ...]) -> bool:
    below = max((p for p in points if p <= x), default=points[0])
    above = min((p for p in points if p >= x), default=points[-1])
    return below <= measured <= above


def test_only_available_and_measured_kinds_are_chosen() -> None:
    table = Table([row(0.5, portable=1.0, hopper=2.0, dense=0.9)])
    assert table.fastest("fwd", "half", 64, SHAPE, 0.5, KINDS) == "hopper"
    assert table.fastest("fwd", "half", 64, SHAPE, 0.5, ["portable", "dense"]) == "portable"
    assert table.fastest("dx", "half", 64, SHAPE, 0.5, KINDS) is None
    # A kind measured at one density only cannot be compared at others.
    table = Table([row(0.5, portable=1.0, hopper=2.0), row(0.1, portable=3.0)])
    assert set(table.predict("fwd", "half", 64, SHAPE, 0.3)) == {"portable"}
    assert set(table.predict("fwd", "half", 64, SHAPE, 0.5)) == {"portable", "hopper"}


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (SHAPE, True),
        ((16384, 2048, 8192), True),  # a factor of 2 in each size and in tokens
        ((256, 4096, 4096), True),  # between the measured numbers of tokens
        ((1, 4096, 4096), False),
        ((8192, 1024, 4096), False),
        ((8192, 4096, 16384), False),
    ],
)
def test_covered_shapes(shape: Any, expected: bool) -> None:
    table = Table([row(0.5, shape=(tokens, 4096, 4096), dense=0.9) for tokens in (8, 8192)])
    assert table.covers("fwd", "half", 64, shape) is expected
    assert not table.covers("fwd", "half", 32, shape) and not Table([]).covers(
        "fwd", "half", 64, shape
    )


@pytest.mark.parametrize(
    ("op", "dtype", "capability", "expected"),
    [
        ("fwd", torch.bfloat16, (9, 0), KINDS),
        ("dw", torch.float16, (9, 0), KINDS),
        ("norms", torch.bfloat16, (9, 0), ("portable", "hopper")),
        ("fwd", torch.float32, (9, 0), ("portable", "dense")),
        ("fwd", torch.bfloat16, (8, 0), ("portable", "dense")),
        ("norms", torch.bfloat16, (10, 0), ("portable",)),
    ],
)
def test_available_kinds(op: str, dtype: torch.dtype, capability: Any, expected: Any) -> None:
    assert tuple(choice.available_kinds(op, dtype, capability)) == expected


# -- files, and the tables of a device --------------------------------------------------------


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    rows = [row(0.5, portable=1.25, hopper=2.5), row(0.1, "dw", dense=0.875)]
    path = tmp_path / "table.json"
    write_rows(path, rows, {"device": "a GPU"})
    assert json.loads(path.read_text())["environment"] == {"device": "a GPU"}
    assert read_rows(path) == rows


@pytest.mark.parametrize(
    "content", ["", "{}", "[1]", '{"rows": [{"op": "fwd"}]}', '{"rows": [{"speed": 1}]}']
)
def test_a_damaged_file_is_named(content: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"table\.json' must be a table.*Measure it again"):
        read_rows(path)


@pytest.mark.parametrize(
    "change",
    [
        {"op": 1},
        {"dtype": None},
        {"block_size": "64"},
        {"shape": [8, 64]},
        {"shape": [8, 64, 0]},
        {"shape": [8, 64, 64.5]},
        {"density": 0},
        {"density": 1.5},
        {"density": "1"},
        {"speedups": {}},
        {"speedups": [1.0]},
        {"speedups": {"dense": 0}},
        {"speedups": {"dense": float("nan")}},
        {"speedups": {"dense": float("inf")}},
        {"speedups": {"dense": True}},
    ],
    ids=str,
)
def test_a_damaged_row_is_named(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    good = asdict(row(0.5, dense=1.0))
    path.write_text(json.dumps({"rows": [good, {**good, **change}]}))
    with pytest.raises(ValueError, match=r"table\.json' must be a table.* at row 1: .*Measure it"):
        read_rows(path)


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"'{tmp_path}' must be a table"):
        read_rows(tmp_path)


def test_without_a_table_the_portable_kernels_compute(device: Path) -> None:
    assert not device.exists()
    assert {choose(op) for op in choice.OPS} == {"portable"}


def ship(name: str, *rows: Measured) -> None:
    write_rows(speedups.SHIPPED_TABLES / f"{name}.json", rows, {})


def test_a_tuned_table_wins_cell_by_cell(device: Path) -> None:
    other = row(0.25, shape=(8192, 512, 512), portable=3.0)
    ship("sm_90-NVIDIA-H100-80GB", row(0.25, portable=1.0, hopper=2.0, dense=0.9), other)
    assert choose() == "hopper" and choose("dx") == "portable"
    write_rows(device, [row(0.25, portable=1.0, hopper=0.5, dense=1.5)], {})
    assert choose() == "hopper"  # choices are cached
    choice.clear_table_cache()
    assert choose() == "dense"
    table = choice.device_speedups(0).table
    assert table.predict("fwd", "half", 64, other.shape, 0.25) == other.speedups


def test_a_similar_gpu_stands_in(device: Path) -> None:
    names = {"sm_90-NVIDIA-H100-PCIe": 1.0, "sm_90-NVIDIA-H200": 2.0, "sm_80-NVIDIA-H200-NVL": 9.0}
    for name, ratio in names.items():
        ship(name, row(0.5, dense=ratio))

    def found(name: str, family: str = "sm_90") -> float | None:
        table = DeviceSpeedups(name, family).table
        return table.predict("fwd", "half", 64, SHAPE, 0.5).get("dense")

    assert found("NVIDIA H200") == found("NVIDIA H200 NVL") == 2.0
    assert found("NVIDIA H100 80GB HBM3") == 1.0
    assert found("NVIDIA H200", "sm_120") is None


def test_measurements_of_a_training_serve_their_own_layer_shape(
    device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another shape's choice does not depend on what was measured since."""
    ship("sm_90-x", row(0.25, portable=1.0, dense=2.0), row(0.25, "dx", portable=1.0, dense=2.0))
    write_rows(measured_file(GPU), [row(0.25, portable=3.0, dense=2.0)], {})
    assert choose() == "dense"  # measuring is off
    monkeypatch.delenv(speedups.MEASURE_VARIABLE)
    known = DeviceSpeedups(GPU, "sm_90")

    def predict(op: str, *features: int) -> float:
        table = known.table_for(("half", 64, *features))
        return table.predict(op, "half", 64, (8192, *features), 0.25)["portable"]

    assert predict("fwd", 4096, 4096) == 3.0
    assert predict("dx", 4096, 4096) == 1.0, "other cells are those of the table"
    assert predict("fwd", 4096, 2048) == 1.0


def test_a_layer_measured_in_part_does_not_depend_on_others(
    device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one whose memory was exhausted before its norms."""
    monkeypatch.delenv(speedups.MEASURE_VARIABLE)
    other = row(1.0, "norms", (256, 512, 512), portable=1.0, hopper=2.0)
    write_rows(measured_file(GPU), [row(0.25, portable=3.0, dense=2.0), other], {})
    assert choose("norms") == "portable"


# Cells in which the fastest kind is slower than .95 of the dense product: all, and those of large
# sparse layers in half precision. In a table that is not listed there must be none. The others are
# dense layers, blocks of 16 and 32, and layers so small that launches take most of the time.
SLOW_CELLS = {"sm_90-NVIDIA-H100-80GB-HBM3": (156, 0), "sm_90-NVIDIA-H200": (3107, 9)}
TABLES = sorted((Path(speedups.__file__).parent / "tables").glob("*.json"))


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_what_is_chosen_from_a_shipped_table_is_fast(path: Path) -> None:
    rows = read_rows(path)
    table = Table(rows)
    slow = [
        r
        for r in rows
        if r.op != "norms"
        and r.speedups[table.fastest(*r.cell[:3], r.shape, r.density, KINDS)] < 0.95  # type: ignore
    ]
    large = [
        r.cell
        for r in slow
        if r.dtype == "half" and r.block_size >= 64 and r.density < 0.3 and min(r.shape[1:]) >= 2048
    ]
    most, most_large = SLOW_CELLS.get(path.stem, (0, 0))
    assert len(slow) <= most
    assert len(large) <= most_large, large
    assert len({r.cell for r in rows}) == len(rows)


# -- choices ----------------------------------------------------------------------------------


def test_choices_at_few_tokens(device: Path) -> None:
    rows = [
        row(0.25, shape=(tokens, 4096, 4096), portable=ratio, dense=1.0)
        for tokens, ratio in ((1, 3.0), (16, 2.0), (64, 0.5))
    ]
    write_rows(device, rows, {})
    assert [choose(tokens=n) for n in (1, 2, 8, 16, 20, 50, 64, 9999)] == 5 * ["portable"] + 3 * [
        "dense"
    ]


def test_products_without_work_are_portable(device: Path) -> None:
    write_rows(device, [row(0.25, portable=1.0, hopper=2.0)], {})
    assert choose() == "hopper"
    assert choose(capacity=0) == choose(tokens=0) == "portable"


def test_forcing_a_kind(device: Path) -> None:
    with choice.forced("hopper"):
        assert choose() == "hopper"
        assert choose(dtype=torch.float32) == "portable"  # hopper does not support fp32
        with choice.forced("dense"):
            assert choose(dtype=torch.float32) == "dense"
            assert choose("norms") == "portable"
        assert choose() == "hopper"
    assert choose() == "portable"
    with (
        pytest.raises(ValueError, match=r"`kind` must be one of .*got 'fast'"),
        choice.forced("fast"),
    ):
        pass


def test_norms_are_computed_by_the_chosen_kind(
    device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(device, [row(1.0, "norms", portable=1.0, hopper=2.0)], {})
    used: list[str] = []
    monkeypatch.setattr(portable, "norms", lambda *_: used.append("portable"))
    monkeypatch.setattr(hopper, "norms", lambda *_: used.append("hopper"))
    x, armed = torch.zeros(8, 64, dtype=torch.bfloat16), torch.tensor(True)
    norms = cuda.block_norms(x, x, armed, 64)
    assert norms.shape == (1, 1) and norms.dtype == torch.float32
    with choice.forced("portable"):
        cuda.block_norms(x, x, armed, 64)
    assert used == ["hopper", "portable"]


def test_norms_of_no_tokens_need_no_kernel(device: Path) -> None:
    x = torch.zeros(0, 64, dtype=torch.bfloat16)
    norms = cuda.block_norms(x, x, torch.tensor(True), 16)
    assert norms.shape == (4, 4) and norms.dtype == torch.float32 and not norms.any()


def test_the_speedup_of_a_step(device: Path) -> None:
    def speedup(dtype: torch.dtype = torch.bfloat16) -> float | None:
        return choice.step_speedup(dtype, 64, (64, 64), 0.25, 0)

    assert speedup() is None
    rows = [row(0.25, op, portable=s, dense=0.9) for op, s in (("fwd", 2.0), ("dx", 4.0))]
    write_rows(device, rows, {})
    choice.clear_table_cache()
    assert speedup() is None  # dW is not measured
    write_rows(device, [*rows, row(0.25, "dw", portable=0.5, dense=0.9)], {})
    choice.clear_table_cache()
    # Relative to dense products of time 1: 1/2, 1/4 and, for the dense kind, 1/0.9.
    assert speedup() == pytest.approx(3 / (1 / 2 + 1 / 4 + 1 / 0.9))
    assert speedup(torch.float64) is None


def test_kernel_choice_of_a_layer() -> None:
    layer = BlockSparseLinear(128, 64, block_size=16, density=0.1)
    assert layer.kernel_choice(torch.zeros(4, 128)) == {
        "fwd": "batched",
        "dx": "batched",
        "dw": "batched",
    }
    many = torch.zeros(3, 2000, 128)
    assert layer.kernel_choice(many)["fwd"] == "by block"
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.kernel_choice(many) == {
            "fwd": "batched",
            "dx": "batched",
            "dw": "by block",
        }
    assert layer.predicted_speedup(0.1, torch.bfloat16) is None  # on a CPU


def test_a_cpu_follows_its_table_near_what_it_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SPARSE_LIGHTNING_CACHE_DIR", str(tmp_path))
    ratios = {"by block": 3.0, "batched": 1.0, "densify": 2.0}
    rows = [
        Measured(op, dtype, 16, (tokens, *cpu.MEASURED_FEATURES), 0.5, ratios)
        for op in ("fwd", "dw")
        for dtype in ("fp32", "bf16")
        for tokens in (16, 256)
    ]
    fp32, half = torch.float32, torch.bfloat16
    write_rows(cpu.table_file(torch.get_num_threads()), rows, {})
    cpu.clear_table_cache()
    try:
        found = [cpu.choose("fwd", tokens, 16, 0.5, fp32) for tokens in (1, 8, 64, 512, 1024)]
        assert found == ["batched", "by block", "by block", "by block", "densify"]
        assert cpu.choose("fwd", 64, 16, 0.5, torch.float64) == "by block"
        # Sums of blocks would be rounded to half precision.
        assert cpu.choose("fwd", 64, 16, 0.5, half) == "densify"
        assert cpu.choose("dw", 64, 16, 0.5, half) == "by block"
        assert cpu.choose("dw", 64, 32, 0.5, half) == cpu.choose("dx", 64, 16, 0.5, fp32)
        threads = torch.get_num_threads()
        torch.set_num_threads(threads + 1)
        try:
            assert cpu.choose("fwd", 64, 16, 0.5, fp32) == "batched"
        finally:
            torch.set_num_threads(threads)
    finally:
        cpu.clear_table_cache()


@pytest.mark.parametrize("density", [0.25, 0.5])
def test_a_cpu_without_a_table_follows_rules(
    density: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Even if measuring is on: a busy CPU would be measured for minutes, and wrongly."""
    monkeypatch.setenv("SPARSE_LIGHTNING_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv(speedups.MEASURE_VARIABLE)
    cpu.clear_table_cache()
    layer = BlockSparseLinear(1024, 1024, block_size=32, density=density)
    found = layer.kernel_choice(torch.zeros(1024, 1024))
    assert set(found.values()) == {"by block" if density == 0.25 else "densify"}
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_kernel_choice_of_a_layer_on_a_gpu() -> None:
    layer = BlockSparseLinear(128, 64, block_size=16, density=0.1).cuda()
    x = torch.zeros(4, 128, device="cuda")
    assert set(layer.kernel_choice(x).values()) <= set(KINDS)
    for kind in ("portable", "dense"):
        with choice.forced(kind):
            assert layer.kernel_choice(x) == {"fwd": kind, "dx": kind, "dw": kind}


def test_few_tokens_take_the_kept_weights_of_a_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "choose", lambda *_: choice.DENSE)
    whole = BlockTopology.from_mask(torch.ones(2, 2, dtype=torch.bool), 16)
    pattern = whole.with_random_positions("2:4")
    for topology, tokens, kinds in (
        (pattern, 32, [choice.PORTABLE, choice.PORTABLE, choice.DENSE]),
        (pattern, 33, [choice.DENSE] * 3),
        (whole, 32, [choice.DENSE] * 3),
    ):
        found = choice.choose_for_step(topology, torch.bfloat16, tokens, torch.device("cuda:0"))
        assert [found[op] for op in ("fwd", "dx", "dw")] == kinds
