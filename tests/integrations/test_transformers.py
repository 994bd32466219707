"""`SparsityTrainerCallback` in transformers' Trainer: training, resuming and errors."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from sparse_lightning import BlockSparseLinear, integrations, sparsify
from tests.integrations.helpers import (
    ACCUMULATE,
    BATCH,
    CLIP,
    RIGL,
    SGD,
    STEPS,
    Examples,
    Net,
    assert_same,
    outcome,
)

accelerate = pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from sparse_lightning.integrations import SparsityTrainerCallback  # noqa: E402


def arguments(folder: Path, **options: Any) -> Any:
    given = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATE,
        "max_grad_norm": CLIP,
        "learning_rate": SGD["lr"],
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "logging_steps": 5,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 7,
    }
    return transformers.TrainingArguments(**{**given, **options})


def trainer(folder: Path, model: nn.Module | None = None, *callbacks: Any, **options: Any) -> Any:
    trainer_options = {
        key: options.pop(key)
        for key in ("model_init", "optimizers", "train_dataset", "eval_dataset")
        if key in options
    }
    if "optimizers" not in trainer_options:
        trainer_options["optimizer_cls_and_kwargs"] = (torch.optim.SGD, SGD)
    trainer_options.setdefault("train_dataset", Examples())
    return transformers.Trainer(
        model=model, args=arguments(folder, **options), callbacks=list(callbacks), **trainer_options
    )


def dense(name: str) -> str:
    return rf"got .*dense.* \(layer '{name}'"


def sparse_net() -> Net:
    model = Net()
    sparsify(model, block_size=16, density=1.0, exclude=["head"])
    return model


# Training.


def test_density_and_memory_fall_and_are_logged(tmp_path: Path) -> None:
    class Reporter(transformers.TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            reported.append(kwargs["logs"]["sparsity/density"])

    sparsity, reported = SparsityTrainerCallback(**RIGL), []
    model = Net()
    training = trainer(tmp_path, model, sparsity, Reporter())
    assert isinstance(model.up, BlockSparseLinear) and type(model.head) is nn.Linear
    assert sparsity.report is not None and list(sparsity.report.layers) == ["up", "down"]
    training.train()
    engine = sparsity.sparsifier
    assert engine is not None and engine.steps == STEPS and engine.density == 0.25
    assert engine.timetable is not None and engine.timetable.density_until == STEPS * 3 // 4
    assert model.up.topology.capacity == model.up.topology.n_blocks
    logged = [entry["sparsity/density"] for entry in training.state.log_history]
    assert len(logged) == STEPS // 5 + 1 and logged == sorted(logged, reverse=True)
    assert logged[0] > logged[-1] == 0.25 and reported == logged
    # The optimizer has no hooks left, and the layers are unlocked.
    optimizer = training.optimizer.optimizer
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    assert not model.up._is_locked


def test_steps_without_gradients_reduce_the_planned_steps(tmp_path: Path) -> None:
    class NoGradientAtFirst(Net):
        calls = 0

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
            self.calls += 1
            if self.calls > 3 * ACCUMULATE:
                return super().forward(x, y)
            return {"loss": (self.head(x) - y).square().mean()}

    until_the_end = {**RIGL["density"], "until": 1.0}
    options = {**RIGL, "density": until_the_end, "update": {"every_n_steps": 3, "until": 1.0}}
    sparsity = SparsityTrainerCallback(**options)
    trainer(tmp_path, NoGradientAtFirst(), sparsity).train()
    engine = sparsity.sparsifier
    assert engine is not None and engine.steps == STEPS - 3 and engine.density == 0.25


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor"])
def test_the_trainers_own_optimizers(optim: str, tmp_path: Path) -> None:
    sparsity = SparsityTrainerCallback(**RIGL)
    training = transformers.Trainer(
        model=Net(),
        args=arguments(tmp_path, optim=optim),
        train_dataset=Examples(),
        callbacks=[sparsity],
    )
    training.train()
    assert sparsity.sparsifier is not None and sparsity.sparsifier.density == 0.25


def test_wrong_options_raise_immediately() -> None:
    with pytest.raises(ValueError, match="`block_size` must"):
        SparsityTrainerCallback(block_size=17)
    with pytest.raises(TypeError, match="dens"):
        SparsityTrainerCallback(dens=0.5)


# Saving and resuming.


def small_bert(_: Path) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        hidden_dropout_prob=0.1,
    )
    return transformers.BertForMaskedLM(config)


def tied_llama(_: Path) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)


def from_pretrained(folder: Path) -> nn.Module:
    small_bert(folder).save_pretrained(folder / "pretrained")
    return transformers.BertForMaskedLM.from_pretrained(folder / "pretrained")


class Texts(Examples):
    def __getitem__(self, number: int) -> dict[str, Any]:
        if number >= self.count:
            raise IndexError(number)
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(0, 32, (12,), generator=generator)
        return {"input_ids": tokens, "labels": tokens}


# Updates run every 3 steps; the cuts are before one, right after one, and after layers shrink.
@pytest.mark.parametrize(
    ("build", "cut"),
    [
        *((None, cut) for cut in (2, 3, 10, 18, 20)),
        *((small_bert, 3), (tied_llama, 20), (from_pretrained, 3)),
    ],
)
def test_resumed_bit_for_bit(build: Any, cut: int, tmp_path: Path) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return Net() if build is None else build(tmp_path)

    data = {} if build is None else {"train_dataset": Texts(), "eval_dataset": None}
    options = {**RIGL, "exclude": ["head", "lm_head", "decoder"]}
    saving = {"save_strategy": "steps", "save_steps": cut, **data}
    first = SparsityTrainerCallback(**options)
    whole = trainer(tmp_path, model(), first, **saving)
    whole.train()
    folder = tmp_path / f"checkpoint-{cut}"
    assert (folder / "sparsity.pt").is_file()
    assert not list(folder.glob("*.tmp*"))

    again = SparsityTrainerCallback(**options)
    rest = trainer(tmp_path, model(), again, **saving)
    rest.train(resume_from_checkpoint=str(folder))
    assert_same(outcome(whole.model), outcome(rest.model))
    engines = first.sparsifier, again.sparsifier
    assert engines[0] is not None and engines[1] is not None
    states = [engine.state_dict() for engine in engines if engine is not None]
    assert [s["n_updates"] for s in states] == [states[0]["n_updates"]] * 2
    assert [s["courses"][0]["steps"] for s in states] == [STEPS] * 2
    for name, born in states[0]["born"].items():
        assert torch.equal(born, states[1]["born"][name])
    topologies = [layer.topology for layer in engines[0].layers.values()]
    cells = sum(at.grid[0] * at.grid[1] for at in topologies)
    assert sum(at.capacity for at in topologies) < cells / 2  # The layers have shrunk.


@pytest.mark.parametrize("drop", ["saliency", "movement"])
def test_gathered_scores_are_resumed(drop: str, tmp_path: Path) -> None:
    options = {**RIGL, "drop": drop, "grow": "momentum"}
    saving = {"save_strategy": "steps", "save_steps": 5}
    whole = trainer(tmp_path, Net(), SparsityTrainerCallback(**options), **saving)
    whole.train()
    rest = trainer(tmp_path, Net(), SparsityTrainerCallback(**options), **saving)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert_same(outcome(whole.model), outcome(rest.model))


def test_the_arguments_may_name_a_checkpoint_in_another_folder(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 10}
    whole = trainer(tmp_path / "old", Net(), SparsityTrainerCallback(**RIGL), **saving)
    whole.train()
    folder = tmp_path / "old" / "checkpoint-10"

    lost = trainer(tmp_path / "new", Net(), SparsityTrainerCallback(**RIGL), **saving)
    with pytest.raises(RuntimeError, match=r"got none in .*new/checkpoint-10.*resume_from_checkp"):
        lost.train(resume_from_checkpoint=str(folder))

    rest = trainer(
        tmp_path / "new",
        Net(),
        SparsityTrainerCallback(**RIGL),
        resume_from_checkpoint=str(folder),
        **saving,
    )
    rest.train(resume_from_checkpoint=rest.args.resume_from_checkpoint)
    assert_same(outcome(whole.model), outcome(rest.model))
    # A folder of the same name may belong to another run.
    data = Examples(first=10_000)
    other = SparsityTrainerCallback(**RIGL)
    trainer(tmp_path / "new", Net(), other, train_dataset=data, **saving).train()
    lost = trainer(tmp_path / "new", Net(), SparsityTrainerCallback(**RIGL), **saving)
    with pytest.raises(RuntimeError, match="got one with other blocks or another step in"):
        lost.train(resume_from_checkpoint=str(folder))


def test_resuming_with_another_configuration_raises(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 10}
    trainer(tmp_path, Net(), SparsityTrainerCallback(**RIGL), **saving).train()
    other = SparsityTrainerCallback(**{**RIGL, "seed": 1})
    with pytest.raises(ValueError, match=r"got seed=1 \(was 0\)"):
        trainer(tmp_path, Net(), other).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-10")
        )


def test_resuming_without_the_state_file_raises(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 10}
    trainer(tmp_path, Net(), SparsityTrainerCallback(**RIGL), **saving).train()
    (tmp_path / "checkpoint-10" / "sparsity.pt").unlink()
    with pytest.raises(RuntimeError, match=r"must have a sparsity\.pt .* got none in"):
        trainer(tmp_path, Net(), SparsityTrainerCallback(**RIGL), **saving).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-10")
        )


def test_a_longer_training_does_not_move_updates(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 10}
    trainer(tmp_path, Net(), SparsityTrainerCallback(**RIGL), **saving).train()
    sparsity = SparsityTrainerCallback(**RIGL)
    data = Examples(2 * STEPS * ACCUMULATE)
    longer = trainer(tmp_path, Net(), sparsity, max_steps=STEPS + 6, train_dataset=data, **saving)
    longer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    engine = sparsity.sparsifier
    assert engine is not None and engine.steps == STEPS + 6
    resolved = sparsity.config.timetable(STEPS)
    assert engine.timetable == dataclasses.replace(resolved, total_steps=STEPS + 6)


def test_the_best_model_may_have_more_blocks(tmp_path: Path) -> None:
    class EarlyIsBest(transformers.TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kwargs["metrics"]["eval_late"] = abs(state.global_step - 6)

    sparsity, model = SparsityTrainerCallback(**RIGL), Net()
    training = trainer(
        tmp_path,
        model,
        sparsity,
        EarlyIsBest(),
        eval_dataset=Examples(1),
        eval_strategy="steps",
        eval_steps=6,
        save_strategy="steps",
        save_steps=6,
        load_best_model_at_end=True,
        metric_for_best_model="eval_late",
        greater_is_better=False,
    )
    training.train()
    engine = sparsity.sparsifier
    assert engine is not None and engine.density > 0.25
    assert training.state.best_global_step == 6
    # The optimizer's state belongs to the blocks at the end of the training.
    with pytest.raises(RuntimeError, match=r"trainer\.optimizer = trainer\.lr_sched"):
        training.train()
    # With a new optimizer the schedule continues; it has no updates left.
    training.optimizer = training.lr_scheduler = None
    with pytest.warns(UserWarning, match="where 0.250 was asked for"):
        training.train()
    assert engine.steps == 2 * STEPS


# Further trainings.


def test_another_training_continues_the_schedule(tmp_path: Path) -> None:
    sparsity, model = SparsityTrainerCallback(**RIGL), Net()
    training = trainer(tmp_path, model, sparsity)
    training.train()
    engine, updates = sparsity.sparsifier, []
    assert engine is not None
    engine.register_update_hook(lambda _, update: updates.append(update.step))
    training.train()
    assert sparsity.sparsifier is engine and engine.steps == 2 * STEPS and updates == []
    # So does another Trainer of the same model and callback, with a new optimizer.
    trainer(tmp_path, model, sparsity).train()
    assert sparsity.sparsifier is engine and engine.steps == 3 * STEPS
    # Another model starts a new schedule.
    trainer(tmp_path, Net(), sparsity).train()
    assert sparsity.sparsifier is not engine
    assert sparsity.sparsifier is not None and sparsity.sparsifier.steps == STEPS


class Interrupt(transformers.TrainerCallback):  # type: ignore[misc]
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 20:
            raise KeyboardInterrupt


def test_another_training_continues_after_an_interruption(tmp_path: Path) -> None:
    sparsity, interrupt = SparsityTrainerCallback(**RIGL), Interrupt()
    cut = trainer(tmp_path, Net(), sparsity, interrupt)
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    cut.remove_callback(interrupt)
    cut.train()
    assert sparsity.sparsifier is not None and sparsity.sparsifier.steps == 20 + STEPS


def test_resumed_after_an_interruption_in_the_same_process(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 4}
    whole = trainer(tmp_path / "whole", Net(), SparsityTrainerCallback(**RIGL), **saving)
    whole.train()
    sparsity, interrupt = SparsityTrainerCallback(**RIGL), Interrupt()
    cut = trainer(tmp_path / "cut", Net(), sparsity, interrupt, **saving)
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    cut.remove_callback(interrupt)
    assert sparsity.sparsifier is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparsity.sparsifier.detach()  # Attached layers cannot load another capacity.
    cut.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-8"))
    assert_same(outcome(whole.model), outcome(cut.model))


# Unsupported setups, and their alternatives.


def test_layers_that_are_swapped_late_train_like_others(tmp_path: Path) -> None:
    """Covers `model_init`, `add_callback`, and an optimizer that is built before the swap."""
    usual = trainer(tmp_path, Net(), SparsityTrainerCallback(**RIGL))
    usual.train()
    built = trainer(tmp_path, None, SparsityTrainerCallback(**RIGL), model_init=Net)
    added = trainer(tmp_path, Net())
    added.add_callback(SparsityTrainerCallback(**RIGL))
    for training in (built, added):
        training.train()
        assert_same(outcome(usual.model), outcome(training.model))

    outcomes = []
    for model in (Net(), sparse_net()):
        optimizers = (torch.optim.SGD(model.parameters(), **SGD), None)
        training = trainer(tmp_path, model, SparsityTrainerCallback(**RIGL), optimizers=optimizers)
        training.train()
        outcomes.append(outcome(model))
    assert_same(*outcomes)


def test_dense_layers_in_a_resumed_training_raise(tmp_path: Path) -> None:
    class LikePretrained(Net):
        _keys_to_ignore_on_save = None  # The Trainer then only warns about keys it cannot load.

    saving = {"save_strategy": "steps", "save_steps": 4}
    sparsity = SparsityTrainerCallback(**RIGL)
    trainer(tmp_path, None, sparsity, model_init=LikePretrained, **saving).train()
    again = trainer(tmp_path, None, SparsityTrainerCallback(**RIGL), model_init=LikePretrained)
    with pytest.raises(RuntimeError, match=dense("up") + ".*Call `sparsify` in it"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


def test_model_init_that_calls_sparsify_starts_a_new_schedule(tmp_path: Path) -> None:
    sparsity = SparsityTrainerCallback(**RIGL)
    training = trainer(tmp_path, None, sparsity, model_init=sparse_net)
    training.train()
    engine, first = sparsity.sparsifier, outcome(training.model)
    assert engine is not None and engine.model is training.model and engine.density == 0.25
    training.train()
    assert sparsity.sparsifier is not engine
    assert_same(first, outcome(training.model))


@pytest.mark.parametrize(
    ("given", "launched", "message"),
    [
        ({"fsdp": True}, "NO", "got FSDP. Use DDP"),
        ({"deepspeed": {"zero_optimization": {"stage": 1}}}, "NO", "got DeepSpeed. Use DDP"),
        # Set by `accelerate launch`, which the arguments do not show.
        ({}, "FSDP", "got FSDP. Use DDP"),
        ({}, "DEEPSPEED", "got DeepSpeed. Use DDP"),
        ({}, "MEGATRON_LM", "got Megatron-LM. Use DDP"),
        ({"n_gpu": 2}, "NO", "one process for each GPU.*got 2 GPUs"),
        ({"enable_jit_checkpoint": True}, "NO", "`enable_jit_checkpoint` must be False"),
    ],
)
def test_setups_that_split_blocks_or_copy_layers_raise(
    given: dict[str, Any], launched: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = SimpleNamespace(distributed_type=accelerate.DistributedType[launched])
    module = "sparse_lightning.integrations.transformers"
    monkeypatch.setattr(sys.modules[module], "AcceleratorState", lambda: kind)
    args = SimpleNamespace(
        **{"fsdp": None, "deepspeed": None, "n_gpu": 1, "enable_jit_checkpoint": False, **given}
    )
    model = Net()
    with pytest.raises(ValueError, match=message):
        SparsityTrainerCallback().on_init_end(args, None, None, model=model)
    assert type(model.up) is nn.Linear


# Importing.


@pytest.mark.parametrize("package", ["transformers", "accelerate"])
def test_a_missing_package_raises_with_an_install_command(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "sparse_lightning.integrations.transformers")
    for name in [*sys.modules]:
        if name.split(".")[0] == package:
            monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=f"{package} is not installed. Run `pip install"):
        integrations.SparsityTrainerCallback  # noqa: B018


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="SparsityTrainerCalback"):
        integrations.SparsityTrainerCalback  # noqa: B018
