"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def write_file(content: bytes | memoryview, path: str | Path) -> None:
    """Under a temporary name first: killed at any time, `path` is the old file or the new one.

    Raises:
        OSError: it cannot be written, with `path` in its text; the old file is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):  # the folder is none, and then there is no such file
            temporary.unlink(missing_ok=True)
