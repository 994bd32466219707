"""Export a dense model as an ONNX graph that is verified against the model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sparse_lightning.arguments import Input, random_inputs
from sparse_lightning.export.files import new_file, require
from sparse_lightning.selection import sparse_layers

PACKAGES = ("onnx", "onnxscript", "onnxruntime")

# A protobuf holds at most 2 GiB including the graph; larger weights go into a separate file.
SINGLE_FILE_BYTES = 2**31 - 2**27

# Relative to the largest output: above errors of summation order, below those of a wrong graph.
TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 2e-2, torch.float32: 1e-3, torch.float64: 1e-6}


def write_onnx(
    path: str | os.PathLike[str], model: nn.Module, inputs: Sequence[Input], *, force: bool = False
) -> float | None:
    """Write a model as an ONNX graph atomically, after comparing the graph with the model.

    Weights of more than about 2 GB are written to `<path>.data`.

    Args:
        path: path of the file.
        model: dense model on the CPU; it is put into eval mode.
        inputs: inputs of its `forward`. Named sizes become symbolic dimensions of the graph.
        force: replace an existing file.

    Returns:
        The largest difference between the outputs of onnxruntime and PyTorch over two runs with
        random inputs of different sizes, relative to the largest value of the output; None if
        onnxruntime is not installed and nothing was compared.

    Raises:
        ValueError: if the file exists or cannot be written, or the model rejects the inputs.
        RuntimeError: if onnx or onnxscript is not installed, PyTorch cannot express the model in
            ONNX, or the graph's outputs differ from the model's. Nothing is written in this case.
    """
    for package in PACKAGES[:2]:
        require(package, *PACKAGES)
    if any(True for _ in sparse_layers(model)):
        raise ValueError("`model` must be dense; got block-sparse layers. Call densify(model).")
    model.eval()
    example = random_inputs(inputs, smallest=2)
    _outputs(model, example)
    dynamic_shapes = tuple(
        {dim: size for dim, size in enumerate(spec.shape) if isinstance(size, str)}
        for spec in inputs
    )
    with new_file(path, force) as file:
        try:
            program = torch.onnx.export(
                model, example, dynamo=True, dynamic_shapes=dynamic_shapes, verbose=False
            )
        except Exception as error:  # the exporter raises many types
            raise RuntimeError(f"PyTorch cannot write the model as ONNX: {error}") from error
        assert program is not None
        size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        program.save(file, external_data=size > SINGLE_FILE_BYTES)
        return _compare(file, model, [example, random_inputs(inputs, smallest=5)])


def _outputs(model: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    try:
        with torch.no_grad():
            y = model(*inputs)
    except Exception as error:  # user code can raise anything
        shapes = ", ".join(f"{list(x.shape)} {x.dtype}" for x in inputs)
        raise ValueError(
            f"`--input` must describe the model's inputs; got {shapes}, for which it raised "
            f"{type(error).__name__}: {error}"
        ) from error
    return [leaf for leaf in tree_leaves(y) if isinstance(leaf, Tensor)]


def _compare(file: Path, model: nn.Module, examples: Sequence[tuple[Tensor, ...]]) -> float | None:
    """Return the largest relative difference; raise RuntimeError if it exceeds the tolerance."""
    try:
        import onnxruntime
    except ImportError:
        return None
    try:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        names = [graph_input.name for graph_input in session.get_inputs()]
        results = [
            session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
            for inputs in examples
        ]
    except Exception as error:  # onnxruntime has its own exception classes
        raise RuntimeError(f"onnxruntime cannot run the graph: {error}") from error
    largest = 0.0
    for inputs, outputs in zip(examples, results, strict=True):
        expected = _outputs(model, inputs)
        if len(outputs) != len(expected):
            raise RuntimeError(
                f"The ONNX graph must have the model's {len(expected)} tensor outputs; "
                f"got {len(outputs)}."
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
                    f"The ONNX graph must compute the model's outputs; for inputs of shapes "
                    f"{[list(x.shape) for x in inputs]} it differs: {error}"
                ) from error
            if scale:
                difference = (got.double().nan_to_num(0.0, 0.0, 0.0) - finite).abs().max()
                largest = max(largest, float(difference) / scale)
    return largest
