"""Starts the interpreted tests beside the compilations: each keeps one core busy for a minute."""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

INTERPRETED = [
    str(Path(__file__).with_name(name)) for name in ("interpreted.py", "interpreted_tiles.py")
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", metavar="I/N", help="run every N-th test, from the I-th (of 0) on")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Processes side by side compile what one alone would compile for half an hour."""
    shard = config.getoption("--shard", None)
    if shard:
        index, count = map(int, shard.split("/"))
        items[:] = items[index::count]


@pytest.fixture(scope="session", autouse=True)
def interpreted_tests(request: pytest.FixtureRequest) -> Iterator[Callable[[], tuple[int, str]]]:
    """Waits for `interpreted*.py`, which run in a process of their own, since whether a kernel is
    interpreted is decided when it is defined; returns its exit code and output.
    """
    if not any(item.path.stem == "test_interpreter" for item in request.session.items):
        yield lambda: pytest.fail("the interpreted tests were not started")
        return
    command = [sys.executable, "-m", "pytest", "--quiet", "--no-header", "-p", "no:cacheprovider"]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([*command, *INTERPRETED], stdout=output, stderr=output)

        def wait() -> tuple[int, str]:
            code = process.wait()
            output.seek(0)
            return code, output.read()

        yield wait
        process.kill()
        process.wait()
