"""Options and output of `sparse-lightning export`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from sparse_lightning.arguments import Input, find_builder
from sparse_lightning.export.files import (
    check_output,
    read_checkpoint,
    state_dict_of,
    with_state_dict,
    write_checkpoint,
    write_safetensors,
    write_transformers,
)
from sparse_lightning.export.graph import write_onnx
from sparse_lightning.export.state_dicts import (
    bsr_state_dict,
    dense_state_dict,
    describe_layers,
    find_layers,
    is_compiled,
    part_of,
    uncompiled_state_dict,
)
from sparse_lightning.patching import densify

FORMATS = ("dense", "bsr", "safetensors", "onnx", "transformers")

EXAMPLES = """formats:
  dense        a checkpoint like CKPT with zeros at absent blocks, for the model without
               block-sparse layers: MyModule.load_from_checkpoint(FILE) or, for a plain state dict,
               model.load_state_dict(torch.load(FILE))
  bsr          a state dict whose weights hold only the present blocks, as torch.sparse_bsr
               tensors: model.load_state_dict(torch.load(FILE), assign=True); the weights of
               GPT-2's Conv1D stay dense
  safetensors  dense weights without pickle: safetensors.torch.load_model(model, FILE)
  onnx         the dense model's graph; it is compared with the model if onnxruntime is installed
  transformers a folder with the dense model: AutoModel.from_pretrained(FOLDER)

The state of optimizers, callbacks and loops is omitted, because it does not fit a dense model. In a
checkpoint written with Lightning's WeightAveraging (EMAWeightAveraging), the weights are the
average, and the average is exported. The weights of the last step are in its 'current_model_state',
which you can read in Python.

examples:
  a dense checkpoint, last.dense.ckpt:
    sparse-lightning export last.ckpt --to dense
  a graph for any batch of 16 tokens; build() in project/model.py returns the dense model:
    sparse-lightning export last.ckpt --to onnx --model project.model:build \\
        --input batch,16,int64
  a graph with two inputs, written to another file:
    sparse-lightning export last.ckpt --to onnx --model project.model:build \\
        --input batch,3,32,32 --input batch,10 --output classifier.onnx
  a folder with the Transformers model that the LightningModule holds as self.bert:
    sparse-lightning export last.ckpt --to transformers --model project.model:build \\
        --prefix bert
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CKPT",
        help="a Lightning checkpoint, or a state dict saved by torch.save")  # fmt: skip
    add("--to", choices=FORMATS, required=True, help="the format; see below")
    add("--output", type=Path, metavar="FILE",
        help="output file, or folder for transformers; default: CKPT with the suffix replaced by "
        "the format's")  # fmt: skip
    add("--force", action="store_true", help="replace FILE if it exists")
    add("--prefix", metavar="NAME",
        help="write only the submodule of this name, as a state dict without the prefix: bert for "
        "a LightningModule with self.bert")  # fmt: skip
    add("--uncompiled", action="store_true",
        help="remove the '_orig_mod' that torch.compile inserts into names, for a model that is "
        "not compiled")  # fmt: skip
    add("--model", metavar="MODULE:FUNCTION",
        help="onnx and transformers: a function without arguments that builds the dense model. "
        "Modules in the current folder are found")  # fmt: skip
    add("--input", action="append", metavar="SIZES", default=[],
        help="onnx: sizes of a model input, names for sizes that may vary, and a dtype if it is "
        "not float32: batch,16,int64. Repeat for each input")  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Write the requested format and print a summary.

    Raises:
        ValueError: for incompatible options, or a checkpoint that cannot be exported.
        RuntimeError: if a package is missing, or a graph cannot be made.
    """
    path, to = options.checkpoint, options.to
    if to == "onnx" and not (options.model and options.input):
        raise ValueError(
            "`--model` and `--input` must be given for onnx, as a checkpoint holds no graph. "
            "For instance: --model my_project.model:build --input batch,128"
        )
    if to == "transformers" and not options.model:
        raise ValueError(
            "`--model` must be given for transformers, as a checkpoint holds no config. For "
            "instance: --model my_project.model:build"
        )
    if to != "onnx" and options.input:
        raise ValueError(f"`--input` must be given for onnx only; got --to {to}.")
    if to not in ("onnx", "transformers") and options.model:
        raise ValueError(f"`--model` must be given for onnx and transformers only; got --to {to}.")
    inputs = [Input.parse(text) for text in options.input]
    suffix = {"dense": f".dense{path.suffix}", "bsr": ".bsr.pt"}.get(to, f".{to}")
    output = options.output or path.with_suffix(suffix)
    check_output(output, options.force, kind="folder" if to == "transformers" else "file")

    checkpoint = read_checkpoint(path)
    sparse = state_dict_of(checkpoint)
    if options.uncompiled:
        sparse = uncompiled_state_dict(sparse)
    if options.prefix:
        sparse = part_of(sparse, options.prefix)
    print(f"{describe_layers(find_layers(sparse))}\n")
    state_dict = bsr_state_dict(sparse) if to == "bsr" else dense_state_dict(sparse)

    comparison = ""
    if to == "dense":
        # The whole model keeps the form of its checkpoint; a submodule is a plain state dict.
        whole = state_dict if options.prefix else with_state_dict(checkpoint, state_dict)
        write_checkpoint(output, whole, force=options.force)
    elif to == "bsr":
        write_checkpoint(output, state_dict, force=options.force)
    elif to == "safetensors":
        write_safetensors(output, state_dict, force=options.force)
    elif to == "transformers":
        write_transformers(output, _build(options.model, state_dict), force=options.force)
    else:
        model = _build(options.model, state_dict)
        comparison = _describe_comparison(write_onnx(output, model, inputs, force=options.force))
    print(
        f"Wrote {output}: {to}, {len(state_dict)} tensors, {_megabytes(output)} "
        f"({path.name}: {_megabytes(path)}){comparison}"
    )
    if "averaging_state" in checkpoint:
        print("The weights are the average kept by a callback, not those of the last step.")
    if is_compiled(state_dict):
        print("Names contain '_orig_mod'. For a model that is not compiled, add --uncompiled.")


def _build(target: str, state_dict: Mapping[str, Any]) -> nn.Module:
    """Return the dense model built by the user's function, with the weights loaded."""
    model = densify(find_builder("--model", target)())
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        raise ValueError(
            f"`--model` must build the model that the checkpoint was saved from; got '{target}'. "
            f"{error}\nIf it is a submodule of the trained model, give its name by --prefix."
        ) from error
    return model


def _describe_comparison(difference: float | None) -> str:
    """Return a sentence about the result of `write_onnx`."""
    if difference is None:
        return ". Not compared with the model: pip install onnxruntime"
    return f". Outputs are within {difference:.1e} of the model's."


def _megabytes(path: Path) -> str:
    files = [path] if path.is_file() else [*path.iterdir()]
    return f"{sum(file.stat().st_size for file in files) / 1e6:.2f} MB"
