"""SparsityCallback in a real Trainer: swap, schedule, scores, and refused setups."""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
import pytest
import torch
import torch._dynamo.testing
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from sparse_lightning import BlockSparseLinear, SparsityCallback, sparsify
from sparse_lightning.policy.updates import ModelUpdate
from tests.callbacks.helpers import Classifier, Late, RecordScores, loader, trainer


class Record(L.Callback):
    """Records every update and the number of blocks after every step; listed after the callback."""

    def __init__(self, sparsity: SparsityCallback) -> None:
        self.sparsity = sparsity
        self.updates: list[ModelUpdate] = []
        self.blocks: list[int] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        last = self.sparsity.last_update
        if last is not None and (not self.updates or self.updates[-1] is not last):
            self.updates.append(last)
        self.blocks.append(sum(n.topology.n_blocks for n in sparse(pl_module).values()))


def sparse(model: nn.Module) -> dict[str, BlockSparseLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, BlockSparseLinear)}


def fit(
    sparsity: SparsityCallback, model: L.LightningModule | None = None, **kwargs: Any
) -> tuple[Any, Record]:
    record = Record(sparsity)
    model = model or Classifier()
    trainer(sparsity, record, **kwargs).fit(model, loader())
    return model, record


def test_layers_are_swapped_before_the_optimizer_and_train() -> None:
    sparsity = SparsityCallback(block_size=16, update={"every_n_steps": 5})
    model, record = fit(sparsity, max_steps=60)
    assert list(sparse(model)) == ["net.0", "net.2"]
    assert type(model.head) is nn.Linear
    assert sum(model.losses[-8:]) < 0.7 * sum(model.losses[:8])
    assert [u.step for u in record.updates] == [5, 10, 15, 20, 25, 30, 35, 40, 45]
    assert sum(len(u.grown) for m in record.updates for u in m.layers.values()) > 0


@pytest.mark.parametrize("first", [False, True])
def test_an_update_is_over_before_callbacks_see_the_end_of_a_batch(first: bool) -> None:
    """This includes callbacks that are listed before SparsityCallback."""
    seen: list[tuple[int, int]] = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            last = sparsity.last_update
            if last is not None and last.step == trainer.global_step:
                blocks = sum(layer.topology.n_blocks for layer in sparse(pl_module).values())
                seen.append((last.step, blocks))

    sparsity = SparsityCallback(
        block_size=16,
        density={"schedule": "linear", "initial": 1.0, "final": 0.25, "until": 0.5},
        update={"every_n_steps": 4},
    )
    callbacks = (Look(), sparsity) if first else (sparsity, Look())
    trainer(*callbacks).fit(Classifier(), loader())
    assert seen == [(4, 48), (8, 32), (12, 16), (16, 16), (18, 16)]


def test_after_a_fit_nothing_is_locked_or_hooked() -> None:
    sparsity, model = SparsityCallback(block_size=16, update={"every_n_steps": 4}), Classifier()
    fitting = trainer(sparsity, max_steps=7)  # the next step has an update: layers are armed
    locked: list[bool] = []

    class Look(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            locked.extend(layer._is_locked for layer in sparse(model).values())

    fitting.callbacks.append(Look())  # type: ignore[attr-defined]
    fitting.fit(model, loader())
    assert len(locked) == 14 and all(locked)
    for layer in sparse(model).values():
        assert not layer._is_locked and not layer.armed
        assert not layer.values._backward_hooks and not layer.block_norms._backward_hooks
    (optimizer,) = fitting.optimizers
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("stop", [7, 24])
def test_a_density_that_is_not_reached_warns_once(stop: int) -> None:
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step >= stop

    sparsity = SparsityCallback(
        block_size=16,
        density={"schedule": "linear", "initial": 1.0, "final": 0.25, "until": 0.5},
        update={"every_n_steps": 3},
    )
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        trainer(sparsity, Stop(), min_epochs=0).fit(Classifier(), loader(24))
    messages = [str(w.message) for w in warned if "The training has ended" in str(w.message)]
    if stop == 24:
        assert not messages
    else:
        (text,) = messages
        assert "at density 0.625, where 0.250 was asked for" in text
        assert text.endswith(": 7 steps were taken, where the schedule takes 12.")


def test_report_is_shown_once_and_kept(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    sparsity = SparsityCallback(block_size=16)
    model, _ = fit(sparsity, max_steps=2)
    assert "Block-sparse layers: 2; linear layers left dense: 1; density 0.250" in caplog.text
    assert list(sparsity.report.layers) == ["net.0", "net.2"]
    assert sparsity.report.skipped == {"head": "excluded"}
    caplog.clear()
    trainer(sparsity, max_steps=2).fit(model, loader())
    assert "Block-sparse layers" not in caplog.text


def test_layers_predicted_slower_than_dense_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = []

    def predicted(layer: BlockSparseLinear, density: float, dtype: torch.dtype) -> float:
        requests.append((density, dtype))
        return 0.9 if layer.in_features == 128 else 1.5

    monkeypatch.setattr(BlockSparseLinear, "predicted_speedup", predicted)
    sparsity = SparsityCallback(block_size=16, density={"schedule": "cubic", "final": 0.25})
    with pytest.warns(UserWarning, match=r"predicted to be slower than dense") as warnings:
        fit(sparsity, max_steps=2, precision="bf16-mixed")
    (message,) = [str(w.message) for w in warnings if "slower than dense" in str(w.message)]
    assert "net.2: 0.90 of dense at density 0.25" in message
    assert message.count("of dense at density") == 1
    assert {dtype for _, dtype in requests} == {torch.bfloat16}


@pytest.mark.parametrize("until", [0.5, 0.4, 13])
def test_cubic_density_arrives_exactly_and_stays(until: float) -> None:
    sparsity = SparsityCallback(
        block_size=16,
        density={"schedule": "cubic", "initial": 1.0, "final": 0.25, "until": until},
        distribution="erdos_renyi",
        update={"every_n_steps": 4, "until": 0.6},
        shrink=False,
    )
    model, record = fit(sparsity, max_steps=25)
    assert record.blocks[0] == 64, "the first density is the initial one"
    assert record.blocks == sorted(record.blocks, reverse=True)
    assert record.blocks[-1] == 16
    assert record.updates[-1].step == 15, "0.6 of 25 steps, though not a multiple of 4"
    for layer in sparse(model).values():
        empty = layer.topology.coords[:, 0] < 0
        assert layer.topology.capacity == 32 and empty.any()
        assert not layer.values[empty].any()


def test_a_step_is_an_optimizer_step_under_accumulation() -> None:
    sparsity = SparsityCallback(block_size=16, update={"every_n_steps": 2, "until": 1.0})
    _, record = fit(sparsity, max_steps=8, accumulate_grad_batches=3)
    assert [u.step for u in record.updates] == [2, 4, 6, 8]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_gradient_scores_are_those_of_the_dense_gradient(accumulate: int) -> None:
    """They are compared with autograd on the dense model, at the weights of the step."""
    expected: dict[str, torch.Tensor] = {}

    class Spy(RecordScores):
        def on_train_batch_start(
            self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int
        ) -> None:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            if pl_module.net[0].armed:
                number = trainer.fit_loop.epoch_loop.total_batch_idx
                for name, score in dense_scores(pl_module, number).items():
                    expected[name] = expected.get(name, 0) + score / accumulate**2

    sparsity = Spy(update={"every_n_steps": 3, "until": 3})
    fit(sparsity, max_steps=3, accumulate_grad_batches=accumulate)
    (scored,) = sparsity.seen
    seen = {name: scores.gradient.square() for name, scores in scored.items()}
    assert set(seen) == set(expected) == {"net.0", "net.2"}
    for name, scores in seen.items():
        assert (scores > 0).sum() > 8, "absent blocks have scores too"
        torch.testing.assert_close(scores, expected[name], rtol=1e-4, atol=1e-9)


def dense_scores(model: Any, number: int) -> dict[str, torch.Tensor]:
    """Return the squared block norms of the dense gradient."""
    x, y = model.batch(number)
    first, second = model.net[0], model.net[2]
    weights = [layer.dense_weight().requires_grad_() for layer in (first, second)]
    with torch.enable_grad():
        hidden = nn.functional.linear(x, weights[0], first.bias).relu()
        hidden = nn.functional.linear(hidden, weights[1], second.bias).relu()
        loss = nn.functional.cross_entropy(model.head(hidden), y)
        grads = torch.autograd.grad(loss, weights)
    return {
        name: g.view(g.shape[0] // 16, 16, g.shape[1] // 16, 16).square().sum((1, 3))
        for name, g in zip(("net.0", "net.2"), grads, strict=True)
    }


def test_random_growth_is_reproducible_and_follows_the_seed() -> None:
    def masks(seed: int) -> list[list[bool]]:
        model, _ = fit(
            SparsityCallback(block_size=16, grow="random", seed=seed, update={"every_n_steps": 4}),
            Classifier(),
        )
        return [layer.topology.mask.flatten().tolist() for layer in sparse(model).values()]

    assert masks(1) == masks(1)
    assert masks(1) != masks(2)


def test_without_growth_and_at_constant_density_nothing_moves() -> None:
    _, record = fit(SparsityCallback(block_size=16, grow="none", update={"every_n_steps": 4}))
    assert len(record.updates) == 5
    assert not any(len(u.changed) for m in record.updates for u in m.layers.values())


def test_scores_are_gathered_only_for_an_update() -> None:
    armed: list[bool] = []

    class Look(L.Callback):
        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            armed.append(bool(pl_module.net[0].armed))

    sparsity = SparsityCallback(block_size=16, update={"every_n_steps": 4, "until": 1.0})
    model = Classifier()
    trainer(sparsity, Look(), max_steps=8).fit(model, loader())
    assert armed == [False, False, False, True] * 2
    assert not model.net[0].armed and model.net[0].block_norms.grad is None


def test_models_built_in_configure_model() -> None:
    model = Late()
    fit(SparsityCallback(block_size=16, update={"every_n_steps": 5}), model)
    assert list(sparse(model)) == ["net.0", "net.2"]
    assert "configure_model" not in vars(model)


def test_fit_then_validate_then_fit_again() -> None:
    sparsity = SparsityCallback(
        block_size=16,
        density={"schedule": "cubic", "initial": 1.0, "final": 0.25},
        update={"every_n_steps": 4},
    )
    model = Classifier()
    trainer(sparsity).fit(model, loader())
    layers = sparse(model)
    assert len(layers) == 2
    trainer(sparsity).validate(model, loader(2), verbose=False)
    assert sparse(model) == layers
    assert all(layer.density == 0.25 for layer in layers.values())
    trainer(sparsity, max_steps=30).fit(model, loader())
    assert all(layer.density == 0.25 for layer in layers.values())


def test_layers_built_by_the_user_are_adopted() -> None:
    model = Classifier()
    model.net[0] = BlockSparseLinear(64, 128, block_size=32, density=0.25)
    fit(SparsityCallback(block_size=16, update={"every_n_steps": 5}), model)
    assert [layer.block_size for layer in sparse(model).values()] == [32, 16]


def test_nan_scores_change_nothing_and_do_not_crash() -> None:
    class Broken(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return super().training_step(batch, batch_idx) * float("nan")

    sparsity, model = SparsityCallback(block_size=16, update={"every_n_steps": 4}), Broken()
    sparsify(model, block_size=16)
    masks = {name: layer.topology.mask for name, layer in sparse(model).items()}
    with pytest.warns(UserWarning, match=r"at step 4.*not finite: net\.0, net\.2\.") as warnings:
        _, record = fit(sparsity, model, max_steps=8)
    assert sum("not scored" in str(w.message) for w in warnings) == 1
    # The updates change nothing, and the density is as configured.
    assert [len(u.changed) for m in record.updates for u in m.layers.values()] == [0, 0]
    assert record.blocks == [16] * 8
    for name, layer in sparse(model).items():
        assert torch.equal(layer.topology.mask, masks[name])


def test_bf16_mixed_trains() -> None:
    model, record = fit(
        SparsityCallback(block_size=16, update={"every_n_steps": 5}),
        precision="bf16-mixed",
        max_steps=60,
    )
    assert model.net[0].values.dtype == torch.float32
    assert sum(model.losses[-8:]) < 0.7 * sum(model.losses[:8])
    assert len(record.updates) == 9


@pytest.mark.parametrize("fused", [False, True])
def test_16_mixed_does_not_count_skipped_steps(fused: bool) -> None:
    """The initial scale makes the first steps overflow, so that they are skipped."""

    def optimizer(parameters: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=lr, fused=fused)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=10_000)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    sparsity = SparsityCallback(block_size=16, update={"every_n_steps": 4, "until": 12})
    model, record = fit(sparsity, Classifier(optimizer=optimizer), plugins=[plugin], max_steps=90)
    skipped = round(torch.tensor(2.0**30 / scaler.get_scale()).log2().item())
    assert 0 < skipped < 40, "the test needs skipped steps and other steps"
    assert sparsity.sparsifier is not None and sparsity.sparsifier.steps == 90 - skipped
    assert [u.step for u in record.updates] == [4, 8, 12]
    for layer in sparse(model).values():
        assert layer.values.isfinite().all()
    assert sum(model.losses[-8:]) < 0.8 * sum(model.losses[:8])


def test_grown_blocks_start_at_zero_with_fresh_optimizer_state() -> None:
    class Look(L.Callback):
        checked = 0

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            last = sparsity.last_update
            if last is None or last.step != trainer.global_step:
                return
            for name, update in last.layers.items():
                layer = pl_module.get_submodule(name)
                state = trainer.optimizers[0].state[layer.values]
                for tensor in (layer.values, state["exp_avg"], state["exp_avg_sq"]):
                    assert not tensor[update.grown].any()
                    kept = torch.ones(layer.topology.capacity, dtype=torch.bool)
                    kept[update.changed] = False
                    assert tensor[kept].any()
                self.checked += len(update.grown)

    sparsity = SparsityCallback(block_size=16, update={"every_n_steps": 4})
    look = Look()
    trainer(sparsity, look).fit(Classifier(), loader())
    assert look.checked > 0


def test_grown_blocks_do_not_jump() -> None:
    """The first updates of a grown block do not exceed the learning rate (without weight decay)."""
    lr = 1e-2
    largest: list[float] = []

    class Moves(L.Callback):
        before: dict[str, torch.Tensor] = {}  # noqa: RUF012

        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            self.before = {n: m.values.detach().clone() for n, m in sparse(pl_module).items()}

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            last = sparsity.last_update
            if (
                last is None or last.step == trainer.global_step
            ):  # after an update blocks have moved
                return
            for name, update in last.layers.items():
                moved = (sparse(pl_module)[name].values.detach() - self.before[name]).abs()
                largest.append(moved[update.grown].max().item() if len(update.grown) else 0.0)

    def optimizer(parameters: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)

    sparsity = SparsityCallback(
        block_size=16,
        update={"every_n_steps": 50, "until": 100},
        drop_fraction={"schedule": "cosine", "initial": 0.3},
    )
    trainer(sparsity, Moves(), max_steps=103).fit(Classifier(lr, optimizer), loader())
    assert 0.1 * lr < max(largest) <= 1.1 * lr


class Averages(L.Callback):
    """Compares the averaging callback's weights with a dense average, block by block."""

    def __init__(self, sparsity: SparsityCallback, ema: EMAWeightAveraging, decay: float) -> None:
        self.sparsity, self.ema, self.decay = sparsity, ema, decay
        self.average: dict[str, torch.Tensor] = {}
        self.masks: dict[str, torch.Tensor] = {}
        self.moved = 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        for name, layer in sparse(pl_module).items():
            mask, weight = layer.topology.mask, layer.dense_weight()
            if name not in self.average:
                self.average[name] = weight.clone()
            else:
                self.moved += int((mask ^ self.masks[name]).sum())
                kept = (mask & self.masks[name]).repeat_interleave(16, 0).repeat_interleave(16, 1)
                self.average[name] *= kept
                self.average[name].lerp_(weight, 1 - self.decay)
            self.masks[name] = mask
            copy = self.ema._average_model.module.get_submodule(name)
            assert torch.equal(copy.topology.mask, mask)
            torch.testing.assert_close(copy.dense_weight(), self.average[name])


def test_ema_keeps_averages_at_the_right_coordinates() -> None:
    sparsity = SparsityCallback(block_size=16, update={"every_n_steps": 4})
    ema = EMAWeightAveraging(decay=0.9)
    check = Averages(sparsity, ema, decay=0.9)
    trainer(sparsity, ema, check).fit(Classifier(), loader())
    assert check.moved > 0


def test_swa_copy_follows() -> None:
    sparsity = SparsityCallback(block_size=16, update={"every_n_steps": 4, "until": 1.0})
    swa = StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1, annealing_epochs=1)
    model = Classifier()
    trainer(sparsity, swa, max_steps=-1, max_epochs=4).fit(model, loader())
    assert sparsity.last_update is not None
    for name, layer in sparse(model).items():
        copy = swa._average_model.get_submodule(name)
        assert torch.equal(copy.topology.coords, layer.topology.coords)


@pytest.mark.parametrize(
    "averaging",
    [
        lambda: EMAWeightAveraging(),
        lambda: StochasticWeightAveraging(swa_lrs=1e-2),
    ],
)
def test_averaging_before_the_callback_is_refused(averaging: Any) -> None:
    callback = averaging()
    with pytest.raises(ValueError, match=f"got it after {type(callback).__name__}. Put it first"):
        trainer(callback, SparsityCallback(block_size=16)).fit(Classifier(), loader())


def test_an_optimizer_that_cannot_follow_is_refused_by_name() -> None:
    model = Classifier(optimizer=torch.optim.LBFGS)
    with pytest.raises(ValueError, match=r"got .*LBFGS\. It keeps .*\(layer '"):
        trainer(SparsityCallback(block_size=16)).fit(model, loader())


def test_layers_that_no_optimizer_holds_are_refused() -> None:
    class TrainsHeadOnly(Classifier):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.head.parameters(), lr=0.1)

    with pytest.raises(RuntimeError, match=r"`values` must be in an optimizer.*layer 'net.0'"):
        trainer(SparsityCallback(block_size=16)).fit(TrainsHeadOnly(), loader())


def set_up_optimizers(trainer: L.Trainer, model: L.LightningModule) -> None:
    trainer.strategy.setup_optimizers(trainer)


def assign_optimizers(trainer: L.Trainer, model: L.LightningModule) -> None:
    trainer.optimizers = [torch.optim.SGD(model.parameters(), lr=0.1)]


@pytest.mark.parametrize("replace", [set_up_optimizers, assign_optimizers])
@pytest.mark.parametrize("density", [0.25, {"schedule": "cubic", "final": 0.25}])
def test_a_training_continues_with_replaced_optimizers(
    density: Any, replace: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """SGD has no state, so replacing it changes nothing."""

    class ReplacesOptimizers(Classifier):
        def on_train_epoch_start(self) -> None:
            if self.should_replace and self.current_epoch in (1, 2):
                replace(self.trainer, self)

    models, found = [], []
    caplog.set_level("INFO")
    for should_replace in (False, True):
        sparsity = SparsityCallback(block_size=16, density=density, update={"every_n_steps": 5})
        model = ReplacesOptimizers(lr=0.1, optimizer=torch.optim.SGD)
        model.should_replace = should_replace
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            _, record = fit(sparsity, model, max_steps=-1, max_epochs=3)
        messages = [str(w.message) for w in warned if "lock-sparse" in str(w.message)]
        assert not messages, messages
        models.append(model)
        engine = sparsity.sparsifier
        assert engine is not None and not engine.is_attached and not sparsity._optimizers
        found.append((engine.steps, engine.n_updates, record.blocks, model.losses))
    assert found[0] == found[1] and found[0][1] > 3
    for name, layer in sparse(models[0]).items():
        assert torch.equal(layer.values, sparse(models[1])[name].values)
    assert sum("continues with them" in line for line in caplog.messages) == 2


def test_fractions_of_an_unknown_length_are_refused() -> None:
    with pytest.raises(ValueError, match="max_steps"):
        trainer(SparsityCallback(block_size=16), max_steps=-1, max_epochs=-1).fit(
            Classifier(), loader()
        )


def test_steps_work_with_an_unknown_length() -> None:
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step >= 12

    sparsity = SparsityCallback(block_size=16, update={"every_n_steps": 4, "until": 1000})
    trainer(sparsity, Stop(), max_steps=-1, max_epochs=-1, min_epochs=0).fit(
        Classifier(), loader(100)
    )
    assert sparsity.last_update is not None and sparsity.last_update.step >= 8


def test_no_layer_matched_is_an_error_before_training() -> None:
    with pytest.raises(ValueError, match=r"`include` must match at least one.*net\.0: .*net\.2: "):
        trainer(SparsityCallback(block_size=16, include=["nothing*"])).fit(Classifier(), loader())


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_unsupported_strategies_are_refused_by_name(name: str) -> None:
    fitting = trainer(SparsityCallback(block_size=16))
    fitting.strategy.__class__ = type(name, (type(fitting.strategy),), {})
    with pytest.raises(ValueError, match=f"got {name}. Use DDP"):
        fitting.fit(Classifier(), loader())


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("_tensor_parallel_size", 2, "with tensor parallelism. Use DDP"),
        ("_save_distributed_checkpoint", False, "`save_distributed_checkpoint` must be True"),
    ],
)
def test_unsupported_sharding_options_are_refused(option: str, value: Any, says: str) -> None:
    fitting = trainer(SparsityCallback(block_size=16))
    setattr(fitting.strategy, option, value)
    with pytest.raises(ValueError, match=says):
        fitting.fit(Classifier(), loader())


@pytest.mark.parametrize(("optimizer", "lr"), [(torch.optim.SGD, 0.5), (torch.optim.Adam, 1e-2)])
def test_other_optimizers(optimizer: type, lr: float) -> None:
    model, record = fit(
        SparsityCallback(block_size=16, update={"every_n_steps": 4}),
        Classifier(lr, optimizer),
        max_steps=60,
    )
    assert sum(model.losses[-8:]) < sum(model.losses[:8])
    assert record.updates


def test_frozen_layers_are_not_updated() -> None:
    model = Classifier()
    model.net[0].requires_grad_(False)
    model, record = fit(SparsityCallback(block_size=16, update={"every_n_steps": 4}), model)
    assert all(list(m.layers) == ["net.2"] for m in record.updates)


def test_compiled_module_trains_without_recompilation() -> None:
    model = Classifier()
    sparsity = SparsityCallback(block_size=16, update={"every_n_steps": 2})
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    model.forward = torch.compile(model.forward, backend=counter, fullgraph=True)
    trainer(sparsity, max_steps=40).fit(model, loader())
    assert sparsity.last_update is not None and sparsity.last_update.number == 15
    assert counter.frame_count == 1


def test_one_callback_serves_two_models_in_turn() -> None:
    sparsity = SparsityCallback(block_size=16, update={"every_n_steps": 4})
    _, first = fit(sparsity, max_steps=12)
    _, second = fit(sparsity, max_steps=12)
    assert [u.step for u in first.updates] == [u.step for u in second.updates] == [4, 8, 9]


def test_fast_dev_run() -> None:
    sparsity = SparsityCallback(
        block_size=16, density={"schedule": "cubic", "initial": 1.0, "final": 0.25}
    )
    fit(sparsity, fast_dev_run=True)
    assert sparsity.timetable is not None and sparsity.timetable.update_until == 1


def test_a_budget_above_the_capacity_of_an_adopted_layer_is_refused() -> None:
    model = Classifier()
    model.net[0] = BlockSparseLinear(64, 128, block_size=16, density=0.1)
    with pytest.raises(ValueError, match=r"budget of 8 blocks for 3 slots \(layer 'net.0'\)"):
        fit(SparsityCallback(block_size=16), model)


def test_the_masks_of_chosen_layers_are_shown() -> None:
    callback = SparsityCallback(block_size=16, density=0.25)
    with pytest.raises(RuntimeError, match=r"before `trainer\.fit`"):
        callback.show()
    model = Classifier()
    trainer(callback, max_steps=2).fit(model, loader())
    assert [*callback.show().masks] == ["net.0", "net.2"]
    shown = callback.show(["2"]).masks
    assert [*shown] == ["net.2"]
    assert (shown["net.2"] == model.net[2].topology.mask.numpy()).all()
    with pytest.raises(ValueError, match=r"got \['up'\], which match none of net.0, net.2"):
        callback.show(["up"])
