"""Starts the interpreted tests beside the compilations: each keeps one core busy for a minute.
Options for benchmarks/gpu.sh, which must learn what each test said even if its process dies.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
import torch

from leedl_fast.testing.bench import is_lost

INTERPRETED = [
    str(Path(__file__).with_name(name)) for name in ("interpreted.py", "interpreted_tiles.py")
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", metavar="I/N", help="run every N-th test, from the I-th (of 0) on")
    parser.addoption(
        "--outcomes",
        metavar="FILE",
        help="a line of JSON for each test as it begins and as it ends; none in it is run again",
    )
    parser.addoption(
        "--deadline",
        metavar="SECONDS",
        type=float,
        help="of Unix time, from which on no test begins",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Processes side by side compile what one alone would compile for half an hour."""
    shard = config.getoption("--shard", None)
    if shard:
        index, count = map(int, shard.split("/"))
        items[:] = items[index::count]
    path = config.getoption("--outcomes", None)
    if path and Path(path).exists():
        begun = {json.loads(line)["test"] for line in Path(path).read_text().splitlines()}
        items[:] = [item for item in items if item.nodeid not in begun]


def pytest_runtest_setup(item: pytest.Item) -> None:
    deadline = item.config.getoption("--deadline", None)
    if deadline is not None and time.time() >= deadline:
        pytest.skip("out of time")
    _note(item, outcome="began")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" or not report.passed:
        said = "" if report.passed else report.longreprtext[-2000:]
        _note(item, outcome=report.outcome, seconds=round(report.duration, 2), said=said)
    if report.failed and torch.cuda.is_initialized() and is_lost(torch.device("cuda")):
        item.session.shouldstop = "the GPU is lost to this process"
    return report


def _note(item: pytest.Item, **what: object) -> None:
    path = item.config.getoption("--outcomes", None)
    if path:
        with open(path, "a") as file:
            file.write(json.dumps({"test": item.nodeid, **what}) + "\n")


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
