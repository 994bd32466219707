"""A signal never leaves an update, a shrinking layer or a swap half written."""

from __future__ import annotations

import contextlib
import itertools
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch

from sparse_lightning import Sparsifier, densify, sparsify
from sparse_lightning.interrupts import deferred_signals
from tests.callbacks.helpers import assert_valid
from tests.callbacks.test_resume import assert_identical
from tests.loops import Net, adamw, batch, everything, make, sparse, train
from tests.test_sparsifier_faults import Averaged


class Interrupt:
    """Sends SIGINT at the n-th line that the package executes from the call of a function on.

    Attributes:
        where: name of the function that was interrupted; "" if there were fewer lines.
    """

    def __init__(self, n: int, starts_in: str) -> None:
        self.left, self.starts_in = n, starts_in
        self.has_started = False
        self.where = ""

    def __enter__(self) -> Interrupt:
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        if "/sparse_lightning/" not in frame.f_code.co_filename:
            return None
        self.has_started |= frame.f_code.co_name == self.starts_in
        is_comprehension = frame.f_code.co_name.startswith("<")
        if event == "line" and self.has_started and not self.where and not is_comprehension:
            self.left -= 1
            if self.left < 0:
                self.where = frame.f_code.co_name
                signal.raise_signal(signal.SIGINT)
        return self._trace


class Interrupted(Sparsifier):
    """Takes a snapshot after an update, which is interrupted at its n-th line.

    If it is not interrupted at all, it takes a snapshot before the update, too.
    """

    n = sys.maxsize

    def _update(self, *arguments: Any) -> None:
        if self.n == sys.maxsize:
            self.before = self.snapshot()
        self.interrupt = Interrupt(self.n, "deferred_signals")
        try:
            with self.interrupt:
                super()._update(*arguments)
        finally:
            self.after = self.snapshot()


def is_identical(a: Any, b: Any) -> bool:
    try:
        assert_identical(a, b)
    except AssertionError:
        return False
    return True


def test_an_update_is_written_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt arrives at each line in turn, from the first write on."""

    def update() -> tuple[Interrupted, list[int]]:
        options = {"density": 0.5, "drop": "movement", "update": {"every_n_steps": 2}}
        model, sparsifier = make(12, Interrupted, **options)
        assert isinstance(sparsifier, Interrupted)
        optimizer, averaged = adamw(model.parameters()), Averaged(model)
        sparsifier.snapshot = lambda: everything(
            model, [optimizer], sparsifier, average=averaged.average.state_dict()
        )
        sparsifier.attach(optimizer, copies=averaged.copies)
        train(model, optimizer, [0], lambda _: averaged.average.update_parameters(model))
        numbers: list[int] = []
        sparsifier.register_update_hook(lambda _, update: numbers.append(update.number))
        if sparsifier.n == sys.maxsize:
            train(model, optimizer, [1])
        else:
            with pytest.raises(KeyboardInterrupt):
                train(model, optimizer, [1])
        return sparsifier, numbers

    uninterrupted, _ = update()
    before, complete = uninterrupted.before, uninterrupted.after
    assert not is_identical(before["model"], complete["model"])
    written = {False: 0, True: 0}
    while True:
        monkeypatch.setattr(Interrupted, "n", sum(written.values()))
        sparsifier, numbers = update()
        is_written = bool(numbers)
        assert_identical(sparsifier.after, complete if is_written else before)
        written[is_written] += 1
        if sparsifier.interrupt.where == "_warn_of_unscored_layers":  # after the write
            break
    assert written[False] and written[True] > 50


def test_a_layer_shrinks_completely_or_not_at_all() -> None:
    falling = {"schedule": "linear", "initial": 1.0, "final": 0.25, "until": 2}
    shrunk = set()
    for n in itertools.count(0, 31):
        model, sparsifier = make(12, density=falling, update={"every_n_steps": 2})
        optimizer = adamw(model.parameters())
        sparsifier.attach(optimizer)
        train(model, optimizer, [0])
        interrupt = Interrupt(n, "_shrink_layer")
        with contextlib.suppress(KeyboardInterrupt), interrupt:
            train(model, optimizer, [1])
        shrunk.add(tuple(layer.topology.capacity for layer in sparsifier.layers.values()))
        for layer in sparsifier.layers.values():
            assert_valid(layer, optimizer, layer.topology.n_blocks)
        optimizer.zero_grad()
        train(model, optimizer, [2, 3])
        if not interrupt.where:
            break
    assert len(shrunk) == 3


@pytest.mark.parametrize("change", ["sparsify", "densify"])
def test_a_layer_is_swapped_completely_or_not_at_all(change: str) -> None:
    swapped = set()
    for n in itertools.count(0, 7):
        model = Net()
        expected = model(batch(0)[0])
        if change == "densify":
            sparsify(model, block_size=16, density=1.0)
        interrupt = Interrupt(n, "deferred_signals")
        with contextlib.suppress(KeyboardInterrupt), interrupt:
            sparsify(model, block_size=16, density=1.0) if change == "sparsify" else densify(model)
        swapped.add(len(sparse(model)))
        torch.testing.assert_close(model(batch(0)[0]), expected)
        if interrupt.where == "update_containers" or not interrupt.where:
            break
    assert swapped == {0, 1, 2}


def test_handlers_are_called_at_the_end_and_restored() -> None:
    calls: list[int] = []

    def handle(number: int, _: FrameType | None) -> None:
        calls.append(number)
        raise KeyError(number)

    signals = [signal.SIGINT, signal.SIGTERM]
    earlier = [signal.signal(number, handle) for number in signals]
    try:
        with pytest.raises(KeyError), deferred_signals():
            for number in signals:
                signal.raise_signal(number)
            assert not calls
        assert calls == signals  # both are called, although the first raises
        assert [signal.getsignal(number) for number in signals] == [handle, handle]
    finally:
        for number, handler in zip(signals, earlier, strict=True):
            signal.signal(number, handler)


def test_other_threads_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def run() -> None:
        with deferred_signals():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]
