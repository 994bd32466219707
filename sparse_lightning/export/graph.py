"""ONNX: the graph of a dense model, checked against the model."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sparse_lightning.export.files import new_file, require
from sparse_lightning.selection import sparse_layers

DTYPES = {
    name: getattr(torch, name)
    for name in ("float32", "float64", "float16", "int64", "int32", "int8", "uint8", "bool")
}
PACKAGES = ("onnx", "onnxscript", "onnxruntime")

# A protobuf holds 2 GiB, of which the graph itself takes some; beyond, the weights lie beside it.
SINGLE_FILE_BYTES = 2**31 - 2**27

# Of the largest output: another order of summation costs less, another function costs more.
TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 2e-2, torch.float32: 1e-3, torch.float64: 1e-6}


@dataclass(frozen=True)
class Input:
    """An input of a graph.

    Attributes:
        shape: its sizes; a name where the graph shall take any.
        dtype: one of `DTYPES`.
    """

    shape: tuple[int | str, ...]
    dtype: torch.dtype = torch.float32

    @classmethod
    def parse(cls, text: str) -> Input:
        """Read sizes, names and perhaps a dtype, separated by commas.

        Raises:
            ValueError: for anything else.

        >>> Input.parse("batch,16,int64")
        Input(shape=('batch', 16), dtype=torch.int64)
        """
        *sizes, last = text.replace(" ", "").split(",")
        dtype = DTYPES.get(last)
        if dtype is None:
            sizes.append(last)
        # Digits are for sizes, so that a mistyped dtype is no name.
        if not all(re.fullmatch("[1-9][0-9]*|[A-Za-z_]+", size) for size in sizes):
            raise ValueError(
                "`--input` must be sizes, or names of sizes that may vary (letters only), and "
                f"perhaps one of {', '.join(DTYPES)}, separated by commas; got '{text}'. "
                "Write batch,128 or batch,16,int64."
            )
        shape = tuple(int(size) if size.isdigit() else size for size in sizes)
        return cls(shape, dtype or torch.float32)

    def __str__(self) -> str:
        name = next(name for name, dtype in DTYPES.items() if dtype == self.dtype)
        return ",".join(map(str, [*self.shape, name]))


def write_onnx(
    path: str | os.PathLike[str], model: nn.Module, inputs: Sequence[Input], *, force: bool = False
) -> float | None:
    """Write a model as an ONNX graph, all at once, after comparing it with the model.

    Weights of more than about 2 GB come to lie beside it, in `<path>.data`.

    Args:
        path: of the file.
        model: dense, on the CPU; it is put into eval mode.
        inputs: what its `forward` takes. Names of sizes become those of the graph.
        force: replace a file that is there.

    Returns:
        The largest difference between an output by onnxruntime and by PyTorch, over two runs with
        random inputs of different sizes, as a part of the largest value of that output; None if
        onnxruntime is not installed, and nothing was compared.

    Raises:
        ValueError: if the file is there, or cannot be; or the model does not take the inputs.
        RuntimeError: without the packages onnx and onnxscript; if PyTorch cannot express the model
            in ONNX, or what it writes computes something else. Nothing is written then.
    """
    for package in PACKAGES[:2]:
        require(package, *PACKAGES)
    if any(True for _ in sparse_layers(model)):
        raise ValueError("`model` must be dense; got block-sparse layers. Call densify(model).")
    model.eval()
    example = random_inputs(inputs, smallest=2)
    _outputs(model, example)
    varying = tuple(
        {at: size for at, size in enumerate(one.shape) if isinstance(size, str)} for one in inputs
    )
    with new_file(path, force) as file:
        try:
            program = torch.onnx.export(
                model, example, dynamo=True, dynamic_shapes=varying, verbose=False
            )
        except Exception as error:  # of many kinds
            raise RuntimeError(f"PyTorch cannot write the model as ONNX: {error}") from error
        assert program is not None
        size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        program.save(file, external_data=size > SINGLE_FILE_BYTES)
        return _compare(file, model, [example, random_inputs(inputs, smallest=5)])


def random_inputs(inputs: Sequence[Input], smallest: int) -> tuple[Tensor, ...]:
    """Return random inputs; sizes with a name are `smallest` and the numbers that follow it."""
    names = dict.fromkeys(size for one in inputs for size in one.shape if isinstance(size, str))
    sizes = {name: smallest + i for i, name in enumerate(names)}
    generator = torch.Generator().manual_seed(smallest)
    made = []
    for one in inputs:
        shape = [sizes[size] if isinstance(size, str) else size for size in one.shape]
        # Integers are 0 or 1, which every table of embeddings has.
        is_float = one.dtype.is_floating_point
        drawn = torch.randn(shape, generator=generator)
        made.append((drawn if is_float else drawn > 0).to(one.dtype))
    return tuple(made)


def _outputs(model: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    try:
        with torch.no_grad():
            y = model(*inputs)
    except Exception as error:  # the model is the user's
        shapes = ", ".join(f"{list(x.shape)} {x.dtype}" for x in inputs)
        raise ValueError(
            f"`--input` must say what the model takes; got {shapes}, for which it raised "
            f"{type(error).__name__}: {error}"
        ) from error
    return [leaf for leaf in tree_leaves(y) if isinstance(leaf, Tensor)]


def _compare(file: Path, model: nn.Module, examples: Sequence[tuple[Tensor, ...]]) -> float | None:
    """Return by how much the graph differs from the model; raise RuntimeError for too much."""
    try:
        import onnxruntime
    except ImportError:
        return None
    try:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        names = [one.name for one in session.get_inputs()]
        results = [
            session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
            for inputs in examples
        ]
    except Exception as error:  # its own kinds
        raise RuntimeError(f"onnxruntime cannot run the graph: {error}") from error
    largest = 0.0
    for inputs, outputs in zip(examples, results, strict=True):
        expected = _outputs(model, inputs)
        if len(outputs) != len(expected):
            raise RuntimeError(
                f"The ONNX graph must have the model's {len(expected)} outputs, as far as they are "
                f"tensors; got {len(outputs)}."
            )
        for got, y in zip(map(torch.from_numpy, outputs), expected, strict=True):
            finite = y.double().nan_to_num(0.0, 0.0, 0.0)
            scale = float(finite.abs().max()) if y.numel() else 0.0
            tolerance = TOLERANCE.get(y.dtype, 0.0)
            try:
                torch.testing.assert_close(
                    got, y, rtol=tolerance, atol=tolerance * scale, equal_nan=True
                )
            except AssertionError as error:
                raise RuntimeError(
                    f"The ONNX graph must compute what the model does; got for inputs of shapes "
                    f"{[list(x.shape) for x in inputs]}: {error}"
                ) from error
            if scale:
                apart = (got.double().nan_to_num(0.0, 0.0, 0.0) - finite).abs().max()
                largest = max(largest, float(apart) / scale)
    return largest
