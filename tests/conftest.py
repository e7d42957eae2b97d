"""Fixtures that all tests share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _fixed_state() -> Iterator[None]:
    """Each test begins with the same random state, and may set the number of threads."""
    torch.manual_seed(0)
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)
