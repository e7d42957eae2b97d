"""Checkpoint files: written whole or not at all, read without running code from them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from leedl_fast.files import write_file

KEY = "leedl_fast"  # where a checkpoint says which model it holds, and how that was trained
FORMAT = 3


def write_checkpoint(checkpoint: dict[str, Any], path: str | Path) -> None:
    """As write_file does: a full disk leaves the old checkpoint."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_file(buffer.getbuffer(), path)


def read_checkpoint(path: str | Path, model: str) -> dict[str, Any]:
    """The checkpoint at `path`, which must be one of `model` (a name, such as "gpt")."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint must be a file, got {str(path)!r}, which is no file")
    content = path.read_bytes()
    try:
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no type of its own for a broken file
        raise ValueError(
            f"checkpoint must be a whole file written by training, got {str(path)!r} of "
            f"{len(content)} bytes, which is truncated or something else"
        ) from error
    about = checkpoint.get(KEY) if isinstance(checkpoint, dict) else None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ValueError(
            f"checkpoint must be one of format {FORMAT} written by leedl_fast, got {str(path)!r}"
        )
    if about.get("model") != model:
        raise ValueError(f"checkpoint must hold a {model} model, got one of {about.get('model')}")
    return checkpoint
