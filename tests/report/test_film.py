"""`sparse-lightning report --film`: what pictures show, and error messages."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from sparse_lightning.cli import main
from sparse_lightning.history import HistoryWriter, read_history
from sparse_lightning.masks import COLOURS
from sparse_lightning.report.film import write_film

Image = pytest.importorskip("PIL.Image")
COLOUR = {state: tuple(bytes.fromhex(hex[1:])) for state, hex in COLOURS["light"].items()}


def record(path: Path, names: list[str], grid: tuple[int, int], updates: int) -> Path:
    generator = np.random.default_rng(0)
    now = {name: generator.random(grid) < 0.5 for name in names}
    writer = HistoryWriter(path)
    writer.start(0, now, dict.fromkeys(names, 16), {})
    for number in range(1, updates + 1):
        now = {name: mask ^ (generator.random(grid) < 0.2) for name, mask in now.items()}
        writer.update(10 * number, number, now)
    return path


def expected(now: np.ndarray, before: np.ndarray) -> list[list[str]]:
    names = {(0, 0): "absent", (0, 1): "dropped", (1, 0): "grown", (1, 1): "kept"}
    return [
        [names[int(a), int(b)] for a, b in zip(*rows, strict=True)]
        for rows in zip(now, before, strict=True)
    ]


def states(image: object, x: int, y: int, side: int, grid: tuple[int, int]) -> list[list[str]]:
    """The states of a mask's blocks, read in the middle of each block of `side` pixels."""
    known = {colour: state for state, colour in COLOUR.items()}
    return [
        [known[image.getpixel((x + int((c + 0.5) * side), y + int((r + 0.5) * side)))]
         for c in range(grid[1])]
        for r in range(grid[0])
    ]  # fmt: skip


def test_a_strip_shows_masks_and_what_changed_since_the_previous_column(tmp_path: Path) -> None:
    path = record(tmp_path / "pattern.history", ["fc"], (4, 8), 3)
    assert main(["report", str(tmp_path), "--film", str(tmp_path / "masks.png")]) == 0
    layer = read_history(path).layers["fc"]
    image = Image.open(tmp_path / "masks.png").convert("RGB")
    assert image.width == 20 + 4 * (320 + 20)
    for column in range(4):
        now, before = layer.mask(column), layer.mask(max(0, column - 1))
        shown = states(image, 20 + column * 340, 20 + 2 * 26, 40, (4, 8))
        assert shown == expected(now, before)


def test_an_animation_shows_every_update_of_a_tall_layer_transposed(tmp_path: Path, capsys) -> None:
    path = record(tmp_path / "pattern.history", ["up"], (8, 4), 5)
    output = tmp_path / "mask.gif"
    assert main(["report", str(path), "--film", str(output)]) == 0
    said = f"Wrote {output}: 1 layer, 5 updates, steps 0 to 50,"
    assert said in capsys.readouterr().out
    assert not (tmp_path / "report.html").exists(), "a film replaces the page"
    layer, image = read_history(path).layers["up"], Image.open(output)
    assert image.n_frames == 6 and image.info["loop"] == 0
    durations = []
    for frame in range(6):
        image.seek(frame)
        durations.append(image.info["duration"])
        now, before = layer.mask(frame).T, layer.mask(max(0, frame - 1)).T
        assert states(image.convert("RGB"), 20, 20 + 2 * 26, 70, (4, 8)) == expected(now, before)
    assert durations[0] < durations[-1], "the end stays in view"


def test_a_mask_with_more_blocks_than_pixels_is_averaged(tmp_path: Path) -> None:
    mask = np.zeros((640, 640), bool)
    mask[::2] = True  # in the picture, each pixel covers two blocks that are present and two absent
    HistoryWriter(tmp_path / "h").start(0, {"fc": mask}, {"fc": 16}, {})
    write_film(tmp_path / "h", tmp_path / "x.png")
    pixel = Image.open(tmp_path / "x.png").convert("RGB").getpixel((100, 200))
    mean = (np.array(COLOUR["kept"]) + np.array(COLOUR["absent"])) / 2
    assert np.abs(pixel - mean).max() <= 1


def test_long_trainings_and_layers_of_every_shape(tmp_path: Path) -> None:
    names = [f"base_model.model.decoder.layers.{i}.self_attn.q_proj" for i in range(30)]
    path = record(tmp_path / "h", names, (3, 2), 300)
    drawn = write_film(path, tmp_path / "x.png")
    assert drawn["layers"] == [names[i] for i in (0, 10, 19, 29)]
    assert (drawn["updates"], drawn["steps"]) == (300, [0, 3000])
    write_film(path, tmp_path / "x.gif", names[3:4])
    assert Image.open(tmp_path / "x.gif").n_frames <= 200
    for grid in ((1, 1), (1, 2000), (2000, 1)):
        path = record(tmp_path / f"{grid}", ["a", "b"], grid, 0)
        write_film(path, tmp_path / "x.png", ["b"])
        write_film(path, tmp_path / "x.gif", ["b", "a"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--film", "{tmp}/x.mp4"], ["`--film` must end in .png", ".gif", "x.mp4"]),
        (["--film", "{tmp}/x"], ["`--film` must end in .png", ".gif"]),
        (["--film", "{tmp}/no/x.png"], ["`--film` must be a file", "no/x.png"]),
        (["--film", "{tmp}/x.png", "--layer", "fc1"], ["`--layer` must be", "'fc1'", "fc.1"]),
        (["--layer", "fc.1"], ["`--layer` must come with `--film`"]),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path, capsys, arguments: list[str], says: list[str]
) -> None:
    record(tmp_path / "pattern.history", ["fc.0", "fc.1"], (2, 2), 1)
    given = [part.format(tmp=tmp_path) for part in arguments]
    assert main(["report", str(tmp_path), *given]) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in says) and "Traceback" not in error, error
    assert [path.name for path in tmp_path.iterdir()] == ["pattern.history"]


def test_a_film_and_a_page_are_two_commands(tmp_path: Path, capsys) -> None:
    record(tmp_path / "pattern.history", ["fc"], (2, 2), 1)
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path), "--film", "x.png", "--output", "x.html"])
    assert "not allowed with" in capsys.readouterr().err


def test_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    record(tmp_path / "pattern.history", ["fc"], (2, 2), 1)
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert main(["report", str(tmp_path), "--film", str(tmp_path / "x.gif")]) == 1
    assert "pip install 'sparse-lightning[report]'" in capsys.readouterr().err
    assert not (tmp_path / "x.gif").exists()


def test_a_film_shows_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        record(tmp_path / name / "pattern.history", ["up"], (2, 3), 2)
    assert main(["report", str(tmp_path), "--film", str(tmp_path / "masks.png")]) != 0
    assert "`--film` must have one run; got 2: a, b." in capsys.readouterr().err
