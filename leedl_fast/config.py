"""The environment variables that leedl_fast reads, all of them.

LEEDL_FAST_CPU      the CPU module to use: "avx512", "avx2" or "baseline"; by default the best that
                    this processor runs.
LEEDL_FAST_BACKEND  what `use_backend` would set for the whole process; unset,
                    each op picks its own.
"""

import os

CPU_ISA: str | None = os.environ.get("LEEDL_FAST_CPU") or None
BACKEND: str | None = os.environ.get("LEEDL_FAST_BACKEND") or None
