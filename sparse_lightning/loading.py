"""A model becomes what a checkpoint holds: block-sparse where that is, and dense where that is.

`BlockSparseLinear` loads its own blocks. What is done here comes before that: a model that was
built dense gets block-sparse layers, of the checkpoint's blocks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparse_lightning.export.files import read_checkpoint, require, state_dict_of
from sparse_lightning.export.state_dicts import layers_in, part_of
from sparse_lightning.patching import convert_to_match
from sparse_lightning.selection import sparse_layers
from sparse_lightning.topology import BlockTopology

Model = TypeVar("Model", bound=nn.Module)


def load_sparse(
    model: Model,
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    prefix: str = "",
    strict: bool = True,
) -> Model:
    """Load a checkpoint into a model as it was built: its layers become what the checkpoint holds.

    Dense layers become block-sparse ones with the checkpoint's blocks; block-sparse layers of which
    it has dense weights become dense.

    Args:
        model: is changed in place.
        source: a state dict, a checkpoint of Lightning, or the path of either, or of a safetensors
            file.
        prefix: is taken off the checkpoint's names, and others are left out: "net." for a model
            that a LightningModule held as `self.net`.
        strict: as for `load_state_dict`.

    Returns:
        The model.

    Raises:
        ValueError: if the file cannot be read, or a layer of the checkpoint is none of the model.
        RuntimeError: as from `load_state_dict`; or if a layer is being trained.
    """
    if isinstance(source, (str, os.PathLike)):
        source = _read(Path(source))
    state_dict = state_dict_of(source)
    if prefix:
        state_dict = part_of(state_dict, prefix)
    convert_to_match(model, topologies_in(state_dict, model))
    model.load_state_dict(state_dict, strict=strict)
    return model


def load_from_checkpoint(
    module_class: type[Model], path: str | os.PathLike[str], **kwargs: Any
) -> Model:
    """Do as `module_class.load_from_checkpoint(path, ...)`, for a checkpoint with sparse layers.

    Args:
        module_class: a LightningModule, which builds itself dense.
        path: of the checkpoint.
        kwargs: as its `load_from_checkpoint` takes them.
    """
    if not hasattr(module_class, "load_from_checkpoint"):
        raise TypeError(
            f"`module_class` must be a LightningModule; got {module_class!r}. For another module "
            "use load_sparse(module, path)."
        )
    parent: Any = module_class

    class Loading(parent):  # type: ignore[misc]
        # The model is built by then, and nothing is loaded.
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            super().on_load_checkpoint(checkpoint)
            convert_to_match(self, topologies_in(checkpoint["state_dict"], self))

    # The class is named in messages, and compared with that of the checkpoint.
    Loading.__name__, Loading.__qualname__ = parent.__name__, parent.__qualname__
    Loading.__module__ = parent.__module__
    model: Model = Loading.load_from_checkpoint(path, **kwargs)
    model.__class__ = module_class
    return model


def match_when_loaded(model: nn.Module) -> RemovableHandle:
    """Have a model become what any state dict holds that is loaded into it, until `remove()`."""

    def before(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
        own = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
        convert_to_match(module, topologies_in(own, module))

    handle: RemovableHandle = model.register_load_state_dict_pre_hook(before)
    return handle


def topologies_in(
    state_dict: Mapping[str, Any], model: nn.Module
) -> dict[str, BlockTopology | None]:
    """Return the blocks of each layer of a state dict, by name; None for a dense one.

    Of dense ones only those are named that are block-sparse in the model.

    Raises:
        ValueError: if a topology is damaged.
    """
    sparse = {name: layer.topology for name, layer in layers_in(state_dict).items()}
    dense = {
        name: None
        for name, _ in sparse_layers(model)
        if name not in sparse and f"{name}.weight" in state_dict
    }
    return {**sparse, **dense}


def _read(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".safetensors" and path.is_file():
        tensors: dict[str, Tensor] = require("safetensors.torch", "safetensors").load_file(path)
        return tensors
    return read_checkpoint(path)
