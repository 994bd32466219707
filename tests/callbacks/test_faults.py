"""A fit that ran out of memory in an update can be saved and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

from sparse_lightning import SparsityCallback
from sparse_lightning.policy.criteria import gradient, magnitude, needs
from sparse_lightning.policy.rules import Decision, DropAndGrow, UpdateRequest
from tests.callbacks.helpers import Classifier, loader, trainer
from tests.callbacks.test_sparsity import sparse

OPTIONS: dict[str, Any] = {
    "block_size": 16,
    "density": {"schedule": "linear", "initial": 0.75, "final": 0.25, "until": 0.5},
    "update": {"every_n_steps": 5},
}


@needs("gradient")
class FailsOnce:
    """The default rule, which runs out of memory once, at the second update, if `fails`."""

    def __init__(self, fails: bool) -> None:
        self.fails, self.default = fails, DropAndGrow(magnitude, gradient)

    def __call__(self, request: UpdateRequest) -> Decision:
        decision = self.default(request)
        if self.fails and request.step == 10:
            self.fails = False
            raise torch.OutOfMemoryError("simulated")
        return decision


@pytest.mark.parametrize("average", [False, True])
def test_a_fit_that_ran_out_of_memory_can_be_saved_and_resumed(
    average: bool, tmp_path: Path
) -> None:
    def callbacks(fails: bool) -> tuple[SparsityCallback, ...]:
        averages = [EMAWeightAveraging(decay=0.9)] if average else []
        return SparsityCallback(rule=FailsOnce(fails), **OPTIONS), *averages

    fitting = trainer(*callbacks(True))
    failing = Classifier()
    with pytest.raises(torch.OutOfMemoryError):
        fitting.fit(failing, loader())
    assert not any(layer._is_locked or layer.armed for layer in sparse(failing).values())
    fitting.save_checkpoint(tmp_path / "failed.ckpt")
    sparsity, *averages = callbacks(False)
    model = Classifier()
    trainer(sparsity, *averages).fit(model, loader(), ckpt_path=tmp_path / "failed.ckpt")
    assert sparsity.last_update is not None and sparsity.last_update.step == 18
    assert sparsity.sparsifier is not None and sparsity.sparsifier.n_updates == 4
    assert [layer.topology.n_blocks for layer in sparse(model).values()] == [8, 8]
