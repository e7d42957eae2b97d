"""Pictures: grids of images, attention maps, curves; PNG files, written whole or not at all."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from leedl_fast.files import write_file

MAX_HEADS = 8  # of a layer, and layers, in one picture of maps
CELL = 96  # pixels of the longer side of an image in a grid: small images are enlarged about so


def grid_sizes(height: int, width: int) -> tuple[int, int]:
    """How many times as large an image of a grid is drawn, and the pixels of the line after it."""
    scale = max(1, round(CELL / max(height, width)))
    return scale, max(2, scale // 3)


def write_grid(images: Tensor, path: str | Path, *, columns: int) -> None:
    """Images (num_images, 1 or 3, height, width) in [0, 1], row by row, with a grey line between
    them; see `grid_sizes`.
    """
    from PIL import Image

    if images.dim() != 4 or images.shape[0] == 0 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"images must have shape (num_images >= 1, 1 or 3, height, width), "
            f"got {tuple(images.shape)}"
        )
    rows = math.ceil(len(images) / columns)
    images = images.detach().cpu().float().clamp(0, 1)
    scale, line = grid_sizes(*images.shape[2:])
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    images = F.pad(images, (0, line, 0, line), value=0.5)
    _, channels, height, width = images.shape
    grid = torch.ones(rows * columns, channels, height, width)
    grid[: len(images)] = images
    grid = grid.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4)
    pixels = (grid.reshape(channels, rows * height, columns * width) * 255).round().byte()
    array = pixels.permute(1, 2, 0).numpy()
    picture = Image.fromarray(array[:, :, 0] if channels == 1 else array)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    write_file(buffer.getvalue(), path)


def write_maps(maps: Mapping[str, Tensor], path: str | Path) -> None:
    """Attention weights (batch, num_heads, seqlen_q, seqlen_k) by layer; those of the first sample,
    a row of heads per layer. Each head's colours reach from 0 to its largest weight.
    """
    from matplotlib.ticker import MaxNLocator

    if not maps:
        raise ValueError("attention maps must be of a model with attention, got none")
    names = list(maps)[:MAX_HEADS]
    columns = max(min(maps[name].shape[1], MAX_HEADS) for name in names)
    figure = _figure(2.2 * columns + 0.6, 2.4 * len(names))
    axes = figure.subplots(len(names), columns, squeeze=False)
    for row, name in zip(axes, names, strict=True):
        weights = maps[name][0].detach().float().cpu().numpy()
        for head, axis in enumerate(row):
            axis.set_visible(head < len(weights))
            if head < len(weights):
                axis.imshow(weights[head], cmap="viridis", aspect="auto", vmin=0)
                axis.set_title(f"head {head}, up to {weights[head].max():.2g}", fontsize=7)
                axis.tick_params(labelsize=5)
                for side in (axis.xaxis, axis.yaxis):
                    side.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        row[0].set_ylabel(f"{name}\nquery", fontsize=6)
    for axis in axes[-1]:
        axis.set_xlabel("key", fontsize=6)
    _write(figure, path)


def write_curves(curves: Mapping[str, Sequence[float]], path: str | Path, title: str) -> None:
    """Losses by step, a line for each name; later lines are drawn thinner, over the earlier."""
    figure = _figure(7, 4)
    axis = figure.subplots()
    for number, (name, values) in enumerate(curves.items()):
        width = 3.0 / (1 + number)
        axis.plot(range(1, len(values) + 1), values, label=name, linewidth=width)
    axis.set_xlabel("step")
    axis.set_ylabel("loss")
    axis.set_title(title, fontsize=9)
    axis.legend()
    _write(figure, path)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # without pyplot there is no display to open

    return Figure(figsize=(width, height), layout="constrained")


def _write(figure: Any, path: str | Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_file(buffer.getvalue(), path)
