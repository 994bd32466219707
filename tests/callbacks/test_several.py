"""Several `SparsityCallback`s on one trainer, each with its own layers."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from sparse_lightning import FinalDensityCheckpoint, SparsityCallback, sparsify
from sparse_lightning.history import read_history
from sparse_lightning.report.command import find_histories
from sparse_lightning.report.page import write_report
from tests.callbacks.helpers import Classifier, Late, loader, trainer
from tests.callbacks.test_resume import assert_identical

STEPS = 16


def falling(**changes: Any) -> SparsityCallback:
    options = {
        "include": ["net.0"],
        "density": {"schedule": "linear", "initial": 1.0, "final": 0.25, "until": 8},
        "update": {"every_n_steps": 4, "until": 8},
    }
    return SparsityCallback(**{"block_size": 32, **options, **changes})


def constant(**changes: Any) -> SparsityCallback:
    options = {"include": ["net.2"], "density": 0.5, "update": {"every_n_steps": 3, "until": 12}}
    return SparsityCallback(**{"block_size": 16, **options, **changes})


def head() -> SparsityCallback:
    return SparsityCallback(block_size=16, include=["*", "head"], exclude=["net.*"], density=0.5)


class Wide(Classifier):
    """Has a head that can be block-sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 16)


def run(*callbacks: L.Callback, model: Any = None, **kwargs: Any) -> dict[str, Tensor]:
    model = model or Classifier()
    ckpt_path = kwargs.pop("ckpt_path", None)
    fitting = trainer(*callbacks, **{"max_steps": STEPS, **kwargs})
    fitting.fit(model, loader(), ckpt_path=ckpt_path)
    return {name: value.clone() for name, value in model.state_dict().items()}


class Half(Classifier):
    """Trains one layer only, so that the result depends on one callback."""

    def __init__(self, trained: str) -> None:
        super().__init__()
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith(trained))


def test_each_evolves_its_own_layers_by_its_own_schedule() -> None:
    one, two = falling(), constant()
    model = Classifier()
    run(one, two, model=model)
    up, down = model.net[0], model.net[2]
    assert (up.block_size, up.density, down.block_size, down.density) == (32, 0.25, 16, 0.5)
    assert one.last_update is not None and two.last_update is not None
    assert (list(one.last_update.layers), one.last_update.step) == (["net.0"], 8)
    assert (list(two.last_update.layers), two.last_update.step) == (["net.2"], 12)


@pytest.mark.parametrize(("trained", "build"), [("net.0", falling), ("net.2", constant)])
def test_each_trains_as_it_does_alone(trained: str, build: Any) -> None:
    """The result equals, bit for bit, a model whose other layer is sparse and frozen."""
    together = run(falling(), constant(), model=Half(trained))
    model, other = Half(trained), (constant if build is falling else falling)().config
    density = 1.0 if other.block_size == 32 else 0.5
    sparsify(model, density=density, block_size=other.block_size, include=other.include)
    alone = run(build(), model=model)
    assert_identical(
        {k: v for k, v in together.items() if k.startswith(trained)},
        {k: v for k, v in alone.items() if k.startswith(trained)},
    )


@pytest.mark.parametrize("order", [(falling, constant), (constant, falling)])
@pytest.mark.parametrize("cut", [5, 10])
def test_a_resumed_training_is_the_uninterrupted_one(cut: int, order: Any, tmp_path: Path) -> None:
    """The callbacks' order may differ from that in the checkpoint."""
    checkpoints = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=cut, save_top_k=-1)
    whole = run(falling(), constant(), checkpoints, enable_checkpointing=True)
    resumed = run(*(build() for build in order), ckpt_path=tmp_path / f"step={cut}.ckpt")
    assert_identical(whole, resumed)
    saved = torch.load(tmp_path / f"step={cut}.ckpt", weights_only=True)["callbacks"]
    assert len([key for key in saved if key.startswith("SparsityCallback")]) == 2


def test_a_state_under_the_class_name_alone_is_accepted(tmp_path: Path) -> None:
    """Earlier versions supported one callback per trainer and saved its state this way."""
    whole = run(falling(), ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5,
                                           save_top_k=-1), enable_checkpointing=True)  # fmt: skip
    old = torch.load(tmp_path / "step=5.ckpt", weights_only=True)
    (key,) = (key for key in old["callbacks"] if key.startswith("SparsityCallback"))
    state = old["callbacks"].pop(key)
    del state["arrival"]
    old["callbacks"]["SparsityCallback"] = state
    torch.save(old, tmp_path / "old.ckpt")
    assert_identical(whole, run(falling(), ckpt_path=tmp_path / "old.ckpt"))
    # With one callback before and after, the error names what differs.
    model = Classifier()
    sparsify(model, density=0.5, block_size=16, include=["net.2"])
    del old["state_dict"]["net.2.weight"]
    old["state_dict"].update(
        {key: value for key, value in model.state_dict().items() if key.startswith("net.2")}
    )
    torch.save(old, tmp_path / "wider.ckpt")
    with pytest.raises(ValueError, match=r"include=\['net.\*'\] \(was \['net.0'\]\)"):
        run(falling(include=["net.*"]), ckpt_path=tmp_path / "wider.ckpt")


def test_a_resume_with_one_more_callback_is_refused(tmp_path: Path) -> None:
    fitting = trainer(falling(), max_steps=4)
    fitting.fit(Classifier(), loader())
    fitting.save_checkpoint(tmp_path / "one.ckpt")
    message = r"must have the SparsityCallbacks.*\['net.2'\].*net.0"
    for callbacks in ((falling(), constant()), (constant(), falling())):
        with pytest.raises(ValueError, match=message):
            run(*callbacks, ckpt_path=tmp_path / "one.ckpt")


@pytest.mark.parametrize(
    ("left", "missing"),
    [
        ([constant], "net.0"),
        ([falling], "net.2"),
        ([head, falling], "net.2"),
        ([constant, head], "net.0"),
    ],
)
def test_a_resume_without_one_of_the_callbacks_is_refused(
    left: list[Any], missing: str, tmp_path: Path
) -> None:
    fitting = trainer(*(build() for build in {falling, constant, *left}), max_steps=4)
    fitting.fit(Wide(), loader())
    fitting.save_checkpoint(tmp_path / "all.ckpt")
    message = (
        rf"must have every SparsityCallback.*none with.*'include': \['{missing}'\].*'exclude'.*Add"
    )
    with pytest.raises(ValueError, match=message):
        run(*(build() for build in left), model=Wide(), ckpt_path=tmp_path / "all.ckpt")
    # An evaluation needs no schedule.
    trainer(*(build() for build in left)).validate(
        Wide(), loader(), tmp_path / "all.ckpt", verbose=False
    )


@pytest.mark.parametrize("average", [False, True])
def test_a_dense_checkpoint_starts_all_of_them(average: bool, tmp_path: Path) -> None:
    fitting = trainer(max_steps=4)
    dense = Classifier()
    fitting.fit(dense, loader())
    fitting.save_checkpoint(tmp_path / "dense.ckpt")
    extra = [EMAWeightAveraging(decay=0.5)] if average else []
    started = run(falling(), constant(), *extra, ckpt_path=tmp_path / "dense.ckpt")
    extra = [EMAWeightAveraging(decay=0.5)] if average else []
    assert_identical(started, run(falling(), constant(), *extra, model=dense))


@pytest.mark.parametrize("model", [Classifier, Late])
@pytest.mark.parametrize(
    "changes",
    [
        {"include": ["*"]},
        {"include": ["*"], "exclude": ["0"]},
        {"include": ["re:net[.][0-9]"]},
        {"include": ["net.2"]},  # as the other; Lightning would refuse their equal keys
    ],
    ids=str,
)
def test_a_layer_that_two_select_is_refused_before_any_swap(
    changes: dict[str, Any], model: Any
) -> None:
    made = model()
    other = falling(**changes)
    with pytest.raises(ValueError) as error:
        run(constant(), other, model=made)
    name = "net.2" if "exclude" in changes else "net.[02]"
    assert re.search(
        rf"leave each layer to one SparsityCallback.*{re.escape(str(changes['include']))}.*"
        rf"\(layer '{name}'\)",
        str(error.value),
    )
    assert made.net is None or type(made.net[0]) is type(made.net[2]) is nn.Linear


def test_a_layer_that_neither_can_swap_is_no_conflict() -> None:
    """The patterns of both select the layer with 4 outputs, which is smaller than a block."""
    model = Classifier()
    run(falling(include=["0", "hea*"], exclude=[]), constant(include=["2", "he*"], exclude=[]),
        model=model)  # fmt: skip
    assert type(model.head) is nn.Linear


def test_a_second_fit_of_the_same_model(tmp_path: Path) -> None:
    model, callbacks = Classifier(), (falling(), constant())
    for steps in (4, STEPS):
        trainer(*callbacks, max_steps=steps).fit(model, loader())
    trainer(*callbacks).validate(model, loader(1))
    assert (model.net[0].density, model.net[2].density) == (0.25, 0.5)


def test_logs_and_histories_are_separate(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, two = falling(), constant()
    final = FinalDensityCheckpoint(tmp_path / "final", every_n_train_steps=1)
    fitting = trainer(
        *(one, two, final),
        enable_checkpointing=True,
        logger=CSVLogger(tmp_path),
        max_steps=STEPS,
    )
    fitting.fit(Classifier(), loader())
    assert final.best_model_path.endswith("step=16.ckpt")
    # All layers together: 2 of 8 blocks of size 32, and 16 of 32 blocks of size 16.
    assert fitting.callback_metrics["sparsity/density"] == pytest.approx((2 + 16) / (8 + 32))
    folder = tmp_path / "lightning_logs" / "version_0"
    header, *rows = (folder / "metrics.csv").read_text().splitlines()
    columns = header.split(",")
    assert len(columns) == len(set(columns)) and "sparsity/density" not in columns

    def logged(key: str) -> list[float]:
        values = [row.split(",")[columns.index(key)] for row in rows]
        return [float(value) for value in values if value]

    assert logged("sparsity/1/density") == [0.625, 0.25]
    assert logged("sparsity/2/density") == [0.5] * 4
    assert logged("sparsity_density/net.0") == [0.625, 0.25]
    assert logged("sparsity_density/net.2") == [0.5] * 4

    histories = find_histories(folder)
    assert {path.name for path in histories} == {"pattern-1.history", "pattern-2.history"}
    for number, (name, callback) in enumerate((("net.0", one), ("net.2", two)), 1):
        path = folder / f"pattern-{number}.history"
        assert list(read_history(path).layers) == [name]
        story = write_report(path, tmp_path / f"report-{number}.html")
        assert story["updates"] == callback.sparsifier.n_updates  # type: ignore[union-attr]
    lines = [line for line in caplog.messages if "has ended" in line]
    labels = ["callback 1 of 2, include=['net.0']", "callback 2 of 2, include=['net.2']"]
    for line, label in zip(lines, labels, strict=True):
        assert line.startswith(f"Block-sparse training ({label}) has ended: layers 1; ")
    assert "density 1.000 -> 0.250" in lines[0] and "density 0.500;" in lines[1]
    updates = [line for line in caplog.messages if "topology updates" in line]
    for line, label, every in zip(updates, labels, (4, 3), strict=True):
        assert line.startswith(f"Block-sparse training ({label}): topology updates every {every}")


def test_a_layer_left_dense_is_named_by_the_callback_that_selects_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    one, two = falling(), constant(include=["net.2", "hea*"], exclude=[])
    model = Classifier()
    model.other = nn.Linear(16, 16)
    model.other.requires_grad_(False)
    run(one, two, model=model)
    assert one.report is not None and two.report is not None
    assert one.report.skipped == {"other": "not included"}
    assert two.report.skipped == {
        "head": "4x64 is not divisible by block_size=16",
        "other": "not included",
    }
    lines = [line for line in caplog.messages if "left dense" in line]
    assert [line.split("left dense: ")[1][0] for line in lines] == ["1", "2"]
