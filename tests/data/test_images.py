"""The user's own folders of images, and MNIST's file."""

import gzip

import numpy as np
import pytest
import torch
from PIL import Image

from leedl_fast.data import images as images_module
from leedl_fast.data.images import load_digits, load_image_folder, load_mnist


def write(path, value=0, size=(4, 4), mode="L"):
    """One picture of one value; size is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


def test_pixels_are_shares_of_white(tmp_path):
    pixels = np.array([[0, 51, 102], [153, 204, 255]], dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    write(tmp_path / "b.png", 255, (3, 2))
    images = load_image_folder(tmp_path)
    assert images.images.dtype == torch.float32
    expected = torch.tensor([[[[0.0, 0.2, 0.4], [0.6, 0.8, 1.0]]], [[[1.0] * 3] * 2]])
    torch.testing.assert_close(images.images, expected)
    assert images.labels is None
    assert images.label_names == []


def test_colours(tmp_path):
    write(tmp_path / "a.png", (255, 0, 51), mode="RGB")
    write(tmp_path / "b.png", (0, 255, 0), mode="RGB")
    colours = load_image_folder(tmp_path, channels=3).images
    assert colours.shape == (2, 3, 4, 4)
    torch.testing.assert_close(colours[:, :, 0, 0], torch.tensor([[1, 0, 0.2], [0, 1, 0]]))
    assert load_image_folder(tmp_path).images.shape == (2, 1, 4, 4)


def test_subfolders_are_labels(tmp_path):
    for number, name in enumerate(("dog/deep/1.png", "cat/2.PNG", "dog/3.bmp")):
        write(tmp_path / name, number)
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    images = load_image_folder(tmp_path)
    assert images.label_names == ["cat", "dog"]
    assert images.labels.tolist() == [0, 1, 1]
    assert (images.images[:, 0, 0, 0] * 255).round().tolist() == [1, 2, 0]


def test_mixed_sizes_need_a_size(tmp_path):
    write(tmp_path / "wide.png", 0, (8, 4))
    write(tmp_path / "high.png", 255, (4, 6))
    message = r"images of one size unless .* got \(channels, height, width\) \[\(1, 4, 8\), \(1, 6"
    with pytest.raises(ValueError, match=message):
        load_image_folder(tmp_path)
    images = load_image_folder(tmp_path, size=4).images
    assert images.shape == (2, 1, 4, 4)
    assert images.flatten(1).mean(1).tolist() == [1.0, 0.0]  # in the order of the names


def test_the_middle_is_kept(tmp_path):
    """Of a wide picture, black at both ends."""
    pixels = np.zeros((4, 12), dtype=np.uint8)
    pixels[:, 4:8] = 255
    for name in ("a.png", "b.png"):
        Image.fromarray(pixels).save(tmp_path / name)
    assert (load_image_folder(tmp_path, size=4).images == 1).all()


def test_folders_that_are_none(tmp_path):
    empty, one = tmp_path / "empty", tmp_path / "one"
    empty.mkdir()
    write(one / "only.png")
    for path, message in (
        (tmp_path / "nowhere", "data must be a folder of images, got .*nowhere', which is none"),
        (one / "only.png", "data must be a folder of images, got .*only.png', which is none"),
        (empty, "at least 2 images, got 0"),
        (one, "at least 2 images, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            load_image_folder(path)


@pytest.mark.parametrize("kind", ["text", "truncated", "empty", "16 bits"])
def test_a_broken_image_is_named(tmp_path, kind):
    noise = np.random.default_rng(0).integers(256, size=(40, 40), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    bad = tmp_path / "bad.png"
    if kind == "16 bits":
        Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)).save(bad)
    else:
        whole = (tmp_path / "a.png").read_bytes()
        bad.write_bytes(
            {"text": b"no picture", "truncated": whole[: len(whole) // 2], "empty": b""}[kind]
        )
    message = r"data must be images, got .*bad\.png'"
    if kind == "16 bits":
        message += ": channels must have 8 bits, got the mode 'I;16'"
    with pytest.raises(ValueError, match=message):
        load_image_folder(tmp_path, size=4)


def test_images_beside_subfolders_are_refused(tmp_path):
    write(tmp_path / "loose.png")
    write(tmp_path / "cat" / "a.png")
    with pytest.raises(ValueError, match="in a folder or in its subfolders, got both in"):
        load_image_folder(tmp_path)


def test_channels_are_1_or_3(tmp_path):
    with pytest.raises(ValueError, match="channels must be 1 or 3, got 2"):
        load_image_folder(tmp_path, channels=2)


def test_the_digest_follows_pixels_and_labels(tmp_path):
    for folder, value, name in (("a", 9, "x"), ("same", 9, "x"), ("value", 8, "x"), ("b", 9, "y")):
        write(tmp_path / folder / "x" / "1.png", value)
        write(tmp_path / folder / name / "2.png", 5)
    names = ("a", "same", "value", "b")
    digests = [load_image_folder(tmp_path / name).digest for name in names]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_digits_are_the_ones_of_scikit_learn():
    digits = load_digits()
    assert digits.images.shape == (1797, 1, 8, 8)
    assert digits.images.min() == 0
    assert digits.images.max() == 1
    assert digits.labels[:10].tolist() == list(range(10))


def test_mnist_is_read_row_by_row(tmp_path, monkeypatch):
    rows = np.zeros((3, 785), dtype=np.uint8)
    rows[:, -1] = [7, 0, 9]
    rows[1, 29] = 255  # second row, second column
    text = "\n".join(",".join(map(str, row)) for row in rows)
    file = tmp_path / "mnist.csv.gz"
    file.write_bytes(gzip.compress(text.encode()))
    monkeypatch.setattr(images_module, "fetched_files", lambda name: {name: file})
    mnist = load_mnist()
    assert mnist.labels.tolist() == [7, 0, 9]
    assert mnist.images.shape == (3, 1, 28, 28)
    assert mnist.images.nonzero().tolist() == [[1, 0, 1, 1]]
    assert mnist.images.max() == 1
