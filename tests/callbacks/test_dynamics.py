"""Every rule in a real Trainer: scores, dropped and grown blocks, budgets, floors and memory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from sparse_lightning import SparsityCallback
from sparse_lightning.callbacks.steps import TotalStepsForecast
from sparse_lightning.policy.criteria import DROP_CRITERIA, GROW_CRITERIA, BlockScores, needs
from sparse_lightning.policy.schedules import DENSITY_SCHEDULES
from tests.callbacks.helpers import Classifier, RecordScores, loader, trainer
from tests.callbacks.test_sparsity import fit, sparse

FALLING = {"schedule": "linear", "initial": 1.0, "final": 0.25, "until": 0.5}


@pytest.mark.parametrize("drop", DROP_CRITERIA)
@pytest.mark.parametrize("grow", GROW_CRITERIA)
def test_every_pair_of_rules_trains(drop: str, grow: str) -> None:
    sparsity = SparsityCallback(block_size=16, drop=drop, grow=grow, update={"every_n_steps": 5})
    model, record = fit(sparsity, max_steps=60)
    assert len(record.updates) == 9
    assert set(record.blocks) == {16}, "the budget is exact"
    moved = sum(len(u.grown) for m in record.updates for u in m.layers.values())
    assert (moved > 0) == (grow != "none")
    assert sum(model.losses[-8:]) < 0.8 * sum(model.losses[:8])


@pytest.mark.parametrize("schedule", DENSITY_SCHEDULES)
@pytest.mark.parametrize("distribution", ["uniform", "erdos_renyi", "global"])
def test_every_schedule_arrives_under_every_distribution(schedule: str, distribution: str) -> None:
    if schedule == "constant" and distribution == "global":
        pytest.skip("refused: layers compete only while the density falls")
    density = {"schedule": schedule, "final": 0.25, "until": 0.5}
    sparsity = SparsityCallback(
        block_size=16, density=density, distribution=distribution, update={"every_n_steps": 3}
    )
    model, record = fit(sparsity, max_steps=24)
    assert record.blocks[-1] == 16
    assert record.blocks == sorted(record.blocks, reverse=True)
    for layer in sparse(model).values():
        assert layer.topology.mask.any(0).all() and layer.topology.mask.any(1).all()


# -- scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_saliency_and_movement_are_of_the_steps_between_updates(accumulate: int) -> None:
    """The scores are compared with w * g of every step, read by another callback."""
    work: dict[str, list[Tensor]] = {}

    class Read(L.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            for name, layer in sparse(pl_module).items():
                product = (layer.values * layer.values.grad).sum((1, 2)).detach()
                work.setdefault(name, []).append(layer.topology.scatter(product, fill=0.0))

    @needs("saliency", "movement")
    def both(scores: BlockScores) -> Tensor:
        return scores.saliency - scores.movement

    sparsity = RecordScores(
        drop=both, grow="none", density=0.5, update={"every_n_steps": 3, "until": 6}
    )
    trainer(sparsity, Read(), max_steps=6, accumulate_grad_batches=accumulate).fit(
        Classifier(), loader()
    )
    assert len(sparsity.seen) == 2
    for name, products in work.items():
        assert len(products) == 6
        first, second = (scores[name] for scores in sparsity.seen)
        torch.testing.assert_close(first.saliency, sum(p.abs() for p in products[:3]) / 3)
        torch.testing.assert_close(second.saliency, sum(p.abs() for p in products[3:]) / 3)
        torch.testing.assert_close(first.movement, -sum(products[:3]))
        torch.testing.assert_close(second.movement, -sum(products), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_scaler_skips_is_in_no_score(fused: bool) -> None:
    """The movement over all steps with scaled gradients equals that of fp32 without scaling."""

    def run(**kwargs: Any) -> dict[str, Tensor]:
        def optimizer(parameters: Any, lr: float) -> torch.optim.Optimizer:
            return torch.optim.SGD(parameters, lr=0.0, fused=fused)

        sparsity = RecordScores(
            drop="movement", grow="none", update={"every_n_steps": 4, "until": 4}
        )
        fit(sparsity, Constant(optimizer=optimizer), **kwargs)
        return {name: scores.movement for name, scores in sparsity.seen[0].items()}

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=10_000)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    scaled = run(plugins=[plugin], max_steps=40)
    assert scaler.get_scale() < 2.0**30, "the test needs skipped steps"
    for name, movement in run(max_steps=4).items():
        assert movement.count_nonzero() > 0
        torch.testing.assert_close(scaled[name], movement, rtol=0.05, atol=2e-3)


class Constant(Classifier):
    """Uses one batch for all steps, so that they are equal at a learning rate of zero."""

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        return super().batch(0)


def test_momentum_is_gathered_in_the_steps_before_an_update() -> None:
    armed: list[bool] = []

    class Watch(L.Callback):
        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            armed.append(bool(pl_module.net[0].armed))

    sparsity = RecordScores(grow="momentum", update={"every_n_steps": 14, "until": 14})
    trainer(sparsity, Watch(), max_steps=16).fit(Classifier(), loader())
    assert armed == [False] * 4 + [True] * 10 + [False] * 2
    momentum = sparsity.seen[0]["net.0"].momentum
    assert (momentum > 0).sum() > 8


# -- user functions -------------------------------------------------------------------------------


@needs("gradient")
def by_gradient_per_weight(scores: BlockScores) -> Tensor:
    return scores.gradient / scores.magnitude.clamp(min=1e-3)


def with_gaps(scores: BlockScores) -> Tensor:
    result = torch.rand(scores.mask.shape, generator=scores.generator)
    result[0, 0], result[1, 1] = float("nan"), float("inf")
    return result


def wrong_shape(scores: BlockScores) -> Tensor:
    return scores.magnitude.flatten()


def undeclared_need(scores: BlockScores) -> Tensor:
    return scores.gradient


def path(function: Any) -> str:
    return f"{__name__}.{function.__name__}"


def test_user_functions_by_dotted_path() -> None:
    sparsity = RecordScores(drop=path(by_gradient_per_weight), grow=path(with_gaps))
    sparsity.config.update.every_n_steps = 4
    _, record = fit(sparsity, max_steps=24)
    assert set(record.blocks) == {16}
    assert sum(len(u.grown) for m in record.updates for u in m.layers.values()) > 0
    for change in record.updates[-1].layers.values():
        grown = [tuple(block) for block in change.coords[change.grown].tolist()]
        assert not {(0, 0), (1, 1)} & set(grown), "blocks whose score is not finite are never grown"


@pytest.mark.parametrize(
    ("drop", "says"),
    [
        (wrong_shape, r"`drop` must return one score per block, \[8, 4\]; got \[32\]. .*net.0"),
        (undeclared_need, r"`scores.gradient` must be declared.*@needs\('gradient'\).*net.0"),
    ],
)
def test_a_function_that_breaks_the_rules_is_named(drop: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says.replace(". .*", r"\. .*")):
        fit(
            SparsityCallback(
                block_size=16, drop=path(drop), grow="none", update={"every_n_steps": 2}
            )
        )


# -- budgets and floors ---------------------------------------------------------------------------


def test_densities_of_individual_layers() -> None:
    sparsity = SparsityCallback(
        block_size=16, density=FALLING, layer_density={"net.2": 0.5}, update={"every_n_steps": 3}
    )
    model, _ = fit(sparsity)
    assert {n: m.density for n, m in sparse(model).items()} == {"net.0": 0.25, "net.2": 0.5}


def test_a_pattern_that_names_no_layer_is_refused_before_anything_changes() -> None:
    model = Classifier()
    with pytest.raises(ValueError, match=r"`layer_density` must name layers.*got 'net.7'.*net.0"):
        fit(SparsityCallback(block_size=16, layer_density={"net.7": 0.5}), model)
    assert not sparse(model)


def test_the_global_distribution_follows_the_scores() -> None:
    class Lopsided(Classifier):
        def __init__(self) -> None:
            super().__init__()
            with torch.no_grad():
                self.net[2].weight *= 10

    sparsity = SparsityCallback(
        block_size=16, density=FALLING, distribution="global", update={"every_n_steps": 3}
    )
    model, _ = fit(sparsity, Lopsided())
    blocks = {n: m.topology.n_blocks for n, m in sparse(model).items()}
    assert sum(blocks.values()) == 16
    # net.0 keeps its floor of one block in each of 8 rows; the rest goes to the larger weights.
    assert blocks == {"net.0": 8, "net.2": 8}
    free = SparsityCallback(
        block_size=16,
        density=FALLING,
        distribution="global",
        floor={"row": 0, "column": 0},
        update={"every_n_steps": 3},
    )
    model, _ = fit(free, Lopsided())
    assert {n: m.topology.n_blocks for n, m in sparse(model).items()} == {"net.0": 1, "net.2": 15}


@pytest.mark.parametrize("floor", [0, 1])
def test_no_output_or_input_dies_unless_allowed(floor: int) -> None:
    """The criterion gives the last rows and columns the lowest scores."""

    def position(scores: BlockScores) -> Tensor:
        return torch.arange(scores.mask.numel()).flip(0).view(scores.mask.shape).float()

    sparsity = SparsityCallback(
        block_size=16,
        drop=position,
        grow=position,
        floor={"row": floor, "column": floor},
        update={"every_n_steps": 2},
        drop_fraction=0.5,
    )
    model, _ = fit(sparsity)
    alive = [
        bool(m.topology.mask.any(0).all() and m.topology.mask.any(1).all())
        for m in sparse(model).values()
    ]
    assert alive == [bool(floor)] * 2


# -- more than one optimizer ----------------------------------------------------------------------


class Manual(Classifier):
    """Steps two optimizers: the first layer's in every batch, the other in every second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        first = torch.optim.AdamW(self.net[0].parameters(), lr=1e-2)
        rest = [*self.net[2].parameters(), *self.head.parameters()]
        return [first, torch.optim.SGD(rest, lr=0.1, momentum=0.9)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        first, rest = self.optimizers()
        self.manual_backward(loss)
        first.step()
        first.zero_grad()
        if batch_idx % 2:
            rest.step()
            rest.zero_grad()


def test_several_optimizers_and_manual_optimization() -> None:
    sparsity = RecordScores(drop="movement", density=FALLING, update={"every_n_steps": 4})
    model, record = fit(sparsity, Manual(), max_epochs=5, max_steps=-1)
    # 40 batches, in each of which the first optimizer stepped; the trainer counts 60 steps.
    assert sparsity.sparsifier is not None and sparsity.sparsifier.steps == 40
    assert [course["steps"] for course in sparsity.state_dict()["courses"]] == [40, 20]
    # Each layer updates at the steps of its optimizer, the last time at three quarters of them.
    steps: dict[str, list[int]] = {}
    for layers in sparsity.seen:
        ((name, scores),) = layers.items()
        steps.setdefault(name, []).append(scores.step)
        assert scores.movement.count_nonzero() > 0
    assert steps == {"net.0": [4, 8, 12, 16, 20, 24, 28, 30], "net.2": [4, 8, 12, 15]}
    assert [u.number for u in record.updates] == [1, 3, 4, 6, 7, 9, 10, 12], "two in some batches"
    assert record.blocks[-1] == 16
    assert sum(model.losses[-8:]) < 0.8 * sum(model.losses[:8])


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("late", [0, 40])
@pytest.mark.parametrize("limit", ["epochs", "steps"])
def test_an_even_pace_is_forecast_exactly(limit: str, late: int, every: int) -> None:
    """The forecast is exact from the second step on, for a step in every `every`-th batch.

    The first step may come late, as after a warm-up of other optimizers.
    """
    for total in range(1, 61):
        batches = late + total * every
        manual = SimpleNamespace(
            lightning_module=SimpleNamespace(automatic_optimization=False),
            optimizers=[None],
            global_step=0,
            max_steps=batches if limit == "steps" else -1,
            max_epochs=1 if limit == "epochs" else None,
            num_training_batches=batches,
            fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=0)),
        )
        forecast = TotalStepsForecast(manual, batches, 0, {})  # type: ignore[arg-type]
        for steps in range(1, total + 1):
            batch = late + steps * every - 1
            manual.global_step = manual.fit_loop.epoch_loop.total_batch_idx = batch
            result = forecast(None, steps)  # type: ignore[arg-type]
            assert result == total if steps > 1 or total == 1 else result >= total


# -- memory ---------------------------------------------------------------------------------------


def capacities(model: Any) -> int:
    return sum(layer.topology.capacity for layer in sparse(model).values())


def adafactor(parameters: Any, lr: float) -> torch.optim.Optimizer:
    """Adafactor without its RMS over all slots, which depends on the number of slots."""
    return torch.optim.Adafactor(parameters, lr=lr, eps=(None, 10.0), d=10.0)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, adafactor])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_memory_follows_the_density(optimizer: Any, accumulate: int) -> None:
    """Runs with and without `shrink` differ only in the slots that they hold."""

    def run(shrink: bool) -> tuple[Any, set[int]]:
        held: set[int] = set()

        class Watch(L.Callback):
            def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
                held.add(capacities(pl_module))
                for layer in sparse(pl_module).values():
                    assert len(layer.values) == layer.topology.capacity
                    for tensor in trainer.optimizers[0].state[layer.values].values():
                        assert not tensor.dim() or len(tensor) == layer.topology.capacity

        sparsity = SparsityCallback(
            block_size=16,
            density={**FALLING, "final": 0.125},
            shrink=shrink,
            update={"every_n_steps": 2},
        )
        model = Classifier(optimizer=optimizer)
        trainer(sparsity, Watch(), accumulate_grad_batches=accumulate, gradient_clip_val=1.0).fit(
            model, loader(48)
        )
        return model, held

    (small, held), (large, all_held) = run(True), run(False)
    assert all_held == {64}
    assert capacities(small) == 8 and 3 <= len(held) <= 6
    assert small.losses == large.losses
    for name, layer in sparse(small).items():
        other = sparse(large)[name]
        assert torch.equal(layer.dense_weight(), other.dense_weight())


def test_compiled_layers_keep_their_shape() -> None:
    model = Classifier()
    model.net.compile(backend="eager")
    fit(SparsityCallback(block_size=16, density=FALLING, update={"every_n_steps": 3}), model)
    assert capacities(model) == 64


def test_a_shrunk_model_is_saved_and_loaded(tmp_path: Path) -> None:
    sparsity = SparsityCallback(block_size=16, density=FALLING, update={"every_n_steps": 3})
    model, _ = fit(sparsity)
    assert capacities(model) == 16
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = Classifier()
    fit(
        SparsityCallback(block_size=16, density=FALLING, update={"every_n_steps": 3}),
        other,
        max_steps=1,
    )
    assert not any(layer._is_locked for layer in sparse(other).values()), "the fit is over"
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    x, _ = model.batch(0)
    assert torch.equal(model(x), other(x))
