"""`SparsityTrainerCallback`: drives a `Sparsifier` with Hugging Face's `Trainer`.

Nothing is decided here: the Trainer's events call the engine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
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
from sparse_lightning.config import configured
from sparse_lightning.export.files import write_checkpoint
from sparse_lightning.patching import SparsityReport
from sparse_lightning.selection import select_layers
from sparse_lightning.sparsifier import Sparsifier
from sparse_lightning.stepping import innermost

STATE_FILE = "sparsity.pt"


class SparsityTrainerCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Train a model's linear layers with dynamic block sparsity, in transformers' `Trainer`.

    Give it to `Trainer(callbacks=[...])`. It swaps the layers when the Trainer is made, before
    there is an optimizer; updates then run by themselves at the optimizer's steps. Each checkpoint
    gets a file `sparsity.pt`, and `train(resume_from_checkpoint=...)` goes on bit for bit. Another
    `train()` of the same model goes on with the schedule where it ended.

    Where `model_init` builds the model, or the callback is added later, the layers are swapped when
    `train()` begins; on several ranks, and to resume, `model_init` has to call `sparsify`. The logs
    get `sparsity/density`. On several ranks, and with `torch_compile`,
    memory does not follow the density, as the Trainer keeps its wrappers of the model.

    Args:
        options: the keywords of `SparsityCallback`; `monitor` means nothing here.

    Attributes:
        config: all of this, checked.
        sparsifier: the `Sparsifier` that does the work, once the Trainer is made.

    Raises:
        ValueError, TypeError: for an argument out of range, naming it. By the Trainer's events also
            for what cannot work: FSDP, DeepSpeed, `DataParallel` and `enable_jit_checkpoint`.
        RuntimeError: when `train()` begins and a layer would not train sparsely; when it is resumed
            and the state is not to be found.
    """

    def __init__(self, **options: Any) -> None:
        self.config = configured(options)
        self.sparsifier: Sparsifier | None = None
        self._optimizer: ref[Optimizer] | None = None
        self._training = False
        # Which blocks the optimizer's state was of when the last training ended.
        self._blocks = ""

    @property
    def report(self) -> SparsityReport | None:
        """What the swap has done, or None before it."""
        return None if self.sparsifier is None else self.sparsifier.report

    # The Trainer is made: the layers must be in place before it builds the optimizer.

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _check_arguments(args)
        if not self._follows(kwargs["model"]):
            self.sparsifier = Sparsifier(kwargs["model"], config=self.config)

    def _follows(self, model: nn.Module) -> bool:
        """Tell whether the layers that it evolves are those of a model."""
        if self.sparsifier is None or self.sparsifier.model is not model:
            return False
        modules = {id(module) for module in model.modules()}
        return all(id(layer) in modules for layer in self.sparsifier.layers.values())

    # A training. Steps and updates run by themselves, in the hooks of the optimizer.

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _check_arguments(args)
        self._let_go()  # of a training that was cut off
        sparsifier = self._of_training(kwargs["model"], state.global_step > 0)
        optimizer = innermost(kwargs["optimizer"])
        # The Trainer has loaded the model and the optimizer before, and so it knows the step.
        if state.global_step:
            sparsifier.load_state_dict(self._saved(args, state, sparsifier))
        elif self._optimizer is None or self._optimizer() is not optimizer:
            sparsifier.forget_gathered()
        elif sparsifier.steps and self._blocks != _digest(sparsifier):
            raise RuntimeError(
                "The optimizer must belong to the model's blocks; got one whose state is of those "
                "at the end of the training before, and a model with others, as after "
                "`load_best_model_at_end`. Set `trainer.optimizer = trainer.lr_scheduler = None` "
                "before another `train()`."
            )
        planned = _StepsToCome(state, sparsifier.steps)
        sparsifier.total_steps = planned.total
        sparsifier.attach(
            optimizer,
            planned=planned,
            # The Trainer keeps the wrapper that holds buckets, or code, for the shapes that were.
            shrink=ranks.world_size() == 1 and not args.torch_compile,
        )
        try:
            sparsifier.check_all_held()
        except RuntimeError as error:
            sparsifier.detach()
            raise RuntimeError(
                f"{error} Under transformers' Trainer leave `optimizers` out, or give one of all "
                "parameters of the model."
            ) from error
        self._optimizer, self._training = ref(optimizer), True

    def _of_training(self, model: nn.Module, resumed: bool) -> Sparsifier:
        """Return the engine for the model that is about to be trained, with an optimizer by now.

        The optimizer goes on with layers that are only swapped here, since they keep their
        parameters. What is built for parameters of a shape, as DDP's buckets, does not; and what
        the Trainer has loaded into dense layers is lost.

        Raises:
            RuntimeError: if the model has dense layers then.
        """
        if self.sparsifier is not None and self._follows(model):
            return self.sparsifier
        config = self.config
        dense = select_layers(
            model, config.block_size, config.include, config.exclude, config.follow
        )
        if dense.layers and (resumed or ranks.world_size() > 1):
            name = next(iter(dense.layers))
            when = "when a training is resumed" if resumed else "on several ranks"
            if self.sparsifier is None:
                raise RuntimeError(
                    "`callbacks` must hold SparsityTrainerCallback as the Trainer is made, "
                    f"{when}; got it by `add_callback`, and a dense layer (layer '{name}'). Give "
                    "it to Trainer(callbacks=[...])."
                )
            raise RuntimeError(
                f"`model_init` must return block-sparse layers {when}; got a dense layer (layer "
                f"'{name}'). Call `sparsify` in it, with the same patterns and block size and the "
                "density to begin with, or give Trainer the `model` itself."
            )
        # Layers that are block-sparse already are taken over, with a new schedule.
        self.sparsifier = Sparsifier(model, config=config)
        return self.sparsifier

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
        # The history has its own copy of the logs by now.
        for entry in (logs, *state.log_history[-1:]):
            entry["sparsity/density"] = self.sparsifier.density
        # The sums of a training are logged after its last step. Then the Trainer may load the best
        # model, whose layers may have more slots than an optimizer that is attached could follow.
        if "total_flos" in logs:
            self._let_go()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._let_go()

    def _let_go(self) -> None:
        if self.sparsifier is not None and self._training:
            self._blocks, self._training = _digest(self.sparsifier), False
            self.sparsifier.detach()

    # Save and resume.

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The trials of a search have folders that callbacks are not told of.
        if self.sparsifier is None or not args.should_save or state.is_hyper_param_search:
            return
        saved = {
            **self.sparsifier.state_dict(),
            "global_step": state.global_step,
            "blocks": _digest(self.sparsifier),
        }
        write_checkpoint(_folder(args, state) / STATE_FILE, saved, force=True)

    def _saved(
        self, args: TrainingArguments, state: TrainerState, sparsifier: Sparsifier
    ) -> dict[str, Any]:
        """Return what `on_save` has written to the checkpoint that the Trainer has loaded.

        Callbacks are not told which one that is, so the state says to which blocks it belongs.

        Raises:
            RuntimeError: if no state belongs to the model.
        """
        blocks, others = _digest(sparsifier), []
        for folder in _folders(args, state):
            file = folder / STATE_FILE
            if not file.is_file():
                continue
            saved: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
            if (saved.get("global_step"), saved.get("blocks")) == (state.global_step, blocks):
                return saved
            others.append(folder)
        looked = " and ".join(f"'{folder}'" for folder in _folders(args, state))
        got = f"one of other blocks or another step in {looked}" if others else f"none in {looked}"
        raise RuntimeError(
            f"A checkpoint that is resumed must have a {STATE_FILE} that belongs to its blocks, so "
            f"that their schedule can go on; got {got}. For a checkpoint outside of `output_dir` "
            "set `TrainingArguments(resume_from_checkpoint=...)` to its folder. Of one that has no "
            "such file load the weights alone, into a model after `sparsify`, and start anew."
        )


class _StepsToCome:
    """Says how many steps an optimizer will have taken when a training ends.

    The Trainer counts a step that a GradScaler skips, or that had no gradient; these are lost of
    what was planned.

    Args:
        state: of the Trainer, which keeps it up to date.
        steps: that counted before.
    """

    def __init__(self, state: TrainerState, steps: int) -> None:
        self.state = state
        # Another training of the same model begins to count at zero.
        self.before = max(0, steps - state.global_step)
        self.total = state.max_steps + self.before

    def __call__(self, optimizer: Optimizer, steps: int) -> int:
        lost = self.before + self.state.global_step + 1 - steps
        return max(steps, self.total - max(0, lost))


def _check_arguments(args: TrainingArguments) -> None:
    """Raise ValueError for what would cut blocks, copy layers or leave out their state."""
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
            f"step; got {args.n_gpu} GPUs in this one. Start it by `torchrun`, or show it one GPU "
            "by CUDA_VISIBLE_DEVICES."
        )
    if getattr(args, "enable_jit_checkpoint", False):
        raise ValueError(
            "`enable_jit_checkpoint` must be False, as callbacks cannot add the state of the "
            "sparsity to its checkpoints, within a step; got True. Save by `save_steps`."
        )


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _folders(args: TrainingArguments, state: TrainerState) -> Iterator[Path]:
    """Yield where the checkpoint that was loaded may be."""
    if args.resume_from_checkpoint:
        yield Path(args.resume_from_checkpoint)
    yield _folder(args, state)


def _digest(sparsifier: Sparsifier) -> str:
    """Return a name of which blocks there are, and in which slots."""
    digest = hashlib.sha256()
    for layer in sparsifier.layers.values():
        digest.update(layer.topology.to_state().cpu().numpy().tobytes())
    return digest.hexdigest()
