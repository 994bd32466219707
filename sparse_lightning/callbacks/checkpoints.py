"""Which Lightning checkpoints a fit goes on from, and which one it begins with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from sparse_lightning.linear import BlockSparseLinear
from sparse_lightning.patching import start_from
from sparse_lightning.resume import is_dense


def begin_with(
    checkpoint: Mapping[str, Any], layers: Mapping[str, BlockSparseLinear], init: str
) -> None:
    """Give layers the dense weights of a checkpoint, which has no state of a sparsity.

    Raises:
        ValueError: if it has block-sparse layers: there is no schedule to go on with.
    """
    if not is_dense(checkpoint["state_dict"], layers):
        raise ValueError(
            "`ckpt_path` must be a checkpoint of a training with SparsityCallback, so that its "
            "schedule can go on, or one of dense weights, to begin with; got block-sparse layers "
            "without the callback's state. To start a new training from its weights, leave "
            "`ckpt_path` out, call `sparsify`, and load checkpoint['state_dict'] before the fit."
        )
    for name, layer in layers.items():
        start_from(layer, checkpoint["state_dict"][f"{name}.weight"], init)
    rank_zero_info(
        "Block-sparse training begins with the dense weights of the checkpoint. Its optimizer, its "
        "progress and the state of callbacks are left out."
    )


def leave_only_weights(checkpoint: dict[str, Any], state_dict: Mapping[str, Any]) -> None:
    """Have Lightning take a state dict from a checkpoint, and begin with all else."""
    checkpoint.update(state_dict=state_dict, optimizer_states=[], lr_schedulers=[], callbacks={})
    checkpoint.pop("loops", None)
