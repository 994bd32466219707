"""Plans as text and on a terminal, and the remarks in their tables."""

from __future__ import annotations

import sys

import pytest

from sparse_lightning.planning import Check, Cost, Plan, PlannedLayer, Setting
from sparse_lightning.tables import Section, as_text, show

SECTIONS = [
    Section("First [bold]", ["layer", "size", "why"], [["up", "8", ""], ["a.b", "+10", "[red]"]]),
    Section("Second", remarks=["A remark."]),
]
TEXT = """First [bold]

| layer | size | why   |
|-------|-----:|-------|
| up    |    8 |       |
| a.b   |  +10 | [red] |

Second

A remark.
"""


def setting(block_size: int, density: float, speedup: float) -> Setting:
    step = 0.1 / speedup
    return Setting(1000, 1000, 16_000, 6000, step, block_size, density, speedup)


def plan(*settings: Setting, **keywords: object) -> Plan:
    return Plan(
        model="Net",
        layers={"blocks.0.up": PlannedLayer((64, 32), (16, 32), 1024)},
        skipped={},
        unfit={},
        precision="bf16-mixed",
        dense=Cost(4000, 4000, 64_000, 24_000, 0.1),
        settings=settings,
        **{"launch": 0.0, "measured": False, **keywords},
    )


def test_text_is_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{as_text(SECTIONS)}\n" == TEXT
    show(SECTIONS)
    assert capsys.readouterr().out == TEXT


def test_a_terminal_gets_the_same_by_rich(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show(SECTIONS)
    out = capsys.readouterr().out
    assert "┃" in out and "|" not in out
    assert all(text in out for text in ("First [bold]", "a.b", "+10", "[red]", "A remark."))


def test_a_terminal_without_rich(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    show(SECTIONS)
    assert capsys.readouterr().out == TEXT


def test_the_best_are_marked() -> None:
    best = setting(64, 0.1, 4.0)
    result = plan(setting(32, 0.5, 0.9), setting(64, 0.5, 1.1), setting(32, 0.1, 2.0), best)
    assert result.best is best
    marks = {(row[0], row[1]): row[-1] for row in result.sections()[1].rows if row[0] != "dense"}
    assert marks == {
        ("blocks of 32", "0.5"): "slower than dense",
        ("blocks of 64", "0.5"): "fastest at 0.5",
        ("blocks of 32", "0.1"): "",
        ("blocks of 64", "0.1"): "fastest",
    }


def test_remarks_name_the_source_and_bound_of_speedups() -> None:
    text = " ".join(str(plan(setting(32, 0.5, 1.2))).split())
    assert "by tables of kernels measured on such a GPU" in text
    assert "to launch a step" not in text and "No setting is expected" not in text
    text = " ".join(str(plan(setting(32, 0.5, 0.8), measured=True, launch=0.0123)).split())
    assert "measured one by one" in text and "12.3 ms to launch a step" in text
    assert "No setting is expected to be faster than dense" in text


def test_checks_show_the_error_of_the_expected_step() -> None:
    check = Check(32, 0.5, expected=0.045, measured=0.05)
    row = plan(setting(32, 0.5, 1.2), checks=[check]).sections()[-1].rows[0]
    assert row == ("blocks of 32", "0.5", "45.0 ms", "50.0 ms", "-10.0%", "2.00")
