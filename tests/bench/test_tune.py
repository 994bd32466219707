"""`sparse-lightning tune`: what it measures, checks, prints and saves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_lightning.bench import tune
from sparse_lightning.bench.tune import Grid, check_sample, measure_all
from sparse_lightning.cli import main
from sparse_lightning.kernels import choice, cpu
from sparse_lightning.kernels.measuring import Operands
from sparse_lightning.kernels.speedups import MEASURED_TOKENS, Measured, Table, read_rows

CPU = torch.device("cpu")


def test_a_cpu_is_tuned(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPARSE_LIGHTNING_CACHE_DIR", str(tmp_path))
    options = ["--device", "cpu", "--repeats", "1", "--tokens", "4", "--block-sizes", "64"]
    try:
        for dtype in ("fp32", "fp16"):
            assert main(["tune", *options, "--densities", ".25", "--dtypes", dtype]) == 0
        path = cpu.table_file(torch.get_num_threads())
        assert f"Saved in {path}" in capsys.readouterr().out
        fp32, fp16 = (
            [row for row in read_rows(path) if row.dtype == name] for name in ("fp32", "fp16")
        )
        assert [set(row.speedups) for row in fp32] == 3 * [set(cpu.METHODS)]
        assert [set(row.speedups) for row in fp16] == [
            *2 * [{"batched", "densify"}],
            set(cpu.METHODS),
        ]
        for row in fp32:
            fastest = max(row.speedups, key=row.speedups.__getitem__)
            assert cpu.choose(row.op, 4, 64, 0.25, torch.float32) == fastest
    finally:
        cpu.clear_table_cache()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--device", "nonsense"), "cuda or cpu; got 'nonsense'"),
        (("--dtypes", "bf16", "fp16"), "`--dtypes` must be bf16 or fp32 on a GPU; got bf16 fp16"),
        (("--device", "cuda:1"), "one of the 1 available GPUs; got 'cuda:1'"),
        (("--repeats", "0"), "`--repeats` must be at least 1; got 0"),
        (("--tokens", "0"), "`--tokens` must be at least 1; got 0"),
        (("--densities", "2"), "--densities"),
        (("--shapes", "2048"), "`--shapes` must be sizes as 2048x8192; got 2048"),
        (("--shapes", "100x512"), "positive multiple of block_size=16; got 100"),
        (("--output", "/dev/null/new/table.json"), "in a folder that can be written to"),
    ],
)
def test_wrong_options(
    options: tuple[str, ...],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Options are checked before measuring, so a fake GPU suffices."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    assert main(["tune", *options]) == 2
    assert says in capsys.readouterr().err


def test_a_row_of_the_table() -> None:
    row = Measured("dw", "half", 32, (8, 16, 32), 0.25, {"portable": 1.5, "dense": 0.951})
    assert (
        tune.table_row(row, choice.KINDS)
        == "| dw | half | 32 | 8x16x32 | 0.25 | 1.50 | n/a | 0.95 |"
    )


def row(tokens: int, ratio: float = 1.0) -> Measured:
    return Measured("fwd", "half", 32, (tokens, 64, 64), 0.25, {"dense": ratio})


def test_an_interrupted_run_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    skipped: list[Any] = []

    def measure(
        grids: Any, done: Any, device: torch.device, rounds: int
    ) -> Iterator[list[Measured]]:
        skipped.append(done)
        yield [row(1 + len(done))]
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "find_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(tune, "prepare_device", lambda _: None)
    monkeypatch.setattr(tune, "describe_environment", lambda _: {"device": "a GPU"})
    monkeypatch.setattr(tune, "measure_all", measure)
    path = tmp_path / "table.json"
    for options, kept in ((), [1]), ((), [1, 2]), (("--fresh",), [1]):
        with pytest.raises(KeyboardInterrupt):
            main(["tune", "--output", str(path), *options])
        assert [r.shape[0] for r in read_rows(path)] == kept
    assert skipped == [set(), {row(1).cell}, set()]


def test_cells_that_are_done_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "check_small", lambda *_: None)
    grids = {torch.float32: Grid((2, 4), ((64, 32), (32, 32)), (16,), (1.0, 0.5))}
    first, second = measure_all(grids, set(), CPU, 1)
    assert len(first) == len(second) == 2 * 2 * 3
    assert all(set(row.speedups) == set(cpu.METHODS) for row in first)
    done = {row.cell for row in (*first, *second[1:])}
    assert [[row.cell for row in layer] for layer in measure_all(grids, done, CPU, 1)] == [
        [second[0].cell]
    ]
    assert not list(measure_all(grids, {*done, second[0].cell}, CPU, 1))


def test_large_products_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "check_small", lambda *_: None)
    monkeypatch.setattr(tune, "_MOST_BYTES", 2**16)
    grids = {torch.float32: Grid((2, 1000), ((64, 32),), (16,), (0.5,))}
    (layer,) = measure_all(grids, set(), CPU, 1)
    assert {row.shape[0] for row in layer} == {2}


@pytest.mark.parametrize("op", choice.STEP)
def test_a_part_of_each_result_is_checked(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operands = Operands((torch.float32, 16, 64, 48), (0.7, 0.3), CPU)
    check_sample(operands, 20)
    right = tune.Products.compute

    def wrong(self: Any, kind: str, of: str, density: float) -> torch.Tensor:
        result = right(self, kind, of, density)
        return result * (1.001 if (kind, of) == (cpu.METHODS[1], op) else 1)

    monkeypatch.setattr(tune.Products, "compute", wrong)
    with pytest.raises(
        AssertionError, match=f"{op} by {cpu.METHODS[1]} kernels .* 20 x 64 x 48 is wrong"
    ):
        check_sample(operands, 20)


def test_the_table_covers_layers_of_every_usual_size() -> None:
    grid = tune.GRIDS["cuda"][torch.bfloat16]
    table = Table(
        Measured("fwd", "half", 64, (tokens, *features), 0.5, {"dense": 1.0})
        for tokens in grid.tokens
        for features in grid.features
    )
    for sizes in ((256, 256), (1024, 4096), (5120, 13824), (32768, 256)):
        for tokens in (*MEASURED_TOKENS, 131072):
            assert table.covers("fwd", "half", 64, (tokens, *sizes))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "table.json"
    options = ["--repeats", "2", "--dtypes", "bf16", "--tokens", "16", "256", "--shapes", "512x256"]
    options += ["--block-sizes", "32", "64", "--densities", "0.5", "0.25", "--output", str(path)]
    assert main(["tune", *options]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n| fwd | half |") == 8 and f"Saved in {path}" in printed
    table = Table(read_rows(path))
    predicted = table.predict("fwd", "half", 64, (256, 512, 256), 0.4)
    assert {"portable", "dense"} <= set(predicted) and min(predicted.values()) > 0
    assert main(["tune", *options]) == 0 and "| fwd |" not in capsys.readouterr().out
