"""`sparse-lightning inspect`: show the block-sparse layers of a checkpoint and their masks."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import Tensor

from sparse_lightning.export.files import read_checkpoint, state_dict_of
from sparse_lightning.export.state_dicts import SavedLayer, find_layers
from sparse_lightning.masks import mask_image, mask_text
from sparse_lightning.swap_report import DEAD_FEATURES
from sparse_lightning.tables import Section, show
from sparse_lightning.topology import count_dead

EXAMPLES = """examples:
  all block-sparse layers, and the configuration of the training:
    sparse-lightning inspect last.ckpt
  the block mask of one layer, as text and as an image:
    sparse-lightning inspect last.ckpt --layer blocks.0.mlp.0
    sparse-lightning inspect last.ckpt --layer blocks.0.mlp.0 --png mask.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CKPT",
        help="a Lightning checkpoint, or a state dict saved by torch.save")  # fmt: skip
    add("--layer", metavar="NAME", help="show the block mask of this layer")
    add("--png", type=Path, metavar="FILE",
        help="write the mask as a PNG image; needs --layer and pillow")  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Print the layers and the training's configuration, or show one layer's mask.

    Raises:
        ValueError: for wrong options, or a checkpoint without block-sparse layers.
        RuntimeError: if pillow is missing.
        OSError: if the image cannot be written.
    """
    if options.png and not options.layer:
        raise ValueError("`--png` must come with `--layer`: an image shows one layer.")
    checkpoint = read_checkpoint(options.checkpoint)
    layers = find_layers(state_dict_of(checkpoint))
    if options.layer is None:
        print_layers(layers)
        print_training(checkpoint)
        return
    layer = _get_layer(layers, options.layer)
    if options.png:
        _write_png(options.png, layer)
        print(f"Wrote {options.png}")
    else:
        print(mask_title(options.layer, layer))
        print(mask_text(layer.topology.mask.numpy(), shutil.get_terminal_size().columns))


def print_layers(layers: Mapping[str, SavedLayer]) -> None:
    """Print a table of saved layers: sizes, dead outputs, unread inputs, norms of the blocks."""
    header = (
        "layer", "shape", "blocks", "density", *DEAD_FEATURES, "dtype",
        "min norm", "median", "max",
    )  # fmt: skip
    rows = []
    present = total = 0
    for name, layer in layers.items():
        topology = layer.topology
        norms = _block_norms(layer)
        quantiles = (norms.min(), norms.median(), norms.max()) if len(norms) else ()
        rows.append(
            (
                name,
                f"{topology.out_features}x{topology.in_features}",
                f"{topology.n_blocks} of {topology.block_size}x{topology.block_size}",
                f"{topology.density:.3f}",
                *(f"{n * topology.block_size:,}" for n in count_dead(topology.mask)),
                str(layer.values.dtype).removeprefix("torch."),
                *(f"{float(norm):.3g}" for norm in quantiles),
                *("-" for _ in range(3 - len(quantiles))),
            )
        )
        present += topology.n_blocks * topology.block_size**2
        total += topology.out_features * topology.in_features
    rows.append(("total", "", f"{present:,} weights", f"{present / total:.3f}", *[""] * 6))
    show([Section("Block-sparse layers", header, rows)])


def print_training(checkpoint: Mapping[str, Any]) -> None:
    """Print the progress and configuration that `SparsityCallback` saved, if there is any."""
    states = [
        state
        for name, state in checkpoint.get("callbacks", {}).items()
        if name.startswith("SparsityCallback") and isinstance(state, Mapping)
    ]
    for state in states:
        print()
        for optimizer in state["courses"]:
            next_update = optimizer["next_update"]
            when = "none left" if next_update is None else f"the next after step {next_update}"
            print(f"Step {optimizer['steps']}, {state['n_updates']} topology updates, {when}")
        for key, value in state["config"].items():
            print(f"  {key}: {value}")


def mask_title(name: str, layer: SavedLayer) -> str:
    """Return the line printed above a layer's mask."""
    topology = layer.topology
    size, (rows, columns) = topology.block_size, topology.grid
    return (
        f"{name}: {topology.out_features}x{topology.in_features}, {topology.n_blocks} of "
        f"{rows}x{columns} blocks of {size}x{size}, density {topology.density:.3f}"
    )


def _block_norms(layer: SavedLayer) -> Tensor:
    slots = layer.topology.slots[layer.topology.mask].long()
    norms: Tensor = layer.values[slots].float().flatten(1).norm(dim=1)
    return norms


def _get_layer(layers: Mapping[str, SavedLayer], name: str) -> SavedLayer:
    if name not in layers:
        near = get_close_matches(name, layers, n=3) or list(layers)[:3]
        raise ValueError(
            f"`--layer` must be a block-sparse layer of the checkpoint; got '{name}'. "
            f"There are {len(layers)}, among them {', '.join(near)}."
        )
    return layers[name]


def _write_png(path: Path, layer: SavedLayer) -> None:
    try:
        from PIL import Image
    except ImportError:
        raise RuntimeError("`--png` needs pillow: pip install pillow") from None
    Image.fromarray(mask_image(layer.topology.mask.numpy())).save(path, format="png")
