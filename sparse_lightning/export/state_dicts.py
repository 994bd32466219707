"""Find block-sparse layers in a state dict, and convert them to dense or BSR weights."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor

from sparse_lightning.swap_report import LayerReport, SparsityReport
from sparse_lightning.topology import BLOCK_SIZES, BlockTopology, is_transposed_state

_COMPILED = "_orig_mod"


@dataclass(frozen=True)
class SavedLayer:
    """A block-sparse layer read from a state dict.

    Attributes:
        topology: the layer's topology, on the device of `values`.
        values: the blocks by slot, of the topology's `values_shape`.
        bias: the bias `[out_features]`, or None.
        transposed: whether the dense weight is stored as `[in_features, out_features]`, like
            that of Transformers' `Conv1D`.
    """

    topology: BlockTopology
    values: Tensor
    bias: Tensor | None
    transposed: bool = False


def find_layers(state_dict: Mapping[str, Any]) -> dict[str, SavedLayer]:
    """Return the block-sparse layers of a state dict by name, in the state dict's order.

    Raises:
        ValueError: if there are none, or one is incomplete or damaged.
    """
    layers = layers_in(state_dict)
    if not layers:
        raise ValueError(
            "`checkpoint` must hold at least one block-sparse layer ('<name>.values' and "
            f"'<name>._extra_state'); got {len(state_dict)} other entries, so it is dense. If it "
            "comes from a block-sparse training, check that SparsityCallback was used."
        )
    return layers


def layers_in(state_dict: Mapping[str, Any]) -> dict[str, SavedLayer]:
    """Return the same as `find_layers`, but an empty dict if there are no block-sparse layers."""
    layers: dict[str, SavedLayer] = {}
    for key in state_dict:
        prefix, _, last = key.rpartition(".")
        if last in ("values", "_extra_state") and prefix not in layers:
            try:
                layer = _read_layer(state_dict, key.removesuffix(last))
            except (ValueError, RuntimeError) as error:
                raise ValueError(f"{error} (layer '{prefix}')") from error
            if layer is not None:
                layers[prefix] = layer
    return layers


def describe_layers(layers: Mapping[str, SavedLayer]) -> SparsityReport:
    """Return the layers' shapes, densities and parameter counts as a swap report."""
    return SparsityReport(
        {name: LayerReport.from_topology(each.topology, each.bias) for name, each in layers.items()}
    )


def dense_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state dict of the dense model, with zeros at absent blocks.

    Args:
        state_dict: state dict of a model with block-sparse layers; it is not modified.

    Returns:
        A state dict for `load_state_dict(..., strict=True)` of the dense model. Each layer's
        `<name>.values` is replaced by `<name>.weight` `[out_features, in_features]` (transposed for
        a former `Conv1D`) of the same dtype and device. Tied layers share one weight. All other
        entries are the same objects.

    Raises:
        ValueError: if there are no block-sparse layers, or one is incomplete or damaged.

    >>> from sparse_lightning.linear import BlockSparseLinear
    >>> layer = BlockSparseLinear(64, 32, block_size=16, density=0.5)
    >>> state_dict = dense_state_dict(layer.state_dict())
    >>> {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    {'weight': (32, 64), 'bias': (32,)}
    >>> torch.nn.Linear(64, 32).load_state_dict(state_dict)
    <All keys matched successfully>
    """
    return _with_weights(state_dict, _to_dense)


def bsr_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state dict of the dense model with weights of layout `torch.sparse_bsr`.

    Arguments and errors are those of `dense_state_dict`. The weights hold only the present blocks,
    sorted by column within each block row. Load the result by `load_state_dict(..., assign=True)`
    of the dense model: `nn.Linear` supports BSR weights where PyTorch does; elsewhere call
    `weight.to_dense()`. The weights of a former `Conv1D` stay dense, because PyTorch does not
    multiply by a BSR matrix on the right.
    """
    return _with_weights(state_dict, _to_bsr)


def uncompiled_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict without the `_orig_mod` that `torch.compile` inserts into names.

    >>> list(uncompiled_state_dict({"net._orig_mod.0.bias": torch.zeros(8)}))
    ['net.0.bias']
    """
    renamed = OrderedDict((_uncompiled(name), value) for name, value in state_dict.items())
    metadata = getattr(state_dict, "_metadata", None)
    if metadata is not None:
        return _with_metadata(renamed, {_uncompiled(name): metadata[name] for name in metadata})
    return renamed


def part_of(state_dict: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the state dict of a submodule, such as the network held by a LightningModule.

    Args:
        state_dict: state dict of the whole model; it is not modified.
        prefix: name of the submodule, with or without a trailing dot; it is removed from the names.

    Raises:
        ValueError: if no name begins with the prefix.

    >>> list(part_of({"net.0.bias": 1, "net.0.weight": 2, "loss.weight": 3}, "net"))
    ['0.bias', '0.weight']
    """
    start = f"{prefix.rstrip('.')}."
    part = OrderedDict(
        (name.removeprefix(start), value)
        for name, value in state_dict.items()
        if name.startswith(start)
    )
    if not part:
        depth = prefix.count(".") + 1
        available = {
            ".".join(name.split(".")[:n]) + "."
            for name in state_dict
            for n in range(1, min(depth, name.count(".")) + 1)
        }
        raise ValueError(
            f"`prefix` must begin names of the checkpoint; got '{prefix}'. Names begin with "
            f"{', '.join(sorted(available)) or 'no prefix'}."
        )
    metadata = getattr(state_dict, "_metadata", None)
    if metadata is not None:
        metadata = {
            f"{name}.".removeprefix(start).rstrip("."): versions
            for name, versions in metadata.items()
            if f"{name}.".startswith(start)
        }
    return _with_metadata(part, metadata)


def is_compiled(state_dict: Mapping[str, Any]) -> bool:
    """Return whether any name contains the `_orig_mod` of `torch.compile`."""
    return any(_COMPILED in name.split(".") for name in state_dict)


def is_same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors share storage, offset, shape, strides, dtype and device."""
    return a.dtype == b.dtype and a.device == b.device and a.is_set_to(b)


def _with_weights(
    state_dict: Mapping[str, Any], convert: Callable[[SavedLayer], Tensor]
) -> dict[str, Any]:
    """Replace the entries of each layer by the weight that `convert` returns for it."""
    layers = find_layers(state_dict)
    weights: list[tuple[SavedLayer, Tensor]] = []

    def weight_of(layer: SavedLayer) -> Tensor:
        for other, weight in weights:
            if _is_tied(layer, other):
                return weight
        weights.append((layer, convert(layer)))
        return weights[-1][1]

    converted: OrderedDict[str, Any] = OrderedDict()
    for key, value in state_dict.items():
        name, _, last = key.rpartition(".")
        if name not in layers or last not in ("values", "weight", "_extra_state"):
            converted[key] = value
        elif last != "_extra_state":
            converted[key.removesuffix(last) + "weight"] = weight_of(layers[name])
    metadata = getattr(state_dict, "_metadata", None)
    if metadata is not None:
        # Dense layers do not record which layers they are copies of.
        copy_keys = ("lineage", "label", "has_learnt")
        metadata = {
            name: {key: value for key, value in entries.items() if key not in copy_keys}
            for name, entries in metadata.items()
        }
    return _with_metadata(converted, metadata)


def _read_layer(state_dict: Mapping[str, Any], prefix: str) -> SavedLayer | None:
    """Return the layer with a prefix; None if no entry belongs to a block-sparse layer."""
    values, state = state_dict.get(prefix + "values"), state_dict.get(prefix + "_extra_state")
    # Other modules may have entries of the same names.
    blocks = values if _is_blocks(values) else None
    vector = state if _is_topology(state) else None
    weight = state_dict.get(prefix + "weight")
    if values is None and vector is not None and _is_blocks(weight):
        # Files written by `save_pretrained` store the blocks as `weight`.
        return _saved_layer(prefix, vector, weight, state_dict)
    if blocks is None and vector is None:
        return None
    if vector is None:
        raise ValueError(
            f"`{prefix}_extra_state` must be the topology of `{prefix}values`, an int32 vector; "
            f"got {_describe(state)}. Save state_dict() with all its keys."
        )
    if blocks is None:
        raise ValueError(
            f"`{prefix}values` must be the blocks of the topology in `{prefix}_extra_state`; "
            f"got {_describe(values)}. Save state_dict() with all its keys."
        )
    if prefix + "weight" in state_dict:
        raise ValueError(
            f"`{prefix}values` must replace `{prefix}weight`; got both. "
            "Remove the one that does not belong to the layer."
        )
    return _saved_layer(prefix, vector, blocks, state_dict)


def _saved_layer(
    prefix: str, vector: Tensor, blocks: Tensor, state_dict: Mapping[str, Any]
) -> SavedLayer:
    topology = BlockTopology.from_state(vector)
    expected = [*topology.values_shape]
    if list(blocks.shape) != expected:
        raise ValueError(
            f"`{prefix}values` must have shape {expected} to match the saved topology; "
            f"got {list(blocks.shape)}. The checkpoint is damaged."
        )
    bias, transposed = state_dict.get(prefix + "bias"), is_transposed_state(vector)
    return SavedLayer(topology.to_(blocks.device), blocks.detach(), bias, transposed)


def _is_blocks(value: object) -> TypeGuard[Tensor]:
    return (
        isinstance(value, Tensor)
        and value.dim() == 3
        and value.shape[1] in BLOCK_SIZES
        and value.shape[2] in (value.shape[1], value.shape[1] // 2)  # whole or 2:4 sparse
    )


def _is_topology(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.dtype == torch.int32 and value.dim() == 1


def _is_tied(a: SavedLayer, b: SavedLayer) -> bool:
    is_same_layout = a.transposed == b.transposed and a.topology.equals(b.topology)
    return is_same_layout and is_same(a.values, b.values)


def _to_dense(layer: SavedLayer) -> Tensor:
    weight = layer.topology.unpack(layer.values)
    return weight.T.contiguous() if layer.transposed else weight


def _to_bsr(layer: SavedLayer) -> Tensor:
    if layer.transposed:
        return _to_dense(layer)
    topology = layer.topology
    columns, slots = topology.row_entries[: topology.n_blocks].long().T.contiguous()
    return torch.sparse_bsr_tensor(
        topology.row_offsets.long(),
        columns,
        topology.expand(layer.values)[slots],
        size=(topology.out_features, topology.in_features),
        check_invariants=True,
    )


def _with_metadata(
    state_dict: OrderedDict[str, Any], metadata: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Attach the modules' metadata, which `load_state_dict` reads, as `Module.state_dict` does."""
    if metadata is not None:
        state_dict._metadata = OrderedDict(metadata)  # type: ignore[attr-defined]
    return state_dict


def _uncompiled(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {list(value.shape)}"
    return "none" if value is None else type(value).__name__
