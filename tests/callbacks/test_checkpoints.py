"""Which checkpoints can be resumed from, started from or evaluated, and the errors otherwise."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor

from sparse_lightning import SparsityCallback, sparsify
from sparse_lightning.topology import STATE_FORMAT
from tests.callbacks.helpers import Classifier, loader, trainer
from tests.callbacks.test_resume import assert_identical, sparsity
from tests.callbacks.test_sparsity import fit, sparse

STEPS = 12


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint from the middle of a sparse training."""
    path: Path = tmp_path_factory.mktemp("sparse") / "model.ckpt"
    fitting = trainer(sparsity(), max_steps=2 * STEPS, limit_train_batches=STEPS, max_epochs=1)
    fitting.fit(Classifier(), loader(STEPS))
    fitting.save_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("dense") / "model.ckpt"
    fitting = trainer(max_steps=STEPS)
    fitting.fit(Classifier(), loader())
    fitting.save_checkpoint(path)
    return path


def resume(callback: SparsityCallback, path: Path, **kwargs: Any) -> Classifier:
    model = Classifier()
    trainer(callback, max_steps=2 * STEPS, **kwargs).fit(model, loader(STEPS), ckpt_path=path)
    return model


# -- a training that is resumed -------------------------------------------------------------------

BASE: dict[str, Any] = {
    "block_size": 16,
    "density": {"schedule": "cubic", "initial": 0.75, "final": 0.25, "until": 0.7},
    "update": {"every_n_steps": 5},
}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"block_size": 32}, r"block_size=32 \(was 16\)"),
        (
            {"density": 0.5},
            r"density.schedule='constant' \(was 'cubic'\), density.initial=0.5",
        ),
        ({"density": {**BASE["density"], "until": 0.75}}, r"got density.until=0.75 \(was 0.7\)\. "),
        (
            {"distribution": "erdos_renyi"},
            r"distribution='erdos_renyi' \(was 'uniform'\)",
        ),
        ({"drop": "saliency"}, r"drop='saliency' \(was 'magnitude'\)"),
        ({"grow": "none"}, r"grow='none' \(was 'gradient'\)"),
        ({"update": {"every_n_steps": 3}}, r"update.every_n_steps=3 \(was 5\)"),
        ({"layer_density": {"net.0": 0.5}}, r"layer_density.net.0=0.5 \(was None\)"),
        ({"floor": {"row": 0}, "seed": 3}, r"floor.row=0 \(was 1\), seed=3 \(was 0\)"),
        ({"include": ["net.0"]}, r"include=\['net.0'\] \(was \['\*'\]\)"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_resuming_with_another_configuration_raises(
    change: dict[str, Any], says: str, saved: Path
) -> None:
    if "include" in change:  # `load_state_dict` fails first
        with pytest.raises(RuntimeError, match=r'Missing key\(s\).*"net.2.weight"'):
            resume(SparsityCallback(**{**BASE, **change}), saved)
        return
    with pytest.raises(ValueError, match=r"configured as before.*" + says) as error:
        resume(SparsityCallback(**{**BASE, **change}), saved)
    assert "load only the model's state dict, after `sparsify`" in str(error.value)


def test_options_of_memory_logging_and_initialisation_may_change(saved: Path) -> None:
    model = resume(SparsityCallback(**BASE, monitor=None, shrink=False, init="magnitude"), saved)
    assert_identical(dict(model.state_dict()), dict(resume(sparsity(), saved).state_dict()))


def test_a_numpy_number_is_saved_as_a_primitive(tmp_path: Path) -> None:
    callback = SparsityCallback(block_size=16, density=np.float64(0.25))
    fitting = trainer(callback, max_steps=2)
    fitting.fit(Classifier(), loader())
    fitting.save_checkpoint(tmp_path / "numpy.ckpt")
    torch.load(tmp_path / "numpy.ckpt", weights_only=True)
    resume(SparsityCallback(block_size=16), tmp_path / "numpy.ckpt")


def edited(path: Path, tmp_path: Path, edit: Any) -> Path:
    checkpoint = torch.load(path, weights_only=True)
    edit(checkpoint)
    torch.save(checkpoint, tmp_path / "edited.ckpt")
    return tmp_path / "edited.ckpt"


def test_another_version_of_the_callback_or_the_topology_is_refused(
    saved: Path, tmp_path: Path
) -> None:
    old = edited(saved, tmp_path, lambda c: c["callbacks"]["SparsityCallback"].pop("config"))
    with pytest.raises(ValueError, match=r"must hold 'config'; got none.*version"):
        resume(sparsity(), old)

    def older(checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["net.0._extra_state"][0] = STATE_FORMAT - 1

    with pytest.raises(
        RuntimeError, match=r"must be an int32 vector of format 1.*version.*layer 'net.0'"
    ):
        resume(sparsity(), edited(saved, tmp_path, older))


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("init", ["random", "magnitude"])
def test_a_dense_checkpoint_starts_a_sparse_training(init: str, average: bool, dense: Path) -> None:
    """It equals a training of a model with these weights; optimizer and progress are ignored."""

    def run(model: Classifier, **kwargs: Any) -> dict[str, torch.Tensor]:
        callback = SparsityCallback(block_size=16, init=init, update={"every_n_steps": 3})
        averaging = [EMAWeightAveraging(decay=0.5)] if average else []
        trainer(callback, *averaging, max_steps=STEPS).fit(model, loader(), **kwargs)
        assert callback.last_update is not None and len(model.losses) == STEPS
        return model.state_dict()

    pretrained = Classifier()
    pretrained.load_state_dict(torch.load(dense, weights_only=True)["state_dict"])
    expected, actual = run(pretrained), run(Classifier(), ckpt_path=dense)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def test_sparse_layers_without_a_schedule_are_not_resumed(dense: Path, tmp_path: Path) -> None:
    model = Classifier()
    sparsify(model, block_size=16, density=0.25)
    path = tmp_path / "user.ckpt"
    fitting = trainer(max_steps=2)
    fitting.fit(model, loader())
    fitting.save_checkpoint(path)
    with pytest.raises(ValueError, match=r"`ckpt_path` must be .*SparsityCallback.*before the fit"):
        resume(SparsityCallback(block_size=16, density=0.25), path)


def test_a_sparse_training_is_not_resumed_without_the_callback(saved: Path) -> None:
    with pytest.raises(RuntimeError, match=r'Missing key\(s\).*"net.0.weight"'):
        trainer(max_steps=2 * STEPS).fit(Classifier(), loader(), ckpt_path=saved)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_checkpoint_cut_off_in_its_middle_is_refused(
    share: float, saved: Path, tmp_path: Path
) -> None:
    """PyTorch raises the error; nothing of the file is used."""
    whole = saved.read_bytes()
    (tmp_path / "part.ckpt").write_bytes(whole[: int(len(whole) * share)])
    fitting, model = trainer(sparsity()), Classifier()
    with pytest.raises((RuntimeError, OSError)):
        fitting.fit(model, loader(), ckpt_path=tmp_path / "part.ckpt")
    assert fitting.global_step == 0 and not model.losses


# -- weights only ---------------------------------------------------------------------------------


def test_dense_weights_start_a_sparse_training(dense: Path) -> None:
    model = Classifier()
    weights = torch.load(dense, weights_only=True)["state_dict"]
    model.load_state_dict(weights)
    callback = SparsityCallback(block_size=16, init="magnitude", density=0.5)
    trainer(callback, max_steps=1).validate(model, loader(2), verbose=False)
    for name, layer in sparse(model).items():
        assert torch.equal(layer.values, layer.topology.pack(weights[f"{name}.weight"]))
    trainer(callback, max_steps=2).fit(model, loader())


def test_sparse_weights_start_a_training_of_another_schedule(saved: Path) -> None:
    model = Classifier()
    sparsify(model, block_size=32, density=1.0, exclude=["head"])
    model.load_state_dict(torch.load(saved, weights_only=True)["state_dict"])
    assert [layer.block_size for layer in sparse(model).values()] == [16, 16]
    density = {"schedule": "linear", "initial": 0.25, "final": 0.125}
    fit(SparsityCallback(block_size=16, density=density, update={"every_n_steps": 3}), model)
    assert [layer.topology.n_blocks for layer in sparse(model).values()] == [4, 4]


def test_save_weights_only(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, filename="w", save_weights_only=True)
    fitting = trainer(sparsity(), checkpoint, enable_checkpointing=True, max_epochs=1)
    model = Classifier()
    fitting.fit(model, loader())
    (loss,) = trainer(sparsity()).validate(
        Classifier(), loader(2), ckpt_path=tmp_path / "w.ckpt", verbose=False
    )
    assert loss == trainer(sparsity()).validate(model, loader(2), verbose=False)[0]
    with pytest.raises(KeyError, match="contains only the model"):
        resume(sparsity(), tmp_path / "w.ckpt")


# -- validate, test, predict, load ----------------------------------------------------------------


class Predicting(Classifier):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(self.batch(batch_idx)[0])


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
@pytest.mark.parametrize("block_size", [16, 32])
def test_a_sparse_checkpoint_is_evaluated(stage: str, block_size: int, saved: Path) -> None:
    """The layers are those of the checkpoint, whatever the callback's configuration."""
    model = Predicting()
    callback = SparsityCallback(block_size=block_size)
    getattr(trainer(callback), stage)(model, loader(2), ckpt_path=saved)
    loaded = Classifier()
    sparsify(loaded, block_size=16, density=0.5, exclude=["head"])
    loaded.load_state_dict(torch.load(saved, weights_only=True)["state_dict"])
    assert_identical(dict(model.state_dict()), dict(loaded.state_dict()))


def test_a_callback_that_has_evaluated_another_training_starts_its_own(saved: Path) -> None:
    callback = SparsityCallback(block_size=16, density=0.25, update={"every_n_steps": 4})
    model = Classifier()
    trainer(callback).validate(model, loader(2), ckpt_path=saved, verbose=False)
    trainer(callback, max_steps=8).fit(model, loader())
    assert callback.last_update is not None and callback.last_update.step == 6


def test_load_from_checkpoint_needs_block_sparse_layers(saved: Path) -> None:
    with pytest.raises(RuntimeError, match=r'"net.0.weight".*[\s\S]*"net.0.values"'):
        Classifier.load_from_checkpoint(saved)

    class Sparse(Classifier):
        def __init__(self) -> None:
            super().__init__()
            sparsify(self, block_size=16, density=0.5, exclude=["head"])

    model = Sparse.load_from_checkpoint(saved)
    assert model(torch.zeros(2, 64)).shape == (2, 4)


@pytest.mark.parametrize("rules", [{}, {"drop": "movement", "grow": "momentum"}])
def test_last_and_best_of_several(rules: dict[str, Any], tmp_path: Path) -> None:
    """The best checkpoint has more slots than the model by then; training continues after it."""
    checkpoint = ModelCheckpoint(
        tmp_path, monitor="val_loss", mode="max", save_top_k=2, save_last=True
    )
    fitting = trainer(
        sparsity(**rules), checkpoint, enable_checkpointing=True, val_check_interval=4
    )
    model = Predicting()
    fitting.fit(model, loader(), loader(1))
    small = len(model.net[0].values)
    assert checkpoint.best_model_path != checkpoint.last_model_path
    fitting.test(model, loader(2), ckpt_path="best", verbose=False)
    assert len(model.net[0].values) > small
    fitting.fit_loop.epoch_loop.max_steps = 48
    steps = len(model.losses)
    fitting.fit(model, loader(), loader(1))
    assert len(model.losses) > steps
    again = Predicting()
    fitting = trainer(sparsity(**rules), checkpoint, enable_checkpointing=True, max_steps=30)
    fitting.fit(again, loader(), loader(1), ckpt_path=tmp_path / "last.ckpt")
    assert all(layer.density == 0.25 for layer in sparse(again).values())


# -- safety ---------------------------------------------------------------------------------------


class Harmful:
    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["HARM"],)


@pytest.mark.parametrize("place", ["state_dict", "callbacks"])
def test_a_checkpoint_executes_nothing(
    place: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARM", str(tmp_path / "harm"))
    bad = edited(saved, tmp_path, lambda c: c[place].update({"net.0._extra_state": Harmful()}))
    with pytest.raises(Exception, match="Weights only load failed"):
        trainer(sparsity()).fit(Classifier(), loader(), ckpt_path=bad, weights_only=True)
    assert not (tmp_path / "harm").exists()
    # The callback's own checkpoints load with `weights_only=True`.
    fitting = trainer(sparsity(), max_steps=2 * STEPS)
    fitting.fit(Classifier(), loader(STEPS), ckpt_path=saved, weights_only=True)
    assert fitting.global_step == 2 * STEPS
