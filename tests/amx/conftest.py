"""What the files share that test AMX in processes of their own."""

from collections.abc import Iterator
from types import ModuleType

import pytest
from libraries import emulator, processor_has_amx

from leedl_fast.backends import cpu_modules


@pytest.fixture(scope="module")
def module() -> Iterator[ModuleType]:
    """The module for AVX-512, with its products on AMX."""
    module = cpu_modules.modules()["avx512"]
    if not processor_has_amx():
        emulator()
        module.use_amx(True)
    with cpu_modules.use_isa("avx512"):
        yield module
