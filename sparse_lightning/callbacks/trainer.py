"""What `SparsityCallback` asks of Lightning's trainer, its strategies and other callbacks."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from sparse_lightning.linear import BlockSparseLinear
from sparse_lightning.sharding import is_sharded


def averaging_callbacks() -> tuple[type[Callback], ...]:
    """Return the classes of callbacks that copy the model; Lightning 2.5 lacks one of them."""
    try:
        from lightning.pytorch.callbacks import WeightAveraging
    except ImportError:
        return (StochasticWeightAveraging,)
    return (StochasticWeightAveraging, WeightAveraging)


def averaged_copies(trainer: pl.Trainer, name: str) -> Iterator[BlockSparseLinear]:
    """Yield the copies of a layer in models that other callbacks hold, such as averages."""
    model = trainer.lightning_module
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for held in vars(callback).values():
            if not isinstance(held, nn.Module) or held is model:
                continue
            inner = held.module if isinstance(held, torch.optim.swa_utils.AveragedModel) else held
            try:
                copy = inner.get_submodule(name)
            except AttributeError:
                continue
            if isinstance(copy, BlockSparseLinear):
                yield copy


def planned_steps(trainer: pl.Trainer) -> float:
    """Return how many optimizer steps the training will have; infinite if nobody knows."""
    total = trainer.estimated_stepping_batches
    epochs, batches = trainer.max_epochs, trainer.num_training_batches
    if not epochs or epochs < 0 or math.isinf(batches) or not _has_batch_norm_epoch(trainer):
        return total
    return min(total, math.ceil(batches / trainer.accumulate_grad_batches) * (epochs - 1))


def _has_batch_norm_epoch(trainer: pl.Trainer) -> bool:
    """Whether SWA has put an epoch at the end, to see the statistics of its average."""
    return any(
        isinstance(callback, StochasticWeightAveraging)
        and callback.pl_module_contains_batch_norm(trainer.lightning_module)
        for callback in trainer.callbacks  # type: ignore[attr-defined]
    )


def skips_backward(trainer: pl.Trainer) -> bool:
    """Whether it is that epoch: what steps in it has no gradients of its own."""
    return trainer.fit_loop._skip_backward


def grad_scale(trainer: pl.Trainer) -> float | None:
    """Return what a GradScaler multiplies losses by; None without one."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return None if scaler is None else float(scaler.get_scale())


def unscale_factor(trainer: pl.Trainer, optimizer: torch.optim.Optimizer) -> float:
    """Return what gradients are still multiplied by: only fused optimizers unscale themselves."""
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    scale = grad_scale(trainer)
    return 1.0 if scale is None else scale


def compute_dtype(trainer: pl.Trainer, layer: BlockSparseLinear) -> torch.dtype:
    """Return the dtype that a layer computes in."""
    mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    return mixed.get(str(trainer.precision), layer.values.dtype)


def check_ranks(trainer: pl.Trainer, tensors: Iterable[Tensor]) -> None:
    """Raise RuntimeError on every rank unless all hold the same; every rank must call this."""
    if trainer.world_size == 1:
        return
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().numpy().tobytes())
    own = int.from_bytes(digest.digest()[:8], "little") >> 1
    # The largest, and the smallest by its negative, in one go.
    both = torch.tensor([own, -own], device=trainer.strategy.root_device)
    largest, smallest = trainer.strategy.reduce(both, reduce_op="max").tolist()
    if largest != -smallest:
        raise RuntimeError(
            "All ranks must hold the same blocks, and score them alike; they differ at step "
            f"{trainer.global_step} (seen on rank {trainer.global_rank}). Look for what differs "
            "between ranks: weights changed outside of the optimizer, or a criterion that draws "
            "numbers without `scores.generator`. Resume from the last checkpoint."
        )


def can_shrink(trainer: pl.Trainer, layers: Iterable[BlockSparseLinear]) -> bool:
    """Tell whether parameters may change their shape: not where they are sharded or compiled."""
    module = trainer.lightning_module
    # Lightning keeps the wrapper of a module that was compiled as a whole apart from the module.
    wrapped = isinstance(trainer.strategy.model, torch._dynamo.OptimizedModule)
    compiled = wrapped or any(
        isinstance(m, torch._dynamo.OptimizedModule) or m._compiled_call_impl is not None
        for m in module.modules()
    )
    return not compiled and not any(is_sharded(layer.values) for layer in layers)


def forget_old_shapes(trainer: pl.Trainer) -> None:
    """Let go of what was built for parameters of other shapes, after they have shrunk."""
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy):
        # DDP's buckets have the old sizes. The old wrapper must be gone before there is a new one,
        # or both would reduce every gradient.
        strategy.model = trainer.lightning_module
        strategy.configure_ddp()
    if strategy.root_device.type == "cuda":
        torch.cuda.empty_cache()  # so that others, too, can use what is free now
