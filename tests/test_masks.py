"""Images and text show every block, or the density of blocks that share a pixel or a letter."""

from __future__ import annotations

import base64
import io
import re
import sys

import numpy as np
import pytest

from sparse_lightning.masks import COLOURS, MaskGallery, mask_image, mask_text

ABSENT, DROPPED, GROWN, KEPT = (
    tuple(bytes.fromhex(COLOURS["light"][state][1:]))
    for state in ("absent", "dropped", "grown", "kept")
)


def coloured(mask: np.ndarray) -> np.ndarray:
    return np.where(mask[..., None], KEPT, ABSENT)


def test_a_small_mask_is_enlarged_by_a_whole_factor() -> None:
    mask = np.array([[1, 1, 0], [0, 0, 1]], bool)
    image = mask_image(mask)
    assert image.shape == (2 * 170, 3 * 170, 3) and image.dtype == np.uint8
    assert (image == coloured(mask).repeat(170, 0).repeat(170, 1)).all()


def test_blocks_that_stayed_came_and_went_have_the_colours_of_the_page() -> None:
    before, after = np.array([[0, 1, 0, 1]], bool), np.array([[0, 0, 1, 1]], bool)
    image = mask_image(after, before)[0, ::128]
    assert [tuple(pixel) for pixel in image.tolist()] == [ABSENT, DROPPED, GROWN, KEPT]
    assert len({ABSENT, DROPPED, GROWN, KEPT}) == 4


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_the_image_of_a_large_layer(block_size: int) -> None:
    mask = np.random.default_rng(0).random((16384 // block_size, 4096 // block_size)) < 0.25
    image = mask_image(mask)
    assert 512 <= image.shape[0] <= 1024 and image.shape[0] == 4 * image.shape[1]
    scale = image.shape[0] // mask.shape[0]
    assert (image[::scale, ::scale] == coloured(mask)).all(), "all blocks are distinguishable"


def test_a_mask_that_is_too_large_is_averaged() -> None:
    mask = np.zeros((2050, 4), bool)  # 683 rows of 3 x 3 squares, and one of height 1
    mask[:3, 0] = mask[2049, 3] = True
    image = mask_image(mask)
    assert image.shape == (684, 2, 3)
    third = [round(absent + (kept - absent) / 3) for absent, kept in zip(ABSENT, KEPT, strict=True)]
    assert image[0].tolist() == [third, list(ABSENT)]
    assert image[683].tolist() == [list(ABSENT), list(KEPT)] and (image[1:683] == ABSENT).all()


def test_text_of_a_large_mask_has_shades() -> None:
    mask = np.zeros((8, 400), dtype=bool)
    mask[:, :200] = True
    mask[0, 200] = True
    lines = mask_text(mask, columns=100).splitlines()
    assert lines == ["█" * 50 + "░"]


def test_a_gallery_shows_pictures_in_a_notebook_and_text_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image = pytest.importorskip("PIL.Image")
    masks = {"up<0>": np.eye(4, dtype=bool), "down": np.ones((1, 3), dtype=bool)}
    gallery = MaskGallery(masks)
    assert str(gallery) == repr(gallery)
    assert str(gallery).splitlines() == [
        "up<0>: 4 of 4x4 blocks, density 0.250",
        "▀▄",
        "  ▀▄",
        "",
        "down: 3 of 1x3 blocks, density 1.000",
        "▀▀▀",
    ]
    page = gallery._repr_html_()
    assert "up&lt;0&gt;: 4 of 4x4" in page and "up<0>" not in page
    sources = re.findall(r"base64,([^\"]+)", page)
    for source, mask in zip(sources, masks.values(), strict=True):
        picture = image.open(io.BytesIO(base64.b64decode(source)))
        np.testing.assert_array_equal(np.asarray(picture), mask_image(mask))
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert gallery._repr_html_().startswith("<pre>up&lt;0&gt;: 4 of")


def test_a_gallery_of_many_layers_shows_a_few_and_names_another() -> None:
    pytest.importorskip("PIL.Image")
    masks = {f"blocks.{i}.up": np.eye(2, dtype=bool) for i in range(48)}
    gallery = MaskGallery(masks)
    page = gallery._repr_html_()
    for shown in (str(gallery), page):
        assert re.findall(r"blocks\.(\d+)\.up:", shown) == ["0", "16", "31", "47"]
        assert "4 of 48 layers" in shown
    assert "show(layers=['blocks.1.up'])" in str(gallery)
    chosen = MaskGallery(masks, limit=48)
    assert str(chosen).count("blocks.") == chosen._repr_html_().count("<img") == 48
