"""Lightning's checkpoints: resuming or starting from one, and warnings about its density."""

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
from sparse_lightning.patching import discards_training, initialize_from_dense
from sparse_lightning.sparsifier import Sparsifier
from sparse_lightning.swap_report import describe_trained

# Key of the density status in a callback's saved state. It is not part of `state_dict`, whose keys
# are all required to resume.
_DENSITY_STATUS = "arrival"


def find_state(
    checkpoint: Mapping[str, Any],
    key: str,
    config: SparsityConfig,
    others: Collection[str],
) -> dict[str, Any] | None:
    """Return the state of a `SparsityCallback` in a checkpoint, and move it to the callback's key.

    Earlier versions saved it under the name of the class alone.

    Args:
        checkpoint: Lightning's checkpoint; its "callbacks" may be changed.
        key: state key of the callback.
        config: configuration of the callback.
        others: state keys of the trainer's other `SparsityCallback`s.

    Returns:
        The state; None if the checkpoint has no state of any `SparsityCallback`.

    Raises:
        ValueError: if the checkpoint has states of `SparsityCallback`s, but not this callback's.
    """
    states = checkpoint["callbacks"]
    if key in states:
        return states[key]  # type: ignore[no-any-return]
    saved = _states_of_same_class(states, key)
    unclaimed = [k for k in saved if k not in others]
    patterns = _patterns(config.training_options())
    matching = [k for k in unclaimed if _patterns(saved[k].get("config", {})) == patterns]
    if not matching and not others and len(unclaimed) == 1:
        matching = unclaimed  # the only candidate; differing options are reported later
    if matching:
        states[key] = states.pop(matching[0])
        return states[key]  # type: ignore[no-any-return]
    if saved:
        available = "; ".join(str(_patterns(state.get("config", {}))) for state in saved.values())
        raise ValueError(
            "`callbacks` must have the SparsityCallbacks of the resumed training, with the same "
            f"`include` and `exclude`; got {patterns}, but the checkpoint has {available}. Use "
            "those, or start a new training from its weights: load checkpoint['state_dict'] after "
            "`sparsify`."
        )
    return None


def check_none_missing(
    checkpoint: Mapping[str, Any], configs: Mapping[str, SparsityConfig]
) -> None:
    """Raise ValueError if a checkpoint has a `SparsityCallback` that the trainer does not have.

    Otherwise its layers would silently stay dense, or no longer evolve.

    Args:
        checkpoint: Lightning's checkpoint.
        configs: configurations of all `SparsityCallback`s of the trainer, by state key.
    """
    states = checkpoint.get("callbacks", {})
    saved = {k: s for key in configs for k, s in _states_of_same_class(states, key).items()}
    if len(saved) == len(configs) == 1:
        return  # `find_state` pairs them; differing options are reported later
    known = [_patterns(config.training_options()) for config in configs.values()]
    for key, state in saved.items():
        patterns = _patterns(state.get("config", {}))
        if key not in configs and patterns not in known:
            raise ValueError(
                "`callbacks` must have every SparsityCallback of the resumed training; got none "
                f"with {patterns}, which the checkpoint has. Add it, or start a new training from "
                "its weights: load checkpoint['state_dict'] after `sparsify`."
            )


def _states_of_same_class(states: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return the saved states of all callbacks of the class that a state key names."""
    class_name = key.partition("{")[0]
    return {k: s for k, s in states.items() if str(k).partition("{")[0] == class_name}


def _patterns(config: Mapping[str, Any]) -> dict[str, Any]:
    return {argument: config.get(argument) for argument in ("include", "exclude")}


def start_from_dense_weights(checkpoint: Mapping[str, Any], sparsifier: Sparsifier) -> None:
    """Initialise block-sparse layers from a dense checkpoint without a `SparsityCallback` state.

    Warns of layers of which only random blocks are kept although the checkpoint has trained them.

    Raises:
        ValueError: if the checkpoint has block-sparse layers, since their schedule is unknown.
    """
    layers, dense = sparsifier.layers, checkpoint["state_dict"]
    if not all(f"{name}.weight" in dense for name in (*layers, *sparsifier.follows)):
        raise ValueError(
            "`ckpt_path` must be a checkpoint of a training with SparsityCallback, whose schedule "
            "can continue, or one with dense weights to start from; got block-sparse layers "
            "without the callback's state. To start a new training from its weights, omit "
            "`ckpt_path`, call `sparsify`, and load checkpoint['state_dict'] before the fit."
        )
    init, floor = sparsifier.config.init, sparsifier.config.floor
    trained = []
    for name, layer in layers.items():
        weight = dense[f"{name}.weight"]
        if discards_training(weight, layer.weight_density, init):
            trained.append(name)
        initialize_from_dense(layer, weight, init, floor=floor)
    if trained:
        rank_zero_warn(describe_trained(trained))
    for name, source in sparsifier.follows.items():
        copy = sparsifier.model.get_submodule(name)
        assert isinstance(copy, BlockSparseLinear)
        weight = dense[f"{name}.weight"]
        initialize_from_dense(copy, weight, init, layers[source], floor=floor)
    rank_zero_info(
        "Block-sparse training starts from the dense weights of the checkpoint. Its optimizer "
        "states, its progress and its callback states are ignored."
    )


def keep_only_weights(
    checkpoint: dict[str, Any], state_dict: Mapping[str, Any], pending: Collection[str] = ()
) -> None:
    """Reduce a checkpoint to a state dict, so that Lightning starts everything else from scratch.

    Args:
        checkpoint: Lightning's checkpoint, with dense weights; it is changed in place.
        state_dict: state dict of the model after `start_from_dense_weights`.
        pending: names of layers that another callback initialises later; the checkpoint keeps
            their dense weights.
    """
    dense = checkpoint["state_dict"]
    pending_weights = {f"{name}.weight": dense[f"{name}.weight"] for name in pending}
    initialised = {
        key: value
        for key, value in state_dict.items()
        if not any(key in (f"{name}.values", f"{name}._extra_state") for name in pending)
    }
    checkpoint.update(
        state_dict={**initialised, **pending_weights},
        optimizer_states=[],
        lr_schedulers=[],
        callbacks={},
    )
    checkpoint.pop("loops", None)


# Warnings about checkpoints from before the final density.


def save_density_status(checkpoint: Mapping[str, Any], key: str, sparsifier: Sparsifier) -> None:
    """Add the current and the final density to a callback's state in a checkpoint."""
    checkpoint["callbacks"][key][_DENSITY_STATUS] = {
        "density": sparsifier.density,
        "final_density": sparsifier.final_density,
        "is_final": sparsifier.is_final,
    }


def warn_if_not_final(trainer: pl.Trainer, state: Mapping[str, Any] | None) -> None:
    """Warn if a checkpoint to be evaluated was saved before the final density.

    Args:
        trainer: the trainer that has loaded the checkpoint.
        state: the state of the `SparsityCallback` in the checkpoint.
    """
    status = None if state is None else state.get(_DENSITY_STATUS)
    if status is None or status["is_final"] or status["density"] == status["final_density"]:
        return
    rank_zero_warn(
        f"The checkpoint '{trainer.ckpt_path}' was saved at density {status['density']:.3f}, "
        f"before its training reached the final density {status['final_density']:.3f}. {_REMEDY}"
    )


def warn_if_best_differs(trainer: pl.Trainer) -> None:
    """Warn about each best checkpoint whose density differs from that of the trained model."""
    if not trainer.is_global_zero:
        return
    engines = sparsifiers(trainer)
    layers = {name: layer for engine in engines for name, layer in engine.layers.items()}
    for path in _best_paths(trainer.checkpoint_callbacks):
        try:
            blocks = _saved_blocks(path, layers)
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).partition("\n")[0]
            rank_zero_info(f"The density of the checkpoint '{path}' is unknown: {reason}")
            continue
        current = {name: layers[name].topology.n_blocks for name in blocks}
        if sum(blocks.values()) != sum(current.values()):
            grids = [layers[name].topology.grid for name in blocks]
            saved = sum(blocks.values()) / sum(rows * columns for rows, columns in grids)
            rank_zero_warn(
                f"The best checkpoint '{path}' has density {saved:.3f}, but the trained model has "
                f"density {density_of(layers[name] for name in blocks):.3f}. {_REMEDY}"
            )


_REMEDY = (
    "The monitored metric may have been better while more blocks were present. To keep the best "
    "checkpoint at the final density, use `sparse_lightning.FinalDensityCheckpoint`."
)


def _best_paths(callbacks: Sequence[Any]) -> list[Path]:
    """Return the distinct best checkpoints that are single local files."""
    best = [
        callback.best_model_path
        for callback in callbacks
        if isinstance(callback, ModelCheckpoint) and callback.best_model_path
    ]
    paths = [Path(path) for path in dict.fromkeys(best) if "://" not in path]
    return [path for path in paths if path.is_file()]


def _saved_blocks(path: Path, layers: Mapping[str, BlockSparseLinear]) -> dict[str, int]:
    """Return how many blocks each layer has in a checkpoint; layers it lacks are omitted.

    The file is memory-mapped and only the topologies are read.
    """
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    saved = find_layers(checkpoint["state_dict"])
    return {name: saved[name].topology.n_blocks for name in layers if name in saved}
