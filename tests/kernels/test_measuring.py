"""Measuring layer shapes when they are first used: what is kept, and that nothing else changes."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_lightning import BlockTopology, SparsityCallback
from sparse_lightning.bench.tune import check_sample
from sparse_lightning.files import locked
from sparse_lightning.kernels import choice, cuda, measuring, speedups
from sparse_lightning.kernels.measuring import Ladder, Operands, Stopped, measure_layer
from sparse_lightning.kernels.speedups import Measured, measured_file, read_rows, write_rows
from tests.callbacks.helpers import Classifier, loader, trainer

CPU, GPU, GPU_NAME = torch.device("cpu"), torch.device("cuda", 0), "NVIDIA RTX 6000"
SMALL = Ladder((2, 4, 8), (0.5, 0.25), 1, 60.0)
SHAPE = (torch.float32, 16, 64, 64)


@pytest.fixture(autouse=True)
def gpu(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[None]:
    """Turn measuring on, for a simulated GPU without tables."""
    if request.node.get_closest_marker("gpu"):
        yield
        return
    monkeypatch.delenv(speedups.MEASURE_VARIABLE)
    monkeypatch.setenv("SPARSE_LIGHTNING_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(speedups, "SHIPPED_TABLES", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (12, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: GPU_NAME)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    choice.clear_table_cache()
    yield
    choice.clear_table_cache()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replace measurements by invented rows; return the shapes measured."""
    shapes: list[Any] = []

    def invent(shape: Any, *_: Any) -> Sequence[Measured]:
        shapes.append(shape)
        return invented(shape)

    monkeypatch.setattr(measuring, "measure_layer", invent)
    return shapes


def invented(shape: Any) -> list[Measured]:
    ratios = {"portable": 1.0, "dense": 2.0}
    return [
        Measured(op, choice.DTYPES[shape[0]], shape[1], (4, *shape[2:]), 0.5, ratios)
        for op in choice.STEP
    ]


def choose(blocks: int = 4, tokens: int = 4) -> str:
    return choice.choose("fwd", torch.bfloat16, 16, blocks, (blocks, blocks), tokens, 0)


# -- what is measured and kept ----------------------------------------------------------------


def test_a_gpu_layer_is_measured_at_its_first_use(measured: list[Any]) -> None:
    assert choose() == choose(tokens=9999) == "dense"
    assert measured == [(torch.bfloat16, 16, 64, 64)]
    assert choose(5) == "dense" and len(measured) == 2, "another shape"
    assert choice.choose("fwd", torch.float64, 16, 4, (4, 4), 4, 0) == "portable"
    choice.clear_table_cache()
    assert choose() == choose(5) == "dense" and len(measured) == 2
    assert {row.shape[1:] for row in read_rows(measured_file(GPU_NAME))} == {(64, 64), (80, 80)}


def test_a_layer_that_a_table_covers_is_not_measured(measured: list[Any]) -> None:
    rows = [
        Measured(op, "half", 16, (tokens, 64, 64), 0.5, {"portable": 1.5, "dense": 1.0})
        for op in choice.STEP
        for tokens in (1, 16384)
    ]
    write_rows(speedups.SHIPPED_TABLES / "sm_120-x.json", rows, {})
    assert choose() == choose(8) == "portable" and not measured
    assert choose(16) == "dense" and len(measured) == 1


def test_it_says_once_what_it_does(measured: list[Any], capfd: pytest.CaptureFixture[str]) -> None:
    choose()
    choose(tokens=9)
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "64 x 64 (half, blocks of 16)" in said
    assert str(measured_file(GPU_NAME)) in said and "SPARSE_LIGHTNING_MEASURE=0" in said


def test_a_choice_after_a_measurement_is_remembered(
    measured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    choose()
    monkeypatch.setattr(measuring, "measure_missing", None)
    for tokens in (4, 4, 64):
        assert choose(tokens=tokens) == "dense"


def test_layers_are_measured_ahead_of_training(
    measured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as capturing:
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert choose() == "portable"
    layer: Any = SimpleNamespace(device=GPU, block_size=16, in_features=64, out_features=64)
    on_cpu = BlockTopology.random(64, 128, 16, density=0.5)
    for _ in range(2):
        measuring.prepare(
            [(layer, torch.bfloat16), (layer, torch.float64), (on_cpu, torch.float32)]
        )
    assert measured == [(torch.bfloat16, 16, 64, 64)] and choose() == "dense"


@pytest.mark.parametrize("value", ["0", "false", "No", "OFF"])
def test_switched_off(value: str, measured: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither made nor used: choices do not depend on this machine."""
    assert choose() == "dense"
    monkeypatch.setenv(speedups.MEASURE_VARIABLE, value)
    choice.clear_table_cache()
    assert choose() == choose(5) == "portable" and len(measured) == 1


@pytest.mark.parametrize("value", ["1", "true", ""])
def test_switched_on(value: str, measured: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(speedups.MEASURE_VARIABLE, value)
    assert choose() == "dense"


def test_measurements_that_cannot_be_kept_are_not_made(
    measured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSE_LIGHTNING_CACHE_DIR", "/dev/null/cache")
    with pytest.warns(UserWarning, match="should be a file that can be written to"):
        assert choose() == "portable"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose() == choose(5) == "portable"
    assert not measured


def test_what_was_kept_before_a_failure_is_used(
    measured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process would use it, too."""
    write = write_rows

    def fail_later(path: Path, rows: Sequence[Measured], *rest: Any) -> None:
        if len(rows) > 3:
            raise OSError("disk full")
        write(path, rows, *rest)

    monkeypatch.setattr(speedups, "write_rows", fail_later)
    with pytest.warns(UserWarning, match="disk full"):
        measuring.measure_missing(0, [(torch.bfloat16, 16, n, n) for n in (64, 128)])
    assert (choose(4), choose(8)) == ("dense", "portable") and len(measured) == 2


def test_a_damaged_file_is_named() -> None:
    file = measured_file(GPU_NAME)
    file.parent.mkdir()
    for content in ("{}", '{"rows": [], "exhausted": [["half", 64, 1.5, 2]]}'):
        file.write_text(content)
        with pytest.raises(ValueError, match=r"must be a table .*Measure it again, or remove it"):
            choose()


# -- other threads, processes and signals -----------------------------------------------------


def test_processes_wait_for_one_another(measured: list[Any]) -> None:
    choice.device_speedups(0)  # read before the other process writes
    file = measured_file(GPU_NAME)
    file.parent.mkdir()
    waiting = threading.Thread(target=choose)
    with locked(file, 1):
        waiting.start()
        time.sleep(0.1)
        assert waiting.is_alive() and not measured
        row = Measured("fwd", "half", 16, (4, 64, 64), 0.5, {"portable": 2.0, "dense": 1.0})
        write_rows(file, [row], {})
    waiting.join()
    assert choose() == "portable" and not measured


def test_a_process_does_not_wait_forever(
    measured: list[Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measuring, "_SECONDS_OF_WAITING", (0.1, 0.1))
    file = measured_file(GPU_NAME)
    file.parent.mkdir()
    with locked(file, 1), pytest.warns(UserWarning, match="another process has held"):
        assert choose() == "portable"
    assert capfd.readouterr().err.count("Waiting for another process that measures") == 1
    assert choose() == "portable" and not measured


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of a fork beside threads
def test_a_process_that_is_forked_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """It inherits the locks, but neither waits for ever nor makes others wait."""
    started, finish = threading.Event(), threading.Event()

    def measure(shape: Any, *_: Any) -> list[Measured]:
        if shape[2] == 64:
            started.set()
            finish.wait(10)
        return invented(shape)

    monkeypatch.setattr(measuring, "measure_layer", measure)
    measuring_thread = threading.Thread(target=choose)
    measuring_thread.start()
    started.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(10)  # ends it if it waits for ever
        os._exit(0 if choose(5) == "dense" else 1)
    finish.set()
    measuring_thread.join()
    assert os.waitpid(child, 0)[1] == 0
    assert choose(6) == "dense"


@contextmanager
def handling(handler: Callable[..., None]) -> Iterator[Callable[[], None]]:
    """Install a handler; yield a function that has it called in the main thread."""
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        yield lambda: os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_signal_handler_may_use_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_SECONDS_OF_WAITING", (1.0, 1.0))
    found, handled = [], threading.Event()

    def handler(*_: Any) -> None:
        found.append(choose(5))
        handled.set()

    with handling(handler) as interrupt:

        def measure(shape: Any, *_: Any) -> list[Measured]:
            if not found:
                interrupt()
                assert handled.wait(5)
            return invented(shape)

        monkeypatch.setattr(measuring, "measure_layer", measure)
        assert choose() == "dense"
    assert found == ["portable"] and choose(5) == "dense"


@pytest.mark.parametrize("error", [KeyboardInterrupt, TimeoutError])
def test_an_interrupted_measurement_ends(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch, measured: list[Any]
) -> None:
    def handler(*_: Any) -> None:
        raise error

    ended = []
    with handling(handler) as interrupt, monkeypatch.context() as interrupted:

        def measure(shape: Any, ladder: Any, device: Any, stop: threading.Event) -> Any:
            interrupt()
            ended.append(stop.wait(5))
            return invented(shape)

        interrupted.setattr(measuring, "measure_layer", measure)
        with pytest.raises(error):
            choose()
    assert ended == [True] and read_rows(measured_file(GPU_NAME)) == []
    assert choose() == "dense" and len(measured) == 1


@pytest.mark.parametrize("when", ["compiling", "capturing", "faking"])
def test_a_choice_without_a_measurement_is_not_remembered(
    when: str, measured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as context:
        if when == "compiling":
            context.setattr(torch.compiler, "is_compiling", lambda: True)
        if when == "capturing":
            context.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        if when == "faking":
            with FakeTensorMode():
                assert choose() == "portable"
        else:
            assert choose() == "portable"
    assert not measured and choose() == "dense"


# -- how a layer is measured ------------------------------------------------------------------


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


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Let tensors of a CPU stand in for those of the GPU; return the launchers by kind."""

    class OnCpu(Operands):
        def __init__(self, shape: Any, densities: Any, device: Any, *rest: Any) -> None:
            super().__init__(shape, densities, CPU, *rest)
            self.device = device

    def run(contenders: Any, rounds: int, device: torch.device) -> list[list[float]]:
        for functions in contenders:
            functions[0]()
        return [[4.0], *([2.0 ** (i % 3)] for i in range(len(contenders) - 1))]

    found = {kind: _Launchers() for kind in choice.KINDS}
    monkeypatch.setattr(cuda, "LAUNCHERS", found)
    monkeypatch.setattr(measuring, "Operands", OnCpu)
    monkeypatch.setattr(measuring, "LADDER", SMALL)
    monkeypatch.setattr(measuring, "device_times", run)
    monkeypatch.setattr(measuring, "side_stream", lambda device: f"side stream of {device}")
    monkeypatch.setattr(Operands, "random", lambda self, *size: torch.randn(size).to(self.dtype))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "stream", _Streams)
    _Streams.entered.clear()
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: _Streams.entered.append(name))
    return found


class _Streams:
    """Notes which streams are entered, and what cleans up."""

    entered: list[str] = []  # noqa: RUF012

    def __init__(self, stream: str) -> None:
        self.entered.append(stream)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def test_kernels_are_called_with_the_operands_of_a_layer(
    kernels: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    operands = measuring.Operands((torch.float32, 16, 64, 48), (0.7, 0.3), GPU)
    monkeypatch.setattr(
        choice, "available_kinds", lambda op, *_: choice.KINDS[: 2 + (op != "norms")]
    )
    check_sample(operands, 20)

    timed, times = [], measuring.device_times

    def count(contenders: Any, *rest: Any) -> Any:
        timed.append(len(contenders))
        return times(contenders, *rest)

    monkeypatch.setattr(measuring, "device_times", count)
    rows = measuring.blank_rows((torch.float32, 16, 64, 48), 256, (0.7, 0.3), operands.device)
    operands.measure(rows, 3)
    assert timed == [1 + 2 * 3, 1 + 2 * 3, 1 + 2 * 3, 1 + 2]
    *step, norms = rows
    assert all(r.speedups == {"portable": 4.0, "hopper": 2.0, "dense": 1.0} for r in step)
    assert norms.op == "norms" and norms.speedups == {"portable": 4.0, "hopper": 2.0}


def test_time_and_memory_are_limited(
    kernels: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def tokens(ladder: Ladder) -> list[int]:
        rows = measure_layer(SHAPE, ladder, GPU, threading.Event())
        return list(dict.fromkeys(row.shape[0] for row in rows))

    assert tokens(SMALL) == [2, 4, 8]
    assert tokens(SMALL._replace(seconds=0.0)) == [2]
    _Streams.entered.clear()
    run = Operands.measure

    def exhaust(self: Operands, rows: Sequence[Measured], rounds: int) -> float:
        if rows[0].shape[0] == 8:
            raise torch.OutOfMemoryError("out of memory")
        return run(self, rows, rounds)

    monkeypatch.setattr(Operands, "measure", exhaust)
    assert tokens(SMALL) == [2, 4]
    with pytest.raises(torch.OutOfMemoryError):
        tokens(SMALL._replace(tokens=(8,)))
    assert _Streams.entered[-2:] == ["synchronize", "empty_cache"]


def test_without_memory_a_shape_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by a training that resumes, so that it makes the same choices."""
    tried: list[Any] = []

    def exhaust(shape: Any, *_: Any) -> list[Measured]:
        tried.append(shape)
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(measuring, "measure_layer", exhaust)
    assert choose() == choose(tokens=99) == "portable"
    choice.clear_table_cache()
    assert choose() == "portable" and len(tried) == 1


def test_a_kind_that_fails_is_left_out(
    kernels: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fail(*_: Any) -> None:
        calls.append(1)
        raise RuntimeError("cannot be compiled")

    monkeypatch.setattr(kernels["hopper"], "linear_dw", fail, raising=False)
    with pytest.warns(UserWarning) as caught:
        assert choose() in ("portable", "dense")
    (message,) = (str(warning.message) for warning in caught)
    assert "The hopper kernels fail for layers of 64 x 64 (half, blocks of 16)" in message
    assert "cannot be compiled" in message and calls == [1]
    rows = read_rows(measured_file(GPU_NAME))
    assert len(rows) == 18 and all(set(row.speedups) == {"portable", "dense"} for row in rows)


def test_a_layer_that_cannot_be_measured_is_computed(
    kernels: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such instruction")

    def fails_to(choose: Callable[[], str], match: str) -> None:
        with pytest.warns(UserWarning, match=match):
            assert choose() == "portable"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert choose() == "portable", "tried again"

    monkeypatch.setattr(measuring, "device_times", fail)
    fails_to(choose, "Measuring layers of 64 x 64 .* failed.*no such instruction")
    for launchers in kernels.values():
        monkeypatch.setattr(launchers, "linear", fail, raising=False)
    fails_to(lambda: choose(5), "kernels fail for layers of 80 x 80")
    assert read_rows(measured_file(GPU_NAME)) == []


class _NoOperations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} was seen")


def test_nothing_else_changes(kernels: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what modes, hooks and autocast see, nor the memory of this thread and stream."""

    def refuse(tensor: torch.Tensor) -> None:
        raise AssertionError("a tensor was saved")

    threads, run = set(), Operands.measure

    def note(*arguments: Any) -> float:
        threads.add(threading.current_thread())
        assert not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        return run(*arguments)

    monkeypatch.setattr(Operands, "measure", note)
    with (
        _NoOperations(),
        torch.autograd.graph.saved_tensors_hooks(refuse, refuse),
        torch.autocast("cpu", torch.bfloat16),
        torch.device("meta"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("error")
        choose()
        assert torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")
    with torch.inference_mode():
        choose(5)
    assert len(read_rows(measured_file(GPU_NAME))) == 36
    assert threading.current_thread() not in threads
    assert _Streams.entered[0] == "side stream of 0"


@pytest.mark.parametrize("within", ["linear", "device_times"])
def test_a_measurement_ends_when_it_is_told_to(
    within: str, kernels: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the product that it is in."""
    stop, owner = threading.Event(), measuring if within == "device_times" else kernels["portable"]
    calls, function = [], getattr(owner, within)

    def call(*arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        stop.set()
        return function(*arguments, **keywords)

    monkeypatch.setattr(owner, within, call, raising=False)
    with pytest.raises(Stopped):
        measure_layer(SHAPE, SMALL, GPU, stop)
    assert calls == [1] and _Streams.entered[-2:] == ["synchronize", "empty_cache"]


def test_products_are_exact_and_settings_as_before() -> None:
    deterministic: Any = torch.utils.deterministic
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    try:
        for is_on in (False, True):
            matmul.allow_tf32 = is_on
            torch.use_deterministic_algorithms(is_on)
            with measuring.exact(torch.float32):
                if hasattr(matmul, "fp32_precision"):
                    assert matmul.fp32_precision == "ieee"
                else:
                    assert not matmul.allow_tf32
                assert deterministic.fill_uninitialized_memory is not is_on
            assert matmul.allow_tf32 is is_on and deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)
        matmul.allow_tf32 = before


class _Watching(Classifier):
    """A model that notes what was to be measured when its first step begins."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if not self.losses:
            self.known = list(self.asked)
        return super().training_step(batch, batch_idx)


def test_trainings_measure_before_their_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _Watching()
    model.asked = []
    monkeypatch.setattr(measuring, "prepare", lambda layers: model.asked.extend(layers))
    callback = SparsityCallback(block_size=16, exclude=["head"])
    trainer(callback, precision="bf16-mixed").fit(model, loader())
    layers = callback.sparsifier.layers.values()
    assert model.known == [(layer.topology, torch.bfloat16) for layer in layers] != []


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
    device, stop = torch.device("cuda", torch.cuda.current_device()), threading.Event()
    nn.Linear(8, 8).to(device)(torch.zeros(1, 8, device=device))
    measure_layer((dtype, 64, 512, 256), measuring.LADDER, device, stop)  # loads the kernels
    torch.cuda.synchronize()
    allocated, state = torch.cuda.memory_allocated(), torch.cuda.get_rng_state()
    begin = time.monotonic()
    rows = measure_layer((dtype, 64, 512, 1024), measuring.LADDER, device, stop)
    assert time.monotonic() - begin < 30
    assert torch.cuda.memory_allocated() <= allocated
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert {row.shape[0] for row in rows} == {*measuring.LADDER.tokens}
    for row in rows:
        kinds = choice.available_kinds(row.op, dtype, torch.cuda.get_device_capability())
        assert set(row.speedups) == set(kinds) and min(row.speedups.values()) > 0.01
