"""The page that compares runs in headless Chromium."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparse_lightning.history import HistoryWriter, read_history
from sparse_lightning.report import write_comparison

EVIL = "</script><b>fat</b>&amp;<img src=x onerror=alert(1)>"


def record(
    path: Path,
    seed: int,
    layers: dict[str, tuple[int, int]],
    updates: int = 4,
    *,
    metric: float | None = None,
    option: str = "x",
    nm: str | None = None,
) -> Path:
    generator = np.random.default_rng(seed)
    writer = HistoryWriter(path)
    config = {"config": {"density": seed / 10, "drop": option, "same": 1}}

    def masks() -> dict[str, np.ndarray]:
        return {name: generator.random(grid) < seed / 10 for name, grid in layers.items()}

    writer.start(0, masks(), dict.fromkeys(layers, 16), config, dict.fromkeys(layers, nm))
    for number in range(1, updates + 1):
        writer.update(100 * number, number, masks())
        if metric is not None:
            writer.metrics(100 * number, {"val_loss": metric / number, EVIL: 1.0 + seed})
    return path


@pytest.fixture
def histories(tmp_path: Path) -> dict[str, Path]:
    """Two runs with the same layers, one with another and a name that is HTML, and a bare start."""
    grids = {"up": (12, 5), "down": (5, 12)}
    return {
        "first": record(tmp_path / "1", 5, grids, metric=3.0),
        "second": record(tmp_path / "2", 2, grids, 7, metric=5.0),
        EVIL: record(tmp_path / "3", 10, {EVIL: (3, 3), "up": (4, 4)}, metric=1.0, option=EVIL),
        "bare": record(tmp_path / "4", 7, {"other": (2, 2)}, 0),
    }


@pytest.fixture
def compare(visit: Callable[..., Any], file: Path) -> Callable[..., Any]:
    """Opens the page of histories."""

    def open_page(histories: dict[str, Path], **options: Any) -> Any:
        write_comparison(histories, file, title=EVIL)
        page = visit(**options)
        for panel in page.locator(".panel").all():
            panel.scroll_into_view_if_needed()
        page.wait_for_function("panels.every((panel) => panel.drawn)")
        return page

    return open_page


def cells(page: Any) -> list[list[str]]:
    """The texts of the table."""
    rows = (
        "[...document.querySelectorAll('#runs tr')]"
        ".map((row) => [...row.cells].map((cell) => cell.innerText))"
    )
    return [[cell.replace("\xa0", " ") for cell in row] for row in page.evaluate(rows)]


def test_the_table_shows_what_differs_and_sorts(compare, histories: dict[str, Path]) -> None:
    page = compare(histories)
    header, *rows = cells(page)
    assert header == [
        "Run", "density", "drop", "Density", "Weights", "FLOPs", "Time", "last val_loss",
        "best val_loss",
    ]  # fmt: skip
    assert [row[0] for row in rows] == list(histories)
    assert [row[1] for row in rows] == ["0.5", "0.2", "1", "0.7"]
    assert [row[-2] for row in rows] == ["0.75", "0.7143", "0.25", "–"]
    assert rows[2][2] == EVIL and rows[3][6] == "–"  # a start alone has no duration
    masks = [layer.mask(-1) for layer in read_history(histories["first"]).layers.values()]
    density = f"{100 * sum(m.sum() for m in masks) / sum(m.size for m in masks):.1f}"
    assert rows[0][3] == f"{density.removesuffix('.0')} %"
    page.click("#runs th:nth-child(8) button")
    assert [row[0] for row in cells(page)[1:]] == ["first", "second", EVIL, "bare"]
    page.click("#runs th:nth-child(8) button")
    assert [row[0] for row in cells(page)[1:]] == ["bare", EVIL, "second", "first"]
    page.click("#runs th:nth-child(3) button")  # a text: not every run's is a number
    assert [row[2] for row in cells(page)[1:]][-1] == "x"


def test_a_pattern_within_blocks_is_told_in_a_comparison(compare, tmp_path: Path) -> None:
    runs = {str(nm): record(tmp_path / str(nm), 5, {"up": (4, 4)}, nm=nm) for nm in (None, "2:4")}
    page = compare({"None": runs["None"]})
    assert page.locator("#patterns").is_hidden()
    page = compare(runs)
    assert "take the time of whole blocks" in page.inner_text("#patterns")
    header, whole, half = cells(page)
    assert whole[header.index("Density")] == half[header.index("Density")]
    for column in ("weights", "flops"):
        assert page.evaluate(f"data.runs[1].{column} / data.runs[0].{column}") == 0.5
    shown = page.inner_text("#masks")
    assert "in blocks of 16 at 2:4" in shown and shown.count("in blocks of 16") == 2


def test_the_quality_is_shown_over_each_cost(compare, histories: dict[str, Path]) -> None:
    page = compare(histories)
    points = "panels[0].plot.data.map(({ x, y }) => [...x, ...y])"
    runs = page.evaluate("data.runs.map(({ density, flops, weights, seconds }) => "
                         "({ density, flops, weights, seconds }))")  # fmt: skip
    losses = [0.75, 0.714286, 0.25]
    for over in ("density", "flops", "weights", "seconds"):
        page.select_option("#over", over)
        page.wait_for_function("!panels[0].dirty")
        shown = [[run[over], loss] for run, loss in zip(runs, losses, strict=False)]
        assert page.evaluate(points) == [*shown, []]  # the fourth run has no metric
    assert page.inner_text("#chosen") == "1 of 4 runs without it"
    page.evaluate("panels[0].root.scrollIntoView()")
    page.select_option("#over", "density")
    page.wait_for_timeout(300)
    box = page.evaluate(
        "panels[0].plot.querySelectorAll('.points path')[1].getBoundingClientRect().toJSON()"
    )
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector(".hovertext:has-text('second')")


def test_another_metric(compare, histories: dict[str, Path]) -> None:
    page = compare(histories)
    page.select_option("#metric", EVIL)
    assert cells(page)[0][-1] == f"best {EVIL}"
    assert [row[-1] for row in cells(page)[1:]] == ["6", "3", "11", "–"]
    page.wait_for_function("panels.every((panel) => !panel.dirty || !panel.visible)")
    assert page.locator("#curves h3").first.inner_text() == EVIL
    assert "is the lowest" in page.inner_text("#best")


def test_names_hide_runs_and_rows_highlight_them(compare, histories: dict[str, Path]) -> None:
    page = compare(histories)
    page.evaluate("panels.forEach((panel) => { panel.visible = true; })")
    visible = "panels.map(({ plot }) => plot.data[1].visible)"
    page.click(".chip:has-text('second')")
    page.wait_for_function(f"{visible}.every((shown) => shown === false)")
    page.click(".chip:has-text('second')")
    page.wait_for_function(f"{visible}.every((shown) => shown === true)")
    page.click("#runs tbody tr:nth-child(2) td:nth-child(2)")
    page.wait_for_function(
        "panels.every(({ plot }) => plot.data[0].opacity < plot.data[1].opacity)"
    )
    assert page.get_attribute("#runs tbody tr:nth-child(2)", "aria-selected") == "true"
    page.click("#runs tbody tr:nth-child(2) button")
    page.wait_for_function("panels.every(({ plot }) => plot.data[0].opacity === 1)")
    assert page.locator("#runs tr[aria-selected=true]").count() == 0


def test_curves_have_every_run(compare, histories: dict[str, Path]) -> None:
    page = compare(histories)
    titles = page.locator("#curves h3").all_inner_texts()
    assert titles == ["val_loss", "Density", "Churn"]
    lengths = page.evaluate("panels.slice(1).map(({ plot }) => plot.data.map(({ x }) => x.length))")
    assert lengths == [[4, 7, 4, 0], [5, 8, 5, 1], [4, 7, 4, 0]]


def test_masks_are_side_by_side_at_every_place_of_the_slider(
    compare, histories: dict[str, Path]
) -> None:
    page = compare(histories)
    for name, frames in (("up", 3), ("down", 2), ("other", 1), (EVIL, 1)):
        page.select_option("#layer", name)
        page.wait_for_function("name => figures.length && state.layer === name", arg=name)
        page.wait_for_function(f"document.querySelectorAll('#masks canvas').length === {frames}")
        assert page.locator("#masks figure").count() == 4
        assert page.locator("text=no block-sparse layer").count() == 4 - frames
        for place in (40, 20, 0):
            page.locator("#slider").fill(str(place))
            shown = page.evaluate("figures.map(({ masks }) => masks && [...masks.mask])")
            for path, mask in zip(histories.values(), shown, strict=True):
                known = read_history(path)
                if name not in known.layers:
                    assert mask is None
                    continue
                step = place / 40 * known.frames[-1].step
                frame = sum(frame.step <= step for frame in known.frames) - 1
                assert mask == known.layers[name].mask(frame).reshape(-1).astype(int).tolist()
    assert page.inner_text("#when") == "at the start"


def test_names_are_text(compare, histories: dict[str, Path]) -> None:
    page = compare(histories)
    assert page.inner_text("#title") == EVIL
    assert page.locator("b:text-is('fat'), img").count() == 0
    assert EVIL in page.locator("#lines-shown").inner_text()


def test_without_a_metric_there_is_a_sentence(compare, tmp_path: Path) -> None:
    page = compare({name: record(tmp_path / name, 5, {"a": (2, 2)}) for name in "ab"})
    assert "No run logged a metric" in page.inner_text("main")
    assert not page.is_visible("#bar") and not page.is_visible("#over")
    assert page.locator("#curves h3").all_inner_texts() == ["Density", "Churn"]
    assert cells(page)[0] == ["Run", "Density", "Weights", "FLOPs", "Time"]


def test_a_damaged_run_is_named(compare, histories: dict[str, Path]) -> None:
    path = histories["second"]
    path.write_bytes(path.read_bytes()[:-1])
    page = compare(histories)
    assert page.inner_text("#gaps").startswith("second: Records are damaged or missing after step")


def test_light_and_dark(compare, histories: dict[str, Path]) -> None:
    page = compare(histories, color_scheme="dark")
    paper = "getComputedStyle(document.body).backgroundColor"
    pixels = "figures[0].canvas.toDataURL()"
    assert page.evaluate(paper) == "rgb(17, 21, 27)"
    dark = page.evaluate(pixels)
    page.click("#theme")
    assert page.evaluate(paper) == "rgb(251, 250, 247)" and page.evaluate(pixels) != dark


@pytest.mark.parametrize("width", [390, 320])
def test_only_the_table_is_wider_than_a_phone(
    compare, histories: dict[str, Path], width: int
) -> None:
    scroll_width = "document.documentElement.scrollWidth"
    short = {name: histories[name] for name in ("first", "second")}
    assert compare(short, width=width, height=844, phone=True).evaluate(scroll_width) == width
    page = compare(histories, width=width, height=844, phone=True)
    assert page.evaluate(scroll_width) == width
    box = "document.querySelector('#runs').parentElement"
    assert page.evaluate(f"{box}.scrollWidth > {box}.clientWidth")
    page.evaluate(f"{box}.scrollLeft = 1e4")
    name = page.locator("#runs tbody tr:first-child td:first-child").bounding_box()
    assert 0 <= name["x"] < width / 4  # the name of a run stays in view


def test_a_printed_comparison_holds_everything(
    visit: Callable[..., Any], file: Path, histories: dict[str, Path]
) -> None:
    write_comparison(histories, file, title="sweep")
    page = visit(width=1000, height=300, color_scheme="dark")
    page.evaluate(
        """() => addEventListener("beforeprint", () => {
            const { right } = document.querySelector("main").getBoundingClientRect();
            window.paper = {
                curves: panels.map(({ plot }) => plot.querySelectorAll(".trace").length),
                inside: [...document.querySelectorAll(".js-plotly-plot .main-svg, table")]
                    .every((e) => e.getBoundingClientRect().right <= right + 1),
                theme: theme(),
            };
        })"""
    )
    page.pdf(format="A4")
    paper = page.evaluate("paper")
    assert len(paper["curves"]) == 4 and all(paper["curves"]) and paper["inside"]
    assert paper["theme"] == "light" and page.evaluate("theme()") == "dark"


def test_the_note_on_the_masks_is_on_their_sheet_of_paper(
    compare, sheets, histories: dict[str, Path]
) -> None:
    page = compare(histories)
    for space in range(0, 600, 30):
        (note,) = [s for s in sheets(page, "#masks-head", space) if "Each pixel is a block" in s]
        assert "just dropped" in note and "the previous place of the slider" in " ".join(
            note.split()
        )
