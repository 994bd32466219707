"""What the Trainer's own loggers get of a training's options and summary."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.helpers import RIGL, STEPS, Net

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from sparse_lightning.integrations import SparsityTrainerCallback  # noqa: E402
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
