"""What a linear layer is to its model: one whose `weight` the model reads itself, or a head."""

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


def weight_readers(model: nn.Module) -> dict[str, str]:
    """Return the linear layers whose `weight` their model reads while it computes.

    A block-sparse layer has no `weight`, so such a layer must stay dense. Nothing is run: what is
    looked for, in the bytecode of `forward`, of the steps and hooks of a `LightningModule` and of
    the methods that these call, is `self.layer.weight`, however long the way from `self` is. What
    is read in another way, as from a local variable, is not found; the layer's error then says what
    to do. PyTorch's own modules are not looked into.

    Args:
        model: any module; its parameters may be on meta.

    Returns:
        From the full name of an `nn.Linear`, or of a `Conv1D` of transformers, to the reason.

    >>> class Tower(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
    ...
    ...     def forward(self, x):
    ...         return self.down(self.up(x.to(self.up.weight.dtype)))
    >>> weight_readers(Tower())
    {'up': 'its `weight` is read by Tower.forward'}
    """
    readers: dict[int, str] = {}
    for module in model.modules():
        readers |= _adapters(module)
        of: Any = type(module)  # to mypy, a class of modules cannot be hashed
        for (*way, _), by in _weights_read_by(of).items():
            layer: Any = module
            for name in way:
                layer = getattr(layer, name, None)
            if isinstance(layer, nn.Module) and is_linear(layer):
                readers.setdefault(id(layer), f"its `weight` is read by {by}")
    return {name: readers[id(m)] for name, m in model.named_modules() if id(m) in readers}


def output_heads(model: nn.Module) -> dict[str, str]:
    """Return the linear layers that are a model's output heads, whatever their names.

    A layer is one if the model says so (`get_output_embeddings`, `get_classifier`), if it is the
    last of a module that names its number of classes and has as many outputs, if it is the last of
    all and has as many outputs as an embedding has entries, if it is the last within a module
    that is itself called a head, or if it is the last of all, an attribute of its module, and
    narrower than every other linear layer. A layer that is called a head itself is not looked for.

    Args:
        model: any module; its parameters may be on meta.

    Returns:
        From the full name to the reason, of dense and block-sparse layers, in the model's order.

    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.body, self.out = nn.Linear(64, 128), nn.Linear(128, 10)
    >>> output_heads(Net())
    {'out': 'an output head: the last and narrowest linear layer'}
    >>> output_heads(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)))
    {}
    """
    heads: dict[int, str] = {}
    within = {id(module) for module in model.modules()}
    configs: list[object] = []
    for name, module in model.named_modules():
        kind = type(module).__name__
        for method in ("get_output_embeddings", "get_classifier"):
            for head in _told(module, method):
                if id(head) in within:
                    heads.setdefault(id(head), f"an output head: {kind}.{method} returns it")
        linears = _linears(module)
        if not linears:
            continue
        last = linears[-1]
        for what, count in _class_counts(module, configs):
            if dense_shape(last)[0] == count:
                heads.setdefault(id(last), f"an output head: {kind} has {what} = {count}")
        part = name.rpartition(".")[2]
        if part in DEFAULT_EXCLUDE and module is not last:
            heads.setdefault(id(last), f"an output head: the last linear layer within '{name}'")
    if reason := _closing(model):
        heads.setdefault(id(_linears(model)[-1]), reason)
    return {name: heads[id(m)] for name, m in model.named_modules() if id(m) in heads}


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a dense linear layer: an `nn.Linear` or transformers' `Conv1D`."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _linears(module: nn.Module) -> list[nn.Module]:
    """Return the linear layers in a module, dense and block-sparse, in its order."""
    return [m for m in module.modules() if is_linear(m) or isinstance(m, BlockSparseLinear)]


def _told(module: nn.Module, method: str) -> list[nn.Module]:
    """Return the linear layers that a method returns, or the last of each module it returns."""
    if not callable(getattr(type(module), method, None)):
        return []
    try:
        told = getattr(module, method)()
    except Exception:  # it may ask for what this model does not have
        return []
    found = told if isinstance(told, (tuple, list)) else [told]
    return [_linears(m)[-1] for m in found if isinstance(m, nn.Module) and _linears(m)]


def _class_counts(module: nn.Module, configs: list[object]) -> Iterator[tuple[str, int]]:
    """Yield how many classes a module says there are, and the attribute that says so.

    Args:
        module: asked for `num_classes`, `num_labels` and `config.num_labels`.
        configs: those asked already, by modules around this one; its own is added. The parts of
            a model hold its `config` too, and their last layers are no heads.
    """
    config = getattr(module, "config", None)
    counts = [(what, getattr(module, what, None)) for what in ("num_classes", "num_labels")]
    if config is not None and not any(config is seen for seen in configs):
        configs.append(config)
        counts.append(("config.num_labels", getattr(config, "num_labels", None)))
    for what, count in counts:
        if isinstance(count, int) and not isinstance(count, bool):
            yield what, count


def _closing(model: nn.Module) -> str | None:
    """Return why a model's last linear layer is a head by its size, or None."""
    linears = _linears(model)
    if not linears:
        return None
    last, others = linears[-1], linears[:-1]
    out = dense_shape(last)[0]
    if out in _vocabularies(model):
        return f"an output head: the last linear layer, {out} wide as an embedding has entries"
    if not others or out >= min(chain.from_iterable(map(dense_shape, others))):
        return None
    for module in model.modules():
        listed = isinstance(module, (nn.Sequential, nn.ModuleList))
        if not listed and any(child is last for child in module.children()):
            return "an output head: the last and narrowest linear layer"
    return None


# In the names of embeddings of where something stands, absolute or relative; GPT-2's is `wpe`.
_POSITIONS = re.compile(r"(^|[._])(pos|wpe|relative)")


def _vocabularies(model: nn.Module) -> set[int]:
    """Return the numbers of entries of a model's embeddings, but for those of positions.

    Those are known by their names, or by a config that says how many positions there are.
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


def _adapters(module: Any) -> dict[int, str]:
    """Return, by id, the linear layers that PEFT adds to one that it wraps: it reads their weights.

    The wrapped one it calls, but for variants such as DoRA, which compute with its weight.
    """
    kinds = (f"{of.__module__}.{of.__name__}" for of in type(module).__mro__)
    if not any(kind.startswith("peft.") and kind.endswith(".BaseTunerLayer") for kind in kinds):
        return {}
    base = getattr(module, "base_layer", None)
    computed_with = bool(getattr(module, "lora_variant", None))
    return {
        id(layer): "inside a PEFT adapter"
        for layer in module.modules()
        if is_linear(layer) and (layer is not base or computed_with)
    }


# By which a model computes, called by whoever trains it; and any hook, by its first letters.
_ENTRIES = {
    *("__call__", "forward", "training_step", "validation_step", "test_step", "predict_step"),
    "configure_optimizers",
}
_HOOK = "on_"
# Methods that give weights their first values.
_INITIAL = {"__init__", "reset_parameters", "_init_weights", "init_weights", "post_init"}
# Whose methods are not looked into: they know nothing of a model's layers.
_FRAMEWORKS = {"torch", "lightning", "lightning_fabric", "pytorch_lightning"}


@functools.cache
def _weights_read_by(of: Any) -> dict[tuple[str, ...], str]:
    """Return the ways from `self` to a `weight` that a class reads, and the method that does."""
    classes = [c for c in of.__mro__ if c.__module__.partition(".")[0] not in _FRAMEWORKS]
    names = {name for c in classes for name in vars(c)} - _INITIAL
    todo = [(name, 0) for name in sorted(names) if name in _ENTRIES or name.startswith(_HOOK)]
    seen = set(todo)
    found: dict[tuple[str, ...], str] = {}
    while todo:
        name, first = todo.pop(0)
        at = next((i for i, c in enumerate(classes) if i >= first and name in vars(c)), None)
        if at is None:
            continue
        called = []
        for function in _functions(vars(classes[at])[name]):
            for way in _ways(function.__code__):
                if len(way) > 1 and way[-1] == "weight":
                    found.setdefault(way, f"{classes[at].__name__}.{name}")
                called.append((way[0], 0))
            if "super" in function.__code__.co_names:
                called.append((name, at + 1))
        new = [each for each in called if each[0] in names and each not in seen]
        seen.update(new)
        todo += new
    return found


def _ways(code: CodeType) -> set[tuple[str, ...]]:
    """Return the attributes that code loads of `self`, one after the other.

    Those up to a `weight` end there; functions within the function are read too.
    """
    me = code.co_varnames[0] if code.co_argcount else "self"
    return {way for within in _within(code) for way in _loads(within, me)}


def _within(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _within(constant)


def _loads(code: CodeType, me: str) -> Iterator[tuple[str, ...]]:
    way: list[str] | None = None
    for instruction in dis.get_instructions(code):
        attribute = instruction.opname in ("LOAD_ATTR", "LOAD_METHOD")
        if attribute and way is not None:
            way.append(instruction.argval)
            yield tuple(way)
        elif instruction.opname != "CACHE":
            loaded = instruction.argval
            # Python 3.13 loads two variables at once.
            last = loaded[-1] if isinstance(loaded, tuple) and loaded else loaded
            way = [] if instruction.opname.startswith("LOAD_") and last == me else None


def _functions(of: Any) -> list[FunctionType]:
    """Return the functions that a method or a property is made of, its decorators looked through.

    That is by `__wrapped__`, by what a `partial` holds, and by the functions in a closure.
    """
    found: dict[int, FunctionType] = {}
    todo, seen = [of], set()
    while todo:
        each = todo.pop()
        if each is None or id(each) in seen or isinstance(each, type):
            continue
        seen.add(id(each))
        todo += [getattr(each, n, None) for n in ("__wrapped__", "__func__", "func", "fget")]
        if isinstance(each, FunctionType):
            found[id(each)] = each
            cells = [c.cell_contents for c in each.__closure__ or () if c != _EMPTY]
            todo += [cell for cell in cells if isinstance(cell, (FunctionType, MethodType))]
    return list(found.values())


_EMPTY = type((lambda x: lambda: x)(0).__closure__[0])()  # type: ignore[index]
