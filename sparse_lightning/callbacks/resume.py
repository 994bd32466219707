"""Which checkpoints a training may be resumed from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_REMEDY = (
    "To start a new training from its weights, leave `ckpt_path` out, call `sparsify`, and load "
    "checkpoint['state_dict'] before the fit."
)


# Describes what has been; checkpoints of earlier versions hold none of it.
_OPTIONAL = {"patterns"}


def is_dense(state_dict: Mapping[str, Any], layers: Iterable[str]) -> bool:
    """Tell whether a state dict has a dense weight for each of some layers."""
    return all(f"{name}.weight" in state_dict for name in layers)


def leave_only_weights(checkpoint: dict[str, Any]) -> None:
    """Have Lightning take a checkpoint's model, and begin with all else."""
    checkpoint.update(optimizer_states=[], lr_schedulers=[], callbacks={})
    checkpoint.pop("loops", None)


def check_resumable(state: Mapping[str, Any] | None, own: Mapping[str, Any]) -> None:
    """Check that a training can go on from what a checkpoint holds of `SparsityCallback`.

    Args:
        state: the callback's state in the checkpoint; None if there is none.
        own: the state of the callback that is about to take it over.

    Raises:
        ValueError: if there is none, if another version wrote it, or if the callback was
            configured in another way: half of a changed schedule would be of the old one.
    """
    if state is None:
        raise ValueError(
            "`ckpt_path` must be a checkpoint of a training with SparsityCallback, so that its "
            "schedule can go on, or one of dense weights, to begin with; got block-sparse layers "
            f"without the callback's state. {_REMEDY}"
        )
    missing = sorted(own.keys() - state.keys() - _OPTIONAL)
    if missing:
        raise ValueError(
            f"The saved state of SparsityCallback must hold {', '.join(map(repr, missing))}; got "
            "none. Resume with the version of sparse_lightning that wrote it."
        )
    saved, now = state["config"], own["config"]
    differing = [key for key in {**saved, **now} if saved.get(key) != now.get(key)]
    if differing:
        got = ", ".join(f"{key}={now.get(key)!r} (was {saved.get(key)!r})" for key in differing)
        raise ValueError(
            "SparsityCallback must be configured as before when a training is resumed; got "
            f"{got}. Take what it was. {_REMEDY}"
        )
