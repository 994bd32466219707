"""Terminal output: tables and a progress bar in a terminal, log lines elsewhere."""

from __future__ import annotations

import fcntl
import logging
import os
import pty
import re
import struct
import sys
import termios
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger

from sparse_lightning import BlockSparseLinear, SparsityCallback
from sparse_lightning.observers import throughput
from sparse_lightning.savings import model_speedup
from tests import processes
from tests.callbacks.helpers import Classifier, Manual, loader, trainer
from tests.processes import end_rank, run_ranks

BARS = {"tqdm": TQDMProgressBar, "rich": RichProgressBar}


def sparsity(**kwargs: Any) -> SparsityCallback:
    return SparsityCallback(
        block_size=16,
        density={"schedule": "cubic", "initial": 1.0, "final": 0.25},
        update={"every_n_steps": 4},
        **kwargs,
    )


def in_terminal(*arguments: str) -> str:
    """Run this file with a terminal of 100 columns as its stdout and stderr; return its output."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 40, 100, 0, 0))
    with mock.patch.dict(os.environ):
        for name in ("COLUMNS", "NO_COLOR"):
            os.environ.pop(name, None)
        script = processes.Script(__file__, *arguments, terminal=theirs)
    os.close(theirs)
    output = b""
    try:
        while chunk := os.read(ours, 4096):
            output += chunk
    except OSError:  # Linux reports the end of a terminal like this
        pass
    finally:
        os.close(ours)
    assert script.wait(120).returncode == 0, output.decode()
    return output.decode()


def piped(*arguments: str) -> tuple[str, str]:
    done = processes.run(__file__, *arguments, timeout=120)
    return done.stdout, done.stderr


@pytest.mark.parametrize("bar", BARS)
def test_a_terminal_gets_tables_and_a_bar(bar: str) -> None:
    output = in_terminal(bar)
    assert "net.0   128x64   32 of 16x16           1.000        8,320" in output
    assert re.search(r"total.*1\.000 → 0\.250.*16,576", output), "the target, too"
    assert "Left dense: head (excluded)." in output
    assert "╭─ Block-sparse training ──" in output and "1.000 -> 0.250" in output
    assert output.count("╭─ Block-sparse training") == output.count("Block-sparse layers") == 1
    first, last = (
        ("density: 1.000", "density: 0.250")
        if bar == "rich"
        else ("density=1.000", "density=0.250")
    )
    assert first in output and last in output and "churn" in output
    assert output.index(last) < output.index("╭─ Block-sparse training")


def test_a_terminal_without_rich_gets_plain_text() -> None:
    output = in_terminal("tqdm", "without-rich")
    assert "net.0  128x64  32 of 16x16          1.000" in output
    assert "Block-sparse training\r\nlayers" in output and "╭" not in output


def test_a_pipe_gets_a_line_each() -> None:
    out, err = piped("none")
    assert out == ""
    assert (
        "Block-sparse layers: 2; linear layers left dense: 1; density 1.000 → 0.250; "
        "parameters 16,576 -> 16,576.\n"
    ) in err
    (last,) = [line for line in err.splitlines() if "training has ended" in line]
    assert (
        "layers 2; density 1.000 -> 0.250; parameters 4,548 of 16,836 dense, in the model; " in last
    )


def test_the_summary_by_hand() -> None:
    callback = sparsity()
    trainer(callback).fit(Classifier(), loader())
    summary = callback.summary
    assert (summary.layers, summary.first_density, summary.density) == (2, 1.0, 0.25)
    head = 64 * 4 + 4
    assert summary.dense_parameters == 2 * 64 * 128 + 128 + 64 + head
    assert summary.parameters == 2 * 8 * 256 + 128 + 64 + head
    assert summary.dense_nbytes == 2 * 4 * 4 * 64 * 128  # AdamW: four tensors of 4 bytes
    indices = 4 * (16 + 9 + 16 + 5 + 16 + 32) + 4 * 32
    assert summary.nbytes == 2 * (4 * 4 * 8 * 256 + indices)
    assert summary.flops == pytest.approx((2 * 8 * 256 + 64 * 4) / (2 * 64 * 128 + 64 * 4))
    assert summary.updates == 5
    assert summary.dropped - summary.grown == 48
    assert (summary.ever_active, summary.speedup) == (1.0, None)
    lines = str(summary).splitlines()
    assert lines[:3] == [
        "Block-sparse training",
        "layers       2",
        "density      1.000 -> 0.250",
    ]
    assert lines[4].startswith("memory       0.1 MB, ") and lines[4].endswith(
        "of 0.3 MB dense, in these layers"
    )
    report = str(callback.report).splitlines()
    assert next(line for line in report if line.startswith("total")).split()[1:4] == [
        *("1.000", "→", "0.250")
    ], "where the density begins, and where it is to end"


def test_the_share_of_weights_is_said_if_blocks_have_a_pattern(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    callback = sparsity(nm="2:4")
    trainer(callback).fit(Classifier(), loader())
    first, *_, last = (line for line in caplog.messages if "density" in line)
    assert "; density 1.000 → 0.250; weight density 0.500 → 0.125; parameters" in first
    assert "density 1.000 -> 0.250; weight density 0.125, with 2:4 patterns within blocks; " in last
    assert "% of dense, in all linear layers, counting kept weights (kernels multiply" in last
    summary, head = callback.summary, 64 * 4 + 4
    assert summary.parameters == 2 * 8 * 128 + 128 + 64 + head
    assert summary.flops == pytest.approx((2 * 8 * 128 + 64 * 4) / (2 * 64 * 128 + 64 * 4))
    positions, indices = 8 * 16 * 2, 4 * (16 + 9 + 16 + 5 + 16 + 32) + 4 * 32
    assert summary.nbytes == 2 * (4 * 4 * 8 * 128 + positions + indices)
    assert str(callback.report).splitlines()[6].split()[1:] == [
        *("1.000", "→", "0.250", "0.500", "→", "0.125", "8,384", "16,576")
    ]


def test_a_constant_density_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    callback = SparsityCallback(block_size=16, update={"every_n_steps": 4})
    trainer(callback).fit(Classifier(), loader())
    first, *_, last = (line for line in caplog.messages if "density" in line)
    assert "; density 0.250; parameters" in first
    assert "; density 0.250; parameters" in last


def test_the_summary_of_a_training_that_ends_early_says_what_was_planned() -> None:
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step >= 5

    callback = sparsity()
    trainer(callback, Stop()).fit(Classifier(), loader())
    (density,) = [text for label, text in callback.summary.rows() if label == "density"]
    assert density.startswith("1.000 -> 0.") and density.endswith(", of 0.250 planned")


def test_speedups_add_up_as_times(monkeypatch: pytest.MonkeyPatch) -> None:
    def predicted(layer: BlockSparseLinear, density: float, dtype: torch.dtype) -> float:
        return {16: 2.0, 48: 4.0}[layer.out_features] * density

    monkeypatch.setattr(BlockSparseLinear, "predicted_speedup", predicted)
    layers = [BlockSparseLinear(16, out, block_size=16, density=1.0) for out in (16, 48)]
    together = model_speedup([(layer, 1.0) for layer in layers], torch.float32)
    assert together == pytest.approx((1 + 3) / (1 / 2 + 3 / 4))
    callback = SparsityCallback(block_size=16)
    monkeypatch.setattr(BlockSparseLinear, "predicted_speedup", lambda *_: 1.5)
    trainer(callback, max_steps=1).fit(Classifier(), loader())
    assert str(callback.summary).endswith("predicted speed-up  1.50 of these layers")


def summary_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "training has ended" in r.getMessage()]


def test_each_fit_has_its_own_summary(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    callback, model = sparsity(), Classifier()
    trainer(callback).fit(model, loader())
    assert (callback.summary.updates, callback.summary.first_density) == (5, 1.0)
    # The summary covers the whole training so far: a second fit continues after its schedule.
    fitting = trainer(callback, max_steps=8)
    fitting.fit(model, loader())
    assert callback.summary.updates == 5 and callback.summary.first_density == 1.0
    # Another model starts a new schedule.
    trainer(callback, max_steps=8).fit(Classifier(), loader())
    assert callback.summary.updates == 2
    assert len(summary_lines(caplog)) == 3
    fitting.validate(model, loader(1), verbose=False)
    assert len(summary_lines(caplog)) == 3


def start_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    lines = [record.getMessage() for record in caplog.records]
    return [line for line in lines if line.startswith("Block-sparse training: ")]


@pytest.mark.parametrize("build", [Classifier, Manual])
def test_a_fit_after_the_end_of_the_schedule_says_that_the_blocks_stay(
    build: type[Classifier], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    callback, model = sparsity(), build()
    trainer(callback).fit(model, loader())
    trainer(callback).fit(model, loader())
    first, second = start_lines(caplog)
    assert "updates every 4 steps, from step 0 to 18" in first
    assert "ended" in second and "blocks stay" in second and "at most 0.250" in second
    assert "every" not in second
    summary = callback.summary
    assert summary.scalars()["fit_updates"] == 0
    assert ("this fit", "24 of 48 steps, 0 of 5 updates") in summary.rows()
    # What the line advises moves blocks again.
    fresh = SparsityCallback(block_size=16, density=0.25, update={"every_n_steps": 4})
    trainer(fresh).fit(model, loader())
    assert "updates every 4 steps, from step 0 to 18" in start_lines(caplog)[-1]
    assert (fresh.summary.updates, fresh.summary.fit_updates) == (5, 5)
    assert "this fit" not in dict(fresh.summary.rows())


@pytest.mark.parametrize("resume", [False, True])
def test_a_training_that_continues_says_where(
    resume: bool, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.INFO)

    def falling() -> SparsityCallback:
        return SparsityCallback(
            block_size=16,
            density={"schedule": "linear", "initial": 1.0, "final": 0.25, "until": 20},
            update={"every_n_steps": 4, "until": 20},
        )

    callback, model = falling(), Classifier()
    fitting = trainer(callback, max_steps=10)
    fitting.fit(model, loader())
    before = callback.summary.updates
    if resume:
        fitting.save_checkpoint(tmp_path / "cut.ckpt")
        callback, model = falling(), Classifier()
    trainer(callback).fit(model, loader(), ckpt_path=tmp_path / "cut.ckpt" if resume else None)
    line = start_lines(caplog)[-1]
    assert "from step 0 to 20" in line and "at step 10" in line and "at step 12" in line
    total = callback.summary.updates
    assert total > before == total - callback.summary.fit_updates
    assert "this fit" in dict(callback.summary.rows())


def test_no_summary_of_a_trial_run(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    trainer(sparsity(), fast_dev_run=3).fit(Classifier(), loader())
    callback = sparsity()
    trainer(callback, max_steps=0).fit(Classifier(), loader())
    assert summary_lines(caplog) == [] and callback.summary is None


def test_no_summary_of_a_run_that_was_cut_off(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise OSError("the disk is full")

    caplog.set_level(logging.INFO)
    callback, model = sparsity(), Classifier()
    with pytest.raises(OSError, match="the disk is full"):
        trainer(callback, Failing()).fit(model, loader())
    trainer(callback, max_steps=0).fit(model, loader())
    assert summary_lines(caplog) == [] and callback.summary is None


@pytest.mark.parametrize("build", [Classifier, Manual])
def test_progress_bar_metrics_are_not_logged(build: type[Classifier], tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    class Bar(TQDMProgressBar):
        def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
            super().on_train_batch_end(trainer, *arguments)
            seen.append(dict(trainer.progress_bar_metrics))

    logger = CSVLogger(tmp_path)
    checkpoint = ModelCheckpoint(tmp_path, filename="{density}", save_top_k=-1)
    callback = sparsity()
    fitting = trainer(
        *(callback, Bar(), checkpoint),
        enable_checkpointing=True,
        enable_progress_bar=True,
        logger=logger,
        log_every_n_steps=1,
    )
    fitting.fit(build(), loader(), loader(1))
    assert [shown["density"] for shown in seen[:3]] == ["1.000 → 0.250"] * 3
    assert all("churn" not in shown for shown in seen[:3])
    changes = callback.last_update.layers.values()
    assert seen[-1] == {
        "density": 0.25,
        "churn": sum(len(c.grown) for c in changes) / sum(c.n_after for c in changes),
    }
    for metrics in (fitting.callback_metrics, fitting.logged_metrics):
        assert "density" not in metrics and "churn" not in metrics
    header = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0].split(",")
    assert "density" not in header and "churn" not in header


def test_without_a_bar_there_are_no_metrics_for_it() -> None:
    fitting = trainer(sparsity())
    fitting.fit(Classifier(), loader())
    assert fitting.progress_bar_metrics == {}


def test_only_rank_zero_logs(tmp_path: Path) -> None:
    done = run_ranks(__file__, "ranks", tmp_path)
    output = done.stdout + done.stderr
    assert output.count("Block-sparse layers: 2") == output.count("training has ended") == 1
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    # One sample per second on each of two ranks, logged at five updates and at the end.
    assert [rank["speeds"] for rank in ranks] == [[2.0] * 6, []]
    for name, mask in ranks[0]["patterns"]["ever"].items():
        assert torch.equal(mask, ranks[1]["patterns"]["ever"][name])


class Speeds(CSVLogger):
    """Records the logged samples per second."""

    def __init__(self, save_dir: Path) -> None:
        super().__init__(save_dir)
        self.speeds: list[float] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if "sparsity/samples_per_second" in metrics:
            self.speeds.append(metrics["sparsity/samples_per_second"])
        super().log_metrics(metrics, step)


class Ticking(L.Callback):
    """Advances the clock by one second per step."""

    def on_train_batch_start(self, *_: Any) -> None:
        self.now = getattr(self, "now", 0.0) + 1.0


def run_on_ranks(out: Path) -> None:
    ticking = Ticking()
    throughput.time = SimpleNamespace(perf_counter=lambda: getattr(ticking, "now", 0.0))
    callback, logger = sparsity(), Speeds(out)
    fitting = trainer(ticking, callback, logger=logger, strategy="ddp", devices=2)
    fitting.fit(Classifier(), loader(16))
    state = {"speeds": logger.speeds, "patterns": callback.state_dict()["patterns"]}
    torch.save(state, out / f"{fitting.global_rank}.pt")
    end_rank()


def main(bar: str, *options: str) -> None:
    if bar == "ranks":
        return run_on_ranks(Path(options[0]))
    if "without-rich" in options:
        sys.modules["rich.console"] = None
    bars = [BARS[bar]()] if bar in BARS else []
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
    trainer(sparsity(), *bars, enable_progress_bar=bool(bars)).fit(Classifier(), loader())


if __name__ == "__main__":
    main(*sys.argv[1:])
