"""Pictures are read back: their sizes and their pixels."""

import errno
import os

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from leedl_fast import files
from leedl_fast.training.pictures import grid_sizes, write_curves, write_grid, write_maps


def read(path):
    with Image.open(path) as file:
        return np.array(file)


def test_a_grid_is_the_images_row_by_row(tmp_path):
    images = torch.rand(3, 1, 16, 32)
    write_grid(images, tmp_path / "grid.png", columns=2)
    pixels = read(tmp_path / "grid.png")
    # Three times as large, for 96 pixels on the longer side, and a line of two pixels.
    assert pixels.shape == (2 * 50, 2 * 98)
    bytes_of = (images * 255).round().byte().numpy()[:, 0]
    for number, image in enumerate(bytes_of):
        top, left = 50 * (number // 2), 98 * (number % 2)
        cell = pixels[top : top + 48, left : left + 96]
        assert np.array_equal(cell, image.repeat(3, 0).repeat(3, 1))
        assert (pixels[top + 48 : top + 50, left : left + 98] == 128).all()  # the line below
        assert (pixels[top : top + 50, left + 96 : left + 98] == 128).all()  # the one on the right
    assert (pixels[50:, 98:] == 255).all()  # no fourth image


@pytest.mark.parametrize(
    ("size", "sizes"),
    [((8, 8), (12, 4)), ((28, 28), (3, 2)), ((64, 48), (2, 2)), ((500, 300), (1, 2))],
)
def test_small_images_are_enlarged(size, sizes):
    assert grid_sizes(*size) == sizes


def test_a_grid_in_colours_and_values_beyond_white(tmp_path):
    images = torch.tensor([1.5, 0.2, -1.0]).view(1, 3, 1, 1).expand(1, 3, 96, 96)
    write_grid(images, tmp_path / "grid.png", columns=1)
    pixels = read(tmp_path / "grid.png")
    assert pixels.shape == (98, 98, 3)
    assert (pixels[:96, :96] == [255, 51, 0]).all()
    assert (pixels[96:] == 128).all()


@pytest.mark.parametrize("shape", [(0, 1, 2, 2), (1, 2, 2, 2), (2, 2)])
def test_what_is_no_set_of_images(tmp_path, shape):
    with pytest.raises(ValueError, match=r"images must have shape \(num_images >= 1, 1 or 3"):
        write_grid(torch.zeros(shape), tmp_path / "grid.png", columns=1)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_picture(tmp_path, monkeypatch):
    write_grid(torch.zeros(1, 1, 2, 2), tmp_path / "grid.png", columns=1)
    before = (tmp_path / "grid.png").read_bytes()

    def full_disk(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_grid(torch.ones(1, 1, 2, 2), tmp_path / "grid.png", columns=1)
    assert (tmp_path / "grid.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


def test_a_folder_that_is_none(tmp_path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "grid.png"
    with pytest.raises(OSError, match=f"Not a directory: '{path}'"):
        write_grid(torch.ones(1, 1, 2, 2), path, columns=1)


def colours(pixels):
    return set(map(tuple, pixels.reshape(-1, pixels.shape[-1])[:, :3].tolist()))


def test_maps_show_the_weights_of_the_first_sample(tmp_path):
    """Viridis: 0 is its first colour, the largest weight its last."""
    diagonal = torch.eye(4).expand(2, 3, 4, 4).clone()
    diagonal[1] = 0.5
    write_maps({"layer1": diagonal, "layer2": diagonal[:, :2]}, tmp_path / "maps.png")
    pixels = read(tmp_path / "maps.png")
    # 150 dots per inch: three heads of 2.2 inches and the names, two layers of 2.4 inches.
    assert pixels.shape[:2] == (720, 1080)
    low, high = (
        (pixels[..., :3] == matplotlib.colormaps["viridis"](value, bytes=True)[:3]).all(-1)
        for value in (0.0, 1.0)
    )
    assert low.sum() == pytest.approx(3 * high.sum(), rel=0.1)
    third_head = slice(1080 * 2 // 3 + 40, None)
    assert high[:360, third_head].any()
    assert not high[360:, third_head].any()  # the second layer has none


def test_maps_of_no_attention(tmp_path):
    with pytest.raises(ValueError, match="attention maps must be of a model with attention"):
        write_maps({}, tmp_path / "maps.png")


def test_curves(tmp_path):
    write_curves({"eager": [3.0, 2.0, 1.0]}, tmp_path / "one.png", "losses")
    write_curves({"eager": [3.0, 2.0, 1.0], "cpu": [3.0, 2.5, 2.0]}, tmp_path / "two.png", "losses")
    one, two = (read(tmp_path / name) for name in ("one.png", "two.png"))
    assert one.shape[:2] == two.shape[:2] == (600, 1050)
    first, second = (
        tuple(round(255 * part) for part in matplotlib.colors.to_rgb(name)) for name in ("C0", "C1")
    )
    assert first in colours(one)
    assert second not in colours(one)
    assert {first, second} <= colours(two)
