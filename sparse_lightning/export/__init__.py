"""Getting out of sparsity: from the blocks of a checkpoint to weights that others can read.

    from sparse_lightning.export import dense_state_dict, read_checkpoint, state_dict_of

    model.load_state_dict(dense_state_dict(state_dict_of(read_checkpoint("last.ckpt"))))

A block-sparse layer is found by its keys, `<name>.values` and `<name>._extra_state`; no model is
needed. In what comes out it has `<name>.weight` instead, as an `nn.Linear` has, and all else is as
it was. The command is `sparse-lightning export`.
"""

from sparse_lightning.export.files import (
    read_checkpoint,
    state_dict_of,
    with_state_dict,
    write_checkpoint,
    write_safetensors,
    write_transformers,
)
from sparse_lightning.export.graph import Input, write_onnx
from sparse_lightning.export.state_dicts import (
    SavedLayer,
    bsr_state_dict,
    dense_state_dict,
    find_layers,
    part_of,
    report,
    uncompiled_state_dict,
)

__all__ = [
    "Input",
    "SavedLayer",
    "bsr_state_dict",
    "dense_state_dict",
    "find_layers",
    "part_of",
    "read_checkpoint",
    "report",
    "state_dict_of",
    "uncompiled_state_dict",
    "with_state_dict",
    "write_checkpoint",
    "write_onnx",
    "write_safetensors",
    "write_transformers",
]
