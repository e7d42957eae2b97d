"""What the tasks on images share: the digits or the user's folder, and sample pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leedl_fast.data.images import Images, load_digits, load_image_folder
from leedl_fast.data.split import split_indices
from leedl_fast.training.settings import Settings


@dataclass(frozen=True)
class ImageSettings(Settings):
    """size: height and width to which the user's own images are scaled."""

    size: int = 16
    weight_decay: float = 0.01
    batch_size: int = 64
    validate_every: int = 250
    checkpoint_every: int = 250

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")


def load_images(settings: ImageSettings) -> Images:
    """The digits, or the grey images of the folder settings.data."""
    if settings.data is None:
        return load_digits()
    return load_image_folder(settings.data, size=settings.size)


def describe_images(images: Images) -> dict[str, Any]:
    return {"image_size": images.images.shape[-1], "label_names": images.label_names}


def split_images(images: Images, seed: int) -> tuple[Images, Images]:
    """Four fifths to train on, one fifth held out."""
    return tuple(  # type: ignore[return-value]
        Images(
            images.images[indices],
            None if images.labels is None else images.labels[indices],
            images.label_names,
            images.digest,
        )
        for indices in split_indices(len(images.images), held_out=0.2, seed=seed)
    )


def picture_path(output: Path | None, name: str) -> Path:
    """In the folder `output`, which is created."""
    if output is None:
        raise ValueError("output must be a folder for the pictures, got None")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"output must be a folder for the pictures, got {str(output)!r}: {error}"
        ) from None
    return output / name
