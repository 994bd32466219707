"""`Sparsifier` in loops of every kind: equal bit for bit, resumed, on ranks, and detached."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparse_lightning import BlockSparseLinear, Sparsifier, SparsityCallback
from sparse_lightning.selection import sparse_layers
from tests.callbacks.helpers import assert_valid
from tests.callbacks.helpers import trainer as lightning_trainer
from tests.integrations.helpers import (
    ACCUMULATE,
    BATCH,
    CLIP,
    RIGL,
    SGD,
    STEPS,
    Net,
    assert_same,
    loader,
    outcome,
    plain,
)
from tests.pages import example
from tests.processes import end_rank, run_ranks

ADAM = {"lr": 0.01, "weight_decay": 0.1}
OPTIMIZERS = [(torch.optim.SGD, SGD), (torch.optim.AdamW, ADAM)]
Outcome = dict[str, Tensor]


def sparse(
    total_steps: int | None = STEPS, cls: type = torch.optim.SGD, **options: Any
) -> tuple[Net, Sparsifier, torch.optim.Optimizer]:
    """Return a model, its engine, and an optimizer that is not attached yet."""
    model = Net()
    sparsifier = Sparsifier(model, total_steps, **{**RIGL, **options})
    kwargs = next(
        (known for known_cls, known in OPTIMIZERS if issubclass(cls, known_cls)), {"lr": 0.01}
    )
    return model, sparsifier, cls(model.parameters(), **kwargs)


# One training, four loops.


class InLightning(L.LightningModule):
    def __init__(self, cls: type, kwargs: dict[str, Any]) -> None:
        super().__init__()
        net = Net()
        self.up, self.down, self.head = net.up, net.down, net.head
        self.cls, self.kwargs = cls, kwargs

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return Net.forward(self, **batch)["loss"]  # type: ignore[arg-type]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.cls(self.parameters(), **self.kwargs)


def by_lightning(cls: type, kwargs: dict[str, Any], folder: Path) -> Outcome:
    model = InLightning(cls, kwargs)
    fitting = lightning_trainer(
        SparsityCallback(**RIGL, monitor=None),
        root=folder,
        max_steps=STEPS,
        accumulate_grad_batches=ACCUMULATE,
        gradient_clip_val=CLIP,
    )
    fitting.fit(model, loader())
    return outcome(model)


def by_transformers(cls: type, kwargs: dict[str, Any], folder: Path) -> Outcome:
    transformers = pytest.importorskip("transformers")
    from sparse_lightning.integrations import SparsityTrainerCallback
    from tests.integrations.test_transformers import arguments

    model = Net()
    transformers.Trainer(
        model=model,
        args=arguments(folder, learning_rate=kwargs["lr"]),
        train_dataset=loader().dataset,
        callbacks=[SparsityTrainerCallback(**RIGL)],
        optimizer_cls_and_kwargs=(cls, {**kwargs, "weight_decay": 0.0}),
    ).train()
    return outcome(model)


def by_accelerate(cls: type, kwargs: dict[str, Any], folder: Path) -> Outcome:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE)
    model = Net()
    sparsifier = Sparsifier(model, STEPS, **RIGL)
    wrapped, optimizer, batches = accelerator.prepare(
        model, cls(model.parameters(), **kwargs), loader()
    )
    sparsifier.attach(optimizer)
    for batch in batches:
        with accelerator.accumulate(wrapped):
            accelerator.backward(wrapped(**batch)["loss"])
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(wrapped.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
    sparsifier.detach()
    assert sparsifier.steps == STEPS
    return outcome(model)


def by_hand(cls: type, kwargs: dict[str, Any], folder: Path) -> Outcome:
    model = Net()
    sparsifier = Sparsifier(model, STEPS, **RIGL)
    optimizer = cls(model.parameters(), **kwargs)
    sparsifier.attach(optimizer)
    plain(model, sparsifier, optimizer, range(STEPS))
    sparsifier.detach()
    for layer in sparsifier.layers.values():
        assert_valid(layer, optimizer, layer.topology.n_blocks)
    assert sparsifier.n_updates == 8 and sparsifier.density == 0.25
    return outcome(model)


@pytest.mark.parametrize("other", [by_lightning, by_transformers, by_accelerate])
@pytest.mark.parametrize(("cls", "kwargs"), OPTIMIZERS)
def test_loops_train_alike_bit_for_bit(
    other: Callable[..., Outcome], cls: type, kwargs: dict[str, Any], tmp_path: Path
) -> None:
    # The Trainer of transformers chooses the weight decay itself.
    kwargs = {**kwargs, "weight_decay": 0.0}
    assert_same(by_hand(cls, kwargs, tmp_path), other(cls, kwargs, tmp_path))


# Saved and resumed by state dicts.


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("cut", [2, 3, 10, 18, 21])
def test_a_plain_loop_resumes_bit_for_bit(cut: int, cls: type, tmp_path: Path) -> None:
    model, sparsifier, optimizer = sparse(cls=cls)
    sparsifier.attach(optimizer)
    plain(model, sparsifier, optimizer, range(cut))
    parts = {"model": model, "optimizer": optimizer, "sparsifier": sparsifier}
    torch.save({name: part.state_dict() for name, part in parts.items()}, tmp_path / "last.pt")
    plain(model, sparsifier, optimizer, range(cut, STEPS))
    sparsifier.detach()

    again, engine, other = sparse(cls=cls)
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    again.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    engine.load_state_dict(saved["sparsifier"])
    engine.attach(other)
    assert engine.steps == cut
    plain(again, engine, other, range(cut, STEPS))
    engine.detach()
    assert_same(outcome(model), outcome(again))
    for values, state in optimizer.state.items():
        name = next(n for n, p in model.named_parameters() if p is values)
        for key, tensor in state.items():
            assert torch.equal(tensor, other.state[again.get_parameter(name)][key]), (name, key)


def test_accelerate_saves_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)

    def prepared() -> tuple[nn.Module, Sparsifier, Any]:
        model, sparsifier, optimizer = sparse()
        accelerator.free_memory()
        accelerator._custom_objects.clear()
        model, optimizer = accelerator.prepare(model, optimizer)
        accelerator.register_for_checkpointing(sparsifier)
        return model, sparsifier, optimizer

    model, sparsifier, optimizer = prepared()
    sparsifier.attach(optimizer)
    plain(model, sparsifier, optimizer, range(10))
    accelerator.save_state(str(tmp_path))
    plain(model, sparsifier, optimizer, range(10, STEPS))
    sparsifier.detach()
    again, engine, other = prepared()
    accelerator.load_state(str(tmp_path))
    engine.attach(other)
    assert engine.steps == 10
    plain(again, engine, other, range(10, STEPS))
    assert_same(outcome(model), outcome(again))


# Mixed precision: a GradScaler skips steps.


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_scaler_skips_are_none(fused: bool) -> None:
    model = Net()
    in_steps = {
        "density": {"schedule": "linear", "initial": 1.0, "final": 0.25, "until": 9},
        "update": {"every_n_steps": 3, "until": 11},
    }
    sparsifier = Sparsifier(model, **{**RIGL, **in_steps, "drop": "saliency"})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    sparsifier.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
    updated: list[tuple[int, int]] = []
    trained = 0
    sparsifier.register_update_hook(lambda _, update: updated.append((trained, update.step)))
    batches = list(loader())
    for step in range(16):
        for batch in batches[step * ACCUMULATE : (step + 1) * ACCUMULATE]:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(**batch)["loss"] / ACCUMULATE
            if step in (1, 5, 6, 11):
                loss = loss * float("inf")
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        trained = step + 1
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert sparsifier.steps == 12
    # Updates are due after 3, 6, ... counted steps.
    assert [step for _, step in updated] == [3, 6, 9, 11]
    assert [when for when, _ in updated] == [4, 9, 13, 15]
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert optimizer.state[model.up.values]["exp_avg"].isfinite().all()
    sparsifier.detach()


@pytest.mark.parametrize("drop", ["magnitude", "saliency"])
def test_a_fused_optimizer_under_a_scaler_decides_as_without(drop: str) -> None:
    found = []
    for scale in (None, 2.0**12):
        model = Net()
        sparsifier = Sparsifier(model, STEPS, **{**RIGL, "drop": drop})
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
        sparsifier.attach(optimizer)
        enabled = scale is not None
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=enabled)
        for batch in list(loader())[:STEPS]:
            scaler.scale(model(**batch)["loss"]).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        found.append([layer.topology.mask for layer in sparsifier.layers.values()])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


# Two ranks.


KINDS = ["rewrap", "no rewrap", "the page's", "transformers"]


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of results that two ranks have written for each kind of training."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(__file__, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_end_identical(kind: str, of_ranks: Path) -> None:
    ranks = [torch.load(of_ranks / f"{kind}-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert_same(ranks[0]["model"], ranks[1]["model"])
    assert [rank["density"] for rank in ranks] == [0.25, 0.25]
    shrunk = [rank["slots"] == rank["blocks"] for rank in ranks]
    assert shrunk == [kind in ("rewrap", "the page's")] * 2
    assert [rank["warned"] for rank in ranks] == [kind == "no rewrap", False]


def main(out: Path) -> None:
    import warnings

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for kind in KINDS:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train = {"transformers": transformers_rank, "the page's": rank_of_the_page}
            model = train.get(kind, ddp_rank)(rank, out, kind)
        topologies = [layer.topology for _, layer in sparse_layers(model)]
        cells = sum(topology.grid[0] * topology.grid[1] for topology in topologies)
        found = {
            "model": model.state_dict(),
            "density": sum(topology.n_blocks for topology in topologies) / cells,
            "slots": sum(topology.capacity for topology in topologies),
            "blocks": sum(topology.n_blocks for topology in topologies),
            "warned": any("does not follow their density" in str(w.message) for w in caught),
        }
        torch.save(found, out / f"{kind}-{rank}.pt")
    end_rank()


def ddp_rank(rank: int, out: Path, kind: str) -> nn.Module:
    model = Net()
    torch.manual_seed(rank)  # each rank begins with different weights
    for layer in (model.up, model.down, model.head):
        layer.reset_parameters()
    sparsifier = Sparsifier(model, STEPS, **RIGL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    holder = [DistributedDataParallel(model)]

    def rewrap() -> None:
        holder.clear()  # first, or both wrappers would reduce every gradient
        holder.append(DistributedDataParallel(model))

    sparsifier.attach(optimizer, rewrap=rewrap if kind == "rewrap" else None)
    batches = list(loader(first=10_000 * rank))
    for step in range(STEPS):
        first, last = batches[step * ACCUMULATE : (step + 1) * ACCUMULATE]
        with holder[0].no_sync():
            (holder[0](**first)["loss"] / ACCUMULATE).backward()
        (holder[0](**last)["loss"] / ACCUMULATE).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    sparsifier.detach()
    return model


def rank_of_the_page(rank: int, out: Path, kind: str) -> nn.Module:
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64))
    example("def rewrap")["train"](model, list(torch.randn(STEPS, BATCH, 64)), **RIGL)
    return model


def transformers_rank(rank: int, out: Path, kind: str) -> nn.Module:
    """Train half of the steps, then resume the rest from the checkpoint."""
    from sparse_lightning.integrations import SparsityTrainerCallback
    from tests.integrations.test_transformers import trainer

    for folder in (None, str(out / "run" / "checkpoint-10")):
        model, sparsity = Net(), SparsityTrainerCallback(**RIGL)
        training = trainer(
            out / "run",
            model,
            sparsity,
            save_strategy="steps",
            save_steps=10,
            ddp_backend="gloo",
            gradient_accumulation_steps=1,
        )
        training.train(resume_from_checkpoint=folder)
        if folder is None:
            whole = outcome(model)
    assert_same(whole, outcome(model))
    return model


# Attaching and detaching.


BATCHES = list(loader())


def hooks_of(optimizer: torch.optim.Optimizer) -> int:
    return len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: int = 0) -> None:
    model(**BATCHES[batch])["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()


def test_nothing_is_left_after_detach() -> None:
    model, sparsifier, optimizer = sparse()
    sparsifier.attach(optimizer)
    assert hooks_of(optimizer) == 2 and model.up._is_locked
    for number in range(3):
        step(model, optimizer, number)
    with pytest.warns(UserWarning, match="3 steps were taken"):
        sparsifier.detach()
    assert hooks_of(optimizer) == 0 and not model.up._is_locked and not model.up.armed
    assert not model.up.values._backward_hooks
    before = [layer.topology.mask.clone() for layer in sparsifier.layers.values()]
    for number in range(3, 9):
        step(model, optimizer, number)
    assert sparsifier.steps == 3
    for mask, layer in zip(before, sparsifier.layers.values(), strict=True):
        assert torch.equal(mask, layer.topology.mask)
    sparsifier.detach()  # has no further effect, and does not warn
    # A new `attach` continues the schedule.
    sparsifier.attach(optimizer)
    for number in range(9, 12):
        step(model, optimizer, number)
    assert sparsifier.steps == 6 and sparsifier.n_updates == 2


@pytest.mark.parametrize("when", ["a bad optimizer", "a bad second one", "none of torch's"])
def test_nothing_is_left_when_attach_fails(when: str) -> None:
    model, sparsifier, good = sparse()
    bad: Any = object() if when == "none of torch's" else torch.optim.LBFGS(model.parameters())
    given = [bad] if when == "a bad optimizer" else [good, bad]
    with pytest.raises((ValueError, TypeError), match="optimizer"):
        sparsifier.attach(*given)
    assert hooks_of(good) == 0 and not model.up._is_locked
    if isinstance(bad, torch.optim.Optimizer):
        assert hooks_of(bad) == 0
    # A failed `attach` does not change the count of optimizers either.
    sparsifier.attach(good)
    for number in range(3):
        step(model, good, number)
    assert sparsifier.steps == 3 and sparsifier.n_updates == 1


def test_an_optimizer_attached_twice_counts_once() -> None:
    model, sparsifier, optimizer = sparse()
    sparsifier.attach(optimizer, optimizer)
    sparsifier.attach(optimizer)
    step(model, optimizer)
    assert sparsifier.steps == 1 and hooks_of(optimizer) == 2


def test_a_step_that_calls_that_of_its_base_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_lightning.optimizer_state import STATE_RULES

    class Louder(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    monkeypatch.setitem(STATE_RULES, Louder, STATE_RULES[torch.optim.SGD])
    model, sparsifier, optimizer = sparse(cls=Louder, drop="saliency")
    sparsifier.attach(optimizer)
    plain_model, plain_engine, plain_optimizer = sparse(drop="saliency")
    plain_engine.attach(plain_optimizer)
    for number in range(4):
        step(model, optimizer, number)
        step(plain_model, plain_optimizer, number)
    assert sparsifier.steps == 4 and sparsifier.n_updates == 1
    assert_same(outcome(plain_model), outcome(model))


@pytest.mark.parametrize("by_name", [False, True])
def test_of_a_closure_that_is_evaluated_twice_the_last_gradient_counts(
    by_name: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparse_lightning.optimizer_state import STATE_RULES

    class Twice(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            with torch.enable_grad():
                closure()
            return super().step(closure)

    monkeypatch.setitem(STATE_RULES, Twice, STATE_RULES[torch.optim.SGD])
    model, sparsifier, optimizer = sparse(cls=Twice, drop="saliency")
    sparsifier.attach(optimizer)
    other, engine, once = sparse(drop="saliency")
    engine.attach(once)
    batches, calls = list(loader()), []
    for batch in batches[:7]:

        def closure(batch: dict[str, Tensor] = batch) -> Tensor:
            calls.append(1)
            optimizer.zero_grad()
            loss: Tensor = model(**batch)["loss"]
            loss.backward()
            return loss

        optimizer.step(closure=closure) if by_name else optimizer.step(closure)
        once.zero_grad()
        other(**batch)["loss"].backward()
        once.step()
    assert len(calls) == 14 and sparsifier.steps == 7 and sparsifier.n_updates == 2
    assert_same(outcome(other), outcome(model))


# Refused optimizers.


class ZeroRedundancyOptimizer(torch.optim.SGD):
    """Has the name of PyTorch's class, which needs a process group."""


class Lookahead(torch.optim.Optimizer):
    """Wraps an optimizer, and keeps slow weights in a state of its own."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        super().__init__(optimizer.param_groups, {})

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (
            lambda inner: ZeroRedundancyOptimizer(inner.param_groups[0]["params"], lr=0.1),
            "must not be a ZeroRedundancyOptimizer: .*fully_shard",
        ),
        (Lookahead, "whose state can follow the blocks.*got .*Lookahead around.*layer 'up'"),
        (lambda inner: [inner], "must be a torch.optim.Optimizer.*got list"),
    ],
)
def test_an_optimizer_that_cannot_be_followed_is_refused(
    wrap: Callable[[torch.optim.Optimizer], Any], message: str
) -> None:
    _, sparsifier, optimizer = sparse()
    with pytest.raises((ValueError, TypeError), match=message):
        sparsifier.attach(wrap(optimizer))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # raised by torch itself
def test_optimizers_in_backward_are_refused_when_attached() -> None:
    from torch.distributed.optim import _apply_optimizer_in_backward

    model, sparsifier, optimizer = sparse()
    _apply_optimizer_in_backward(torch.optim.SGD, model.up.parameters(), {"lr": 0.1})
    with pytest.raises(ValueError, match=r"`_in_backward_optimizers`.*\(layer 'up'\)"):
        sparsifier.attach(optimizer)
    assert hooks_of(optimizer) == 0


def test_a_step_within_backward_is_refused() -> None:
    model, sparsifier, optimizer = sparse()
    sparsifier.attach(optimizer)
    model.up.values.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    with pytest.raises(RuntimeError, match=r"got SGD\.step\(\) within it"):
        model(**next(iter(loader())))["loss"].backward()


# Functions passed to `attach`.


def test_copies_follow_the_blocks() -> None:
    model, sparsifier, optimizer = sparse()
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )

    def copies(name: str) -> Iterable[BlockSparseLinear]:
        return [average.module.get_submodule(name)]

    sparsifier.attach(optimizer, copies=copies)
    for number in range(STEPS):
        step(model, optimizer, number)
        average.update_parameters(model)
    assert sparsifier.density == 0.25
    for name, layer in sparsifier.layers.items():
        averaged = average.module.get_submodule(name)
        assert torch.equal(averaged.topology.coords, layer.topology.coords)
        assert averaged.values.shape == layer.values.shape


def test_a_training_may_learn_its_length_on_its_way() -> None:
    model, sparsifier, optimizer = sparse(total_steps=100)
    sparsifier.attach(optimizer, planned=lambda optimizer, steps: STEPS)
    for number in range(STEPS):
        step(model, optimizer, number)
    assert sparsifier.density == 0.25 and sparsifier.timetable is not None
    assert sparsifier.timetable.total_steps == STEPS


def test_memory_stays_where_shrink_is_off() -> None:
    model, sparsifier, optimizer = sparse()
    sparsifier.attach(optimizer, shrink=False)
    kept = model.up.values.shape
    for number in range(STEPS):
        step(model, optimizer, number)
    assert sparsifier.density == 0.25 and model.up.values.shape == kept


def test_what_was_offered_ends_with_detach() -> None:
    model, sparsifier, optimizer = sparse(total_steps=100)
    called: list[str] = []

    def copies(name: str) -> Iterable[BlockSparseLinear]:
        called.append(name)
        return []

    def planned(optimizer: torch.optim.Optimizer, steps: int) -> int:
        called.append("planned")
        return 100

    offered = {"copies": copies, "planned": planned, "rewrap": lambda: called.append("rewrap")}
    sparsifier.attach(optimizer, **offered, shrink=False)
    for number in range(3):
        step(model, optimizer, number)
    assert {"up", "down", "planned"} <= set(called)
    with pytest.warns(UserWarning, match="3 steps were taken"):
        sparsifier.detach()
    called.clear()
    sparsifier.attach(optimizer)
    kept = model.up.values.shape
    for number in range(3, 100):
        step(model, optimizer, number % STEPS)
    assert not called and sparsifier.density == 0.25 and model.up.values.shape != kept


if __name__ == "__main__":
    main(Path(sys.argv[1]))
