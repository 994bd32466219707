"""State dicts: the blocks of saved layers, and the weights that they stand for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor

from sparse_lightning.patching import LayerReport, SparsityReport
from sparse_lightning.topology import BLOCK_SIZES, BlockTopology

_COMPILED = "_orig_mod"


@dataclass(frozen=True)
class SavedLayer:
    """A block-sparse layer as a state dict holds it.

    Attributes:
        topology: which block each slot holds, on the device of `values`.
        values: `[capacity, block_size, block_size]`, the blocks by slot.
        bias: `[out_features]`, or None.
        transposed: whether its dense weight lies as `[in_features, out_features]`, as that of
            transformers' `Conv1D`.
    """

    topology: BlockTopology
    values: Tensor
    bias: Tensor | None
    transposed: bool = False


def find_layers(state_dict: Mapping[str, Any]) -> dict[str, SavedLayer]:
    """Return the block-sparse layers of a state dict, by name, in its order.

    Raises:
        ValueError: if there is none, or one is incomplete or damaged.
    """
    layers = layers_in(state_dict)
    if not layers:
        raise ValueError(
            "`checkpoint` must hold at least one block-sparse layer ('<name>.values' and "
            f"'<name>._extra_state'); got {len(state_dict)} other entries. A dense one needs no "
            "export; and of a fit, check that SparsityCallback was among the callbacks."
        )
    return layers


def layers_in(state_dict: Mapping[str, Any]) -> dict[str, SavedLayer]:
    """Return what `find_layers` does; nothing if there is no block-sparse layer."""
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


def report(layers: Mapping[str, SavedLayer]) -> SparsityReport:
    """Return the layers' shapes, densities and parameters, as `sparsify` reports them."""
    reports = {}
    for name, layer in layers.items():
        at, bias = layer.topology, 0 if layer.bias is None else layer.bias.numel()
        reports[name] = LayerReport(
            shape=(at.out_features, at.in_features),
            block_size=at.block_size,
            n_blocks=at.n_blocks,
            density=at.density,
            parameters_before=at.out_features * at.in_features + bias,
            parameters_after=at.n_blocks * at.block_size**2 + bias,
        )
    return SparsityReport(reports)


def dense_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state dict of the dense model, with zeros at absent blocks.

    Args:
        state_dict: of a model with block-sparse layers; not changed.

    Returns:
        With `<name>.weight` `[out_features, in_features]`, of the dtype and on the device of the
        layer's `<name>.values`, in its place; `[in_features, out_features]` of what was a `Conv1D`.
        Tied layers share one weight. All else is the same objects.
        `load_state_dict(..., strict=True)` of the dense model takes it.

    Raises:
        ValueError: if there is no block-sparse layer, or one is incomplete or damaged.

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

    Args and raises: as for `dense_state_dict`. The weights hold the present blocks only, in the
    order of their columns. `load_state_dict(..., assign=True)` of the dense model takes it, and
    `nn.Linear` computes with such a weight where PyTorch can; or take `weight.to_dense()`. The
    weights of what was a `Conv1D` are dense, as PyTorch computes with no such weight on the right
    of a product.
    """
    return _with_weights(state_dict, _to_bsr)


def uncompiled_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict without the `_orig_mod` that `torch.compile` puts into names.

    >>> list(uncompiled_state_dict({"net._orig_mod.0.bias": torch.zeros(8)}))
    ['net.0.bias']
    """
    renamed = OrderedDict((_uncompiled(name), value) for name, value in state_dict.items())
    metadata = getattr(state_dict, "_metadata", None)
    if metadata is not None:
        return _with_metadata(renamed, {_uncompiled(name): metadata[name] for name in metadata})
    return renamed


def part_of(state_dict: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the state dict of a part of a model, as of what a LightningModule holds.

    Args:
        state_dict: of the whole model; not changed.
        prefix: the part's name; it is taken off the names. A dot at its end may be left out.

    Raises:
        ValueError: if no name begins with it.

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
        there = {
            ".".join(name.split(".")[:n]) + "."
            for name in state_dict
            for n in range(1, min(depth, name.count(".")) + 1)
        }
        raise ValueError(
            f"`prefix` must begin names of the checkpoint; got '{prefix}'. Names begin with "
            f"{', '.join(sorted(there)) or 'no prefix'}."
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
    """Tell whether a name has a part that `torch.compile` put there."""
    return any(_COMPILED in name.split(".") for name in state_dict)


def is_same(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors are the same memory, read the same way."""
    return a.dtype == b.dtype and a.device == b.device and a.is_set_to(b)


def _with_weights(
    state_dict: Mapping[str, Any], make: Callable[[SavedLayer], Tensor]
) -> dict[str, Any]:
    """Replace the pieces of each layer by the weight that `make` makes of them."""
    layers = find_layers(state_dict)
    made: list[tuple[SavedLayer, Tensor]] = []

    def weight_of(layer: SavedLayer) -> Tensor:
        for other, weight in made:
            if _is_tied(layer, other):
                return weight
        made.append((layer, make(layer)))
        return made[-1][1]

    converted: OrderedDict[str, Any] = OrderedDict()
    for key, value in state_dict.items():
        name, _, last = key.rpartition(".")
        if name not in layers or last not in ("values", "weight", "_extra_state"):
            converted[key] = value
        elif last != "_extra_state":
            converted[key.removesuffix(last) + "weight"] = weight_of(layers[name])
    metadata = getattr(state_dict, "_metadata", None)
    if metadata is not None:
        # Dense layers are of no lineage.
        own = {name: {**of} for name, of in metadata.items()}
        for of in own.values():
            for key in ("lineage", "label", "has_learnt"):
                of.pop(key, None)
        metadata = own
    return _with_metadata(converted, metadata)


def _read_layer(state_dict: Mapping[str, Any], prefix: str) -> SavedLayer | None:
    """Return the layer of a prefix; None if neither of its pieces looks like a layer's."""
    values, state = state_dict.get(prefix + "values"), state_dict.get(prefix + "_extra_state")
    # Modules of other kinds may have an entry of one of these names.
    blocks = values if _is_blocks(values) else None
    vector = state if _is_topology(state) else None
    weight = state_dict.get(prefix + "weight")
    if values is None and vector is not None and _is_blocks(weight):
        # As the files of `save_pretrained` have it.
        return _saved_layer(prefix, vector, weight, state_dict)
    if blocks is None and vector is None:
        return None
    if vector is None:
        raise ValueError(
            f"`{prefix}_extra_state` must be the topology of `{prefix}values`, an int32 vector; "
            f"got {_describe(state)}. Save with state_dict(), and keep every key of it."
        )
    if blocks is None:
        raise ValueError(
            f"`{prefix}values` must be the blocks of the topology in `{prefix}_extra_state`; "
            f"got {_describe(values)}. Save with state_dict(), and keep every key of it."
        )
    if prefix + "weight" in state_dict:
        raise ValueError(
            f"`{prefix}values` must stand in place of `{prefix}weight`; got both. "
            "Leave out the one that is not the layer's."
        )
    return _saved_layer(prefix, vector, blocks, state_dict)


def _saved_layer(
    prefix: str, vector: Tensor, blocks: Tensor, state_dict: Mapping[str, Any]
) -> SavedLayer:
    topology = BlockTopology.from_state(vector)
    expected = [topology.capacity, topology.block_size, topology.block_size]
    if list(blocks.shape) != expected:
        raise ValueError(
            f"`{prefix}values` must have shape {expected} by the saved topology; "
            f"got {list(blocks.shape)}. The checkpoint is damaged."
        )
    bias, transposed = state_dict.get(prefix + "bias"), BlockTopology.is_transposed(vector)
    return SavedLayer(topology.to_(blocks.device), blocks.detach(), bias, transposed)


def _is_blocks(value: object) -> TypeGuard[Tensor]:
    return (
        isinstance(value, Tensor)
        and value.dim() == 3
        and value.shape[1] == value.shape[2]
        and value.shape[1] in BLOCK_SIZES
    )


def _is_topology(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.dtype == torch.int32 and value.dim() == 1


def _is_tied(a: SavedLayer, b: SavedLayer) -> bool:
    same_place = torch.equal(a.topology.slots, b.topology.slots) and a.transposed == b.transposed
    return same_place and is_same(a.values, b.values)


def _to_dense(layer: SavedLayer) -> Tensor:
    weight = layer.topology.unpack(layer.values)
    return weight.T.contiguous() if layer.transposed else weight


def _to_bsr(layer: SavedLayer) -> Tensor:
    if layer.transposed:
        return _to_dense(layer)
    at = layer.topology
    columns, slots = at.row_entries[: at.n_blocks].long().T.contiguous()
    return torch.sparse_bsr_tensor(
        at.row_offsets.long(),
        columns,
        layer.values[slots],
        size=(at.out_features, at.in_features),
        check_invariants=True,
    )


def _with_metadata(
    state_dict: OrderedDict[str, Any], metadata: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Attach the versions of the modules, which loading reads, as `Module.state_dict` does."""
    if metadata is not None:
        state_dict._metadata = OrderedDict(metadata)  # type: ignore[attr-defined]
    return state_dict


def _uncompiled(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {list(value.shape)}"
    return "none" if value is None else type(value).__name__
