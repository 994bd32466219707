"""Read checkpoints, and write weights without replacing a file by accident."""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_lightning.export.state_dicts import is_same
from sparse_lightning.files import atomic_write, check_writable

# `dcp_to_torch` joins a sharded checkpoint with one key per optimizer: optimizer_0, ...
_OPTIMIZER_PREFIX = "optimizer_"

# What `save_pretrained` writes: all weights, or the names of the files that share them.
_WEIGHTS = "model.safetensors"
_INDEX = f"{_WEIGHTS}.index.json"

# Entries of a Lightning checkpoint that serve only to resume the sparse run.
_RESUME_KEYS = (
    "lr_schedulers",
    "loops",
    "callbacks",
    "MixedPrecision",
    "averaging_state",
    "current_model_state",
)


def read_checkpoint(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """Read a Lightning checkpoint, or a saved state dict, onto the CPU.

    Only tensors and plain values are unpickled, so the file cannot run code.

    Raises:
        ValueError: if the file does not exist, or holds no state dict.
    """
    path = Path(path)
    if is_transformers(path):
        raise ValueError(
            f"`checkpoint` must be a file written by torch.save; got '{path}', which Transformers "
            "wrote. Load the model by from_pretrained; `sparse_lightning.densify` makes it dense."
        )
    if path.is_dir():
        raise ValueError(
            f"`checkpoint` must be a file; got the folder '{path}'. Join a sharded checkpoint by "
            "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE."
        )
    if not path.is_file():
        raise ValueError(f"`checkpoint` must be an existing file; got '{path}'.")
    try:
        checkpoint: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(_explain_unreadable(path, error)) from error
    state_dict_of(checkpoint)
    return checkpoint


def is_transformers(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is a folder with a model that Transformers' `save_pretrained` wrote."""
    return any(Path(path, name).is_file() for name in (_WEIGHTS, _INDEX))


def read_transformers(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the state dict of a model that Transformers' `save_pretrained` wrote, onto the CPU.

    In such a folder the blocks of a layer are called `<name>.weight`, as `find_layers` knows.

    Args:
        folder: folder with model.safetensors, or with several files and their index.

    Raises:
        ValueError: if a file is missing or cannot be read.
        RuntimeError: if the package safetensors is not installed.
    """
    library = require("safetensors.torch", "safetensors")
    folder = Path(folder)
    tensors: dict[str, Tensor] = {}
    try:
        names = [_WEIGHTS]
        if not Path(folder, _WEIGHTS).is_file():
            index = json.loads(Path(folder, _INDEX).read_text(encoding="utf-8"))
            names = sorted({*index["weight_map"].values()})
        for name in names:
            tensors.update(library.load_file(folder / name))
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(
            f"`checkpoint` must hold all files of the model; got '{folder}', which cannot be read: "
            f"{type(error).__name__}: {error}"
        ) from error
    return tensors


def state_dict_of(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the model's state dict: the one in a Lightning checkpoint, else the argument itself.

    Raises:
        ValueError: if there is no state dict.
    """
    found = checkpoint["state_dict"] if _is_lightning_checkpoint(checkpoint) else checkpoint
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise ValueError(
            "`checkpoint` must hold a state dict, from names to tensors; "
            f"got {type(found).__name__}. Save it with trainer.save_checkpoint(path) or "
            "torch.save(model.state_dict(), path)."
        )
    return found


def with_state_dict(
    checkpoint: Mapping[str, Any], state_dict: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Return a checkpoint of the same form with another state dict.

    A Lightning checkpoint keeps its other entries, such as hyper-parameters, except those that only
    resume the run: the state of optimizers, callbacks and loops.
    """
    if not _is_lightning_checkpoint(checkpoint):
        return state_dict
    kept = {
        key: value
        for key, value in checkpoint.items()
        if key not in _RESUME_KEYS and not key.startswith(_OPTIMIZER_PREFIX)
    }
    return kept | {"state_dict": state_dict}


def write_checkpoint(
    path: str | os.PathLike[str], checkpoint: Mapping[str, Any], *, force: bool = False
) -> None:
    """Write a file for `torch.load(path, weights_only=True)` atomically.

    Args:
        path: path of the file.
        checkpoint: a state dict or a Lightning checkpoint.
        force: replace an existing file.

    Raises:
        ValueError: if the file exists or cannot be written.
    """
    with new_file(path, force) as file:
        torch.save(checkpoint, file)


def write_safetensors(
    path: str | os.PathLike[str], state_dict: Mapping[str, Any], *, force: bool = False
) -> None:
    """Write a state dict in safetensors format atomically, for `load_model(model, path)`.

    A tensor with several names, such as a tied weight, is written under the first; the metadata
    maps the other names to it. `safetensors.torch.save_model` does the same, and `load_model` ties
    the tensors again. Other tensors that overlap in memory are written separately.

    Args:
        path: path of the file.
        state_dict: dense tensors by name.
        force: replace an existing file.

    Raises:
        ValueError: if the file exists or cannot be written, or an entry is not a dense tensor.
        RuntimeError: if the package safetensors is not installed.
    """
    library = require("safetensors.torch", "safetensors")
    first: dict[str, Tensor] = {}
    metadata = {"format": "pt"}
    for name, tensor in state_dict.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            kind = tensor.layout if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(
                f"`state_dict` must hold dense tensors only for safetensors; got {kind} for "
                f"'{name}'. Remove the entry, or write a PyTorch file instead."
            )
        same = next((other for other in first if is_same(tensor, first[other])), None)
        if same is None:
            first[name] = tensor
        else:
            metadata[name] = same
    # The library rejects tensors that share memory or are not contiguous.
    copies = {name: t.clone(memory_format=torch.contiguous_format) for name, t in first.items()}
    with new_file(path, force) as file:
        library.save_file(copies, file, metadata=metadata)


def write_transformers(
    folder: str | os.PathLike[str], model: nn.Module, *, force: bool = False
) -> None:
    """Write a folder for Transformers' `from_pretrained(folder)` atomically.

    Args:
        folder: path of the folder.
        model: dense model with Transformers' `save_pretrained`.
        force: replace the model's files in an existing folder; its other files stay.

    Raises:
        ValueError: if the folder exists or cannot be written, or the model has no
            `save_pretrained`.
    """
    folder = Path(folder)
    save = getattr(model, "save_pretrained", None)
    if save is None:
        raise ValueError(
            "`model` must be a Transformers model, which has `save_pretrained`; got a "
            f"{type(model).__name__}. If a module holds one, export that submodule: give a "
            "function that builds it, and its name by --prefix."
        )
    check_output(folder, force, kind="folder")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as work:
        written = Path(work, folder.name)
        save(written)
        if folder.exists():
            for file in written.iterdir():
                os.replace(file, folder / file.name)
        else:
            os.replace(written, folder)


@contextmanager
def new_file(path: str | os.PathLike[str], force: bool) -> Iterator[Path]:
    """Yield a temporary path; its file becomes `path`, as with `atomic_write`.

    Raises:
        ValueError: if `path`, or a file written next to it, exists and `force` is false, or
            cannot be written.
    """
    path = Path(path)
    check_output(path, force)
    with atomic_write(path) as file:
        yield file
        for extra in file.parent.iterdir():
            check_output(path.with_name(extra.name), force)


def check_output(path: Path, force: bool, *, kind: str = "file") -> None:
    """Raise ValueError if a file or folder cannot be written, or exists and `force` is false."""
    check_writable(path, "output", kind=kind)
    if path.exists() and not force:
        replaced = "it" if kind == "file" else "the model in it"
        raise ValueError(
            f"`output` must be a new {kind}; got '{path}', which exists. "
            f"Give another with --output, or --force to replace {replaced}."
        )


def require(module: str, *packages: str) -> Any:
    """Import an optional module, or raise RuntimeError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RuntimeError(
            f"This format needs the package {packages[0]}: {error}. "
            f"Install it: pip install {' '.join(packages)}"
        ) from error


def _is_lightning_checkpoint(checkpoint: Mapping[str, Any]) -> bool:
    return isinstance(checkpoint, Mapping) and isinstance(checkpoint.get("state_dict"), Mapping)


def _explain_unreadable(path: Path, error: Exception) -> str:
    classes: list[str] = []
    with suppress(Exception):
        classes = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    if not classes:
        return (
            f"`checkpoint` must be a complete file written by torch.save; got '{path}', which "
            f"torch.load rejects: {type(error).__name__}: {str(error).partition('. ')[0]}"
        )
    return (
        "`checkpoint` must hold tensors and plain values only, as other objects could run code "
        f"when loaded; got '{path}' with {', '.join(sorted(classes))}. If you trust the file, "
        'extract its weights: torch.save(torch.load(path, weights_only=False)["state_dict"], '
        "'weights.pt')."
    )
