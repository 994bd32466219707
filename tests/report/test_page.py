"""The page in headless Chromium: all controls work, and the page shows what the history holds."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparse_lightning.history import History, HistoryWriter, read_history
from sparse_lightning.report import write_report

Image = pytest.importorskip("PIL.Image")

EVIL = "</script><b>fat</b>&amp;<img src=x onerror=alert(1)>"
GRIDS = {"fc.0": (12, 5), "fc.1": (5, 12), EVIL: (3, 3), "one": (1, 1)}
UPDATES = 9


@pytest.fixture
def show(visit: Callable[..., Any], file: Path) -> Callable[..., Any]:
    """Opens the page of a history."""

    def open_page(history: Path, **options: Any) -> Any:
        write_report(history, file)
        return visit(**options)

    return open_page


def record(
    path: Path,
    grids: dict[str, tuple[int, int]],
    updates: int,
    *,
    moves: bool = True,
    metrics: bool = True,
    nm: str | None = None,
) -> Path:
    generator = np.random.default_rng(0)
    now = {name: generator.random(grid) < 0.5 for name, grid in grids.items()}
    writer = HistoryWriter(path)
    about = {"torch": EVIL, "config": {"seed": 3}}
    writer.start(0, now, dict.fromkeys(grids, 16), about, dict.fromkeys(grids, nm))
    for number in range(1, updates + 1):
        if moves:
            now = {n: m ^ (generator.random(m.shape) < 0.2) for n, m in now.items()}
        writer.update(100 * number, number, now)
        if number % 3 == 2:
            writer.scores({n: generator.random(m.shape).astype(np.float32) for n, m in now.items()})
        if metrics:
            loss = float("nan") if number == 2 else 1 / number
            writer.metrics(100 * number, {"train_loss": loss, "val_loss": 2.0, EVIL: 1.0})
    return path


@pytest.fixture
def history(tmp_path: Path) -> Path:
    return record(tmp_path / "run" / "pattern.history", GRIDS, UPDATES)


def text(page: Any, selector: str) -> str:
    return page.inner_text(selector).replace("\xa0", " ")


def point_at(page: Any, grid: tuple[int, int], row: int, column: int, touch: bool = False) -> None:
    """Point at the middle of a block; tall masks are drawn transposed."""
    transposed = grid[0] > grid[1]
    x, y = (row, column) if transposed else (column, row)
    page.locator("#mask").scroll_into_view_if_needed()
    box = page.locator("#mask").bounding_box()
    width, height = (grid[0], grid[1]) if transposed else (grid[1], grid[0])
    point = (
        box["x"] + (x + 0.5) * box["width"] / width,
        box["y"] + (y + 0.5) * box["height"] / height,
    )
    (page.touchscreen.tap if touch else page.mouse.move)(*point)


def truth(history: History, name: str, frame: int, row: int, column: int) -> str:
    """The expected readout of a block."""
    layer = history.layers[name]
    seen = [bool(layer.mask(i)[row, column]) for i in range(frame + 1)]
    changes = [i for i in range(1, frame + 1) if seen[i] != seen[i - 1]]
    since = history.frames[changes[-1] if changes else 0].step
    state = "present" if seen[-1] else "absent"
    parts = [
        f"{state} since step {since:,}" if changes else f"{state} from the start",
        f"for {history.frames[frame].step - since:,} steps",
    ]
    if seen[-1]:
        scored = [i for i in layer.scores if i <= frame]
        score = layer.scores[scored[-1]][row, column] if scored else np.nan
        step = history.frames[scored[-1]].step if scored else 0
        parts.append(
            "not scored"
            if np.isnan(score)
            else f"score {float(f'{score:.4g}'):g} (at step {step:,})"
        )
    grown = sum(seen[i] for i in changes)
    times = [f"{n} time{'' if n == 1 else 's'}" for n in (grown, len(changes) - grown)]
    parts.append(f"grown {times[0]}, dropped {times[1]}")
    size = layer.block_size
    where = (
        f"Block {row}, {column} · outputs {row * size:,}–{(row + 1) * size - 1:,}, "
        f"inputs {column * size:,}–{(column + 1) * size - 1:,}"
    )
    return f"{where}\n{' · '.join(parts)}"


@pytest.mark.slow
def test_the_readout_shows_the_history_of_a_block(show, history: Path) -> None:
    page, known = show(history), read_history(history)
    for index, (name, grid) in enumerate(GRIDS.items()):
        page.click(f".tile[data-layer='{index}']")
        assert text(page, "#layer-name") == name
        for frame in (0, 4, UPDATES, 3):
            page.evaluate("frame => showFrame(frame)", frame)
            mask = known.layers[name].mask(frame)
            assert text(page, "#layer-state").startswith(f"{mask.sum()} of {mask.size} blocks")
            for row, column in {(0, 0), (grid[0] - 1, grid[1] - 1), (grid[0] // 2, grid[1] // 3)}:
                page.mouse.move(0, 0)
                point_at(page, grid, row, column)
                assert text(page, "#readout") == truth(known, name, frame, row, column)


def test_the_animation_shows_every_mask(show, history: Path) -> None:
    page, known = show(history), read_history(history)
    is_present = """() => {
        const { width, height } = animation();
        const copy = new OffscreenCanvas(width, height).getContext("2d");
        copy.drawImage(document.getElementById("mask"), 0, 0);
        const data = [...copy.getImageData(0, 0, width, height).data];
        const pixels = data.flatMap((_, i) => i % 4 ? [] : [data.slice(i, i + 3).join()]);
        const shown = ["kept", "grown"].map((name) => rgb(style[name]).join());
        return pixels.map((pixel) => shown.includes(pixel));
    }"""
    for index, (name, grid) in enumerate(GRIDS.items()):
        page.click(f".tile[data-layer='{index}']")
        for frame in (*range(UPDATES + 1), 2, 7, 0):
            page.evaluate("frame => showFrame(frame)", frame)
            mask = known.layers[name].mask(frame)
            shown = np.array(page.evaluate(is_present))
            assert (shown == (mask.T if grid[0] > grid[1] else mask).reshape(-1)).all()


def test_play_pause_and_the_slider(show, history: Path) -> None:
    page = show(history)
    assert text(page, "#when") == "step 0 · start"
    page.select_option("#speed", "20")
    page.click("#play")
    assert text(page, "#play") == "Pause"
    page.wait_for_function("state.frame >= 2")
    page.click("#play")
    frame = page.evaluate("state.frame")
    page.wait_for_timeout(200)
    assert page.evaluate("state.frame") == frame and text(page, "#play") == "Play"
    page.click("#play")
    page.wait_for_function(f"state.frame === {UPDATES} && !state.playing")
    assert text(page, "#when") == f"step {100 * UPDATES} · update {UPDATES}"
    page.click("#play")  # at the end, play starts over
    page.wait_for_function(f"state.frame < {UPDATES}")
    page.locator("#slider").fill("5")
    assert text(page, "#when") == "step 500 · update 5" and not page.evaluate("state.playing")


def test_keys(show, history: Path) -> None:
    page, known = show(history), read_history(history)
    for key, frame, layer in (
        ("ArrowRight", 1, 0),
        ("ArrowRight", 2, 0),
        ("ArrowLeft", 1, 0),
        ("ArrowDown", 1, 1),
        ("ArrowDown", 1, 2),
        ("ArrowUp", 1, 1),
    ):
        page.keyboard.press(key)
        assert page.evaluate("[state.frame, state.layer]") == [frame, layer]
    page.focus("#slider")
    page.keyboard.press("ArrowUp")
    assert page.evaluate("[state.frame, state.layer]") == [1, 0]
    page.keyboard.press("Space")
    page.wait_for_function("state.frame > 1")
    page.keyboard.press("Space")
    assert not page.evaluate("state.playing")
    page.evaluate("showFrame(4)")
    # 'fc.0' is drawn transposed: the right arrow moves to the next row.
    page.focus("#sheet")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft"):
        page.keyboard.press(key)
    assert page.evaluate("[state.frame, state.layer]") == [4, 0]
    assert text(page, "#readout") == truth(known, "fc.0", 4, 1, 1)
    for _ in range(20):
        page.keyboard.press("ArrowRight")
    assert text(page, "#readout") == truth(known, "fc.0", 4, 11, 1)
    page.keyboard.press("Escape")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("[state.frame, state.cell]") == [5, None]


def test_every_control_is_reached_by_tab(show, history: Path) -> None:
    page = show(history, width=1000)
    seen = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        focused = "document.activeElement"
        seen |= set(page.evaluate(f"[{focused}.id, ...{focused}.classList]"))
        outline = page.evaluate(
            "(({nextElementSibling: next}) => [document.activeElement, next].some((e) => e &&"
            " getComputedStyle(e).outlineStyle !== 'none'))(document.activeElement)"
        )
        assert outline or page.evaluate("document.activeElement === document.body")
    assert {"theme", "play", "slider", "speed", "sheet", "larger", "tile", "chip"} <= seen


def test_colours_of_age_and_score(show, history: Path) -> None:
    page = show(history)
    pixels = "document.getElementById('mask').toDataURL()"
    page.evaluate("showFrame(5)")
    pictures = {page.evaluate(pixels)}
    page.click(".segmented span:text-is('age')")
    pictures.add(page.evaluate(pixels))
    assert "900 steps old" in text(page, "#legend")
    page.click(".segmented span:text-is('score')")
    pictures.add(page.evaluate(pixels))
    assert len(pictures) == 3
    assert "scores at step 500" in text(page, "#legend")
    page.evaluate("showFrame(1)")
    assert "No block has been scored" in text(page, "#legend")


def test_the_mask_is_enlarged(show, history: Path) -> None:
    page = show(history, width=1000)
    page.click(".tile[data-layer='1']")
    width = page.locator("#mask").bounding_box()["width"]
    page.click("#larger")
    assert page.locator("#mask").bounding_box()["width"] == 2 * width
    page.click("#smaller")
    assert page.locator("#mask").bounding_box()["width"] == width
    assert page.is_disabled("#smaller")


def test_the_table_sorts_and_selects(show, history: Path) -> None:
    page, known = show(history), read_history(history)
    names = (
        "[...document.querySelectorAll('#layers tbody tr td:first-child')].map(c => c.innerText)"
    )
    assert page.evaluate(names) == list(GRIDS)
    densities = {name: layer.mask(-1).mean() for name, layer in known.layers.items()}
    page.click("#layers th:nth-child(5) button")
    assert page.evaluate(names) == sorted(GRIDS, key=lambda n: -densities[n])
    page.click("#layers th:nth-child(5) button")
    assert page.evaluate(names) == sorted(GRIDS, key=lambda n: densities[n])
    assert page.get_attribute("#layers th:nth-child(5)", "aria-sort") == "ascending"
    page.click("#layers th:nth-child(1) button")
    assert page.evaluate(names)[1:] == ["fc.0", "fc.1", "one"]
    page.click("#layers tbody tr:has-text('fc.1') td:nth-child(3)")
    assert text(page, "#layer-name") == "fc.1"
    assert page.get_attribute(".tile[data-layer='1']", "aria-pressed") == "true"
    assert page.locator("#layers tr[aria-selected=true]").inner_text().startswith("fc.1")


def test_curves_follow_the_frame_and_clicks_go_to_a_frame(show, history: Path) -> None:
    page = show(history)
    for panel in page.locator(".panel").all():
        panel.scroll_into_view_if_needed()
        page.wait_for_timeout(50)
    page.wait_for_function("panels.every((panel) => panel.drawn)")
    titles = page.locator(".panel h3").all_inner_texts()
    assert titles[:4] == ["Density", "Churn", "Survival", "Ever active (Rs)"]
    assert "loss" in titles and EVIL in titles
    loss = "panels.find((panel) => panel.root.innerText.startsWith('loss'))"
    # A NaN loss leaves a gap.
    assert page.evaluate(f"{loss}.plot.data[0].y")[:3] == [1.0, None, 0.333333]
    assert page.evaluate(f"{loss}.plot.data.map((line) => line.name)") == ["train_loss", "val_loss"]
    page.evaluate(f"{loss}.root.scrollIntoView()")
    where = f"{loss}.now.getBoundingClientRect().x"
    page.wait_for_function(f"{loss}.visible")
    page.keyboard.press("ArrowRight")
    before = page.evaluate(where)
    page.keyboard.press("ArrowRight")
    assert page.evaluate(where) > before
    # The line is at the position of that step; the second step has no point.
    point = "plot.querySelector('.points path:nth-child({})').getBoundingClientRect().toJSON()"
    page.keyboard.press("ArrowRight")
    box = page.evaluate(f"(({{plot}}) => {point.format(2)})({loss})")
    assert abs(page.evaluate(where) + 0.75 - box["x"] - box["width"] / 2) < 1.5
    box = page.evaluate(f"(({{plot}}) => {point.format(7)})({loss})")
    point = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(point[0], point[1] - 1)
    page.wait_for_timeout(200)
    page.mouse.click(*point)
    page.wait_for_function("state.frame === 8")
    # Its legend hides a line.
    page.locator(".panel", has_text="train_loss").locator(".legendtoggle").first.click()
    page.wait_for_function(f"{loss}.plot._fullData[0].visible === 'legendonly'")


def test_the_legend_of_all_layers(show, history: Path) -> None:
    page = show(history)
    page.locator("#curves .panel").first.scroll_into_view_if_needed()
    page.wait_for_function("panels[0].drawn")
    visible = "panels[0].plot.data.map((line) => line.visible)"
    chip = page.locator(".chips").get_by_role("button", name="fc.1", exact=True)
    assert page.evaluate(visible) == [True] * 5
    chip.click()
    page.wait_for_function(f"{visible}[2] === false")
    assert chip.get_attribute("aria-pressed") == "false"
    chip.click()
    page.wait_for_function(f"{visible}[2] === true")


def test_many_repeated_layers_share_names_and_rows(show, tmp_path: Path) -> None:
    kinds = {"up": (4, 2), "down": (2, 4)}
    grids = {f"blocks.{i}.{kind}": grid for i in range(13) for kind, grid in kinds.items()}
    page = show(record(tmp_path / "h", {**grids, "other": (2, 2)}, 2))
    names = ["blocks.*.up (13 layers)", "blocks.*.down (13 layers)", "other"]
    assert page.locator(".chip").all_inner_texts() == ["all layers", *names]
    rows = page.locator("#layers tbody tr")
    assert page.locator("#layers td button").all_inner_texts() == names
    assert rows.nth(1).locator("td").nth(3).inner_text().endswith(f"of {13 * 8}")
    # A name shows and hides the lines of its layers, in addition to all layers' and the chosen one.
    page.locator("#curves .panel").first.scroll_into_view_if_needed()
    page.wait_for_function("panels[0].drawn")
    lines = "panels[0].plot.data.filter((line) => line.visible).length"
    assert page.evaluate(lines) == 2
    page.click(".chip:has-text('blocks.*.down')")
    page.wait_for_function(f"{lines} === 15")
    # A row stands for its first layer until there is a row for each.
    rows.nth(1).click()
    assert page.inner_text("#layer-name") == "blocks.0.down"
    assert rows.nth(1).get_attribute("aria-selected") == "true"
    page.get_by_label("A row for each").check()
    assert page.locator("#layers td button").all_inner_texts() == [*grids, "other"]
    rows.nth(3).click()
    page.get_by_label("A row for each").uncheck()
    assert page.inner_text("#layer-name") == "blocks.1.down"
    assert rows.nth(1).get_attribute("aria-selected") == "true" and rows.count() == 3
    # On paper, which cannot be asked for more, each layer has its row.
    page.evaluate(
        """() => addEventListener("beforeprint", () => {
            window.printed = document.querySelectorAll("#layers tbody tr").length;
        })"""
    )
    page.pdf(format="A4")
    assert page.evaluate("printed") == 27 and rows.count() == 3


@pytest.mark.parametrize("nm", [None, "2:4"])
def test_a_pattern_within_blocks_is_told(show, tmp_path: Path, nm: str | None) -> None:
    page = show(record(tmp_path / "h", {"up": (2, 2), "down": (3, 1)}, 2, moves=False, nm=nm))
    lede, table = text(page, "#lede"), text(page, "#layers")
    history = read_history(tmp_path / "h")
    present = [int(layer.mask(-1).sum()) for layer in history.layers.values()]
    kept = 256 if nm is None else 128
    assert f"{sum(present) * kept} of 1.79K dense" in text(page, "#facts")
    row = page.evaluate("[...document.querySelectorAll('#layers tbody tr')[0].cells]"
                        ".map((cell) => cell.innerText.replace('\\xa0', ' '))")  # fmt: skip
    density = f"{100 * present[0] / 4:g} %"
    if nm is None:
        assert "2:4" not in lede + table + text(page, "#readout") and "Weight density" not in table
        assert row[2:5] == ["16", f"{present[0]} of 4", density]
        return
    assert f"The density stayed at {100 * sum(present) / 7:.1f} %" in lede
    assert f"the share of weights stayed at {50 * sum(present) / 7:.1f} %" in lede
    assert "Weight density" in table
    assert row[2:6] == ["16 at 2:4", f"{present[0]} of 4", density, f"{50 * present[0] / 4:g} %"]
    assert "two of each four in a row are kept (2:4)" in text(page, "#readout")


def test_light_and_dark(show, history: Path) -> None:
    page = show(history, color_scheme="dark")
    paper = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(paper) == "rgb(17, 21, 27)"
    page.emulate_media(color_scheme="light")
    page.wait_for_function(f"{paper} === 'rgb(251, 250, 247)'")
    absent = page.evaluate("palette.absent")
    page.click("#theme")
    assert page.evaluate(paper) == "rgb(17, 21, 27)" and page.evaluate("palette.absent") != absent
    page.emulate_media(color_scheme="dark")
    page.click("#theme")
    assert page.evaluate(paper) == "rgb(251, 250, 247)"


def test_names_are_text(show, history: Path) -> None:
    page = show(history)
    page.click(".tile[data-layer='2']")
    page.locator("#metrics").scroll_into_view_if_needed()
    page.wait_for_timeout(300)
    assert page.locator("b:has-text('fat'), img").count() == 0
    for selector in (
        "#layer-name",
        ".tile[data-layer='2'] .name",
        "#layers tr:nth-child(3) button",
    ):
        assert page.inner_text(selector) == EVIL
    assert EVIL in page.inner_text("#made")
    page.click("summary")
    assert page.inner_text("#config") == "seed\n3"


@pytest.mark.parametrize("width", [390, 320])
def test_nothing_is_wider_than_a_phone(show, history: Path, width: int) -> None:
    page = show(history, width=width, height=844, phone=True)
    known = read_history(history)
    for panel in page.locator(".panel").all():
        panel.scroll_into_view_if_needed()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.locator(".tile[data-layer='1']").tap()
    page.evaluate("scrollTo(0, 0), showFrame(6)")
    point_at(page, GRIDS["fc.1"], 3, 7, touch=True)
    assert text(page, "#readout") == truth(known, "fc.1", 6, 3, 7)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_shadows_show_that_the_table_scrolls_on_a_phone(show, history: Path, scheme: str) -> None:
    """Where the table goes on beyond an edge, that edge has another colour than the page."""
    page = show(history, width=390, height=844, phone=True, color_scheme=scheme)
    table = page.locator(".scroll")
    room, width = page.evaluate("(({clientWidth, scrollWidth}) => [clientWidth, scrollWidth])"
                                "(document.querySelector('.scroll'))")  # fmt: skip
    assert width > room

    def edges_with_shadow(scrolled: int) -> list[bool]:
        page.evaluate("x => { document.querySelector('.scroll').scrollLeft = x; }", scrolled)
        image = Image.open(io.BytesIO(table.screenshot())).convert("RGB")
        paper = image.getpixel((image.width // 2, 3))
        return [image.getpixel((x, 3)) != paper for x in (1, image.width - 2)]

    page.add_style_tag(content="td, th { visibility: hidden; }")
    assert edges_with_shadow(0) == [False, True]
    assert edges_with_shadow(100) == [True, True]
    assert edges_with_shadow(width) == [True, False]


def test_a_printed_page_holds_everything(show, history: Path) -> None:
    page = show(history, width=1000, color_scheme="dark")
    page.click(".tile[data-layer='1']")
    page.evaluate("showFrame(3)")
    page.click("#larger")
    # What the page is like on paper is read right after the browser has asked for it.
    page.evaluate(
        """() => addEventListener("beforeprint", () => {
            const { right } = document.querySelector("main").getBoundingClientRect();
            const inside = [...document.querySelectorAll(".js-plotly-plot .main-svg, #mask, table")]
                .every((e) => e.getBoundingClientRect().right <= right + 1);
            const copies = tiles.map(({ canvas, index }) => {
                const { width, height } = animations[index];
                return canvas.width === width && canvas.height === height;
            });
            window.paper = {
                curves: panels.map(({ plot }) => plot.querySelectorAll(".trace").length),
                inside, copies, theme: theme(), frame: state.frame, config: $("about").open,
                shown: ["#play", ".tools", ".chips"].map((part) =>
                    getComputedStyle(document.querySelector(part)).display),
            };
        })"""
    )
    screen = page.locator("#mask").bounding_box()["width"]
    pdf = page.pdf(format="A4")
    paper = page.evaluate("paper")
    assert len(paper["curves"]) > 6 and all(paper["curves"]), "the curves below the fold are drawn"
    assert all(paper["copies"]) and paper["inside"] and paper["config"]
    assert (paper["theme"], paper["frame"]) == ("light", 3)
    assert paper["shown"] == ["none"] * 3
    assert len(pdf) > 50_000
    # Afterwards the screen is as before.
    assert page.evaluate("[theme(), $('about').open, state.frame]") == ["dark", False, 3]
    assert page.locator("#mask").bounding_box()["width"] == screen
    page.locator(".panel").first.scroll_into_view_if_needed()
    page.wait_for_function(
        "panels[0].plot.querySelector('.main-svg').clientWidth === panels[0].plot.clientWidth"
    )


def test_what_belongs_together_is_on_one_sheet_of_paper(show, sheets, tmp_path: Path) -> None:
    page = show(record(tmp_path / "h", {"up": (12, 16), "down": (16, 12)}, 4))
    for space in range(0, 700, 100):
        printed = sheets(page, "header", space)
        (head,) = [sheet for sheet in printed if "grown in this frame" in sheet]
        assert re.search(r"up +\d+ of 192 blocks", head), "the mask has its legend"
        (layers,) = [sheet for sheet in printed if "At the last frame" in sheet]
        assert re.search(r"up +192×256", layers), "the table has its title"
    # Neither the table nor a sentence in place of a plot leaves a sheet mostly empty.
    assert len(sheets(page, "header", 0)) == 3


def test_names_of_repeated_layers_are_shown_whole_and_break_at_dots(show, tmp_path: Path) -> None:
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(12)]
    page = show(record(tmp_path / "h", dict.fromkeys(names, (4, 4)), 2))
    for selector in (".tile .name", "#layers td button"):
        assert page.locator(selector).all_inner_texts() == names
    cut, dots = page.evaluate(
        """() => {
            const shown = [...document.querySelectorAll(".tile .name")];
            const ends = (name) => { // the texts of its lines
                const lines = new Map();
                for (const node of name.childNodes) {
                    if (!node.data) continue;
                    const range = document.createRange();
                    range.selectNode(node);
                    const { top } = range.getBoundingClientRect();
                    lines.set(top, (lines.get(top) ?? "") + node.data);
                }
                return [...lines.values()];
            };
            return [
                shown.some((name) => name.scrollWidth > name.clientWidth),
                shown.map(ends),
            ];
        }"""
    )
    assert not cut
    for lines in dots:
        assert len(lines) > 1 and all(line.endswith(".") for line in lines[:-1])
    copied = page.evaluate(
        """() => {
            getSelection().selectAllChildren(document.querySelector(".tile .name"));
            return getSelection().toString();
        }"""
    )
    assert copied == names[0]


def test_a_grid_of_1024_by_256_blocks(show, tmp_path: Path) -> None:
    path = record(tmp_path / "h", {"up": (1024, 256)}, 4)
    page, known = show(path), read_history(path)
    page.evaluate("showFrame(4)")
    box = page.locator("#mask").bounding_box()
    assert (box["width"], box["height"]) == (1024, 256)  # one pixel per block
    assert page.evaluate("document.documentElement.scrollWidth") == 1280
    for row, column in ((0, 0), (517, 101), (1023, 255)):
        point_at(page, (1024, 256), row, column)
        assert text(page, "#readout") == truth(known, "up", 4, row, column)
    page.click("#larger")
    assert page.locator("#mask").bounding_box()["width"] == 2048
    assert page.evaluate("document.documentElement.scrollWidth") == 1280


def test_many_updates_are_merged_and_the_page_says_so(show, tmp_path: Path) -> None:
    path = record(tmp_path / "h", {"a": (4, 4)}, 450)
    page = show(path)
    assert "451 frames were recorded. The animations show 200" in page.inner_text("#still")
    page.evaluate("showFrame(last)")
    assert text(page, "#when") == "step 45,000 · update 450"
    shown = page.evaluate("[...animation().mask]")
    assert shown == read_history(path).layers["a"].mask(-1).reshape(-1).astype(int).tolist()
    point_at(page, (4, 4), 1, 2)
    assert re.search(r"grown at least \d+ times", page.inner_text("#readout"))


@pytest.mark.parametrize(
    ("updates", "options", "says"),
    [
        (0, {}, ["only one frame", "Nothing changed yet", "No metric was recorded"]),
        (3, {"moves": False, "metrics": False}, ["The topology is static", "No block was ever"]),
    ],
)
def test_a_sentence_replaces_empty_axes(
    show, tmp_path: Path, updates: int, options: dict, says: list[str]
) -> None:
    page = show(record(tmp_path / "h", {"a": (3, 3)}, updates, **options))
    words = page.inner_text("main")
    assert all(part in words for part in says), words
    assert page.is_disabled("#play") == (updates == 0)
    assert not page.is_visible(".shelf")
    page.keyboard.press("Space")
    page.keyboard.press("ArrowRight")
    point_at(page, (3, 3), 2, 1)
    assert "from the start" in page.inner_text("#readout")


def test_a_history_cut_by_a_kill(show, tmp_path: Path) -> None:
    path = record(tmp_path / "h", GRIDS, UPDATES)
    size = int(path.stat().st_size * 0.6)
    os.truncate(path, size)
    if not read_history(path).gaps:  # the cut was between two records, where it cannot be seen
        os.truncate(path, size - 1)
    known = read_history(path)
    assert 1 < len(known.frames) <= UPDATES
    page = show(path)
    page.evaluate("showFrame(last)")
    assert text(page, "#when").startswith(f"step {known.frames[-1].step} ")
    where = f"damaged or missing after step {known.gaps[-1].after}."
    assert page.is_visible("#gaps") and where in text(page, "#gaps")


def test_nothing_is_said_of_gaps_where_there_is_none(show, history: Path) -> None:
    assert not show(history).is_visible("#gaps")
