"""What goes wrong in the middle of an update leaves everything as it was, and NaN is no choice."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_lightning import SparsityCallback
from tests.callbacks.helpers import Classifier, assert_valid, loader, trainer
from tests.callbacks.test_resume import assert_identical
from tests.callbacks.test_sparsity import fit, sparse

FALLING = {"schedule": "linear", "initial": 0.75, "final": 0.25, "until": 0.5}


class OutOfMemory(TorchDispatchMode):
    """Refuses the `n`-th operation that returns new memory, and all that follow."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.left = n

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        of_arguments = schema.is_mutable or any(r.alias_info for r in schema.returns)
        if schema.returns and not of_arguments:
            self.left -= 1
            if self.left < 0:
                raise torch.OutOfMemoryError(f"simulated, in {func}")
        return func(*args, **(kwargs or {}))


class Starved(SparsityCallback):
    """Tries every update with ever more memory, until it goes through."""

    def __init__(self, *, ema: EMAWeightAveraging | None = None, **kwargs: Any) -> None:
        super().__init__(block_size=16, **kwargs)
        self.ema = ema
        self.failures: list[int] = []
        self.done = 0

    def everything(self, trainer: L.Trainer, pl_module: Any) -> dict[str, Any]:
        state = {
            "model": pl_module.state_dict(),
            "gradients": {n: p.grad for n, p in pl_module.named_parameters()},
            "optimizer": trainer.optimizers[0].state_dict()["state"],
            "callback": self.state_dict(),
        }
        if self.ema is not None:
            state["average"] = self.ema._average_model.state_dict()
        indices = {n: vars(layer.topology) for n, layer in sparse(pl_module).items()}
        return copy.deepcopy({**state, "indices": indices})

    def _update(self, trainer: L.Trainer, pl_module: Any) -> None:
        before = self.everything(trainer, pl_module)
        attempts = 0
        while True:
            try:
                with OutOfMemory(attempts):
                    super()._update(trainer, pl_module)
            except torch.OutOfMemoryError:
                assert_identical(self.everything(trainer, pl_module), before)
                attempts += 1
            else:
                break
        self.failures.append(attempts)
        for name, update in (self.last_update or pytest.fail("no update")).layers.items():
            self.done += len(update.changed)
            assert_valid(sparse(pl_module)[name], trainer.optimizers[0], update.n_after)


@pytest.mark.parametrize(
    "rules",
    [{}, {"drop": "movement", "grow": "momentum"}],
    ids=["rigl", "gathered"],
)
def test_an_update_out_of_memory_changes_nothing(rules: dict[str, Any]) -> None:
    """At every allocation of every update; and the training is then the one without a failure."""
    ema = EMAWeightAveraging(decay=0.9)
    options = {"density": FALLING, "shrink": False, "update": {"every_n_steps": 5}, **rules}
    starved = Starved(ema=ema, **options)
    model = Classifier()
    trainer(starved, ema, max_steps=12).fit(model, loader())
    assert starved.done > 0 and min(starved.failures) > 30
    other = Classifier()
    plain = SparsityCallback(block_size=16, **options)
    trainer(plain, EMAWeightAveraging(decay=0.9), max_steps=12).fit(other, loader())
    assert model.losses == other.losses


def test_shrinking_out_of_memory_leaves_every_layer_whole() -> None:
    failures: list[int] = []

    class Shrinking(SparsityCallback):
        def _shrink(self, trainer: L.Trainer, progress: float) -> None:
            weights = {n: layer.dense_weight() for n, layer in self._layers.items()}
            n = 0
            while True:
                try:
                    with OutOfMemory(n):
                        super()._shrink(trainer, progress)
                except torch.OutOfMemoryError:
                    n += 1
                else:
                    break
                finally:
                    for name, layer in self._layers.items():
                        assert torch.equal(layer.dense_weight(), weights[name])
                        assert_valid(layer, trainer.optimizers[0], layer.topology.n_blocks)
                        pending = self._pending.get(name)
                        assert pending is None or len(pending) == layer.topology.capacity
                        assert len(self._gatherer._sums_of(name).work) == layer.topology.capacity
            failures.append(n)

    options = {
        "block_size": 16,
        "density": {**FALLING, "initial": 1.0},
        "drop": "movement",
        "update": {"every_n_steps": 3},
    }
    model, _ = fit(Shrinking(**options))
    other, _ = fit(SparsityCallback(**options))
    assert max(failures) > 10
    assert model.losses == other.losses
    assert [len(layer.values) for layer in sparse(model).values()] == [8, 8]


def test_a_fit_that_ran_out_of_memory_can_be_saved_and_goes_on(tmp_path: Any) -> None:
    class Once(SparsityCallback):
        failed = False

        def _decide(self, *arguments: Any) -> Any:
            updates = super()._decide(*arguments)
            if self._step == 10 and not self.failed:
                self.failed = True
                raise torch.OutOfMemoryError("simulated")
            return updates

    options: dict[str, Any] = {
        "block_size": 16,
        "density": FALLING,
        "update": {"every_n_steps": 5},
    }
    fitting = trainer(Once(**options))
    with pytest.raises(torch.OutOfMemoryError):
        fitting.fit(Classifier(), loader())
    fitting.save_checkpoint(tmp_path / "failed.ckpt")
    again = Once(**options)
    again.failed = True
    model = Classifier()
    trainer(again).fit(model, loader(), ckpt_path=tmp_path / "failed.ckpt")
    assert again.last_update is not None and again.last_update.step == 18
    assert [layer.topology.n_blocks for layer in sparse(model).values()] == [8, 8]


# -- NaN ------------------------------------------------------------------------------------------


class Valid(L.Callback):
    """Checks every layer after every step; stands after the other."""

    def __init__(self, sparsity: SparsityCallback) -> None:
        self.sparsity, self.updates, self.moved = sparsity, 0, 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        for layer in sparse(pl_module).values():
            assert_valid(layer, trainer.optimizers[0], 8)
        last = self.sparsity.last_update
        if last is not None and last.step == trainer.global_step:
            self.updates += 1
            self.moved += sum(len(update.changed) for update in last.layers.values())


RULES = [
    {},
    {"drop": "saliency", "grow": "momentum"},
    {"drop": "gradient", "grow": "gradient", "exact": True},
    {"drop": "movement", "grow": "random"},
]


@pytest.mark.parametrize("rules", RULES, ids=lambda r: "-".join(map(str, r.values())) or "rigl")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_at_an_update(rules: dict[str, Any], bad: float) -> None:
    """From one input feature on: its column of blocks is what cannot be scored."""

    class Broken(Classifier):
        def batch(self, number: int) -> tuple[Tensor, Tensor]:
            x, y = super().batch(number)
            if number == 3:
                x[0, 0] = bad
            return x, y

    sparsity = SparsityCallback(block_size=16, update={"every_n_steps": 4, "until": 12}, **rules)
    valid = Valid(sparsity)
    trainer(sparsity, valid, max_steps=13).fit(Broken(), loader())
    assert valid.updates == 3


def test_blocks_of_nan_are_dropped_first() -> None:
    class Poison(L.Callback):
        def on_before_zero_grad(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                pl_module.net[0].values.data[:3] = float("nan")

    class Calm(Classifier):
        """Whose loss does not see the weights that are NaN."""

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.net(x).nan_to_num(0.0))

    sparsity = SparsityCallback(
        block_size=16,
        grow="random",
        drop_fraction=0.5,
        regrow=False,
        update={"every_n_steps": 4, "until": 4},
    )
    seen: list[bool] = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 4:
                last = sparsity.last_update
                assert last is not None
                assert {0, 1, 2} <= set(last.layers["net.0"].dropped.tolist())
                seen.append(bool(pl_module.net[0].values[:3].isfinite().all()))

    trainer(Poison(), sparsity, Valid(sparsity), Look(), max_steps=4).fit(Calm(), loader())
    assert seen == [True]
