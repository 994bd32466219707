"""The kernel choice: tables, their files, and the kinds chosen from them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_lightning import BlockSparseLinear
from sparse_lightning.bench.tune import write_table
from sparse_lightning.kernels import choice, cuda
from sparse_lightning.kernels.choice import KINDS, Measured, Table
from sparse_lightning.kernels.hopper import launchers as hopper
from sparse_lightning.kernels.portable import launchers as portable

SHAPE = (8192, 4096, 4096)


def row(density: float, op: str = "fwd", shape: Any = SHAPE, **speedups: float) -> Measured:
    return Measured(op, "half", 64, shape, density, speedups)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Simulate a Hopper GPU; return the path of its measured table."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB")
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("SPARSE_LIGHTNING_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(choice, "SHIPPED_TABLES", tmp_path)
    choice.clear_table_cache()
    yield choice.user_table_file("NVIDIA H100 80GB")
    choice.clear_table_cache()


def choose(
    op: str = "fwd",
    capacity: int = 1024,
    tokens: int = 8192,
    dtype: torch.dtype = torch.bfloat16,
) -> str:
    return choice.choose(op, dtype, 64, capacity, (64, 64), tokens, 0)


def test_speedups_are_interpolated_in_log_log_space() -> None:
    table = Table([row(0.5, portable=1.0), row(0.125, portable=4.0)])  # rows in any order

    def speedup(density: float) -> float:
        return table.predict("fwd", "half", 64, SHAPE, density)["portable"]

    assert speedup(0.25) == pytest.approx(2.0)
    assert speedup(0.5) == 1.0 and speedup(0.125) == 4.0
    assert speedup(0.9) == 1.0 and speedup(0.01) == 4.0  # beyond the ends, the nearest value


def test_the_nearest_shape_is_used() -> None:
    small = row(0.5, shape=(256, 1024, 1024), portable=0.5, dense=0.9)
    table = Table([small, row(0.5, portable=2.0, dense=0.9)])
    arguments = ("fwd", "half", 64)
    assert table.choose(*arguments, (100, 1024, 1024), 0.5, KINDS) == "dense"
    assert table.choose(*arguments, (10_000, 4096, 4096), 0.5, KINDS) == "portable"
    assert table.predict("dx", "half", 64, SHAPE, 0.5) == {}
    assert table.choose("dx", "half", 64, SHAPE, 0.5, KINDS) == "portable"


def test_only_available_and_measured_kinds_are_chosen() -> None:
    table = Table([row(0.5, portable=1.0, hopper=2.0, dense=0.9)])
    assert table.choose("fwd", "half", 64, SHAPE, 0.5, KINDS) == "hopper"
    assert table.choose("fwd", "half", 64, SHAPE, 0.5, ["portable", "dense"]) == "portable"
    # A kind measured at one density only cannot be compared at others.
    table = Table([row(0.5, portable=1.0, hopper=2.0), row(0.1, portable=3.0)])
    assert set(table.predict("fwd", "half", 64, SHAPE, 0.3)) == {"portable"}


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


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    rows = [row(0.5, portable=1.25, hopper=2.5), row(0.1, "dw", dense=0.875)]
    path = tmp_path / "table.json"
    write_table(path, rows, {"device": "a GPU"})
    assert json.loads(path.read_text())["environment"] == {"device": "a GPU"}
    table = choice.read_table(path)
    assert table.predict("fwd", "half", 64, SHAPE, 0.5) == {"portable": 1.25, "hopper": 2.5}
    assert table.predict("dw", "half", 64, SHAPE, 0.1) == {"dense": 0.875}


@pytest.mark.parametrize(
    "content", ["", "{}", "[1]", '{"rows": [{"op": "fwd"}]}', '{"rows": [{"speed": 1}]}']
)
def test_a_damaged_file_is_named(content: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"table\.json' must be a table.*Measure it again"):
        choice.read_table(path)


def test_without_a_table_the_portable_kernels_compute(device: Path) -> None:
    assert not device.exists()
    assert {choose(op) for op in choice.OPS} == {"portable"}


def test_a_measured_table_takes_precedence_over_a_shipped_one(device: Path) -> None:
    shipped = choice.SHIPPED_TABLES / "choices-sm_90.json"
    write_table(shipped, [row(0.25, portable=1.0, hopper=2.0, dense=0.9)], {})
    assert choose() == "hopper" and choose("dx") == "portable"
    write_table(device, [row(0.25, portable=1.0, hopper=0.5, dense=1.5)], {})
    assert choose() == "hopper"  # choices are cached
    choice.clear_table_cache()
    assert choose() == "dense"


def test_products_without_work_are_portable(device: Path) -> None:
    write_table(device, [row(0.25, portable=1.0, hopper=2.0)], {})
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
    write_table(device, [row(1.0, "norms", portable=1.0, hopper=2.0)], {})
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
    write_table(device, rows, {})
    choice.clear_table_cache()
    assert speedup() is None  # dW is not measured
    write_table(device, [*rows, row(0.25, "dw", portable=0.5, dense=0.9)], {})
    choice.clear_table_cache()
    # Relative to dense products of time 1: 1/2, 1/4 and, for the dense kind, 1/0.9.
    assert speedup() == pytest.approx(3 / (1 / 2 + 1 / 4 + 1 / 0.9))
    assert speedup(torch.float64) is None


def test_kernel_choice_of_a_layer() -> None:
    layer = BlockSparseLinear(128, 64, block_size=16, density=0.1)
    assert layer.kernel_choice(torch.zeros(4, 128)) == {
        "fwd": "by row",
        "dx": "by row",
        "dw": "by row",
    }
    assert layer.kernel_choice(torch.zeros(2, 200, 128))["fwd"] == "by block"
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.kernel_choice(torch.zeros(2, 200, 128)) == {
            "fwd": "by row",
            "dx": "by row",
            "dw": "by block",
        }
    assert layer.predicted_speedup(0.1, torch.bfloat16) is None  # on a CPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_kernel_choice_of_a_layer_on_a_gpu() -> None:
    layer = BlockSparseLinear(128, 64, block_size=16, density=0.1).cuda()
    x = torch.zeros(4, 128, device="cuda")
    assert set(layer.kernel_choice(x).values()) <= set(KINDS)
    for kind in ("portable", "dense"):
        with choice.forced(kind):
            assert layer.kernel_choice(x) == {"fwd": kind, "dx": kind, "dw": kind}
