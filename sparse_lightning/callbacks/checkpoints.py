"""Lightning's checkpoints: what a fit goes on from or begins with, and how dense the best is."""

from __future__ import annotations

import pickle
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from sparse_lightning.config import SparsityConfig
from sparse_lightning.export.state_dicts import find_layers
from sparse_lightning.linear import BlockSparseLinear, density_of
from sparse_lightning.observers.observers import sparsifiers
from sparse_lightning.patching import start_from
from sparse_lightning.resume import is_dense
from sparse_lightning.sparsifier import Sparsifier

# What a callback adds to its state when a checkpoint is saved. It is not in its `state_dict`, which
# a training is refused to resume without.
_ARRIVAL = "arrival"


def find_state(
    checkpoint: Mapping[str, Any],
    key: str,
    config: SparsityConfig,
    others: Collection[str],
) -> dict[str, Any] | None:
    """Return the state that a `SparsityCallback` has in a checkpoint, and put it under its key.

    Earlier versions saved it under the class's name alone.

    Args:
        checkpoint: of Lightning's; its "callbacks" may be changed.
        key: of the callback.
        config: of the callback.
        others: keys of the trainer's other `SparsityCallback`s.

    Returns:
        The state; None if the checkpoint has none of any `SparsityCallback`.

    Raises:
        ValueError: if it has some, and none is this callback's.
    """
    states = checkpoint["callbacks"]
    if key in states:
        return states[key]  # type: ignore[no-any-return]
    saved = _saved(states, key)
    free = [k for k in saved if k not in others]
    asked = _patterns(config.of_training())
    found = [k for k in free if _patterns(saved[k].get("config", {})) == asked]
    if not found and not others and len(free) == 1:
        found = free  # one callback before, one now: it is told what else differs
    if found:
        states[key] = states.pop(found[0])
        return states[key]  # type: ignore[no-any-return]
    if saved:
        had = "; ".join(str(_patterns(state.get("config", {}))) for state in saved.values())
        raise ValueError(
            "`callbacks` must have the SparsityCallbacks of the training that is resumed, by their "
            f"`include` and `exclude`; got {asked}, where the checkpoint has {had}. Give those, or "
            "start a new training from its weights: load checkpoint['state_dict'] after `sparsify`."
        )
    return None


def check_none_missing(
    checkpoint: Mapping[str, Any], configs: Mapping[str, SparsityConfig]
) -> None:
    """Raise ValueError if a `SparsityCallback` of a checkpoint is none of the trainer's.

    Its layers would stay dense, or as they are, without a word.

    Args:
        checkpoint: of Lightning's.
        configs: of all `SparsityCallback`s of the trainer, by their keys.
    """
    saved = {
        k: s for key in configs for k, s in _saved(checkpoint.get("callbacks", {}), key).items()
    }
    if len(saved) == len(configs) == 1:
        return  # it is told what differs
    known = [_patterns(config.of_training()) for config in configs.values()]
    for key, state in saved.items():
        had = _patterns(state.get("config", {}))
        if key not in configs and had not in known:
            raise ValueError(
                "`callbacks` must have every SparsityCallback of the training that is resumed; got "
                f"none with {had}, which the checkpoint has. Add it, or start a new training from "
                "its weights: load checkpoint['state_dict'] after `sparsify`."
            )


def _saved(states: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return the states of the callbacks of the class that a key is of."""
    of_class = key.partition("{")[0]
    return {k: s for k, s in states.items() if str(k).partition("{")[0] == of_class}


def _patterns(config: Mapping[str, Any]) -> dict[str, Any]:
    return {argument: config.get(argument) for argument in ("include", "exclude")}


def begin_with(checkpoint: Mapping[str, Any], sparsifier: Sparsifier) -> None:
    """Give layers the dense weights of a checkpoint, which has no state of a sparsity.

    Raises:
        ValueError: if it has block-sparse layers: there is no schedule to go on with.
    """
    layers, dense = sparsifier.layers, checkpoint["state_dict"]
    if not is_dense(dense, [*layers, *sparsifier.follows]):
        raise ValueError(
            "`ckpt_path` must be a checkpoint of a training with SparsityCallback, so that its "
            "schedule can go on, or one of dense weights, to begin with; got block-sparse layers "
            "without the callback's state. To start a new training from its weights, leave "
            "`ckpt_path` out, call `sparsify`, and load checkpoint['state_dict'] before the fit."
        )
    for name, layer in layers.items():
        start_from(layer, dense[f"{name}.weight"], sparsifier.config.init)
    for name, original in sparsifier.follows.items():
        copy = sparsifier.model.get_submodule(name)
        assert isinstance(copy, BlockSparseLinear)
        start_from(copy, dense[f"{name}.weight"], sparsifier.config.init, layers[original])
    rank_zero_info(
        "Block-sparse training begins with the dense weights of the checkpoint. Its optimizer, its "
        "progress and the state of callbacks are left out."
    )


def leave_only_weights(
    checkpoint: dict[str, Any], state_dict: Mapping[str, Any], waiting: Collection[str] = ()
) -> None:
    """Have Lightning take a state dict from a checkpoint, and begin with all else.

    Args:
        checkpoint: of Lightning's, with dense weights.
        state_dict: of the model, which has begun with them.
        waiting: layers that another callback is yet to begin with: their weights stay.
    """
    dense = checkpoint["state_dict"]
    kept = {f"{name}.weight": dense[f"{name}.weight"] for name in waiting}
    taken = {
        key: value
        for key, value in state_dict.items()
        if not any(key in (f"{name}.values", f"{name}._extra_state") for name in waiting)
    }
    checkpoint.update(
        state_dict={**taken, **kept}, optimizer_states=[], lr_schedulers=[], callbacks={}
    )
    checkpoint.pop("loops", None)


# A checkpoint that was the best before the density had fallen.


def arrival(sparsifier: Sparsifier) -> dict[str, Any]:
    """Return how far the density is on its way to the final one, to be saved."""
    grids = {name: layer.topology.grid for name, layer in sparsifier.layers.items()}
    cells = sum(rows * columns for rows, columns in grids.values())
    return {
        "density": sparsifier.density,
        "final_density": sparsifier.config.final_blocks(grids) / max(1, cells),
        "is_final": sparsifier.is_final,
    }


def save_arrival(checkpoint: Mapping[str, Any], key: str, sparsifier: Sparsifier) -> None:
    """Add it to the state of a callback."""
    checkpoint["callbacks"][key][_ARRIVAL] = arrival(sparsifier)


def warn_of_early_weights(trainer: pl.Trainer, state: Mapping[str, Any] | None) -> None:
    """Say so if a checkpoint that is about to be evaluated is not of the final density.

    Args:
        trainer: that has loaded it.
        state: of the `SparsityCallback` in it.
    """
    at = None if state is None else state.get(_ARRIVAL)
    if at is None or at["is_final"] or at["density"] == at["final_density"]:
        return
    rank_zero_warn(
        f"The checkpoint '{trainer.ckpt_path}' was saved at density {at['density']:.3f}, before "
        f"its training came to the final {at['final_density']:.3f}. {_REMEDY}"
    )


def warn_of_early_best(trainer: pl.Trainer) -> None:
    """Name the best checkpoints of a training that are of another density than its end."""
    if not trainer.is_global_zero:
        return
    engines = sparsifiers(trainer)
    layers = {name: layer for each in engines for name, layer in each.layers.items()}
    for path in _best_paths(trainer.checkpoint_callbacks):
        try:
            blocks = _saved_blocks(path, layers)
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).partition("\n")[0]
            rank_zero_info(f"The density of the checkpoint '{path}' is not known: {reason}")
            continue
        now = {name: layers[name].topology.n_blocks for name in blocks}
        if sum(blocks.values()) != sum(now.values()):
            grids = [layers[name].topology.grid for name in blocks]
            saved = sum(blocks.values()) / sum(rows * columns for rows, columns in grids)
            rank_zero_warn(
                f"The best checkpoint '{path}' has density {saved:.3f}, and the model that was "
                f"trained {density_of(layers[name] for name in blocks):.3f}. {_REMEDY}"
            )


_REMEDY = (
    "What is monitored may have been better while more blocks were present. To have the best "
    "checkpoint of the final density, use `sparse_lightning.FinalDensityCheckpoint`."
)


def _best_paths(callbacks: Sequence[Any]) -> list[Path]:
    """Return the best checkpoints that are one file on this machine, each once."""
    best = [
        each.best_model_path
        for each in callbacks
        if isinstance(each, ModelCheckpoint) and each.best_model_path
    ]
    paths = [Path(path) for path in dict.fromkeys(best) if "://" not in path]
    return [path for path in paths if path.is_file()]


def _saved_blocks(path: Path, layers: Mapping[str, BlockSparseLinear]) -> dict[str, int]:
    """Return the number of blocks of those layers that a checkpoint holds.

    Only the topologies are read: all else stays on disk.
    """
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    saved = find_layers(checkpoint["state_dict"])
    return {name: saved[name].topology.n_blocks for name in layers if name in saved}
