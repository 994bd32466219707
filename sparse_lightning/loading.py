"""Load checkpoints into models: each layer becomes block-sparse or dense, as in the checkpoint.

A `BlockSparseLinear` loads its own blocks. The functions here first convert the layers of the model
that are dense where the checkpoint is block-sparse, or the other way around.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparse_lightning.export.files import read_checkpoint, require, state_dict_of
from sparse_lightning.export.state_dicts import layers_in, part_of
from sparse_lightning.linear import (
    BlockSparseLinear,
    dense_shape,
    is_conv1d,
    make_dense_,
    make_sparse_,
)
from sparse_lightning.patching import update_containers
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
    """Load a checkpoint into a model whose layers may be dense or have other blocks.

    Dense layers become block-sparse if the checkpoint has blocks for them, and block-sparse layers
    become dense if it has dense weights for them.

    Args:
        model: model to change in place.
        source: a state dict, a Lightning checkpoint, or the path of either or of a safetensors
            file.
        prefix: prefix to remove from the checkpoint's names; names without it are ignored. Use
            "net." for a model that a LightningModule stores as `self.net`.
        strict: as in `load_state_dict`.

    Returns:
        The model.

    Raises:
        ValueError: if the file cannot be read, or the model lacks a layer of the checkpoint.
        RuntimeError: if `load_state_dict` raises it, or a layer to convert is being trained.
    """
    if isinstance(source, (str, os.PathLike)):
        source = _read(Path(source))
    state_dict = state_dict_of(source)
    if prefix:
        state_dict = part_of(state_dict, prefix)
    convert_layers(model, _topologies_in(state_dict, model))
    model.load_state_dict(state_dict, strict=strict)
    return model


def load_from_checkpoint(
    module_class: type[Model], path: str | os.PathLike[str], **kwargs: Any
) -> Model:
    """Call `module_class.load_from_checkpoint(path, ...)` for a checkpoint with sparse layers.

    Args:
        module_class: a LightningModule that builds dense layers.
        path: path of the checkpoint.
        kwargs: keywords of its `load_from_checkpoint`.
    """
    if not hasattr(module_class, "load_from_checkpoint"):
        raise TypeError(
            f"`module_class` must be a LightningModule; got {module_class!r}. For another module "
            "use load_sparse(module, path)."
        )
    parent: Any = module_class

    class Loading(parent):  # type: ignore[misc]
        # Lightning calls this hook after it has built the model and before it loads weights.
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            super().on_load_checkpoint(checkpoint)
            convert_layers(self, _topologies_in(checkpoint["state_dict"], self))

    # Lightning shows the name of the class, and compares it with the checkpoint's.
    Loading.__name__, Loading.__qualname__ = parent.__name__, parent.__qualname__
    Loading.__module__ = parent.__module__
    model: Model = Loading.load_from_checkpoint(path, **kwargs)
    model.__class__ = module_class
    return model


def register_conversion_hook(model: nn.Module) -> RemovableHandle:
    """Convert a model's layers before each `load_state_dict`, until the handle is removed."""

    def convert(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
        own = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
        convert_layers(module, _topologies_in(own, module))

    handle: RemovableHandle = model.register_load_state_dict_pre_hook(convert)
    return handle


def convert_layers(model: nn.Module, topologies: Mapping[str, BlockTopology | None]) -> None:
    """Make layers block-sparse or dense, in preparation for loading a state dict.

    Args:
        model: model to change in place. The weights of converted layers are lost.
        topologies: blocks of each layer, by name; None for a dense layer.

    Raises:
        ValueError: if a layer is not linear or has another shape.
    """
    changes: dict[int, Callable[[], object]] = {}  # By id, as a module may have several names.
    for name, topology in topologies.items():
        try:
            module = model.get_submodule(name)
        except AttributeError:
            continue  # `load_state_dict` reports missing modules.
        if topology is None:
            if isinstance(module, BlockSparseLinear):
                changes.setdefault(id(module), partial(make_dense_, module))
            continue
        if isinstance(module, BlockSparseLinear):
            continue  # It adopts the topology when it loads.
        if type(module) is not nn.Linear and not is_conv1d(module):
            raise ValueError(
                "A block-sparse layer of a checkpoint must be an nn.Linear in the model; got a "
                f"{type(module).__name__} (layer '{name}'). Build the same model as was saved."
            )
        shape = (topology.out_features, topology.in_features)
        if dense_shape(module) != shape:
            raise ValueError(
                f"The model's layer must be {shape[0]}x{shape[1]}, as in the checkpoint; got "
                f"{'x'.join(map(str, dense_shape(module)))} (layer '{name}')."
            )
        changes.setdefault(id(module), partial(make_sparse_, module, topology, label=name))
    for change in changes.values():
        change()
    if changes:
        update_containers(model)


def _topologies_in(
    state_dict: Mapping[str, Any], model: nn.Module
) -> dict[str, BlockTopology | None]:
    """Return the topology of each block-sparse layer of a state dict, by name.

    Layers that are dense in the state dict but block-sparse in the model have None.

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
