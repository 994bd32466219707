"""Convert the block-sparse layers of a checkpoint to weights that other software can read.

    from sparse_lightning.export import dense_state_dict, read_checkpoint, state_dict_of

    model.load_state_dict(dense_state_dict(state_dict_of(read_checkpoint("last.ckpt"))))

Block-sparse layers are recognised by their keys, `<name>.values` and `<name>._extra_state`; no
model is needed. The result has `<name>.weight` instead, like an `nn.Linear`, and every other entry
is unchanged. The command is `sparse-lightning export`.
"""

from sparse_lightning.arguments import Input
from sparse_lightning.export.files import (
    read_checkpoint,
    state_dict_of,
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
    part_of,
    uncompiled_state_dict,
)

__all__ = [
    "Input",
    "bsr_state_dict",
    "dense_state_dict",
    "describe_layers",
    "find_layers",
    "part_of",
    "read_checkpoint",
    "state_dict_of",
    "uncompiled_state_dict",
    "write_checkpoint",
    "write_onnx",
    "write_safetensors",
    "write_transformers",
]
