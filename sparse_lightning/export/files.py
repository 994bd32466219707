"""Files: checkpoints are read, and what is made of them is written, never over another file."""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_lightning.export.state_dicts import is_same

# In what `dcp_to_torch` makes of a sharded checkpoint each optimizer has a key: optimizer_0, ...
_OF_AN_OPTIMIZER = "optimizer_"

# What a Lightning checkpoint has for going on with the sparse run. It fits no dense model.
_OF_THE_RUN = (
    "lr_schedulers",
    "loops",
    "callbacks",
    "MixedPrecision",
    "averaging_state",
    "current_model_state",
)


def read_checkpoint(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """Read a checkpoint of Lightning, or the file of a state dict, onto the CPU.

    Nothing but tensors and plain values is unpickled: the file cannot run code.

    Raises:
        ValueError: if it is not there, or not such a file.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(
            f"`checkpoint` must be a file; got the folder '{path}'. Join a sharded checkpoint by "
            "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE."
        )
    if not path.is_file():
        raise ValueError(f"`checkpoint` must be a file that is there; got '{path}'.")
    try:
        checkpoint: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a damaged file, any
        raise ValueError(_why_unreadable(path, error)) from error
    state_dict_of(checkpoint)
    return checkpoint


def state_dict_of(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the model's state dict: that in a checkpoint of Lightning, else the argument.

    Raises:
        ValueError: if there is none.
    """
    found = checkpoint["state_dict"] if _is_of_lightning(checkpoint) else checkpoint
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

    Of a checkpoint of Lightning all is kept, as hyper-parameters, but what only serves to go on
    with the run: the state of optimizers, of callbacks and of loops.
    """
    if not _is_of_lightning(checkpoint):
        return state_dict
    kept = {
        key: value
        for key, value in checkpoint.items()
        if key not in _OF_THE_RUN and not key.startswith(_OF_AN_OPTIMIZER)
    }
    return kept | {"state_dict": state_dict}


def write_checkpoint(
    path: str | os.PathLike[str], checkpoint: Mapping[str, Any], *, force: bool = False
) -> None:
    """Write a file for `torch.load(path, weights_only=True)`, all at once.

    Args:
        path: of the file.
        checkpoint: a state dict, or one of the form of Lightning's.
        force: replace a file that is there.

    Raises:
        ValueError: if it is there, or cannot be.
    """
    with new_file(path, force) as file:
        torch.save(checkpoint, file)


def write_safetensors(
    path: str | os.PathLike[str], state_dict: Mapping[str, Any], *, force: bool = False
) -> None:
    """Write a state dict in the format of safetensors, all at once, for `load_model(model, path)`.

    A tensor that has several names, as of tied layers, is written under the first; the metadata
    has the others, `{other: first}`. So does `safetensors.torch.save_model`, and its `load_model`
    ties them again. Other tensors that overlap in memory are written each.

    Args:
        path: of the file.
        state_dict: of dense tensors.
        force: replace a file that is there.

    Raises:
        ValueError: if the file is there, or cannot be; or for an entry that is no dense tensor.
        RuntimeError: without the package safetensors.
    """
    library = require("safetensors.torch", "safetensors")
    first: dict[str, Tensor] = {}
    metadata = {"format": "pt"}
    for name, tensor in state_dict.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            what = tensor.layout if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(
                f"`state_dict` must hold dense tensors only for safetensors; got {what} for "
                f"'{name}'. Leave it out, or write a file of PyTorch's."
            )
        same = next((other for other in first if is_same(tensor, first[other])), None)
        if same is None:
            first[name] = tensor
        else:
            metadata[name] = same
    # The library refuses tensors that share memory, or are not contiguous.
    copies = {name: t.clone(memory_format=torch.contiguous_format) for name, t in first.items()}
    with new_file(path, force) as file:
        library.save_file(copies, file, metadata=metadata)


def write_transformers(
    folder: str | os.PathLike[str], model: nn.Module, *, force: bool = False
) -> None:
    """Write a Transformers model's folder, all at once, for `from_pretrained(folder)`.

    Args:
        folder: of the model.
        model: dense, with Transformers' `save_pretrained`.
        force: replace the files of the model in a folder that is there; its other files stay.

    Raises:
        ValueError: if the folder is there, or cannot be; or for a model without `save_pretrained`.
    """
    folder = Path(folder)
    save = getattr(model, "save_pretrained", None)
    if save is None:
        raise ValueError(
            "`model` must be a Transformers model, which has `save_pretrained`; got a "
            f"{type(model).__name__}. Of a module that holds one, take that alone: give the "
            "function that builds it, and its name by --prefix."
        )
    check_folder(folder, force)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as work:
        written = Path(work, folder.name)
        save(written)
        if folder.exists():
            for file in written.iterdir():
                os.replace(file, folder / file.name)
        else:
            os.replace(written, folder)


def check_folder(folder: Path, force: bool) -> None:
    """Raise ValueError if a folder may not be written: it is there, or its parent is not."""
    if not os.access(folder.parent, os.W_OK) or folder.is_file():
        raise ValueError(
            f"`output` must be a folder in one that can be written to; got '{folder}'."
        )
    if folder.exists() and not force:
        raise ValueError(
            f"`output` must be a new folder; got '{folder}', which is there. "
            "Give another with --output, or --force to replace the model in it."
        )


@contextmanager
def new_file(path: str | os.PathLike[str], force: bool) -> Iterator[Path]:
    """Give a path to write to; `path` gets the file if nothing fails, and else stays as it is.

    Files written beside the given one come along, to beside `path`, and before it.

    Raises:
        ValueError: as for `check_output`.
    """
    path = Path(path)
    check_output(path, force)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        file = Path(folder, path.name)
        yield file
        for beside in Path(folder).iterdir():
            if beside != file:
                check_output(path.with_name(beside.name), force)
                os.replace(beside, path.with_name(beside.name))
        os.replace(file, path)


def check_output(path: Path, force: bool) -> None:
    """Raise ValueError if a file may not be written: it is there, or its folder is not."""
    if not os.access(path.parent, os.W_OK) or path.is_dir():
        raise ValueError(
            f"`output` must be a file in a folder that can be written to; got '{path}'."
        )
    if path.exists() and not force:
        raise ValueError(
            f"`output` must be a new file; got '{path}', which is there. "
            "Give another with --output, or --force to replace it."
        )


def require(module: str, *packages: str) -> Any:
    """Import an optional module, or raise RuntimeError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RuntimeError(
            f"This form needs the package {packages[0]}: {error}. "
            f"Install it: pip install {' '.join(packages)}"
        ) from error


def _is_of_lightning(checkpoint: Mapping[str, Any]) -> bool:
    return isinstance(checkpoint, Mapping) and isinstance(checkpoint.get("state_dict"), Mapping)


def _why_unreadable(path: Path, error: Exception) -> str:
    classes: list[str] = []
    with suppress(Exception):
        classes = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    if not classes:
        return (
            f"`checkpoint` must be a whole file written by torch.save; got '{path}', which "
            f"torch.load refuses: {type(error).__name__}: {str(error).partition('. ')[0]}"
        )
    return (
        "`checkpoint` must hold tensors and plain values only, as others could run code when they "
        f"are loaded; got '{path}' with {', '.join(sorted(classes))}. If you trust the file, take "
        'the weights out of it: torch.save(torch.load(path, weights_only=False)["state_dict"], '
        "'weights.pt')."
    )
