"""Which saved trainings a training may be resumed from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def is_dense(state_dict: Mapping[str, Any], layers: Iterable[str]) -> bool:
    """Tell whether a state dict has a dense weight for each of some layers."""
    return all(f"{name}.weight" in state_dict for name in layers)


def check_same_training(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Check that a training can go on from the state that another one has saved.

    Args:
        saved: the state of the one that was saved.
        own: the state of the one that is about to take it over.

    Raises:
        ValueError: if another version wrote it, or if it was configured in another way: half of a
            changed schedule would be of the old one.
    """
    missing = sorted(own.keys() - saved.keys())
    if missing:
        raise ValueError(
            f"The saved state of the sparsity must hold {', '.join(map(repr, missing))}; got none. "
            "Resume with the version of sparse_lightning that wrote it."
        )
    before, now = saved["config"], own["config"]
    differing = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if differing:
        got = ", ".join(f"{key}={now.get(key)!r} (was {before.get(key)!r})" for key in differing)
        raise ValueError(
            "The sparsity must be configured as before when a training is resumed; got "
            f"{got}. Take what it was, or start a new training from the saved weights: load the "
            "model's state dict alone, after `sparsify`."
        )
