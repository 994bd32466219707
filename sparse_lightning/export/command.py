"""The options of `sparse-lightning export`, and what it prints."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from sparse_lightning.export.files import (
    check_folder,
    check_output,
    read_checkpoint,
    state_dict_of,
    with_state_dict,
    write_checkpoint,
    write_safetensors,
    write_transformers,
)
from sparse_lightning.export.graph import Input, write_onnx
from sparse_lightning.export.state_dicts import (
    bsr_state_dict,
    dense_state_dict,
    find_layers,
    is_compiled,
    part_of,
    report,
    uncompiled_state_dict,
)
from sparse_lightning.patching import densify
from sparse_lightning.targets import builder

FORMS = ("dense", "bsr", "safetensors", "onnx", "transformers")

EXAMPLES = """forms:
  dense        a checkpoint like CKPT, with zeros at absent blocks, for the model without
               block-sparse layers: MyModule.load_from_checkpoint(FILE) or, of a plain state dict,
               model.load_state_dict(torch.load(FILE))
  bsr          a state dict whose weights hold present blocks only, as torch.sparse_bsr tensors:
               model.load_state_dict(torch.load(FILE), assign=True); those of GPT-2's Conv1D
               are dense
  safetensors  dense weights without pickle: safetensors.torch.load_model(model, FILE)
  onnx         the dense model's graph, compared with the model where onnxruntime is installed
  transformers a folder of the dense model: AutoModel.from_pretrained(FOLDER)

The state of optimizers, callbacks and loops is left out, as it fits no dense model. With
Lightning's WeightAveraging (EMAWeightAveraging) a checkpoint's weights are the average, and so are
those exported; those of the last step are in its 'current_model_state', for use in Python.

examples:
  a dense checkpoint, last.dense.ckpt:
    sparse-lightning export last.ckpt --to dense
  a graph for any batch of 16 tokens; build() in project/model.py returns the dense model:
    sparse-lightning export last.ckpt --to onnx --model project.model:build \\
        --input batch,16,int64
  a graph with two inputs, into a file of your choice:
    sparse-lightning export last.ckpt --to onnx --model project.model:build \\
        --input batch,3,32,32 --input batch,10 --output classifier.onnx
  a folder of the Transformers model that the LightningModule has as self.bert:
    sparse-lightning export last.ckpt --to transformers --model project.model:build \\
        --prefix bert
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CKPT",
        help="a checkpoint of Lightning, or a state dict saved by torch.save")  # fmt: skip
    add("--to", choices=FORMS, required=True, help="see below")
    add("--output", type=Path, metavar="FILE",
        help="or a folder for transformers; default: beside CKPT, with its name and an ending of "
        "the form")  # fmt: skip
    add("--force", action="store_true", help="replace FILE if it is there")
    add("--prefix", metavar="NAME",
        help="write only the part of the model that has this name, as a state dict without it: of "
        "a LightningModule with self.bert, bert")  # fmt: skip
    add("--uncompiled", action="store_true",
        help="leave out the '_orig_mod' that torch.compile puts into names, for a model that is "
        "not compiled")  # fmt: skip
    add("--model", metavar="MODULE:FUNCTION",
        help="onnx and transformers: what builds the dense model; it is called without arguments. "
        "Modules in the current folder are found")  # fmt: skip
    add("--input", action="append", metavar="SIZES", default=[],
        help="onnx: sizes of an input of the model, names where they may vary, and a dtype, if it "
        "is not float32: batch,16,int64. Once for each input")  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Write what the options ask for, and print what it is.

    Raises:
        ValueError: for options, or a checkpoint, of which nothing can be made.
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
    output = options.output or path.with_suffix(_ending(to, path))
    (check_folder if to == "transformers" else check_output)(output, options.force)

    checkpoint = read_checkpoint(path)
    sparse = state_dict_of(checkpoint)
    if options.uncompiled:
        sparse = uncompiled_state_dict(sparse)
    if options.prefix:
        sparse = part_of(sparse, options.prefix)
    print(f"{report(find_layers(sparse))}\n")
    state_dict = bsr_state_dict(sparse) if to == "bsr" else dense_state_dict(sparse)

    compared = ""
    if to == "dense":
        # The whole is a checkpoint of the same form; a part of it is no LightningModule's.
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
        compared = _compared(write_onnx(output, model, inputs, force=options.force))
    print(
        f"Wrote {output}: {to}, {len(state_dict)} tensors, {_megabytes(output)} "
        f"({path.name}: {_megabytes(path)}){compared}"
    )
    if "averaging_state" in checkpoint:
        print("The weights are the average that a callback kept, not those of the last step.")
    if is_compiled(state_dict):
        print("Names hold '_orig_mod'. For a model that is not compiled, add --uncompiled.")


def _ending(form: str, path: Path) -> str:
    own = {"dense": f".dense{path.suffix}", "bsr": ".bsr.pt"}
    return own.get(form, f".{form}")


def _build(where: str, state_dict: Mapping[str, Any]) -> nn.Module:
    """Return the dense model that a function of the user builds, with the weights."""
    model = densify(builder("--model", where)())
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        raise ValueError(
            f"`--model` must build the model that the checkpoint is of; got '{where}'. {error}\n"
            "Where it is a part of what was trained, give its name by --prefix."
        ) from error
    return model


def _compared(difference: float | None) -> str:
    """Say how `write_onnx` compared the graph."""
    if difference is None:
        return ". Not compared with the model: pip install onnxruntime"
    return f". Outputs are within {difference:.1e} of the model's."


def _megabytes(path: Path) -> str:
    files = [path] if path.is_file() else [*path.iterdir()]
    return f"{sum(file.stat().st_size for file in files) / 1e6:.2f} MB"
