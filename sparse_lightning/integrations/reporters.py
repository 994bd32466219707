"""Options and summary of a training for the loggers of Transformers' `Trainer`, its reporters.

A callback of the Trainer can reach neither the other callbacks nor their writers, only what they
share with the process: the active run of W&B, and TensorBoard's files.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def report_options(options: Mapping[str, Any]) -> None:
    """Add the options to the configuration of the active W&B run, if there is one."""
    run = _wandb_run()
    if run is not None:
        _try("W&B", lambda: run.config.update(dict(options), allow_val_change=True))


def report_summary(
    output_dir: Path, options: Mapping[str, Any], summary: Mapping[str, float], step: int
) -> None:
    """Add the summary to the active W&B run, and options and summary to TensorBoard's files.

    TensorBoard gets both as hyperparameters and their metrics. Call this after the training: while
    the Trainer's writer appends to its file, some versions of TensorBoard stop reading it as soon
    as there is a newer one.

    Args:
        output_dir: the Trainer's folder.
        options: options by key.
        summary: scalars by key.
        step: the Trainer's step.
    """
    run = _wandb_run()
    if run is not None:
        _try("W&B", lambda: run.summary.update(dict(summary)))
    folder = find_tensorboard_folder(output_dir)
    if folder is not None:
        _try("TensorBoard", lambda: _write_hyperparameters(folder, options, summary, step))


def find_tensorboard_folder(output_dir: Path) -> Path | None:
    """Return where this process has last written a file of TensorBoard; None if it has not.

    That is below the folder in which Transformers' `TensorBoardCallback` puts its files: the one in
    `TENSORBOARD_LOGGING_DIR`, or "runs" in the Trainer's.
    """
    chosen = os.environ.get("TENSORBOARD_LOGGING_DIR")
    root = Path(chosen).expanduser() if chosen else output_dir / "runs"
    # The names have the time, the host and the process.
    files = [
        file
        for file in root.rglob("events.out.tfevents.*")
        if f".{os.getpid()}." in file.name and file.is_file()
    ]
    return max(files, key=lambda file: file.stat().st_mtime_ns).parent if files else None


def _wandb_run() -> Any:
    return getattr(sys.modules.get("wandb"), "run", None)


def _write_hyperparameters(
    folder: Path, options: Mapping[str, Any], summary: Mapping[str, float], step: int
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    values = {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in options.items()
    }
    with SummaryWriter(str(folder)) as writer:
        # The name is that of a subfolder; by default it is the time.
        writer.add_hparams(values, dict(summary), run_name=".", global_step=step)


def _try(reporter: str, call: Callable[[], Any]) -> None:
    """Call a function; a failure only warns, as it must not end a training."""
    try:
        call()
    except Exception as error:
        warnings.warn(
            f"{reporter} could not store the options and the summary of the sparsity "
            f"({type(error).__name__}: {error}); the training continues.",
            stacklevel=2,
        )
