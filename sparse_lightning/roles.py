"""Roles of linear layers: layers whose `weight` the model reads itself, and output heads."""

from __future__ import annotations

import dis
import functools
import re
from collections.abc import Iterator
from itertools import chain
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

from sparse_lightning.linear import BlockSparseLinear, dense_shape, is_conv1d
from sparse_lightning.names import DEFAULT_EXCLUDE


def find_read_weights(model: nn.Module) -> dict[str, str]:
    """Return the linear layers whose `weight` the model reads while it computes.

    A block-sparse layer has no `weight`, so these layers must stay dense. The model does not run:
    the search looks for `self.layer.weight`, with any number of attributes in between, in the
    bytecode of `forward`, of the steps and hooks of a `LightningModule`, and of the methods that
    these call. It misses weights that are read in another way, for example from a local variable;
    the error that the layer then raises names the remedy. PyTorch's own modules are not searched.

    Args:
        model: any module; its parameters may be on the meta device.

    Returns:
        Reason for each layer, an `nn.Linear` or Transformers' `Conv1D`, by its full name.

    >>> class Tower(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
    ...
    ...     def forward(self, x):
    ...         return self.down(self.up(x.to(self.up.weight.dtype)))
    >>> find_read_weights(Tower())
    {'up': 'its `weight` is read by Tower.forward'}
    """
    reasons: dict[int, str] = {}
    for module in model.modules():
        reasons |= _find_adapter_layers(module)
        module_class: Any = type(module)  # mypy does not accept it as hashable.
        for (*attributes, _), method in _find_weight_paths(module_class).items():
            layer: Any = module
            for attribute in attributes:
                layer = getattr(layer, attribute, None)
            if isinstance(layer, nn.Module) and is_linear(layer):
                reasons.setdefault(id(layer), f"its `weight` is read by {method}")
    return {name: reasons[id(m)] for name, m in model.named_modules() if id(m) in reasons}


def find_output_heads(model: nn.Module) -> dict[str, str]:
    """Return the linear layers that are a model's output heads, whatever their names are.

    A linear layer is an output head in any of these cases:

    - A module's `get_output_embeddings` or `get_classifier` returns it.
    - It is the last one of a module that has an attribute for its number of classes, and has as
      many outputs.
    - It is the last one of the model, and has as many outputs as an embedding has entries.
    - It is the last one within a module that is itself called a head.
    - It is the last one of the model, an attribute of its module, and has fewer outputs than any
      other linear layer has inputs or outputs.

    A layer that is itself called a head is left to the patterns of `exclude`.

    Args:
        model: any module; its parameters may be on the meta device.

    Returns:
        Reason for each head, dense or block-sparse, by its full name, in the model's order.

    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.body, self.out = nn.Linear(64, 128), nn.Linear(128, 10)
    >>> find_output_heads(Net())
    {'out': 'an output head: the last and narrowest linear layer'}
    >>> find_output_heads(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)))
    {}
    """
    heads: dict[int, str] = {}
    ids = {id(module) for module in model.modules()}
    seen_configs: list[object] = []
    for name, module in model.named_modules():
        kind = type(module).__name__
        for method in ("get_output_embeddings", "get_classifier"):
            for head in _heads_returned_by(module, method):
                if id(head) in ids:
                    heads.setdefault(id(head), f"an output head: {kind}.{method} returns it")
        linears = _linears_in(module)
        if not linears:
            continue
        last = linears[-1]
        for attribute, count in _class_counts(module, seen_configs):
            if dense_shape(last)[0] == count:
                heads.setdefault(id(last), f"an output head: {kind} has {attribute} = {count}")
        if name.rpartition(".")[2] in DEFAULT_EXCLUDE and module is not last:
            heads.setdefault(id(last), f"an output head: the last linear layer within '{name}'")
    if reason := _explain_last_layer(model):
        heads.setdefault(id(_linears_in(model)[-1]), reason)
    return {name: heads[id(m)] for name, m in model.named_modules() if id(m) in heads}


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a dense linear layer: an `nn.Linear` or Transformers' `Conv1D`."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _linears_in(module: nn.Module) -> list[nn.Module]:
    """Return the linear layers in a module, dense and block-sparse, in order."""
    return [m for m in module.modules() if is_linear(m) or isinstance(m, BlockSparseLinear)]


def _heads_returned_by(module: nn.Module, method: str) -> list[nn.Module]:
    """Return the last linear layer of each module that a method returns."""
    if not callable(getattr(type(module), method, None)):
        return []
    try:
        result = getattr(module, method)()
    except Exception:  # The method may not be implemented for this model.
        return []
    returned = result if isinstance(result, (tuple, list)) else [result]
    return [_linears_in(m)[-1] for m in returned if isinstance(m, nn.Module) and _linears_in(m)]


def _class_counts(module: nn.Module, seen_configs: list[object]) -> Iterator[tuple[str, int]]:
    """Yield each attribute that holds a module's number of classes, and the number.

    Args:
        module: module whose `num_classes`, `num_labels` and `config.num_labels` to read.
        seen_configs: configs to ignore; the module's config is appended. A submodule often has the
            config of the model, but its last layer is not a head.
    """
    config = getattr(module, "config", None)
    counts = [(name, getattr(module, name, None)) for name in ("num_classes", "num_labels")]
    if config is not None and not any(config is seen for seen in seen_configs):
        seen_configs.append(config)
        counts.append(("config.num_labels", getattr(config, "num_labels", None)))
    for name, count in counts:
        if isinstance(count, int) and not isinstance(count, bool):
            yield name, count


def _explain_last_layer(model: nn.Module) -> str | None:
    """Return why the size of a model's last linear layer makes it a head, or None."""
    linears = _linears_in(model)
    if not linears:
        return None
    last, others = linears[-1], linears[:-1]
    width = dense_shape(last)[0]
    if width in _vocabulary_sizes(model):
        return f"an output head: the last linear layer has {width} outputs, one per embedding entry"
    if not others or width >= min(chain.from_iterable(map(dense_shape, others))):
        return None
    for module in model.modules():
        is_list = isinstance(module, (nn.Sequential, nn.ModuleList))
        if not is_list and any(child is last for child in module.children()):
            return "an output head: the last and narrowest linear layer"
    return None


# Matches names of absolute and relative position embeddings; GPT-2's is `wpe`.
_POSITIONS = re.compile(r"(^|[._])(pos|wpe|relative)")


def _vocabulary_sizes(model: nn.Module) -> set[int]:
    """Return the numbers of entries of a model's embeddings, except for position embeddings.

    A position embedding is recognized by its name, or by a config's number of positions.
    """
    configs = [getattr(module, "config", None) for module in model.modules()]
    positions = [getattr(config, "max_position_embeddings", None) for config in configs]
    words = [getattr(config, "vocab_size", None) for config in configs]
    return {
        module.num_embeddings
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and not _POSITIONS.search(name)
        if module.num_embeddings in words or module.num_embeddings not in positions
    }


def _find_adapter_layers(module: Any) -> dict[int, str]:
    """Return the linear layers, by id, whose weights a PEFT adapter reads.

    An adapter reads the weights of the layers that it adds. It only calls the layer that it wraps,
    except for variants such as DoRA, which also read its weight.
    """
    classes = (f"{c.__module__}.{c.__name__}" for c in type(module).__mro__)
    if not any(name.startswith("peft.") and name.endswith(".BaseTunerLayer") for name in classes):
        return {}
    base = getattr(module, "base_layer", None)
    reads_base = bool(getattr(module, "lora_variant", None))
    return {
        id(layer): "inside a PEFT adapter"
        for layer in module.modules()
        if is_linear(layer) and (layer is not base or reads_base)
    }


# Methods that a trainer calls, together with all hooks.
_ENTRY_POINTS = {
    *("__call__", "forward", "training_step", "validation_step", "test_step", "predict_step"),
    "configure_optimizers",
}
_HOOK_PREFIX = "on_"
_INITIALIZERS = {"__init__", "reset_parameters", "_init_weights", "init_weights", "post_init"}
# Methods of these packages' classes do not refer to layers of a particular model.
_FRAMEWORKS = {"torch", "lightning", "lightning_fabric", "pytorch_lightning"}


@functools.cache
def _find_weight_paths(module_class: Any) -> dict[tuple[str, ...], str]:
    """Return the attribute paths from `self` to a `weight` that a class reads, with the method."""
    mro = [c for c in module_class.__mro__ if c.__module__.partition(".")[0] not in _FRAMEWORKS]
    names = {name for c in mro for name in vars(c)} - _INITIALIZERS
    # Each entry is a method and the position in the MRO at which its lookup starts.
    todo = [
        (name, 0)
        for name in sorted(names)
        if name in _ENTRY_POINTS or name.startswith(_HOOK_PREFIX)
    ]
    seen = set(todo)
    found: dict[tuple[str, ...], str] = {}
    while todo:
        name, start = todo.pop(0)
        position = next((i for i, c in enumerate(mro) if i >= start and name in vars(c)), None)
        if position is None:
            continue
        called = []
        for function in _unwrap_functions(vars(mro[position])[name]):
            for path in _attribute_paths(function.__code__):
                if len(path) > 1 and path[-1] == "weight":
                    found.setdefault(path, f"{mro[position].__name__}.{name}")
                called.append((path[0], 0))
            if "super" in function.__code__.co_names:
                called.append((name, position + 1))
        new = [call for call in called if call[0] in names and call not in seen]
        seen.update(new)
        todo += new
    return found


def _attribute_paths(code: CodeType) -> set[tuple[str, ...]]:
    """Return every chain of attributes of `self` that code and its nested functions load.

    A prefix of a chain counts as a chain, too.
    """
    self_name = code.co_varnames[0] if code.co_argcount else "self"
    return {path for part in _nested_code(code) for path in _load_paths(part, self_name)}


def _nested_code(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested_code(constant)


def _load_paths(code: CodeType, self_name: str) -> Iterator[tuple[str, ...]]:
    path: list[str] | None = None
    for instruction in dis.get_instructions(code):
        is_attribute = instruction.opname in ("LOAD_ATTR", "LOAD_METHOD")
        if is_attribute and path is not None:
            path.append(instruction.argval)
            yield tuple(path)
        elif instruction.opname != "CACHE":
            loaded = instruction.argval
            # One instruction of Python 3.13 may load two variables.
            last = loaded[-1] if isinstance(loaded, tuple) and loaded else loaded
            path = [] if instruction.opname.startswith("LOAD_") and last == self_name else None


def _unwrap_functions(method: Any) -> list[FunctionType]:
    """Return the functions behind a method or property, including those that decorators wrap.

    Wrapped functions are found by `__wrapped__`, by the function of a `partial`, and in closures.
    """
    found: dict[int, FunctionType] = {}
    todo, seen = [method], set()
    while todo:
        item = todo.pop()
        if item is None or id(item) in seen or isinstance(item, type):
            continue
        seen.add(id(item))
        todo += [getattr(item, n, None) for n in ("__wrapped__", "__func__", "func", "fget")]
        if isinstance(item, FunctionType):
            found[id(item)] = item
            cells = [c.cell_contents for c in item.__closure__ or () if c != _EMPTY_CELL]
            todo += [cell for cell in cells if isinstance(cell, (FunctionType, MethodType))]
    return list(found.values())


_EMPTY_CELL = type((lambda x: lambda: x)(0).__closure__[0])()  # type: ignore[index]
