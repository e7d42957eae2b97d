"""The conformance of the Triton kernels; the tests themselves are in `interpreted.py`."""

from collections.abc import Callable

import pytest


@pytest.mark.timeout(1500)  # they take minutes, and wait for the compilations beside them
def test_interpreted_kernels(interpreted_tests: Callable[[], tuple[int, str]]) -> None:
    code, output = interpreted_tests()
    assert code == 0, output[-8000:]
    assert " passed" in output
