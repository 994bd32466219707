"""A killed and resumed run ends like an uninterrupted one, bit for bit."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from sparse_lightning import SparsityCallback
from tests import processes
from tests.callbacks.helpers import Classifier, loader, trainer

STEPS = 24
EVERY = 5  # updates run after 5, 10, 15 and 18 steps


def sparsity(**kwargs: Any) -> SparsityCallback:
    return SparsityCallback(
        block_size=16,
        density={"schedule": "cubic", "initial": 0.75, "final": 0.25, "until": 0.7},
        update={"every_n_steps": EVERY},
        **kwargs,
    )


def run(
    root: Path,
    ckpt_path: Path | None = None,
    *extra: L.Callback,
    rules: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Train to the end, with a checkpoint after every step, and return the trainer."""
    checkpoint = ModelCheckpoint(
        root, filename="{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False
    )
    callbacks = [sparsity(**(rules or {})), *extra, checkpoint]
    fitting = trainer(
        *callbacks, root=root, enable_checkpointing=True, **{"max_steps": STEPS, **kwargs}
    )
    fitting.fit(Classifier(), loader(), ckpt_path=ckpt_path)
    return fitting


def final(root: Path) -> dict[str, Any]:
    checkpoint = torch.load(root / f"{STEPS}.ckpt", weights_only=True)
    callbacks = {k: v for k, v in checkpoint["callbacks"].items() if "Sparsity" in k}
    return {
        "state_dict": checkpoint["state_dict"],
        "optimizer": checkpoint["optimizer_states"][0]["state"],
        "callbacks": callbacks,
    }


def assert_identical(a: Any, b: Any, path: str = "") -> None:
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_identical(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_identical(*pair, f"{path}/{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("whole")
    run(root)
    return root


def test_checkpoint_holds_tensors_and_primitives_only(uninterrupted: Path) -> None:
    checkpoint = torch.load(uninterrupted / "5.ckpt", weights_only=True)
    state = checkpoint["callbacks"]["SparsityCallback"]
    (course,) = state["courses"]
    assert (course["steps"], state["n_updates"], course["next_update"]) == (5, 1, 10)
    assert any(pending.any() for pending in course["pending"].values()), (
        "grown slots have had no step yet"
    )


# 3: between updates; 4: right before an update; 5: right after one; 18: after the last one.
@pytest.mark.parametrize("cut", [3, 4, 5, 6, 10, 18, 21])
def test_resume_is_bit_exact(cut: int, uninterrupted: Path, tmp_path: Path) -> None:
    run(tmp_path, uninterrupted / f"{cut}.ckpt")
    assert_identical(final(tmp_path), final(uninterrupted))


def test_resume_under_an_average_is_bit_exact(tmp_path: Path) -> None:
    run(tmp_path / "whole", None, EMAWeightAveraging(decay=0.9))
    run(tmp_path / "cut", tmp_path / "whole" / "10.ckpt", EMAWeightAveraging(decay=0.9))
    assert_identical(final(tmp_path / "cut"), final(tmp_path / "whole"))


def test_resume_under_accumulation_is_bit_exact(tmp_path: Path) -> None:
    run(tmp_path / "whole", accumulate_grad_batches=2)
    run(tmp_path / "cut", tmp_path / "whole" / "10.ckpt", accumulate_grad_batches=2)
    assert_identical(final(tmp_path / "cut"), final(tmp_path / "whole"))


# Scores gathered over several steps are in the checkpoint too; released slots stay released.
@pytest.mark.parametrize("cut", [3, 8, 12, 16])
@pytest.mark.parametrize(
    "rules",
    [
        {"drop": "saliency", "grow": "momentum"},
        {"drop": "movement", "grow": "none", "distribution": "global"},
        {"drop": "gradient", "grow": "momentum", "regrow": False},
    ],
    ids=["saliency", "movement", "gradient"],
)
def test_resume_with_gathered_scores(rules: dict[str, Any], cut: int, tmp_path: Path) -> None:
    run(tmp_path / "whole", rules=rules)
    run(tmp_path / "cut", tmp_path / "whole" / f"{cut}.ckpt", rules=rules)
    assert_identical(final(tmp_path / "cut"), final(tmp_path / "whole"))
    assert len(final(tmp_path / "cut")["state_dict"]["net.0.values"]) < 24, "memory has shrunk"


@pytest.mark.parametrize("cut", [4, 5, 10])
def test_resume_of_two_of_four_is_bit_exact(cut: int, tmp_path: Path) -> None:
    """Right after an update, when weights within blocks and grown blocks are pending."""
    rules = {"nm": "2:4", "grow": "momentum"}
    run(tmp_path / "whole", rules=rules)
    state = torch.load(tmp_path / "whole" / f"{cut}.ckpt", weights_only=True)
    (course,) = state["callbacks"]["SparsityCallback"]["courses"]
    assert (cut != 4) == any(pending.any() for pending in course["pending"].values())
    run(tmp_path / "cut", tmp_path / "whole" / f"{cut}.ckpt", rules=rules)
    assert_identical(final(tmp_path / "cut"), final(tmp_path / "whole"))


def test_a_longer_training_moves_no_density(uninterrupted: Path, tmp_path: Path) -> None:
    fitting = run(tmp_path, uninterrupted / "10.ckpt", max_steps=2 * STEPS)
    callback = next(c for c in fitting.callbacks if isinstance(c, SparsityCallback))
    assert callback.timetable is not None
    assert callback.timetable.update_until == 18, "0.75 of the first 24 steps"
    assert callback.last_update is not None and callback.last_update.step == 18


@pytest.mark.parametrize("victim", [5, 8])
def test_a_killed_process_resumes(victim: int, uninterrupted: Path, tmp_path: Path) -> None:
    """SIGKILL comes after step `victim` and its update, before the checkpoint of this step."""
    done = processes.run(__file__, tmp_path, victim, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    last = max(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem))
    assert int(last.stem) == victim - 1
    run(tmp_path, last)
    assert_identical(final(tmp_path), final(uninterrupted))


class Kill(L.Callback):
    """Kills the process; listed before the checkpoint callback, so that the step is not saved."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    run(Path(sys.argv[1]), None, Kill())
