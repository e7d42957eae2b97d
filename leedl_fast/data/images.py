"""Images: handwritten digits, and the user's own folders."""

from __future__ import annotations

import gzip
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from leedl_fast.data.fetch import fetched_files
from leedl_fast.data.text import digest


@dataclass(frozen=True)
class Images:
    """images: (num_images, channels, height, width) float32 in [0, 1]. labels: int64
    (num_images,), an index into label_names; None where there are none.
    """

    images: Tensor
    labels: Tensor | None
    label_names: list[str]
    digest: str


def _digits(images: Tensor, labels: Tensor) -> Images:
    names = [str(digit) for digit in range(10)]
    return Images(images, labels, names, digest(images, labels))


def load_digits() -> Images:
    """scikit-learn's digits: 1,797 of 8 x 8, in no order. Installed, nothing is fetched."""
    try:
        from sklearn.datasets import load_digits as load
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the digits need scikit-learn: pip install 'leedl_fast[models]' ({error})"
        ) from error
    pixels, labels = load(return_X_y=True)
    images = torch.from_numpy(pixels / 16).to(torch.float32).reshape(-1, 1, 8, 8)
    return _digits(images, torch.from_numpy(labels).to(torch.int64))


def load_mnist() -> Images:
    """The data set "mnist": 5,000 of 28 x 28, sorted by digit."""
    (file,) = fetched_files("mnist").values()
    text = io.StringIO(gzip.decompress(file.read_bytes()).decode("ascii"))
    table = torch.from_numpy(np.loadtxt(text, dtype=np.uint8, delimiter=","))
    images = table[:, :-1].to(torch.float32).div(255).reshape(-1, 1, 28, 28)
    return _digits(images, table[:, -1].to(torch.int64))


SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")


def load_image_folder(
    path: str | Path, *, size: int | None = None, channels: int = 1, at_least: int = 2
) -> Images:
    """The images of a folder; those of its subfolders, with the subfolders' names as labels.

    Args:
        path: the folder.
        size: height and width to which each image is cut (in the middle) and scaled; None means
            that all images have one size already.
        channels: 1 for grey, 3 for colours.
        at_least: how many images there must be; 2 to train on some and to hold out others.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"data must be a folder of images, got {str(path)!r}, which is none")
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    if len(files) < at_least:
        raise ValueError(
            f"data must be a folder with at least {at_least} images, got {len(files)} in "
            f"{str(path)!r}"
        )
    is_loose = [file.parent == path for file in files]
    if any(is_loose) and not all(is_loose):
        raise ValueError(
            f"data must be images in a folder or in its subfolders, got both in {str(path)!r}"
        )
    images = [_read_image(file, size, channels) for file in files]
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise ValueError(
            f"data must be images of one size unless a size is given, got (channels, height, "
            f"width) {sorted(shapes)[:3]} in {str(path)!r}"
        )
    stacked = torch.stack(images)
    if all(is_loose):
        return Images(stacked, None, [], digest(stacked))
    parents = [file.relative_to(path).parts[0] for file in files]
    names = sorted(set(parents))
    labels = torch.tensor([names.index(parent) for parent in parents])
    return Images(stacked, labels, names, digest(stacked, labels))


def _read_image(path: Path, size: int | None, channels: int) -> Tensor:
    """(channels, height, width) float32 in [0, 1]."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            if file.mode.startswith(("I", "F")):  # which a conversion to bytes would cut off
                raise ValueError(f"channels must have 8 bits, got the mode {file.mode!r}")
            image = file.convert("L" if channels == 1 else "RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"data must be images, got {str(path)!r}: {error}") from None
    if size is not None:
        image = ImageOps.fit(image, (size, size))
    pixels = torch.from_numpy(np.array(image)).to(torch.float32).div(255)
    return pixels.unsqueeze(0) if channels == 1 else pixels.permute(2, 0, 1).contiguous()
