"""Training by Lightning, in pieces if need be, with a time-stamped curve of the losses."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from quality_tasks import quiet
from torch import Tensor

from lm.data import Batches
from lm.models import GPT, Llama, build, flops_per_token
from lm.settings import DENSE, RULES, Settings, callback_keywords
from sparse_lightning import SparsityCallback
from sparse_lightning.bench.environment import describe_environment, prepare_device
from sparse_lightning.files import atomic_write
from sparse_lightning.policy.updates import ModelUpdate
from sparse_lightning.savings import count_parameters
from sparse_lightning.sparsifier import Sparsifier

_WEIGHT_DECAY, _BETAS, _CLIP = 0.1, (0.9, 0.95), 1.0
_FINAL_LR = 0.1  # relative to the peak

# Steps at the start of a piece, and steps that take this much longer than usual, compile something.
_WARMUP_STEPS, _COMPILING = 3, 10


@dataclass(frozen=True)
class Point:
    """A point of a training's curve.

    Attributes:
        step: optimizer steps.
        tokens: tokens trained on.
        seconds: training time, without warm-up, evaluation and checkpoints.
        flops: FLOPs of the training.
        train_loss: mean training loss since the previous point, in nats per token; None at step 0.
        held_out_loss: loss on held-out text, in nats per token.
    """

    step: int
    tokens: int
    seconds: float
    flops: float
    train_loss: float | None
    held_out_loss: float


@dataclass(frozen=True)
class Result:
    """The result of a finished training.

    Attributes:
        settings: its settings.
        environment: device, versions and commit of the last piece.
        curve: the points of its curve.
        parameters: number of parameters at the end.
        density: present blocks / all blocks of the sparse layers at the end; 1 if dense.
        peak_memory: largest number of bytes allocated on the GPU; 0 on a CPU.
        wall_seconds: time of all pieces together, with compilation and evaluation.
        warmup_steps: steps that compiled something; the median of others is their time.
    """

    settings: Settings
    environment: dict[str, str]
    curve: list[Point]
    parameters: int
    density: float
    peak_memory: int
    wall_seconds: float
    warmup_steps: int

    @property
    def tokens_per_second(self) -> float:
        """Mean training throughput."""
        return self.curve[-1].tokens / self.curve[-1].seconds


# -- the model and its loss ---------------------------------------------------------------------


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats.

    Args:
        logits: `[batch, time, vocabulary]`.
        targets: int64 `[batch, time]`.
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def divergence(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return the mean KL divergence of predictions from a teacher's, in nats.

    Args:
        logits, teacher_logits: `[batch, time, vocabulary]`.
    """
    student, teacher = (x.flatten(0, 1).float().log_softmax(-1) for x in (logits, teacher_logits))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


class LanguageModel(pl.LightningModule):
    """Trains a model to predict the next token, by AdamW with a warm-up and a cosine.

    Args:
        net: the model.
        batches: batches by step.
        settings: the settings of the training.
    """

    def __init__(self, net: GPT | Llama, batches: Batches, settings: Settings) -> None:
        super().__init__()
        self.net, self.batches, self.settings = net, batches, settings
        self.losses: list[Tensor] = []  # of the steps since they were last read
        self.next_token_loss: Callable[[Tensor, Tensor], Tensor] = next_token_loss
        if settings.compile:
            for block in net.blocks:
                block.compile()
            # A fused loss does not write the fp32 logits of a large vocabulary to memory.
            self.next_token_loss = torch.compile(next_token_loss)

    def train_dataloader(self) -> range:
        """Return one item per step.

        The batch is looked up by step, so that a resumed training continues with the right one.
        """
        return range(self.settings.steps)

    def training_step(self, item: int, batch_idx: int) -> Tensor:
        windows = self.to_device(self.batches[self.global_step])
        inputs, targets = windows[:, :-1], windows[:, 1:]
        logits = self.net(inputs)
        loss = self.next_token_loss(logits, targets)
        self.losses.append(loss.detach())
        return self.total_loss(loss, logits, inputs)

    def total_loss(self, loss: Tensor, logits: Tensor, inputs: Tensor) -> Tensor:
        """Return what is minimised, given the loss of the predictions `logits` for `inputs`."""
        return loss

    def to_device(self, windows: Tensor) -> Tensor:
        """Copy a batch to the device without making the host wait for it."""
        if self.device.type == "cuda":
            windows = windows.pin_memory()
        return windows.to(self.device, non_blocking=True)

    @torch.no_grad()
    def held_out_loss(self, windows: Sequence[Tensor]) -> float:
        """Return the mean loss of held-out batches."""
        total = torch.zeros((), device=self.device)
        with self.trainer.precision_plugin.forward_context():
            for batch in windows:
                batch = self.to_device(batch)
                total += self.next_token_loss(self.net(batch[:, :-1]), batch[:, 1:])
        return float(total) / len(windows)

    def configure_optimizers(self) -> Any:
        settings = self.settings
        # The `values` of a block-sparse layer have three dimensions: [slots, B, B].
        groups = [
            {"params": [p for p in self.parameters() if p.dim() > 1]},
            {"params": [p for p in self.parameters() if p.dim() <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(
            groups, lr=settings.lr, betas=_BETAS, weight_decay=_WEIGHT_DECAY, fused=True
        )
        warmup = max(1, round(settings.warmup * settings.steps))

        def factor(step: int) -> float:
            progress = min(1.0, max(0, step - warmup) / max(1, settings.steps - warmup))
            cosine = _FINAL_LR + (1 - _FINAL_LR) * 0.5 * (1 + math.cos(math.pi * progress))
            return min(1.0, (step + 1) / warmup) * cosine

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: Any = None,
        gradient_clip_algorithm: Any = None,
    ) -> None:
        # In mixed precision Lightning refuses to clip the gradients of a fused optimizer, since one
        # may unscale them itself. In bf16 they are not scaled.
        torch.nn.utils.clip_grad_norm_(self.parameters(), _CLIP)


class DistilledModel(LanguageModel):
    """A language model that also learns the predictions of a frozen dense one.

    Args:
        teacher: the dense model.
        others: arguments of `LanguageModel`.
    """

    def __init__(self, teacher: GPT | Llama, *others: Any) -> None:
        super().__init__(*others)
        # In a tuple it is no submodule: it is neither swapped nor trained nor saved.
        self._teacher = (teacher.requires_grad_(False),)
        self.divergence: Callable[[Tensor, Tensor], Tensor] = divergence
        if self.settings.compile:
            for block in teacher.blocks:
                block.compile()
            self.divergence = torch.compile(divergence)

    def on_fit_start(self) -> None:
        """Move the teacher to the device."""
        self._teacher[0].to(self.device)

    def total_loss(self, loss: Tensor, logits: Tensor, inputs: Tensor) -> Tensor:
        """Return the weighted mean of the loss and of the divergence from the teacher."""
        with torch.no_grad():
            teacher_logits = self._teacher[0](inputs)
        weight = self.settings.distill
        return (1 - weight) * loss + weight * self.divergence(logits, teacher_logits)


# -- time ---------------------------------------------------------------------------------------


class StepTimer:
    """Measures the time of each step without waiting for the device during them.

    A step takes from the previous mark to its own, so the work of the host between steps counts.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def start(self) -> None:
        """Begin the first step of a series."""
        self._marks.clear()
        self.mark()

    def mark(self) -> None:
        """End a step."""
        if not self._on_cuda:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def read(self) -> list[float]:
        """Wait for the device, and return the seconds of each step since `start`."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if not self._on_cuda:
            return [end - begin for begin, end in pairs]
        self._marks[-1].synchronize()
        return [begin.elapsed_time(end) / 1000 for begin, end in pairs]


def without_warmup(seconds: Sequence[float], first: int) -> tuple[float, int]:
    """Return the time of steps if none had compiled anything, and how many did.

    The first steps of a piece compile, and so do steps that take ten times as long as the median
    step. Topology updates take only a few times as long. A step that compiles is counted with the
    median of the others.

    Args:
        seconds: time of each step.
        first: number of steps of this piece before these.

    >>> without_warmup([9.0, 2.0, 2.0, 1.0, 3.0, 1.0, 50.0], first=0)
    (9.0, 4)
    """
    rest = seconds[max(0, _WARMUP_STEPS - first) :] or seconds
    typical = statistics.median(rest)
    usual = [step for step in rest if step <= _COMPILING * typical]
    n = len(seconds) - len(usual)
    return sum(usual) + n * statistics.median(usual), n


@dataclass
class Progress:
    """What a training has recorded so far.

    Attributes:
        curve: fields of its points.
        wall_seconds, warmup_steps, peak_memory: as in `Result`.
    """

    curve: list[dict[str, Any]] = field(default_factory=list)
    wall_seconds: float = 0.0
    warmup_steps: int = 0
    peak_memory: int = 0


class Recorder(pl.Callback):
    """Records the curve of a training, and stops it with a checkpoint when time is up.

    Args:
        model: the model.
        sparsity: the callback that makes it sparse; None if it is dense.
        held_out: held-out batches.
        checkpoint: file to write when time is up.
        deadline: time of `time.monotonic` at which this piece must have ended; None for no limit.
        report: function that receives a line of text for each point.
    """

    def __init__(
        self,
        model: LanguageModel,
        sparsity: SparsityCallback | None,
        held_out: Sequence[Tensor],
        checkpoint: Path,
        deadline: float | None,
        report: Callable[[str], None],
    ) -> None:
        self.model, self.settings = model, model.settings
        self.sparsity, self.held_out = sparsity, held_out
        self.checkpoint, self.deadline, self.report = checkpoint, deadline, report
        self.progress = Progress()
        self.parameters = 0
        self._flops = 0.0

    @property
    def curve(self) -> list[Point]:
        """The points so far."""
        return [Point(**point) for point in self.progress.curve]

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.progress)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.progress = Progress(**state)

    def on_train_start(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        self._timer = StepTimer(model.device)
        self._first = trainer.global_step
        self._point_began = time.monotonic()
        if self.sparsity is not None:
            assert self.sparsifier is not None
            self.sparsifier.register_update_hook(self._count_update)
        self._count_flops()
        if model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(model.device)
        if not self.progress.curve:
            self._append(0, 0.0, None)
        self._timer.start()

    @property
    def sparsifier(self) -> Sparsifier | None:
        """The engine of the sparse training, once it has started."""
        return None if self.sparsity is None else self.sparsity.sparsifier

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._timer.mark()
        self._flops += self._flops_per_step
        step = trainer.global_step
        if step % self.settings.log_every == 0 or step == self.settings.steps:
            self._record(step)
            self._stop_in_time(trainer)
            self._timer.start()

    def _record(self, step: int) -> None:
        seconds = self._timer.read()
        total, warmup_steps = without_warmup(seconds, step - len(seconds) - self._first)
        self.progress.warmup_steps += warmup_steps
        loss = float(torch.stack(self.model.losses).mean())
        self.model.losses.clear()
        if not math.isfinite(loss):
            raise RuntimeError(
                f"The training loss of {self.settings.label} is {loss} at step {step}, with a peak "
                f"learning rate of {self.settings.lr:g}. Give a smaller `--lr`."
            )
        self._append(step, total, loss)

    def _append(self, step: int, seconds: float, train_loss: float | None) -> None:
        progress, settings = self.progress, self.settings
        before = self.curve[-1] if progress.curve else None
        point = Point(
            step=step,
            tokens=step * settings.tokens_per_step,
            seconds=seconds + (before.seconds if before else 0.0),
            flops=self._flops + (before.flops if before else 0.0),
            train_loss=train_loss,
            held_out_loss=self.model.held_out_loss(self.held_out),
        )
        self._flops = 0.0
        progress.curve.append(asdict(point))
        if self.model.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.model.device)
            progress.peak_memory = max(progress.peak_memory, peak)
        if before is not None:
            speed = (point.tokens - before.tokens) / seconds
            self.report(
                f"step {step} of {settings.steps}, {point.tokens / 1e6:.2f} M tokens, "
                f"{point.seconds:.1f} s, {speed:,.0f} tokens/s, "
                f"loss {train_loss:.4f}, held out {point.held_out_loss:.4f}"
            )

    def _stop_in_time(self, trainer: pl.Trainer) -> None:
        now = time.monotonic()
        duration, self._point_began = now - self._point_began, now
        self.progress.wall_seconds += duration
        if trainer.global_step == self.settings.steps or self.deadline is None:
            return
        if now + duration > self.deadline:  # the next point would be too late
            with atomic_write(self.checkpoint) as file:
                trainer.save_checkpoint(file)
            trainer.should_stop = True

    def _count_flops(self) -> None:
        """Update the FLOPs of a step, which change with the number of blocks."""
        settings, net = self.settings, self.model.net
        per_token = flops_per_token(net, settings.layers, settings.width, settings.context)
        self._flops_per_step = per_token * settings.tokens_per_step
        self.parameters = count_parameters(net)

    def _count_update(self, sparsifier: Sparsifier, update: ModelUpdate) -> None:
        self._count_flops()
        if RULES[self.settings.rule]["grow"] == "gradient":
            dense = sum(
                layer.in_features * layer.out_features for layer in sparsifier.layers.values()
            )
            self._flops += 2 * dense * self.settings.tokens_per_step  # the dense gradients


# -- a training ---------------------------------------------------------------------------------


def load_start(file: Path) -> tuple[str, dict[str, Tensor]]:
    """Return the name of a finished dense training, and its weights.

    Raises:
        ValueError: if the file holds no dense weights of a training.
    """
    remedy = "Give a .pt file that `train --rule dense` has written"
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        name, rule, weights = saved["name"], saved["rule"], saved["weights"]
    except Exception as error:  # there is no common class of the errors of `torch.load`
        raise ValueError(f"`--start` must be weights; got '{file}'. {remedy}.") from error
    if rule != DENSE:
        raise ValueError(
            f"`--start` must be weights of a dense model; got '{file}', {rule}. {remedy}."
        )
    return name, weights


def train(
    settings: Settings,
    tokens: Path,
    folder: Path,
    device: torch.device,
    *,
    start: dict[str, Tensor] | None = None,
    deadline: float | None = None,
    report: Callable[[str], None],
) -> Result | None:
    """Train, or continue a training that a deadline has stopped.

    A finished training leaves its weights in `folder`, in the file `<name of the settings>.pt`.

    Args:
        settings: the settings.
        tokens: folder of tokens.
        folder: folder of checkpoints and weights.
        device: the device.
        start: initial weights, which the settings name; they are also those of the teacher.
        deadline: as in `Recorder`.
        report: as in `Recorder`.

    Returns:
        The result; None if the deadline came first, after which the same call continues.
    """
    prepare_device(device)
    torch._dynamo.reset()  # what earlier models compiled counts towards a limit
    torch.manual_seed(settings.seed)
    batches = Batches(tokens / "train.bin", settings.context, settings.batch, settings.seed)
    held_out = Batches(tokens / "held_out.bin", settings.context, settings.batch, 0)
    net = _build(settings, start)
    model = (
        DistilledModel(_build(settings, start), net, batches, settings)
        if settings.distill
        else LanguageModel(net, batches, settings)
    )
    sparsity = None
    if settings.rule != DENSE:
        sparsity = SparsityCallback(**callback_keywords(settings))
    checkpoint = folder / f"{settings.name}.ckpt"
    recorder = Recorder(
        model, sparsity, list(held_out.evenly(settings.held_out)), checkpoint, deadline, report
    )
    on_cuda = device.type == "cuda"
    with quiet():
        trainer = pl.Trainer(
            max_steps=settings.steps,
            accelerator="gpu" if on_cuda else "cpu",
            devices=[device.index or 0] if on_cuda else 1,
            precision=settings.precision,
            callbacks=[*([] if sparsity is None else [sparsity]), recorder],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, ckpt_path=checkpoint if checkpoint.exists() else None)
    if trainer.global_step < settings.steps:
        return None
    with atomic_write(folder / f"{settings.name}.pt") as file:
        weights = {"name": settings.name, "rule": settings.rule, "weights": net.state_dict()}
        torch.save(weights, file)
    progress = recorder.progress
    return Result(
        settings=settings,
        environment=describe_environment(device),
        curve=recorder.curve,
        parameters=recorder.parameters,
        density=1.0 if recorder.sparsifier is None else recorder.sparsifier.density,
        peak_memory=progress.peak_memory,
        wall_seconds=progress.wall_seconds,
        warmup_steps=progress.warmup_steps,
    )


def _build(settings: Settings, start: dict[str, Tensor] | None) -> GPT | Llama:
    net = build(
        settings.model,
        vocabulary=settings.vocabulary,
        width=settings.width,
        layers=settings.layers,
        heads=settings.heads,
        context=settings.context,
        mlp_width=settings.mlp_width,
    )
    if start is not None:
        try:
            net.load_state_dict(start)
        except RuntimeError as error:
            raise ValueError(
                "`--start` must be weights of the same model; got those of another. Give the "
                "options of the model with which they were trained, and the same data."
            ) from error
    return net
