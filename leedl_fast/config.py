"""The environment variables that leedl_fast reads, all of them.

LEEDL_FAST_CPU      the CPU module to use: "avx512", "avx2" or "baseline"; by default the best that
                    this processor runs.
LEEDL_FAST_BACKEND  what `use_backend` would set for the whole process; unset,
                    each op picks its own.
XDG_CACHE_HOME      where the user's programs keep what they can fetch or measure again; by default
                    ~/.cache.
"""

import os
from pathlib import Path

CPU_ISA: str | None = os.environ.get("LEEDL_FAST_CPU") or None
BACKEND: str | None = os.environ.get("LEEDL_FAST_BACKEND") or None


def cache_folder() -> Path:
    """The folder of leedl_fast in the user's cache; it need not exist yet."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    parent = Path(home) if os.path.isabs(home) else Path.home() / ".cache"
    return parent / "leedl_fast"
