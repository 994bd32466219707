"""`SparsityTrainerCallback`: drives a `Sparsifier` with Hugging Face's `Trainer`.

It makes no decisions of its own: it forwards the Trainer's events to the `Sparsifier`.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any
from weakref import ref

import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from sparse_lightning import ranks
from sparse_lightning.config import MonitorOptions, build_config
from sparse_lightning.export.files import write_checkpoint
from sparse_lightning.integrations.notices import TrainerSummary, describe_start, show, summarise
from sparse_lightning.integrations.reporters import report_options, report_summary
from sparse_lightning.kernels import measuring
from sparse_lightning.policy.schedules import Timetable
from sparse_lightning.policy.updates import ModelUpdate
from sparse_lightning.savings import weight_density_of
from sparse_lightning.selection import select_layers
from sparse_lightning.sparsifier import Sparsifier
from sparse_lightning.stepping import unwrap_optimizer
from sparse_lightning.swap_report import SparsityReport

_STATE_FILE = "sparsity.pt"


class SparsityTrainerCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Train a model's linear layers with dynamic block sparsity, in Transformers' `Trainer`.

    Pass it to `Trainer(callbacks=[...])`. It swaps the layers when the Trainer is created, before
    there is an optimizer; topology updates then run in the hooks of the optimizer. Each checkpoint
    gets a file `sparsity.pt`, and `train(resume_from_checkpoint=...)` resumes bit for bit. Another
    `train()` of the same model continues the schedule where it ended. The logs get
    `sparsity/density`, with `nm` also `sparsity/weight_density`, and at the end a summary. The
    active run of W&B gets the options and the summary, too, and so does TensorBoard at the end. The
    main process prints a line about layers and schedule when a training starts, and one with the
    summary when it has ended, unless Transformers' verbosity is that of errors. There is no history
    of the block masks, and hence no run page.

    If `model_init` builds the model, or the callback is added later, the layers are swapped when
    `train()` begins. On several ranks, and in order to resume, `model_init` must call `sparsify`
    itself. Memory does not shrink with the density on several ranks or with `torch_compile`, since
    the Trainer then keeps a wrapper of the model that depends on the shapes of its parameters.

    Args:
        options: keywords of `SparsityCallback`; `monitor` has no effect, except that None keeps
            options and summary from loggers. A warning names its keys that were set.

    Attributes:
        config: all options, validated.
        sparsifier: the `Sparsifier` that trains the layers, once the Trainer is created.
        summary: `TrainerSummary` of the latest training, once it has ended normally.

    Raises:
        ValueError, TypeError: if an argument is out of range, naming it. The Trainer's events raise
            them for setups that are not supported: FSDP, DeepSpeed, `DataParallel` and
            `enable_jit_checkpoint`.
        RuntimeError: when `train()` begins, if a layer would not train sparsely; when it resumes,
            if the checkpoint has no matching state.
    """

    def __init__(self, **options: Any) -> None:
        self.config = build_config(**options)
        self.sparsifier: Sparsifier | None = None
        self._optimizer: ref[Optimizer] | None = None
        self._training = False
        self.summary: TrainerSummary | None = None
        # Digest of the topology at the end of the last training, to which the optimizer's state
        # belongs.
        self._last_digest = ""
        _warn_of_monitor(self.config.monitor)

    @property
    def report(self) -> SparsityReport | None:
        """The swap report, or None before the swap."""
        return None if self.sparsifier is None else self.sparsifier.report

    @property
    def last_update(self) -> ModelUpdate | None:
        """The latest topology update, or None before the first."""
        return None if self.sparsifier is None else self.sparsifier.last_update

    @property
    def timetable(self) -> Timetable | None:
        """The resolved steps of the schedule, once training has started."""
        return None if self.sparsifier is None else self.sparsifier.timetable

    # Creating the Trainer. The layers must be swapped before it builds the optimizer.

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _check_arguments(args)
        if not self._manages(kwargs["model"]):
            self.sparsifier = Sparsifier(kwargs["model"], config=self.config)

    def _manages(self, model: nn.Module) -> bool:
        """Return whether the sparsifier's layers are those of a model."""
        if self.sparsifier is None or self.sparsifier.model is not model:
            return False
        modules = {id(module) for module in model.modules()}
        return all(id(layer) in modules for layer in self.sparsifier.layers.values())

    # Training. Steps and updates run in the hooks of the optimizer.

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _check_arguments(args)
        self._detach()  # The previous training may have been interrupted.
        self.summary = None
        sparsifier = self._sparsifier_for(kwargs["model"], state.global_step > 0)
        optimizer = unwrap_optimizer(kwargs["optimizer"])
        # If the training resumes, the Trainer has already loaded the model, optimizer and step.
        if state.global_step:
            sparsifier.load_state_dict(self._load_state(args, state, sparsifier))
        elif self._optimizer is None or self._optimizer() is not optimizer:
            sparsifier.reset_gathered()
        elif sparsifier.steps and self._last_digest != _topology_digest(sparsifier):
            raise RuntimeError(
                "The optimizer's state must belong to the model's blocks; got the state from the "
                "end of the previous training, and a model with other blocks, as after "
                "`load_best_model_at_end`. Set `trainer.optimizer = trainer.lr_scheduler = None` "
                "before another `train()`."
            )
        planned = _PlannedSteps(state, sparsifier.steps)
        sparsifier.total_steps = planned.total
        sparsifier.attach(
            optimizer,
            planned=planned,
            # The Trainer keeps DDP's buckets, or compiled code, for the original shapes.
            shrink=ranks.world_size() == 1 and not args.torch_compile,
        )
        try:
            sparsifier.check_all_held()
        except RuntimeError as error:
            sparsifier.detach()
            raise RuntimeError(
                f"{error} With transformers' Trainer, omit `optimizers`, or give an optimizer of "
                "all parameters of the model."
            ) from error
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        # Before the first step, which is not interrupted then.
        measuring.prepare(
            (layer.topology, dtype or layer.values.dtype) for layer in sparsifier.layers.values()
        )
        self._optimizer, self._training = ref(optimizer), True
        if state.is_world_process_zero:
            show(describe_start(sparsifier))

    def _sparsifier_for(self, model: nn.Module, resumed: bool) -> Sparsifier:
        """Return the sparsifier for a model that is about to train with an existing optimizer.

        The optimizer works with layers that are swapped only now, since they keep their parameters.
        DDP's buckets do not, since they depend on the shapes of parameters. In a training that
        resumes, the swap would discard the weights that the Trainer has loaded.

        Raises:
            RuntimeError: if layers would be swapped on several ranks or in a resumed training.
        """
        if self.sparsifier is not None and self._manages(model):
            return self.sparsifier
        dense = select_layers(model, self.config.swap_options)
        if dense.layers and (resumed or ranks.world_size() > 1):
            name = next(iter(dense.layers))
            when = "when a training is resumed" if resumed else "on several ranks"
            if self.sparsifier is None:
                raise RuntimeError(
                    f"`Trainer(callbacks=...)` must contain SparsityTrainerCallback {when}; got it "
                    f"by `add_callback`, and a dense layer (layer '{name}'). Pass it to "
                    "Trainer(callbacks=[...])."
                )
            raise RuntimeError(
                f"`model_init` must return block-sparse layers {when}; got a dense layer (layer "
                f"'{name}'). Call `sparsify` in it, with the same patterns and block size and the "
                "initial density, or pass the `model` itself to Trainer."
            )
        # Layers that are already block-sparse start a new schedule.
        self.sparsifier = Sparsifier(model, config=self.config)
        return self.sparsifier

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The reporters that follow this callback in the Trainer's list begin their runs after it.
        if state.is_world_process_zero and self.config.monitor is not None:
            report_options(self._logged_options())

    def _logged_options(self) -> dict[str, Any]:
        options = self.config.options().items()
        return {f"sparsity/{k}": v for k, v in options if k.partition(".")[0] != "monitor"}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.sparsifier is None or logs is None:
            return
        # The Trainer has already appended a copy of the logs to its history.
        entries = (logs, *state.log_history[-1:])
        share = weight_density_of(layer.topology for layer in self.sparsifier.layers.values())
        for entry in entries:
            entry["sparsity/density"] = self.sparsifier.density
            if share is not None:
                entry["sparsity/weight_density"] = share
        # The Trainer logs "total_flos" after the last step, and may then load the best model, whose
        # layers may have more slots. An attached sparsifier's layers cannot change their capacity.
        if "total_flos" in logs:
            if self._training:
                optimizer = None if self._optimizer is None else self._optimizer()
                held = [] if optimizer is None else [optimizer]
                self.summary = summarise(self.sparsifier, held)
                if self.config.monitor is not None:
                    for entry in entries:
                        entry.update(_logged(self.summary))
            self._detach()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._detach()
        if self.summary is None or not state.is_world_process_zero:
            return
        show(f"{self.summary}")
        if self.config.monitor is not None:
            report_summary(
                Path(args.output_dir or "."),
                self._logged_options(),
                _logged(self.summary),
                state.global_step,
            )

    def _detach(self) -> None:
        if self.sparsifier is not None and self._training:
            self._last_digest, self._training = _topology_digest(self.sparsifier), False
            self.sparsifier.detach()

    # Save and resume.

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Callbacks cannot know the folders of hyperparameter search trials.
        if self.sparsifier is None or not args.should_save or state.is_hyper_param_search:
            return
        saved = {
            **self.sparsifier.state_dict(),
            "global_step": state.global_step,
            "blocks": _topology_digest(self.sparsifier),
        }
        write_checkpoint(_checkpoint_folder(args, state) / _STATE_FILE, saved, force=True)

    def _load_state(
        self, args: TrainingArguments, state: TrainerState, sparsifier: Sparsifier
    ) -> dict[str, Any]:
        """Return the state that `on_save` wrote to the checkpoint that the Trainer has loaded.

        Callbacks do not receive the checkpoint's path, so the state has a digest of its blocks.

        Raises:
            RuntimeError: if no state with the model's blocks is found.
        """
        digest, others = _topology_digest(sparsifier), []
        for folder in _candidate_folders(args, state):
            file = folder / _STATE_FILE
            if not file.is_file():
                continue
            saved: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
            if (saved.get("global_step"), saved.get("blocks")) == (state.global_step, digest):
                return saved
            others.append(folder)
        searched = " and ".join(f"'{folder}'" for folder in _candidate_folders(args, state))
        got = "one with other blocks or another step in" if others else "none in"
        raise RuntimeError(
            f"A checkpoint to resume from must have a {_STATE_FILE} that belongs to its blocks, so "
            f"that their schedule can continue; got {got} {searched}. For a checkpoint outside of "
            "`output_dir`, set `TrainingArguments(resume_from_checkpoint=...)` to its folder. If "
            "it has no such file, load its weights into a model after `sparsify`, and start a new "
            "training."
        )


class _PlannedSteps:
    """Predicts how many steps an optimizer will have taken when the training ends.

    The Trainer also counts steps that a GradScaler skips or that have no gradient. They reduce the
    number of steps that the optimizer takes.

    Args:
        state: state of the Trainer, which keeps it up to date.
        steps: steps that the optimizer has taken so far.
    """

    def __init__(self, state: TrainerState, steps: int) -> None:
        self.state = state
        # The Trainer counts from zero again in another training of the same model.
        self.before = max(0, steps - state.global_step)
        self.total = state.max_steps + self.before

    def __call__(self, optimizer: Optimizer, steps: int) -> int:
        lost = self.before + self.state.global_step + 1 - steps
        return max(steps, self.total - max(0, lost))


def _logged(summary: TrainerSummary) -> dict[str, float]:
    """Return a summary under the keys of Lightning's callback."""
    return {f"sparsity/summary/{name}": value for name, value in summary.scalars().items()}


def _warn_of_monitor(monitor: MonitorOptions | None) -> None:
    """Warn of options for Lightning's loggers and history that were set and have no effect."""
    if monitor is None:
        return
    default = MonitorOptions()
    names = [each.name for each in fields(MonitorOptions)]
    changed = [
        f"monitor.{name}={getattr(monitor, name)!r}"
        for name in names
        if getattr(monitor, name) != getattr(default, name)
    ]
    if changed and ranks.is_rank_zero():
        warnings.warn(
            f"`monitor` has no effect with Transformers' Trainer, except for None; got "
            f"{', '.join(changed)}. The Trainer's logs have the density and a summary; scalars of "
            "layers, pictures of masks and the run page need Lightning's SparsityCallback.",
            stacklevel=3,
        )


def _check_arguments(args: TrainingArguments) -> None:
    """Raise ValueError for options that would split blocks, copy layers or drop their state."""
    kind = AcceleratorState().distributed_type.name
    sharded = {
        "FSDP": bool(args.fsdp) or kind == "FSDP",
        "DeepSpeed": bool(args.deepspeed) or kind == "DEEPSPEED",
        "Megatron-LM": kind == "MEGATRON_LM",
    }
    for name, is_used in sharded.items():
        if is_used:
            raise ValueError(
                f"`Trainer` must keep blocks whole; got {name}. Use DDP, or fully_shard under "
                "Lightning's ModelParallelStrategy."
            )
    if args.n_gpu > 1:
        raise ValueError(
            "`Trainer` must have one process for each GPU, as DataParallel copies layers in every "
            f"step; got {args.n_gpu} GPUs in this one. Launch it with `torchrun`, or restrict it "
            "to one GPU with CUDA_VISIBLE_DEVICES."
        )
    if getattr(args, "enable_jit_checkpoint", False):
        raise ValueError(
            "`enable_jit_checkpoint` must be False, as callbacks cannot add the sparsity's state "
            "to checkpoints that are written within a step; got True. Use `save_steps`."
        )


def _checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _candidate_folders(args: TrainingArguments, state: TrainerState) -> Iterator[Path]:
    """Yield the folders that may hold the loaded checkpoint."""
    if args.resume_from_checkpoint:
        yield Path(args.resume_from_checkpoint)
    yield _checkpoint_folder(args, state)


def _topology_digest(sparsifier: Sparsifier) -> str:
    """Return a hash of the present blocks and their slots."""
    digest = hashlib.sha256()
    for layer in sparsifier.layers.values():
        digest.update(layer.topology.to_state().cpu().numpy().tobytes())
    return digest.hexdigest()
