"""A training whose updates cannot change a block says so at its start, with what helps."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from sparse_lightning import Sparsifier, SparsityCallback
from sparse_lightning.policy.rules import Decision, UpdateRequest
from tests.callbacks.helpers import Classifier, loader, trainer
from tests.loops import adamw, make, train

STEPS = 24
FALLING = {"schedule": "cubic", "initial": 1.0, "final": 0.25, "until": 0.5}


def keep(request: UpdateRequest) -> Decision:
    return Decision({})


def by_sparsifier(**options: Any) -> Sparsifier:
    model, sparsifier = make(options.pop("steps", STEPS), **options)
    optimizer = adamw(model.parameters())
    sparsifier.attach(optimizer)
    train(model, optimizer, range(sparsifier.total_steps or STEPS))
    return sparsifier


def by_callback(**options: Any) -> Sparsifier:
    steps = options.pop("steps", STEPS)
    callback = SparsityCallback(block_size=16, exclude=["head"], **options)
    trainer(callback, max_steps=steps).fit(Classifier(), loader())
    assert callback.sparsifier is not None
    return callback.sparsifier


def said(run: Any, **options: Any) -> tuple[list[str], int]:
    """Return the warnings of updates that change nothing, and how many blocks updates changed."""
    changed = []
    register = Sparsifier.attach

    def attach(self: Sparsifier, *args: Any, **kwargs: Any) -> None:
        self.register_update_hook(
            lambda _, update: changed.extend(len(u.changed) for u in update.layers.values())
        )
        register(self, *args, **kwargs)

    with warnings.catch_warnings(record=True) as caught, pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("always")
        patch.setattr(Sparsifier, "attach", attach)
        run(**options)
    texts = [str(warning.message) for warning in caught]
    return [text for text in texts if text.startswith("No topology update")], sum(changed)


@pytest.mark.parametrize("run", [by_sparsifier, by_callback])
@pytest.mark.parametrize(
    ("options", "reason", "remedy"),
    [
        ({}, "the only one is after step 18 of 24", "smaller `update.every_n_steps`"),
        ({"update": {"every_n_steps": 17}}, "the first one is after step 17 of 24", "smaller"),
        ({"update": {"until": 100}}, "the only one is after step 24 of 24", "smaller"),
        ({"update": {"times": [18]}}, "the only one is after step 18", "earlier `update.times`"),
        (
            {"update": {"every_n_steps": 2}, "drop_fraction": 0.02},
            "at most 2 % of a layer's blocks",
            "Set a larger `drop_fraction` or a smaller `block_size`",
        ),
        (
            {"update": {"every_n_steps": 2}, "grow": "none"},
            r"density is constant \(0.25\) and `grow` is 'none'",
            "set `density.final` in place",
        ),
    ],
)
def test_a_training_that_cannot_change_a_block_warns(
    run: Any, options: dict[str, Any], reason: str, remedy: str
) -> None:
    (text,), changed = said(run, **options)
    assert changed == 0, "the warning is right"
    assert re.search(reason, text), text
    assert remedy in text
    assert text.endswith("If the blocks are to stay, set `drop_fraction=0`.")


def test_the_interval_that_it_names_exchanges_blocks() -> None:
    fraction = {"initial": 0.2}
    (text,), _ = said(by_sparsifier, drop_fraction=fraction)
    found = re.search(r"such as (\d+)", text)
    assert found is not None
    update = {"every_n_steps": int(found[1])}
    assert said(by_sparsifier, drop_fraction=fraction, update=update)[1] > 0


def test_transformers_trainer_warns_too(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    from sparse_lightning.integrations import SparsityTrainerCallback
    from tests.integrations.helpers import Net
    from tests.integrations.test_transformers import trainer as trainer_of_transformers

    def run(**options: Any) -> None:
        callback = SparsityTrainerCallback(block_size=16, exclude=["head"], **options)
        trainer_of_transformers(tmp_path, Net(), callback, max_steps=8).train()

    assert said(run)[0][0].count("the only one is after step 6 of 8") == 1


@pytest.mark.parametrize(
    "options",
    [
        {"update": {"every_n_steps": 2}, "drop_fraction": 0.2},
        {"density": FALLING, "grow": "none", "update": {"every_n_steps": 2}},
        {"drop_fraction": 0},
        {"drop_fraction": 0, "grow": "none"},
        {"drop_fraction": {"initial": 0.0}, "grow": "none"},
        {"density": 1.0},
        {"rule": keep},
        {"update": {"begin": 100, "until": 200}},
        {"steps": 1},
    ],
    ids=" ".join,  # the names of the options
)
@pytest.mark.parametrize("run", [by_sparsifier, by_callback])
def test_it_is_silent_if_blocks_change_or_are_to_stay(run: Any, options: dict[str, Any]) -> None:
    assert said(run, **options)[0] == []


def test_steps_of_an_unknown_length_are_judged_by_the_updates() -> None:
    (text,), _ = said(by_sparsifier, steps=None, update={"until": 18})
    assert "the only one is after step 18, and" in text


@pytest.mark.parametrize("density", [0.5, 1.0])
def test_an_exchange_of_weights_within_blocks_counts(density: float) -> None:
    (text,), _ = said(by_sparsifier, density=density, nm="2:4", update={"every_n_steps": 100})
    assert re.search(r"drop fraction has fallen to 0.*every_n_steps`, such as \d", text)
    texts, _ = said(by_sparsifier, density=density, nm="2:4", update={"every_n_steps": 4})
    assert not texts
