"""Images and text show every block, or the density of blocks that share a pixel or a letter."""

from __future__ import annotations

import base64
import io
import re
import sys

import numpy as np
import pytest

from sparse_lightning.masks import MaskGallery, mask_image, mask_text


def test_a_small_mask_is_enlarged_by_a_whole_factor() -> None:
    mask = np.array([[1, 1, 0], [0, 0, 1]], bool)
    image = mask_image(mask)
    assert image.shape == (2 * 170, 3 * 170) and image.dtype == np.uint8
    assert (image == np.kron(np.where(mask, 32, 224), np.ones((170, 170)))).all()


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_the_image_of_a_large_layer(block_size: int) -> None:
    mask = np.random.default_rng(0).random((16384 // block_size, 4096 // block_size)) < 0.25
    image = mask_image(mask)
    assert 512 <= image.shape[0] <= 1024 and image.shape[0] == 4 * image.shape[1]
    scale = image.shape[0] // mask.shape[0]
    assert (image[::scale, ::scale] == np.where(mask, 32, 224)).all(), (
        "all blocks are distinguishable"
    )


def test_a_mask_that_is_too_large_is_averaged() -> None:
    mask = np.zeros((2050, 4), bool)  # 683 rows of 3 x 3 squares, and one of height 1
    mask[:3, 0] = mask[2049, 3] = True
    image = mask_image(mask)
    assert image.shape == (684, 2)
    assert image[0].tolist() == [round(224 - 192 * 3 / (3 * 3)), 224]
    assert image[683].tolist() == [224, 32] and (image[1:683] == 224).all()


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
