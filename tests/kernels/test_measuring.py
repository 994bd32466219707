"""Measuring layer shapes when they are first used: what is kept, and that nothing else changes."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_lightning import BlockSparseLinear, BlockTopology, SparsityCallback
from sparse_lightning.bench.tune import check_sample
from sparse_lightning.files import locked
from sparse_lightning.kernels import choice, cpu, cuda, measuring, speedups
from sparse_lightning.kernels.measuring import Ladder, Operands, measure_layer
from sparse_lightning.kernels.speedups import Measured, measured_file, read_rows, write_rows
from tests.callbacks.helpers import Classifier, loader, trainer

CPU, GPU_NAME = torch.device("cpu"), "NVIDIA RTX 6000"
SMALL = Ladder((4, 2), (0.5, 0.25), 1, 60.0)
SHAPE = (torch.float32, 16, 64, 64)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Turn measuring on, of small layers; return the folder of its files."""
    monkeypatch.delenv(speedups.MEASURE_VARIABLE)
    monkeypatch.setenv("SPARSE_LIGHTNING_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(speedups, "SHIPPED_TABLES", tmp_path)
    monkeypatch.setattr(cpu, "MEASURED_FEATURES", SHAPE[2:])
    monkeypatch.setitem(measuring.LADDERS, "cpu", SMALL)
    forget()
    yield tmp_path / "cache"
    forget()


def forget() -> None:
    """Forget what this process knows, as a new one would."""
    choice.clear_table_cache()
    cpu.device_speedups.cache_clear()
    cpu.clear_choices()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replace measurements, which are slow, by invented rows; return the shapes measured."""
    shapes: list[Any] = []

    def invent(shape: Any, ladder: Ladder, device: torch.device) -> Sequence[Measured]:
        shapes.append(shape)
        names = cpu.DTYPES if device.type == "cpu" else choice.DTYPES
        return [
            Measured(op, names[shape[0]], shape[1], (4, *shape[2:]), 0.5, INVENTED[device.type])
            for op in choice.STEP
        ]

    monkeypatch.setattr(measuring, "measure_layer", invent)
    return shapes


INVENTED = {
    "cpu": {"by block": 3.0, "batched": 1.0, "densify": 2.0},
    "cuda": {"portable": 1.0, "dense": 2.0},
}


@pytest.fixture
def gpu(cache: Path, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Simulate a GPU without tables."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (12, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: GPU_NAME)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return torch.device("cuda", 0)


def choose_cpu(dtype: torch.dtype = torch.float32, op: str = "fwd") -> str:
    return cpu.choose(op, 256, 16, 0.5, dtype)


def choose_gpu(blocks: int = 4, tokens: int = 4) -> str:
    return choice.choose("fwd", torch.bfloat16, 16, blocks, (blocks, blocks), tokens, 0)


# -- what is measured and kept ----------------------------------------------------------------


def test_a_cpu_is_measured_once(cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    layer = BlockSparseLinear(64, 32, block_size=16, density=0.5)
    layer(torch.zeros(2, 64)).sum().backward()
    said = capfd.readouterr().err
    (file,) = cache.glob("*.json")
    assert said.count("\n") == 1 and str(file) in said and "SPARSE_LIGHTNING_MEASURE=0" in said
    rows = read_rows(file)
    assert {(row.op, row.shape[0], row.density) for row in rows} == {
        (op, n, density) for op in choice.STEP for n in SMALL.tokens for density in (0.5, 0.25)
    }
    assert all(set(row.speedups) == set(cpu.METHODS) for row in rows)
    assert all(ratio > 0 for row in rows for ratio in row.speedups.values())
    written = file.read_bytes()
    forget()
    layer(torch.zeros(2, 64)).sum().backward()
    assert file.read_bytes() == written and not capfd.readouterr().err


def test_the_fastest_method_that_is_exact_is_chosen(cache: Path, measured: list[Any]) -> None:
    assert choose_cpu() == choose_cpu(torch.float64) == "by block"
    assert choose_cpu(torch.bfloat16) == "densify"  # its sums would be rounded block by block
    assert choose_cpu(torch.bfloat16, "dw") == "by block"
    assert [shape[0] for shape in measured] == [torch.float32, torch.bfloat16]
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert choose_cpu() == "by block" and len(measured) == 3
    finally:
        torch.set_num_threads(threads)


def test_a_gpu_layer_is_measured_at_its_first_use(gpu: torch.device, measured: list[Any]) -> None:
    assert choose_gpu() == choose_gpu(tokens=9999) == "dense"
    assert measured == [(torch.bfloat16, 16, 64, 64)]
    assert choose_gpu(5) == "dense" and len(measured) == 2, "another shape"
    assert choice.choose("fwd", torch.float64, 16, 4, (4, 4), 4, 0) == "portable"
    forget()
    assert choose_gpu() == choose_gpu(5) == "dense" and len(measured) == 2
    assert {row.shape[1:] for row in read_rows(measured_file(GPU_NAME))} == {(64, 64), (80, 80)}


def test_a_layer_that_a_table_covers_is_not_measured(
    gpu: torch.device, measured: list[Any]
) -> None:
    rows = [
        Measured(op, "half", 16, (tokens, 64, 64), 0.5, {"portable": 1.5, "dense": 1.0})
        for op in choice.STEP
        for tokens in (1, 16384)
    ]
    write_rows(speedups.SHIPPED_TABLES / "sm_120-x.json", rows, {})
    assert choose_gpu() == choose_gpu(8) == "portable" and not measured
    assert choose_gpu(16) == "dense" and len(measured) == 1


def test_layers_are_measured_ahead_of_training(
    cache: Path, measured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as off:
        off.setenv(speedups.MEASURE_VARIABLE, "0")
        assert choose_cpu() == "densify"
    topology = BlockTopology.random(64, 128, 16, density=0.5)
    measuring.prepare([(topology, torch.float32), (topology, torch.float64)])
    measuring.prepare([(topology, torch.float32)])
    assert measured == [SHAPE]
    meta = BlockTopology.random(64, 128, 16, density=0.5).to_(torch.device("meta"))
    measuring.prepare([(meta, torch.float32)])


def test_switched_off(cache: Path, measured: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither made nor used: choices do not depend on this machine."""
    assert choose_cpu() == "by block"
    monkeypatch.setenv(speedups.MEASURE_VARIABLE, "0")
    forget()
    assert choose_cpu() == choose_cpu(torch.bfloat16) == "densify" and len(measured) == 1


def test_measurements_that_cannot_be_kept_are_not_made(
    cache: Path, measured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSE_LIGHTNING_CACHE_DIR", "/dev/null/cache")
    with pytest.warns(UserWarning, match="should be a file that can be written to"):
        assert choose_cpu() == "densify"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_cpu(op="dx") == choose_cpu(torch.bfloat16) == "densify"
    assert not measured


def test_what_was_kept_before_a_failure_is_used(
    gpu: torch.device, measured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process would use it, too."""
    write = write_rows

    def fail_later(path: Path, rows: Sequence[Measured], environment: Any) -> None:
        if len(list(rows)) > 3:
            raise OSError("disk full")
        write(path, rows, environment)

    monkeypatch.setattr(measuring, "write_rows", fail_later)
    known = choice.device_speedups(0)
    layers = [(torch.bfloat16, 16, 64, 64), (torch.bfloat16, 16, 128, 128)]
    with pytest.warns(UserWarning, match="disk full"):
        measuring.measure_missing(known, gpu, layers)
    assert (choose_gpu(4), choose_gpu(8)) == ("dense", "portable") and len(measured) == 2


def test_a_damaged_file_is_named(cache: Path) -> None:
    cache.mkdir()
    name = f"{speedups.cpu_name()} {torch.get_num_threads()} threads"
    measured_file(name).write_text("{}")
    with pytest.raises(ValueError, match=r"must be a table .*Measure it again, or remove it"):
        choose_cpu()


def test_processes_wait_for_one_another(gpu: torch.device, measured: list[Any]) -> None:
    choice.device_speedups(0)  # read before the other process writes
    file = measured_file(GPU_NAME)
    file.parent.mkdir()
    waiting = threading.Thread(target=choose_gpu)
    with locked(file):
        waiting.start()
        time.sleep(0.1)
        assert waiting.is_alive() and not measured
        row = Measured("fwd", "half", 16, (4, 64, 64), 0.5, {"portable": 2.0, "dense": 1.0})
        write_rows(file, [row], {})
    waiting.join()
    assert choose_gpu() == "portable" and not measured


# -- how a layer is measured ------------------------------------------------------------------


def test_time_and_memory_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    def tokens(ladder: Ladder) -> list[int]:
        return list(dict.fromkeys(row.shape[0] for row in measure_layer(SHAPE, ladder, CPU)))

    assert tokens(SMALL._replace(tokens=(2, 4, 8))) == [2, 4, 8]
    assert tokens(SMALL._replace(tokens=(2, 4, 8), seconds=0.0)) == [2]
    measure = Operands.measure

    def exhaust(self: Operands, rows: Sequence[Measured], rounds: int) -> float:
        if rows[0].shape[0] == 8:
            raise torch.OutOfMemoryError("out of memory")
        return measure(self, rows, rounds)

    monkeypatch.setattr(Operands, "measure", exhaust)
    assert tokens(SMALL._replace(tokens=(2, 4, 8))) == [2, 4]
    assert tokens(SMALL._replace(tokens=(8, 2))) == []


def test_without_memory_a_shape_is_tried_once(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Any] = []
    monkeypatch.setattr(measuring, "measure_layer", lambda shape, *_: tried.append(shape) or [])
    assert choose_gpu() == choose_gpu(tokens=99) == "portable" and len(tried) == 1
    assert read_rows(measured_file(GPU_NAME)) == []


class _Launchers:
    """Launchers of a kind that compute on a CPU, by the lists that kernels read."""

    def linear(
        self, x: Any, values: Any, bias: None, lists: Any, y: Any, device: int, *, forward: bool
    ) -> None:
        size = values.shape[1]
        for o, target in enumerate(y.split(size, 1)):
            target.zero_()
            begin, end = lists.offsets[o : o + 2].tolist()
            for i, slot in lists.entries[begin:end].tolist():
                block = values[slot].T if forward else values[slot]
                target += x[:, i * size : (i + 1) * size] @ block

    def linear_dw(self, dy: Any, x: Any, indices: Any, dw: Any, device: int) -> None:
        size = dw.shape[1]
        for slot, (row, col) in enumerate(indices.coords.tolist()):
            dw[slot] = dy.split(size, 1)[row].T @ x.split(size, 1)[col]

    def norms(self, dy: Any, x: Any, armed: Any, norms: Any, device: int) -> None:
        assert armed.item() and norms.shape == (dy.shape[1] // 16, x.shape[1] // 16)


def test_kernels_are_called_with_the_operands_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of a CPU stand in for those of a GPU."""
    operands = Operands((torch.float32, 16, 64, 48), (0.7, 0.3), CPU)
    operands.device = torch.device("cuda", 0)
    monkeypatch.setattr(Operands, "random", lambda self, *size: torch.randn(size))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(cuda, "LAUNCHERS", dict.fromkeys(choice.KINDS, _Launchers()))
    monkeypatch.setattr(
        choice, "available_kinds", lambda op, *_: choice.KINDS[: 2 + (op != "norms")]
    )
    check_sample(operands, 20)

    timed: list[int] = []

    def run(contenders: Any, rounds: int, device: torch.device) -> list[list[float]]:
        timed.append(len(contenders))
        for functions in contenders:
            functions[0]()
        return [[4.0], *([2.0 ** (i % 3)] for i in range(len(contenders) - 1))]

    monkeypatch.setattr(measuring, "device_times", run)
    rows = measuring.blank_rows((torch.float32, 16, 64, 48), 256, (0.7, 0.3), operands.device)
    operands.measure(rows, 3)
    assert timed == [1 + 2 * 3, 1 + 2 * 3, 1 + 2 * 3, 1 + 2]
    *step, norms = rows
    assert all(r.speedups == {"portable": 4.0, "hopper": 2.0, "dense": 1.0} for r in step)
    assert norms.op == "norms" and norms.speedups == {"portable": 4.0, "hopper": 2.0}


class _NoOperations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} was seen")


def test_nothing_else_changes(cache: Path) -> None:
    """Neither the random state, nor what modes, hooks and autocast see."""

    def refuse(tensor: torch.Tensor) -> None:
        raise AssertionError("a tensor was saved")

    state = torch.get_rng_state()
    with (
        _NoOperations(),
        torch.autograd.graph.saved_tensors_hooks(refuse, refuse),
        torch.autocast("cpu", torch.bfloat16),
        torch.device("meta"),
    ):
        rows = measure_layer(SHAPE, SMALL, CPU)
        assert torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")
    with torch.inference_mode():
        rows += measure_layer(SHAPE, SMALL, CPU)
    assert len(rows) == 24 and torch.equal(torch.get_rng_state(), state)


def test_nothing_is_measured_while_tracing_or_capturing(
    gpu: torch.device, measured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as compiling:
        compiling.setattr(torch.compiler, "is_compiling", lambda: True)
        assert choose_gpu(4) == "portable"
    with FakeTensorMode():
        assert choose_gpu(5) == "portable"
    with monkeypatch.context() as capturing:
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert choose_gpu(6) == "portable"
    assert not measured


def test_a_compiled_layer(cache: Path, measured: list[Any]) -> None:
    """It is traced without a measurement, and measured when it runs."""
    layer = BlockSparseLinear(64, 32, block_size=16, density=0.5)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 64)
    assert torch.equal(compiled(x), layer(x)) and len(measured) == 1
    torch.compiler.reset()


class _Watching(Classifier):
    """A model that notes what has been measured when its first step begins."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if not self.losses:
            folder = speedups.cache_folder()
            self.known = {
                row.layer[:2] for file in folder.glob("*.json") for row in read_rows(file)
            }
        return super().training_step(batch, batch_idx)


def test_a_training_measures_before_its_first_step_and_repeats_its_choices(cache: Path) -> None:
    losses = []
    for _ in range(2):
        model = _Watching()
        run = trainer(SparsityCallback(block_size=16, exclude=["head"]), precision="bf16-mixed")
        run.fit(model, loader())
        assert model.known == {("bf16", 16)}
        losses.append(model.losses)
        forget()
    assert losses[0] == losses[1]


def test_transformers_trainings_measure_before_their_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    from sparse_lightning.integrations import SparsityTrainerCallback
    from tests.integrations.helpers import Examples, Net

    asked: list[list[Any]] = []
    monkeypatch.setattr(measuring, "prepare", lambda layers: asked.append(list(layers)))
    for options, dtype in ({"bf16": True}, torch.bfloat16), ({}, torch.float32):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to="none",
            save_strategy="no", disable_tqdm=True, **options,
        )  # fmt: skip
        callback = SparsityTrainerCallback(block_size=16, exclude=["head"])
        model = Net()
        transformers.Trainer(
            model=model, args=arguments, train_dataset=Examples(), callbacks=[callback]
        ).train()
        assert asked.pop() == [(model.up.topology, dtype), (model.down.topology, dtype)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_on_a_gpu(dtype: torch.dtype) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    nn.Linear(8, 8).to(device)(torch.zeros(1, 8, device=device))
    measure_layer((dtype, 64, 512, 256), measuring.LADDERS["cuda"], device)  # loads the kernels
    torch.cuda.synchronize()
    allocated, state = torch.cuda.memory_allocated(), torch.cuda.get_rng_state()
    begin = time.monotonic()
    rows = measure_layer((dtype, 64, 512, 1024), measuring.LADDERS["cuda"], device)
    assert time.monotonic() - begin < 10
    assert torch.cuda.memory_allocated() <= allocated
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert {row.shape[0] for row in rows} >= {1, 16, 64, 256}
    for row in rows:
        kinds = choice.available_kinds(row.op, dtype, torch.cuda.get_device_capability())
        assert set(row.speedups) == set(kinds) and min(row.speedups.values()) > 0.01
