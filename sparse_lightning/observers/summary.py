"""`FitSummary`: what block sparsity has bought, once a training has ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from sparse_lightning.observers.base import Fit
from sparse_lightning.observers.measures import (
    compute_dtype,
    count_parameters,
    predicted_speedup,
    relative_flops,
    share,
    training_bytes,
)
from sparse_lightning.selection import sparse_layers


@dataclass(frozen=True)
class FitSummary:
    """What block sparsity has bought in a training, as it stands at its end.

    Attributes:
        layers: that are block-sparse.
        first_density: present blocks / all blocks of them, when the training began.
        density: the same at the end.
        parameters: of the whole model, at present blocks.
        dense_parameters: of it with every layer dense.
        nbytes: of these layers' weights, gradients and optimizer state, indices included.
        dense_nbytes: of the same, dense.
        flops: FLOPs a token of all linear layers, relative to dense ones.
        updates: of the topology.
        dropped: blocks that these updates have dropped.
        grown: blocks that they have grown.
        ever_active: blocks that were ever present / all blocks.
        speedup: dense time / time predicted for these layers on this GPU; None if unknown.
    """

    layers: int
    first_density: float
    density: float
    parameters: int
    dense_parameters: int
    nbytes: int
    dense_nbytes: int
    flops: float
    updates: int
    dropped: int
    grown: int
    ever_active: float
    speedup: float | None

    def rows(self) -> list[tuple[str, str]]:
        """Return what is shown, as (what, how much)."""
        rows = [
            ("layers", f"{self.layers}"),
            ("density", f"{self.first_density:.3f} -> {self.density:.3f}"),
            ("parameters", f"{self.parameters:,} of {self.dense_parameters:,} dense"),
            (
                "memory",
                f"{self.nbytes / 1e6:.1f} MB, {self.nbytes / max(1, self.dense_nbytes):.1%} of "
                f"{self.dense_nbytes / 1e6:.1f} MB dense",
            ),
            ("FLOPs a token", f"{self.flops:.1%} of dense"),
            ("updates", f"{self.updates}: {self.dropped:,} blocks dropped, {self.grown:,} grown"),
            ("ever active", f"{self.ever_active:.1%} of all blocks"),
        ]
        if self.speedup is not None:
            rows.append(("predicted speed-up", f"{self.speedup:.2f} of these layers"))
        return rows

    def __str__(self) -> str:
        width = max(len(what) for what, _ in self.rows())
        lines = [f"{what.ljust(width)}  {much}" for what, much in self.rows()]
        return "\n".join(["Block-sparse training", *lines])


def summarise(fit: Fit) -> FitSummary:
    """Describe a training at its end."""
    layers, patterns = fit.layers.values(), fit.patterns
    sizes = [training_bytes(layer, fit.trainer.optimizers) for layer in layers]
    parameters = count_parameters(fit.model)
    absent = sum(
        layer.in_features * layer.out_features - layer.topology.n_blocks * layer.block_size**2
        for _, layer in sparse_layers(fit.model)
    )
    speedup = None
    if layers:
        speedup = predicted_speedup(
            [(layer, layer.density) for layer in layers],
            compute_dtype(fit.trainer, next(iter(layers))),
        )
    return FitSummary(
        layers=len(layers),
        first_density=share([*patterns.first.values()]),
        density=share([*patterns.present.values()]),
        parameters=parameters,
        dense_parameters=parameters + absent,
        nbytes=sum(sparse for sparse, _ in sizes),
        dense_nbytes=sum(dense for _, dense in sizes),
        flops=relative_flops(fit.model),
        updates=fit.n_updates,
        dropped=_count(patterns.first) + patterns.grown - _count(patterns.present),
        grown=patterns.grown,
        ever_active=share([*patterns.ever.values()]),
        speedup=speedup,
    )


def _count(masks: Mapping[str, Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks.values())
