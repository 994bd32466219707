"""What the Trainer's own loggers get of a training's options and summary."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.helpers import RIGL, STEPS, Net

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from sparse_lightning.integrations import SparsityTrainerCallback  # noqa: E402
from sparse_lightning.report.command import find_histories  # noqa: E402
from tests.integrations.test_transformers import trainer  # noqa: E402

SUMMARY = "sparsity/summary/"


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """W&B without an account or a network; its run is finished after the test."""
    package = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for name, value in (
        ("WANDB_MODE", "offline"),
        ("WANDB_DIR", str(tmp_path)),
        ("HOME", str(tmp_path)),
    ):
        monkeypatch.setenv(name, value)
    yield package
    package.finish()
    package.teardown()


def read_events(folder: Path) -> Any:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return events


def test_the_last_log_has_a_summary(tmp_path: Path) -> None:
    sparsity, model = SparsityTrainerCallback(**RIGL), Net()
    training = trainer(tmp_path, model, sparsity)
    metrics = training.train().metrics
    summary = {k.removeprefix(SUMMARY): v for k, v in metrics.items() if k.startswith(SUMMARY)}
    biases, head = 96 + 64, 64 * 4 + 4
    engine = sparsity.sparsifier
    assert engine is not None
    assert (summary["density"], summary["updates"]) == (0.25, engine.n_updates)
    assert summary["parameters"] == 2 * 6 * 256 + biases + head
    assert summary["dense_parameters"] == 2 * 64 * 96 + biases + head
    # SGD with momentum: three tensors of 4 bytes.
    assert summary["dense_bytes"] == 3 * 4 * 2 * 64 * 96 > 3 * summary["bytes"]
    last = training.state.log_history[-1]
    assert {k: v for k, v in last.items() if k.startswith(SUMMARY)} == {
        f"{SUMMARY}{name}": value for name, value in summary.items()
    }


@pytest.mark.parametrize("is_last", [False, True])
def test_the_run_of_wandb_has_options_and_summary(
    is_last: bool, wandb: Any, tmp_path: Path
) -> None:
    """Whether the Trainer's callback for W&B begins the run before or after ours."""
    sparsity = SparsityTrainerCallback(**RIGL)
    callbacks = [sparsity]
    if is_last:
        callbacks.append(transformers.integrations.WandbCallback())
    training = trainer(tmp_path, Net(), *callbacks, report_to="none" if is_last else "wandb")
    training.train()
    config, summary = dict(wandb.run.config), dict(wandb.run.summary)
    assert config["max_steps"] == STEPS, "what the Trainer's callback stores stays"
    assert config["sparsity/density.schedule"] == "cubic" and config["sparsity/block_size"] == 16
    assert (summary[f"{SUMMARY}density"], summary[f"{SUMMARY}parameters"]) == (
        0.25,
        training.state.log_history[-1][f"{SUMMARY}parameters"],
    )


@pytest.mark.parametrize("chosen", [False, True])
def test_tensorboard_has_options_and_summary_in_the_trainers_folder(
    chosen: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    if chosen:
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "chosen"))
    # Files that an earlier process left are not taken for those of this one.
    earlier = tmp_path / "runs" / "earlier" / "events.out.tfevents.9999999999.host.0.0"
    earlier.parent.mkdir(parents=True)
    earlier.touch()
    sparsity = SparsityTrainerCallback(**RIGL)
    trainer(tmp_path, Net(), sparsity, report_to="tensorboard").train()
    folders = {file.parent for file in tmp_path.rglob("events.out.*")} - {earlier.parent}
    (folder,) = folders
    assert (folder == tmp_path / "chosen") == chosen
    events = read_events(folder)
    assert len(events.Scalars("train/loss")) == STEPS // 5
    (density,) = events.Scalars(f"{SUMMARY}density")
    assert (density.value, density.step) == (0.25, STEPS)
    content = events.PluginTagToContent("hparams")
    (started,) = [value for tag, value in content.items() if tag.endswith("session_start_info")]
    assert b"sparsity/density.schedule" in started and b"cubic" in started


def test_monitor_null_stores_no_options_and_no_summary(wandb: Any, tmp_path: Path) -> None:
    sparsity = SparsityTrainerCallback(**RIGL, monitor=None)
    metrics = trainer(tmp_path, Net(), sparsity, report_to=["wandb", "tensorboard"]).train().metrics
    assert not any(key.startswith(SUMMARY) for key in metrics)
    assert not any(
        key.startswith("sparsity/") for key in (*wandb.run.config.keys(), *wandb.run.summary.keys())
    )
    assert len([*tmp_path.rglob("events.out.*")]) == 1


def test_a_reporter_that_fails_is_a_warning(
    wandb: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sparsity = SparsityTrainerCallback(**RIGL)

    class Fail(transformers.TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            def fail(*_: Any, **__: Any) -> None:
                raise OSError("no space")

            monkeypatch.setattr(type(wandb.run.config), "update", fail)

    training = trainer(tmp_path, Net(), sparsity, Fail(), report_to="wandb")
    with pytest.warns(UserWarning, match=r"W&B could not store .* \(OSError: no space"):
        training.train()
    assert sparsity.sparsifier is not None and sparsity.sparsifier.steps == STEPS


# What is printed.


def test_a_line_at_the_start_and_one_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the default verbosity, in which Transformers shows no information."""
    sparsity = SparsityTrainerCallback(**RIGL)
    training = trainer(tmp_path, Net(), sparsity)
    assert sparsity.summary is None and sparsity.last_update is None
    training.train()
    lines = [line for line in capsys.readouterr().out.splitlines() if "Block-sparse" in line]
    start, end = lines
    assert start.startswith(
        "Block-sparse training: layers 2; linear layers left dense 1; density 1.000; topology "
        "updates every 3 steps, from step 0 to 22; density moves from step 0 to 18."
    )
    summary, update = sparsity.summary, sparsity.last_update
    assert summary is not None and update is not None and sparsity.sparsifier is not None
    assert (summary.layers, summary.steps, summary.density) == (2, STEPS, 0.25)
    assert summary.updates == sparsity.sparsifier.n_updates == update.number
    assert end == f"{summary}"
    assert end.startswith("Block-sparse training has ended: layers 2; steps 24; density 0.250; ")
    assert f"parameters {summary.parameters:,} of {summary.dense_parameters:,} dense" in end
    assert "weight" not in start + end


def test_the_share_of_weights_is_told_where_blocks_have_a_pattern(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sparsity = SparsityTrainerCallback(**RIGL, nm="2:4")
    training = trainer(tmp_path, Net(), sparsity)
    training.train()
    out = capsys.readouterr().out
    assert "density 1.000; weight density 0.500; topology updates" in out
    assert "; density 0.250; weight density 0.125, with 2:4 patterns within blocks; " in out
    log = training.state.log_history
    assert log[-1]["sparsity/weight_density"] == 0.125
    assert all(e["sparsity/weight_density"] == e["sparsity/density"] / 2 for e in log)


def test_each_training_says_where_the_schedule_stands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sparsity = SparsityTrainerCallback(**RIGL)
    training = trainer(tmp_path, Net(), sparsity, save_strategy="steps", save_steps=10)
    training.train()
    capsys.readouterr()
    resumed = trainer(tmp_path, Net(), SparsityTrainerCallback(**RIGL))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert "it continues at step 10, and the next update is at step 12" in capsys.readouterr().out
    training.train()
    printed = capsys.readouterr().out
    assert "the schedule of topology updates has ended, so the blocks stay" in printed
    assert sparsity.summary is not None and sparsity.summary.steps == 2 * STEPS


@pytest.mark.parametrize("monitor", [None, {}])
def test_only_errors_are_shown_if_that_is_asked_for(
    monitor: dict[str, Any] | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The summary is there all the same, and without a `monitor`, too."""
    verbosity = transformers.logging.get_verbosity()
    sparsity = SparsityTrainerCallback(**RIGL, monitor=monitor)
    try:
        trainer(tmp_path, Net(), sparsity, log_level="error").train()
    finally:
        transformers.logging.set_verbosity(verbosity)
    assert "Block-sparse" not in capsys.readouterr().out
    assert sparsity.summary is not None and sparsity.summary.density == 0.25


def test_a_folder_of_the_trainer_has_no_run_page(tmp_path: Path) -> None:
    """The error does not only have remedies for Lightning's users."""
    trainer(tmp_path, Net(), SparsityTrainerCallback(**RIGL)).train()
    with pytest.raises(ValueError, match="with Transformers' Trainer or a loop of your own has no"):
        find_histories(tmp_path)


def test_options_of_monitor_without_an_effect_are_named() -> None:
    with pytest.warns(UserWarning, match=r"`monitor` has no effect .* got monitor\.layers='all'\."):
        SparsityTrainerCallback(**RIGL, monitor={"layers": "all", "images": 8})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for monitor in (None, {}):
            SparsityTrainerCallback(**RIGL, monitor=monitor)
