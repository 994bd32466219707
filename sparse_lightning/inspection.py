"""`sparse-lightning inspect`: show the block-sparse layers of a checkpoint and their masks."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_lightning.export.files import (
    is_transformers,
    read_checkpoint,
    read_transformers,
    state_dict_of,
)
from sparse_lightning.export.state_dicts import SavedLayer, describe_layers, find_layers
from sparse_lightning.masks import mask_image, mask_text
from sparse_lightning.names import group_similar
from sparse_lightning.swap_report import DEAD_FEATURES, WEIGHT_DENSITY, blocks_text
from sparse_lightning.tables import Section, counted, range_of, show
from sparse_lightning.topology import count_dead

# What `SparsityTrainerCallback` writes into a checkpoint of Transformers' Trainer.
_TRAINING = "sparsity.pt"

EXAMPLES = """examples:
  the block-sparse layers, and the configuration of the training:
    sparse-lightning inspect last.ckpt
  the same with a row for each of the repeated layers:
    sparse-lightning inspect last.ckpt --all
  a model that save_pretrained or the Trainer of Transformers wrote:
    sparse-lightning inspect output/checkpoint-500
  the block mask of one layer, as text and as an image:
    sparse-lightning inspect last.ckpt --layer blocks.0.mlp.0
    sparse-lightning inspect last.ckpt --layer blocks.0.mlp.0 --png mask.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CKPT",
        help="a Lightning checkpoint, a state dict saved by torch.save, or a folder that "
        "Transformers wrote, such as checkpoint-500")  # fmt: skip
    add("--all", action="store_true",
        help="list every layer; without it, layers of one kind whose names differ only in numbers "
        "share a row")  # fmt: skip
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
    if options.all and options.layer:
        raise ValueError("`--all` must come without `--layer`, which shows one layer.")
    if options.png and not options.layer:
        raise ValueError("`--png` must come with `--layer`: an image shows one layer.")
    state_dict, trainings = _read(options.checkpoint)
    layers = find_layers(state_dict)
    if options.layer is None:
        print_layers(layers, options.all)
        for training in trainings:
            print_training(training)
        return
    layer = _get_layer(layers, options.layer)
    if options.png:
        _write_png(options.png, layer)
        print(f"Wrote {options.png}")
    else:
        print(mask_title(options.layer, layer))
        print(mask_text(layer.topology.mask.numpy(), shutil.get_terminal_size().columns))


def print_layers(layers: Mapping[str, SavedLayer], every: bool = False) -> None:
    """Print a table of saved layers: sizes, dead outputs, unread inputs, norms of the blocks.

    Layers whose names differ only in numbers, and that have the same shape, block size and dtype,
    share a row with the sums of their blocks and features and the norms of all their blocks; there
    is a column for their number then. With `every`, each layer has its own row. If blocks of a
    layer keep only some of their weights, there is a column for the share of weights.
    """
    keyed = [(name, _kind(layer)) for name, layer in layers.items()]
    groups = [(name, [name], kind) for name, kind in keyed] if every else group_similar(keyed)
    is_repeated = len(groups) < len(layers)

    def number(count: int) -> list[str]:
        return [f"{count}"] if is_repeated else []

    def share(density: str) -> list[str]:
        return [density] if report.has_patterns else []

    report = describe_layers(layers)
    header = (
        "layer", *(["number"] if is_repeated else []), "shape", "blocks", "density",
        *share(WEIGHT_DENSITY), *DEAD_FEATURES, "dtype", "min norm", "median", "max",
    )  # fmt: skip
    rows = []
    for label, names, (out_features, in_features, size, nm, dtype) in groups:
        topologies = [layers[name].topology for name in names]
        dead = [count_dead(topology.mask) for topology in topologies]
        norms = torch.cat([_block_norms(layers[name]) for name in names])
        quantiles = (norms.min(), norms.median(), norms.max()) if len(norms) else ()
        rows.append(
            (
                label,
                *number(len(names)),
                f"{out_features}x{in_features}",
                f"{sum(topology.n_blocks for topology in topologies):,} of {blocks_text(size, nm)}",
                range_of(f"{topology.density:.3f}" for topology in topologies),
                *share(range_of(f"{topology.weight_density:.3f}" for topology in topologies)),
                *(f"{sum(counts) * size:,}" for counts in zip(*dead, strict=True)),
                str(dtype).removeprefix("torch."),
                *(f"{float(norm):.3g}" for norm in quantiles),
                *("-" for _ in range(3 - len(quantiles))),
            )
        )
    weights = sum(entry.weights for entry in report.layers.values())
    totals = (
        f"{weights:,} weights",
        f"{report.density:.3f}",
        *share(f"{report.weight_density:.3f}"),
    )
    rows.append(("total", *number(len(layers)), "", *totals, *[""] * 6))
    show([Section("Block-sparse layers", header, rows)])


def print_training(state: Mapping[str, Any]) -> None:
    """Print the progress and the configuration that a training saved."""
    print()
    for optimizer in state["courses"]:
        next_update = optimizer["next_update"]
        when = "none left" if next_update is None else f"the next after step {next_update}"
        updates = counted(state["n_updates"], "topology update")
        print(f"Step {optimizer['steps']}, {updates}, {when}")
    for key, value in state["config"].items():
        print(f"  {key}: {value}")


def mask_title(name: str, layer: SavedLayer) -> str:
    """Return the line printed above a layer's mask."""
    topology = layer.topology
    size, (rows, columns) = topology.block_size, topology.grid
    return (
        f"{name}: {topology.out_features}x{topology.in_features}, {topology.n_blocks} of "
        f"{rows}x{columns} blocks of {blocks_text(size, topology.nm)}, density "
        f"{topology.density:.3f}"
        + (f", {WEIGHT_DENSITY} {topology.weight_density:.3f}" if topology.nm else "")
    )


def _read(path: Path) -> tuple[Mapping[str, Any], list[Mapping[str, Any]]]:
    """Return the model's state dict, and what each callback saved of the training."""
    if is_transformers(path):
        state = path / _TRAINING
        return read_transformers(path), [read_checkpoint(state)] if state.is_file() else []
    checkpoint = read_checkpoint(path)
    saved = checkpoint.get("callbacks", {})
    return state_dict_of(checkpoint), [
        state
        for name, state in saved.items()
        if name.startswith("SparsityCallback") and isinstance(state, Mapping)
    ]


def _kind(layer: SavedLayer) -> tuple[int, int, int, str | None, torch.dtype]:
    """Return what layers that share a row have in common."""
    topology = layer.topology
    shape = topology.out_features, topology.in_features
    return *shape, topology.block_size, topology.nm, layer.values.dtype


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
