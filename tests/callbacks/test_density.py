"""The density as a monitored metric, best checkpoints, and FinalDensityCheckpoint."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from sparse_lightning import FinalDensityCheckpoint, SparsityCallback
from tests.callbacks.helpers import Classifier, Manual, loader, trainer
from tests.callbacks.test_resume import assert_identical

# 64 blocks at first, 48 after 2 steps, 32 after 4, 16 from 6 on. An epoch has eight batches.
FALLING: dict[str, Any] = {
    "block_size": 16,
    "density": {"schedule": "linear", "initial": 1.0, "final": 0.25, "until": 6},
    "update": {"every_n_steps": 2, "until": 6},
}
STEPS = 16


class Worsening(Classifier):
    """Logs the number of steps as `val_loss`, so that the densest checkpoint is the best."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", float(self.trainer.global_step))


class WorseningManual(Worsening, Manual):
    """Steps its optimizer itself."""


def fit(
    *callbacks: L.Callback, root: Path, model: Classifier | None = None, **kwargs: Any
) -> L.Trainer:
    """Train to step 16, with a validation after every second batch."""
    options = {"max_steps": STEPS, "val_check_interval": 2, "limit_val_batches": 1}
    ckpt_path = kwargs.pop("ckpt_path", None)
    fitting = trainer(*callbacks, root=root, enable_checkpointing=True, **{**options, **kwargs})
    fitting.fit(model or Worsening(), loader(), loader(1), ckpt_path=ckpt_path)
    return fitting


def density_of(path: str | Path) -> float:
    """Return the density of a checkpoint, computed from its values."""
    state = torch.load(path, weights_only=True)["state_dict"]
    present = [(state[f"{n}.values"] != 0).any(-1).any(-1).sum().item() for n in ("net.0", "net.2")]
    return sum(present) / 64


# -- the monitored metric -------------------------------------------------------------------------


@pytest.mark.parametrize("logger", [False, True])
@pytest.mark.parametrize("monitor", [{}, {"monitor": None}])
@pytest.mark.parametrize("model", [Classifier, WorseningManual])
def test_the_density_can_be_monitored(
    model: type[Classifier], monitor: dict[str, Any], logger: bool, tmp_path: Path
) -> None:
    """The metric exists from the first batch on, after the batch's update, and at epoch ends."""
    by_step = ModelCheckpoint(
        tmp_path / "step",
        "{step}-{sparsity/density:.2f}",
        monitor="sparsity/density",
        save_top_k=-1,
        every_n_train_steps=1,
        auto_insert_metric_name=False,
    )
    by_validation = ModelCheckpoint(tmp_path / "val", monitor="sparsity/density", mode="min")
    stopping = EarlyStopping("sparsity/density", patience=99, strict=True)
    fit(
        SparsityCallback(**FALLING, **monitor),
        *(by_step, by_validation, stopping),
        root=tmp_path,
        model=model(),
        logger=[CSVLogger(tmp_path)] if logger else False,
        log_every_n_steps=1,
    )
    steps = {1: 1.0, 2: 0.75, 3: 0.75, 4: 0.5, 6: 0.25, 7: 0.25, 16: 0.25}
    for step, density in steps.items():
        path = tmp_path / "step" / f"{step}-{density:.2f}.ckpt"
        assert density_of(path) == density
        assert by_step.best_k_models[str(path)] == density
    assert by_validation.best_model_score == stopping.best_score == 0.25
    if logger:  # loggers get it only at updates
        rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
        at = rows[0].split(",").index("sparsity/density") if not monitor else None
        got = [] if at is None else [row.split(",")[at] for row in rows[1:]]
        assert [float(value) for value in got if value] == ([] if monitor else [0.75, 0.5, 0.25])
        assert rows[0].count("sparsity/density") == (
            0 if monitor else 2
        )  # density and density_target


@pytest.mark.filterwarnings("error:.*self.log")
def test_the_density_is_available_at_the_first_validation_of_a_resumed_training(
    tmp_path: Path,
) -> None:
    last = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    fit(SparsityCallback(**FALLING), last, root=tmp_path, max_steps=4)
    seen = []

    class RecordDensity(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            seen.append(trainer.callback_metrics.get("sparsity/density"))

        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            seen.append(trainer.callback_metrics.get("sparsity/density"))

    resumed = trainer(
        SparsityCallback(**FALLING), RecordDensity(), max_steps=6, num_sanity_val_steps=0
    )
    resumed.fit(Worsening(), loader(), loader(1), ckpt_path=tmp_path / "step=4.ckpt")
    assert seen[0] == 0.5
    bare = trainer(SparsityCallback(**FALLING), RecordDensity(), barebones=True, max_steps=3)
    seen.clear()
    bare.fit(Classifier(), loader())
    assert seen == [1.0, 1.0, 0.75]


# -- the best checkpoint --------------------------------------------------------------------------


def warned(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if "FinalDensity" in str(w.message)]


@pytest.mark.parametrize("options", [{}, {"save_weights_only": True}])
def test_a_best_checkpoint_of_another_density_is_named_once(
    options: dict[str, Any], tmp_path: Path
) -> None:
    early = ModelCheckpoint(tmp_path / "loss", monitor="val_loss", **options)
    final = ModelCheckpoint(tmp_path / "density", monitor="sparsity/density", **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(SparsityCallback(**FALLING), early, final, root=tmp_path)
    (message,) = warned(caught)
    assert (
        f"'{early.best_model_path}' has density 0.750" in message
        and "trained model has density 0.250" in message
    )


@pytest.mark.parametrize("kind", ["constant", "removed", "folder", "unreadable"])
def test_no_warning_without_a_readable_best_checkpoint_of_another_density(
    kind: str, tmp_path: Path
) -> None:
    class Spoil(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            path = Path(early.best_model_path)
            if kind in ("removed", "folder"):
                path.unlink()
            if kind == "folder":
                path.mkdir()
            if kind == "unreadable":
                path.write_bytes(b"no checkpoint")

    early = ModelCheckpoint(tmp_path / "loss", monitor="val_loss")
    options = {**FALLING, "density": 0.5} if kind == "constant" else FALLING
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(SparsityCallback(**options), Spoil(), early, root=tmp_path)
    assert not warned(caught)


def test_evaluating_a_checkpoint_before_the_final_density_warns(tmp_path: Path) -> None:
    checkpoints = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    fitted = fit(SparsityCallback(**FALLING), checkpoints, root=tmp_path)
    for evaluate in (fitted.validate, trainer(SparsityCallback(**FALLING)).validate):
        for step, n_warnings in ((2, 1), (6, 0), (16, 0)):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                evaluate(Worsening(), loader(1), ckpt_path=tmp_path / f"step={step}.ckpt")
            assert len(warned(caught)) == n_warnings
            if n_warnings:
                assert "density 0.750" in warned(caught)[0] and "0.250" in warned(caught)[0]


# -- checkpoints of the final density -------------------------------------------------------------


@pytest.mark.parametrize("model", [Worsening, WorseningManual])
@pytest.mark.parametrize(
    "options",
    [
        {"monitor": "val_loss", "save_top_k": -1},
        {"monitor": "val_loss", "every_n_train_steps": 1, "save_top_k": -1},
        {"every_n_train_steps": 1, "save_top_k": -1},
        {"save_last": True},
        {"save_on_train_epoch_end": True},
    ],
    ids=lambda options: ",".join(options),
)
def test_nothing_is_saved_or_scored_before_the_final_density(
    options: dict[str, Any], model: type[Classifier], tmp_path: Path
) -> None:
    ours = FinalDensityCheckpoint(tmp_path / "final", **options)
    plain = ModelCheckpoint(tmp_path / "all", save_last=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(SparsityCallback(**FALLING), ours, plain, root=tmp_path, model=model())
    saved = sorted((tmp_path / "final").glob("*.ckpt"))
    assert saved and {density_of(path) for path in saved} == {0.25}
    assert Path(ours.best_model_path) in saved
    if "monitor" in options:  # the first validation of the final density is after step 6
        assert ours.best_model_score == 6.0
        assert {float(score) for score in ours.best_k_models.values()} <= {*range(6, 17)}
    assert not warned(caught) and Path(plain.last_model_path).exists()


def test_a_training_without_a_saved_checkpoint_warns(tmp_path: Path) -> None:
    never = FinalDensityCheckpoint(tmp_path / "a", save_last=True, save_on_exception=True)
    with pytest.warns(
        UserWarning, match=r"saved nothing.*before the final density was reached.*`density.until`"
    ):
        fit(SparsityCallback(**FALLING), never, root=tmp_path, max_steps=4)
    late = FinalDensityCheckpoint(tmp_path / "b", every_n_train_steps=99)
    with pytest.warns(UserWarning, match="saved nothing, because no save was due"):
        fit(SparsityCallback(**FALLING), late, root=tmp_path)

    class Break(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 3:
                raise KeyError("broken")

    with pytest.raises(KeyError):
        fit(SparsityCallback(**FALLING), Break(), never, root=tmp_path)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_constant_density_is_final_from_the_beginning(tmp_path: Path) -> None:
    ours = FinalDensityCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    fit(SparsityCallback(**{**FALLING, "density": 0.5}), ours, root=tmp_path, max_steps=3)
    assert len(list(tmp_path.glob("*.ckpt"))) == 3


def test_a_sparsity_callback_is_required(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must have a SparsityCallback for FinalDensityCheckpoint"):
        fit(FinalDensityCheckpoint(tmp_path), root=tmp_path)


@pytest.mark.parametrize("at", [3, 9])
def test_a_resumed_training_saves_what_an_uninterrupted_one_does(at: int, tmp_path: Path) -> None:
    """The interruption is before or after the final density is reached."""

    class Cut(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == at:
                raise KeyError("cut")

    def run(root: Path, *extra: L.Callback, **kwargs: Any) -> FinalDensityCheckpoint:
        ours = FinalDensityCheckpoint(
            root / "final", "{step}", monitor="val_loss", mode="max", save_top_k=4
        )
        plain = ModelCheckpoint(root, "{step}", every_n_train_steps=3, save_top_k=-1)
        fit(SparsityCallback(**FALLING), *extra, ours, plain, root=root, **kwargs)
        return ours

    whole = run(tmp_path / "whole")
    root = tmp_path / "cut"
    with pytest.raises(KeyError, match="cut"):
        run(root, Cut())
    resumed = run(root, ckpt_path=root / f"step={at}.ckpt")
    names = {Path(path).name for path in whole.best_k_models}
    assert names == {Path(path).name for path in resumed.best_k_models}
    pairs = zip(sorted(whole.best_k_models), sorted(resumed.best_k_models), strict=True)
    for pair in pairs:
        assert_identical(*(torch.load(path, weights_only=True)["state_dict"] for path in pair))
